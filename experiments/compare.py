"""Differences that the paper claims, as published and in our runs: signs, sizes, and how far seeds differ.

    python experiments/compare.py

Reads `published.csv`, perplexities as published, and the tables of `language.py` in `results/`; prints a table and
writes it there as `signs.csv` and `signs.md`. Differences are in nats a token, negative where what is named first is
better. The spread is the largest distance between two seeds of either side; a smaller difference has no sign.
"""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

HERE = Path(__file__).parent
TABLES = {"share": "table 2", "block": "table 4", "heads": "table 5", "scaling": "figure 9"}
"""What of the paper an experiment of `language.py` is."""


class Claim(NamedTuple):
    """One row of a published table has a lower loss than another; with ``or_equal``, no higher one."""

    table: str
    better: str
    worse: str
    or_equal: bool = False


CLAIMS = [
    *(Claim("table 2", "1 of 48", "0 of 48"), Claim("table 2", "6 of 48", "0 of 48")),
    *(Claim("table 2", "6 of 48", "24 of 48"), Claim("table 2", "6 of 48", "Transformer++")),
    Claim("table 2", "0 of 48", "Transformer++"),
    *(Claim("table 4", f"{each} with norm", each) for each in ("sequential", "parallel")),
    *(Claim("table 4", f"parallel{norm}", f"sequential{norm}") for norm in ("", " with norm")),
    *(Claim("table 5", "multi-value", each) for each in ("multi-query", "multi-key", "multi-head")),
    *(
        Claim("figure 9", f"Mamba-2, width {width}", f"Transformer++, width {width}", or_equal=True)
        for width in (128, 192, 256, 384)
    ),
]


class Row(NamedTuple):
    """A row of a published table, and which of our runs is like it."""

    nats: float | None
    run: str


def published(table: str) -> dict[str, Row]:
    """Rows of a table of the paper by name; nats a token are the logarithm of the perplexity."""
    with (HERE / "published.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == table]
    return {
        row["row"]: Row(math.log(float(row["perplexity"])) if row["perplexity"] else None, row["run"]) for row in rows
    }


def without_seed(name: str) -> str:
    """The name of a run without its seed."""
    return re.sub(r"-s\d+$", "", name)


def losses(results: Path) -> dict[str, list[float]]:
    """Losses on the test projects of each run of the tables that are there, one for each seed."""
    found: dict[str, list[float]] = defaultdict(list)
    for path in (results / f"{experiment}.csv" for experiment in TABLES):
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    found[without_seed(row["name"])].append(float(row["test"]))
    return found


def judge(claim: Claim, found: dict[str, list[float]]) -> dict[str, Any]:
    """A claim as a line of the table."""
    rows = published(claim.table)
    better, worse = rows[claim.better], rows[claim.worse]
    ours, others = found.get(better.run, []), found.get(worse.run, [])
    line: dict[str, Any] = {
        "source": claim.table,
        "claim": f"{claim.better} {'≤' if claim.or_equal else '<'} {claim.worse}",
    }
    line["published"] = None if better.nats is None or worse.nats is None else round(better.nats - worse.nats, 4)
    line |= {"runs": f"{better.run} - {worse.run}", "here": None, "spread": None, "seeds": min(len(ours), len(others))}
    if not line["seeds"]:
        return {**line, "verdict": "not run"}
    difference = math.fsum(ours) / len(ours) - math.fsum(others) / len(others)
    line["here"] = round(difference, 4)
    verdict = "agreed" if difference < 0 or (claim.or_equal and difference == 0) else "not agreed"
    if line["seeds"] == 1:
        return {**line, "verdict": f"{verdict}, one seed"}
    spread = max(max(each) - min(each) for each in (ours, others))
    line["spread"] = round(spread, 4)
    return {**line, "verdict": "within the seeds' spread" if abs(difference) <= spread else verdict}


def as_markdown(lines: list[dict[str, Any]]) -> str:
    """Lines of :func:`judge` as a table."""
    columns = {"source": "", "claim": "loss of", "published": "published", "runs": "here", "here": "difference"}
    columns |= {"spread": "spread", "verdict": "verdict"}
    body = [[_cell(line[name]) for name in columns] for line in lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in [list(columns.values()), ["---"] * len(columns), *body])


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def main(results: Annotated[Path, typer.Option(help="Folder of the tables.")] = HERE / "results") -> None:
    found = losses(results)
    lines = [judge(claim, found) for claim in CLAIMS]
    with (results / "signs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    (results / "signs.md").write_text(as_markdown(lines), encoding="utf-8")
    print(as_markdown(lines), end="")


if __name__ == "__main__":
    typer.run(main)
