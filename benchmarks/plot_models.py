"""Draws what the benchmarks of whole models measured, from the CSVs in a folder.

python benchmarks/plot_models.py benchmarks/results
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator
from table import PLOTS

Row = dict[str, str]
Bars = dict[str, dict[str, float]]  # a name in the legend: a value for each case
DECODED = {"replay": "mamba2-hf, the captured step", "generate": "mamba2-hf, generate"}


def read(path: Path) -> list[Row]:
    with path.open() as file:
        return list(csv.DictReader(file))


def draw_bars(path: Path, bars: Bars, floors: dict[str, float], label: str, scale: str) -> None:
    """Times of cases, a bar for each way, over a line where the floor is."""
    cases = list(dict.fromkeys(case for values in bars.values() for case in values))
    figure, axes = plt.subplots(figsize=(7, 1 + 0.22 * len(cases) * (1 + len(bars))))
    height = 0.8 / len(bars)
    for index, (name, values) in enumerate(bars.items()):
        places = [cases.index(case) + (index - (len(bars) - 1) / 2) * height for case in values]
        axes.bar_label(
            axes.barh(places, list(values.values()), height, label=name), fmt="{:.3g}", padding=2, fontsize=7
        )
    for case, floor in floors.items():
        middle = cases.index(case)
        axes.plot([floor, floor], [middle - 0.45, middle + 0.45], color="black", label=None if middle else "floor")
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    axes.set(xlabel=label, xscale=scale)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, frameon=False)
    save(figure, path)


def draw_decoding(folder: Path) -> None:
    bars: Bars = {name: {} for name in (*DECODED.values(), "mamba_ssm, generate", "transformers, generate")}
    floors: dict[str, float] = {}
    for row in read(folder / "generate.csv"):
        if not (row["case"].startswith("decode_") and row["what"] in DECODED and row["ms"]):
            continue
        case = row["case"].removeprefix("decode_").replace("_", " ")
        ours = row["impl"] == "mamba2_hf"
        bars[DECODED[row["what"]] if ours else f"{row['impl']}, generate"][case] = float(row["ms"])
        if ours and row["floor_ms"]:
            floors[case] = float(row["floor_ms"])
    draw_bars(PLOTS / "models_decoding.svg", bars, floors, "ms a token of every sequence", "log")


def draw_training(folder: Path) -> None:
    bars: Bars = {}
    floors: dict[str, float] = {}
    for row in read(folder / "training.csv"):
        case = row["case"].replace("_", " ")
        if int(row["batch"]) == int(case.split()[-1].split("x")[0]):  # not a smaller batch, as all that fitted
            bars.setdefault(row["impl"], {})[case] = float(row["ms_p50"])
            floors[case] = float(row["floor_ms"])
    draw_bars(PLOTS / "models_training.svg", bars, floors, "ms of a training step", "linear")


def draw_caches(folder: Path) -> None:
    points: dict[str, list[tuple[int, float]]] = {}
    for row in read(folder / "hybrid.csv"):
        if row["case"].startswith("cache_"):
            _, tokens, kind = row["case"].split("_")
            points.setdefault(kind, []).append((int(tokens), float(row["cache_mib"])))
    figure, axes = plt.subplots(figsize=(6, 4))
    for kind, found in points.items():
        axes.plot(*zip(*found, strict=True), marker="o", label=kind)
    ticks = [tokens for tokens, _ in next(iter(points.values()))]
    axes.set(xlabel="tokens", ylabel="cache of one sequence, MiB", xscale="log", yscale="log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()
    save(figure, PLOTS / "hybrid_cache.svg")


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with generate.csv, training.csv and hybrid.csv")
    folder = parser.parse_args().folder
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "models"}
    draw_decoding(folder)
    draw_training(folder)
    draw_caches(folder)


if __name__ == "__main__":
    main()
