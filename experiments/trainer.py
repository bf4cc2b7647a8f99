"""What the experiments have in common: models from a line of settings, a training loop, runs over several processes.

A run is a record of settings. Its result is a JSON file named after them, and its checkpoint lies beside it until then:
what is there is not run again, and a run that was stopped goes on. Batches are a function of seed and step, so that it
gives what it would have given.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
import multiprocessing
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import typer
from mixers import SequentialMixer, share_rows
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from mamba2_hf import Mamba2HybridConfig, Mamba2HybridForCausalLM, spread_layers
from mamba2_hf.layers import Mamba2Mixer
from mamba2_hf.training import CapturedStep, parameter_groups

console = Console(stderr=True)
Batch = dict[str, Tensor]
HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Shape:
    """Layers of a model, all of one class. ``kind`` is mamba2 (SSD alone), attention (each with an MLP) or hybrid
    (``attention_layers`` among SSD layers, one in ten by default); ``mlp`` is the width of the MLPs, 0 for none.
    """

    kind: str
    width: int
    layers: int
    state: int = 128
    head_dim: int = 64
    groups: int = 1
    mlp: int = 0
    key_value_heads: int | None = None
    attention_layers: int | None = None
    norm: str = "gate_first"
    pattern: str = "multi-value"
    projections: str = "parallel"


AS_BEFORE = {"pattern": "multi-value", "projections": "parallel"}
"""Settings of a shape that came after results were there, and what they were until then: files keep their names."""


def new_model(shape: Shape, vocab_size: int, seed: int, rescale: bool = True) -> Mamba2HybridForCausalLM:
    """A model with new weights, drawn by the seed; tied embeddings, rotary positions where attention is alone."""
    count = {"mamba2": 0, "attention": shape.layers, "hybrid": shape.attention_layers}[shape.kind]
    heads, inner = max(1, shape.width // shape.head_dim), 2 * shape.width
    patterned = shape.pattern != "multi-value"
    torch.manual_seed(seed)
    config = Mamba2HybridConfig(
        vocab_size=vocab_size,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        layer_blocks=spread_layers(shape.layers, count, then="mlp" if shape.mlp else None),
        ssm_num_heads=inner // shape.head_dim,
        ssm_head_dim=shape.head_dim,
        ssm_state_size=shape.state,
        ssm_n_groups=inner // shape.head_dim if patterned else shape.groups,
        ssm_norm=shape.norm,
        ssm_norm_group_size=inner if patterned else None,
        num_attention_heads=heads,
        num_key_value_heads=shape.key_value_heads or heads,
        head_dim=min(shape.head_dim, shape.width),
        # SSD layers tell positions apart; attention alone cannot.
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0} if shape.kind == "attention" else None,
        intermediate_size=shape.mlp or 1,
        rescale_prenorm_residual=rescale,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = Mamba2HybridForCausalLM(config)
    for block in [each for each in model.modules() if isinstance(getattr(each, "mixer", None), Mamba2Mixer)]:
        if shape.projections == "sequential":
            sizes = {"num_heads": config.ssm_num_heads, "head_dim": shape.head_dim}
            sizes |= {"n_groups": config.ssm_n_groups, "state_size": shape.state}
            block.mixer = SequentialMixer(shape.width, **sizes, norm=shape.norm)
            block.mixer.apply(model._init_weights)
        if patterned:
            share_rows(block.mixer, shape.pattern)
    return model


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW, a linear warm-up, a cosine to a tenth of the peak or to ``floor`` of it."""

    steps: int
    learning_rate: float
    seed: int = 0
    warmup: float = 0.1  # share of the steps
    floor: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0

    def rate_at(self, step: int) -> float:
        """Learning rate of a step."""
        rising = self.warmup * self.steps
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising) / max(1.0, self.steps - rising)
        return self.learning_rate * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done)))


class InBF16(nn.Module):
    """A model whose products are in bf16 on a GPU. The casts belong to the step that is captured, not around it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> Any:
        kind = next(self.parameters()).device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            return self.model(**batch)


def train(
    model: nn.Module,
    batch_at: Callable[[int], Batch],
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    every: int = 500,
    measure: Callable[[], dict[str, float]] | None = None,
    measure_at: Sequence[int] = (),
) -> list[dict[str, float]]:
    """Trains a model in place, and returns what was logged: loss, seconds, and what ``measure`` found.

    Args:
        model: returns a ``loss`` for a batch.
        batch_at: the batch of a step, alike whenever it is asked for.
        recipe: how.
        checkpoint: file that is written every ``every`` steps, and that is gone on from.
        every: steps between two rows of the log, and two checkpoints.
        measure: of the model in eval mode; it is always called at the end.
        measure_at: further steps after which it is called.

    Raises:
        FloatingPointError: the loss is no number any more.
    """
    device = next(model.parameters()).device
    fused = device.type == "cuda"
    groups = parameter_groups(model, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=fused)
    start, seconds, log = 0, 0.0, []
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds, log = state["step"], state["seconds"], state["log"]
    model.train()
    step_of = CapturedStep(InBF16(model))
    began = time.monotonic()
    losses: list[Tensor] = []
    for step in range(start, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        losses.append(step_of(**batch_at(step)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip, foreach=fused)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = step + 1 == recipe.steps
        if (step + 1) % every and not last and step + 1 not in measure_at:
            continue
        row = {"step": step + 1, "loss": float(torch.stack(losses).mean())}
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(f"the loss is {row['loss']} at step {step + 1}: lower the learning rate")
        losses = []
        seconds += time.monotonic() - began
        row["seconds"] = seconds
        if measure is not None and (last or step + 1 in measure_at):
            model.eval()
            with torch.no_grad():
                row |= measure()
            model.train()
        log.append(row)
        if checkpoint is not None and not last:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            unfinished = checkpoint.with_suffix(".tmp")
            torch.save({**state, "step": step + 1, "seconds": seconds, "log": log}, unfinished)
            unfinished.replace(checkpoint)
        began = time.monotonic()
    if step_of.reason is not None and fused:
        console.print(f"[yellow]steps were not captured: {step_of.reason}")
    return log


def choose(wanted: Sequence[str], experiments: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    """Experiments and settings by names, in the order of the names; "name:part" is for runs with ``part`` in theirs.

    Raises:
        typer.BadParameter: there is no such experiment, or no such run of it.
    """
    chosen: dict[str, tuple[str, Any]] = {}
    for each in wanted:
        name, _, part = each.partition(":")
        if name not in experiments:
            raise typer.BadParameter(f"there is no experiment {name!r}: choose of {', '.join(experiments)}")
        found = {setting.name: (name, setting) for setting in experiments[name] if part in setting.name}
        if not found:
            raise typer.BadParameter(f"no run of {name} has {part!r} in its name, as {experiments[name][0].name} has")
        chosen |= {key: value for key, value in found.items() if key not in chosen}
    return list(chosen.values())


def stem(setting: Any) -> str:
    """Name of a run's files: its name, and eight digits of the hash of all that decides what comes out."""
    decides = {name: value for name, value in dataclasses.asdict(setting).items() if name != "data"}
    decides["shape"] = dict(decides["shape"].items() - AS_BEFORE.items())
    return f"{setting.name}-{hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]}"


def run_all(
    run: Callable[[Any, Path, str], dict[str, Any]],
    settings: Sequence[Any],
    out: Path,
    *,
    device: str = "auto",
    processes: int = 1,
    seconds: float = math.inf,
) -> list[dict[str, Any]]:
    """Results of all settings that could be run, in their order; those that were there are read.

    Args:
        run: ``(setting, checkpoint, device)`` to a result; a function of a module, so that other processes find it.
        settings: dataclasses with a ``name``.
        out: folder of results.
        device: a device, or "auto" for all GPUs, else the CPU.
        processes: per GPU; each works through its share of the settings.
        seconds: after which no further run is started.
    """
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.time() + seconds
    missing = [setting for setting in settings if not (out / f"{stem(setting)}.json").exists()]
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if device == "auto" else []
    devices = (gpus or ["cpu" if device == "auto" else device]) * processes
    with Progress(console=console) as progress:
        bar = progress.add_task(out.name, total=len(missing))
        if len(devices) == 1:
            for setting in missing:
                _run_one(run, setting, out, devices[0], deadline)
                progress.advance(bar)
        elif missing:
            context = multiprocessing.get_context("spawn")
            waiting = context.Queue()
            for each in devices:
                waiting.put(each)
            with ProcessPoolExecutor(len(devices), context, _take_device, (waiting,)) as pool:
                futures = [pool.submit(_run_one, run, setting, out, None, deadline) for setting in missing]
                failed: list[BaseException] = []
                for future in as_completed(futures):
                    failed += [error] if (error := future.exception()) else []
                    progress.advance(bar)
            if failed:
                raise RuntimeError(f"{len(failed)} runs of {len(missing)} failed") from failed[0]
    files = [out / f"{stem(setting)}.json" for setting in settings]
    return [json.loads(file.read_text()) for file in files if file.exists()]


_device = "cpu"


def _take_device(waiting: Any) -> None:
    global _device
    _device = waiting.get()


def _run_one(run: Callable[..., dict[str, Any]], setting: Any, out: Path, device: str | None, deadline: float) -> None:
    if time.time() > deadline:
        return
    checkpoint, device = out / f"{stem(setting)}.pt", device or _device
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    random.seed(0)
    try:
        result = {"name": setting.name, **dataclasses.asdict(setting), **run(setting, checkpoint, device)}
    except (FloatingPointError, torch.OutOfMemoryError) as error:
        console.print(f"[red]{setting.name}: {error}")
        return
    _write(out / f"{stem(setting)}.json", json.dumps(result))
    checkpoint.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A table; the columns are those of all rows, in the order in which they first come."""
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def run_chosen(
    run: Callable[[Any, Path, str], dict[str, Any]],
    chosen: Sequence[tuple[str, Any]],
    out: Path,
    tables: Path,
    as_row: Callable[[dict[str, Any]], dict[str, Any]],
    plot: Callable[[str, list[dict[str, Any]], Path], None],
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Runs what :func:`choose` gave and writes each experiment's CSV and plot; yields the results, by experiment.

    Args:
        run, out, options: see :func:`run_all`.
        chosen: experiments and settings.
        tables: folder of the CSVs and plots.
        as_row: a result as a line of the table.
        plot: draws an experiment's results to a file.
    """
    found = run_all(run, [each for _, each in chosen], out, **options)
    for name in dict.fromkeys(name for name, _ in chosen):
        names = {each.name for experiment, each in chosen if experiment == name}
        mine = [result for result in found if result["name"] in names]
        if mine:
            write_csv(tables / f"{name}.csv", map(as_row, mine))
            plot(name, mine, tables / f"{name}.png")
            yield from mine


ANOTHER_SEED = ", another seed"
"""Ends the name of a line that is drawn in the color of the one without."""


def draw(
    path: Path,
    lines: dict[str, Sequence[tuple[float, float]]],
    *,
    x: str,
    y: str,
    log: str = "",
    title: str = "",
) -> None:
    """One plot of several lines; ``log`` names the axes, "x", "y" or both, that are logarithmic."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    colors: dict[str, str] = {}
    for name, points in sorted(lines.items()):
        other = name.endswith(ANOTHER_SEED)
        color = colors.setdefault(name.removesuffix(ANOTHER_SEED), f"C{len(colors)}")
        style = {"color": color, "linestyle": "--" if other else "-", "label": name}
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, **style)
    axes.set(xlabel=x, ylabel=y, title=title)
    if "x" in log:
        axes.set_xscale("log")
        places = [place for points in lines.values() for place, _ in points]
        if max(places) > 20 * min(places):  # powers of ten are enough
            axes.xaxis.set_minor_formatter("")
    if "y" in log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    _save(figure, path)


def draw_points(path: Path, panels: dict[str, dict[str, Sequence[float]]], *, x: str) -> None:
    """Panels side by side, each with the values of some names, from above to below."""
    height = 1.2 + 0.3 * max(map(len, panels.values()))
    figure, axes = _pyplot().subplots(1, len(panels), figsize=(9, height), layout="constrained", squeeze=False)
    for place, (title, points) in zip(axes[0], panels.items(), strict=True):
        for name, values in points.items():
            place.plot(values, [name] * len(values), marker="o", color="C0", alpha=0.7)
        place.set(xlabel=x, title=title)
        place.invert_yaxis()
        place.grid(alpha=0.3)
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    _pyplot().close(figure)
