"""Language models of a few million parameters on the corpus of `corpus.py`: the experiments of the paper's section 9.

    python experiments/language.py answer share --data ~/.cache/mamba2-hf/corpus/8k
    python experiments/language.py length --tiny --out /tmp/length      # every part on a CPU, in seconds

answer    learning rates of a Mamba-2, a Transformer and a hybrid of the same size, fresh tokens against repeated ones
share     how many layers have attention (table 2)
heads     which of x, B and C heads share (table 5), how many share them, and how many states and channels they have
block     projections at once or one after the other, with and without a norm before the last (table 4), and MLPs
scaling   four sizes of each, tokens in proportion to parameters (figure 9)
length    loss by position far past the training length, for two state sizes
speed     tokens a second in training, at 2K and at 16K tokens a row

Runs go on from where they stopped when the command is given again; results are in `--out` as JSON, and `results/` gets
a CSV and a plot of each experiment. Loss is in nats per token on projects that were never trained on.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import compare
import numpy as np
import torch
import torch.nn.functional as F
import trainer
import typer
from torch import Tensor
from trainer import Batch, Recipe, Shape, console

TOKENS_EVALUATED = 2**20
MAMBA2 = Shape("mamba2", 256, 6)
ABLATED = dataclasses.replace(MAMBA2, state=64)  # N = P, as in tables 4 and 5
HYBRID = Shape("hybrid", 256, 5, mlp=192, key_value_heads=2, attention_layers=1)
ATTENTION = Shape("attention", 256, 4, mlp=568)
SHAPES = {"mamba2": MAMBA2, "attention": ATTENTION, "hybrid": HYBRID}
RATES = {
    "mamba2": (4e-3, 8e-3, 2e-3, 1.6e-2),
    "hybrid": (4e-3, 8e-3, 2e-3, 1.6e-2),
    "attention": (1e-3, 2e-3, 5e-4, 4e-3),
}
USUAL = {kind: rates[0] for kind, rates in RATES.items()}  # peak learning rates of all but `answer`


@dataclasses.dataclass(frozen=True)
class Run:
    """A model, its data and how it is trained."""

    name: str
    data: str
    shape: Shape
    learning_rate: float
    tokens: int = 32_000_000
    batch: int = 8  # rows; larger ones leave too few steps for recall to be learned
    window: int = 2048
    seed: int = 0
    epochs: int = 1  # how often each token is seen; of a run shorter than the corpus a part is read
    keep: bool = False  # the weights, beside the result
    far: int = 0  # tokens of the rows in which loss by position is measured; 0 for none
    vocab_size: int = 0  # 0 for that of the data

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return max(2, self.tokens // (self.batch * self.window))


@lru_cache(maxsize=4)
def stream(data: str, split: str, device: str) -> Tensor:
    """Tokens of a split, ``(n,)`` int32 on the device."""
    return torch.from_numpy(np.load(Path(data) / f"{split}.npy").astype(np.int32)).to(device)


def as_batch(rows: Tensor) -> Batch:
    """Rows ``(B, T)`` as arguments of a model. Documents follow each other in a row and are not kept apart, as in the
    paper's training.
    """
    ids = rows.long()
    return {"input_ids": ids, "labels": ids}


class Batches:
    """Batches of windows: every epoch sees each token once, on a grid and in an order drawn by seed and epoch."""

    def __init__(self, tokens: Tensor, window: int, batch: int, seed: int) -> None:
        self.tokens, self.window, self.batch, self.seed = tokens, window, batch, seed
        self.rows = len(tokens) // window - 1
        if self.rows < batch:
            raise ValueError(f"{len(tokens)} tokens are too few for {batch} windows of {window}")
        self._epoch = -1

    def __call__(self, step: int) -> Batch:
        epoch, place = divmod(step, self.rows // self.batch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
            shift = int(torch.randint(self.window, (), generator=generator))
            order = torch.randperm(self.rows, generator=generator).to(self.tokens.device)
            self._starts, self._epoch = order * self.window + shift, epoch
            self._offsets = torch.arange(self.window, device=self.tokens.device)
        starts = self._starts[place * self.batch : (place + 1) * self.batch]
        return as_batch(self.tokens[starts[:, None] + self._offsets])


@torch.no_grad()
def losses(model: torch.nn.Module, rows: Tensor) -> Tensor:
    """Nats of each next token, ``(B, T - 1)``."""
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.device.type == "cuda"):
        logits = model(input_ids=rows.long(), use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].float().mT, rows[:, 1:].long(), reduction="none")


def held_out(model: torch.nn.Module, tokens: Tensor, window: int, batch: int) -> float:
    """Loss in nats per token, in windows side by side."""
    rows = tokens[: min(len(tokens), TOKENS_EVALUATED) // window * window].view(-1, window)
    return float(torch.cat([losses(model, piece).flatten() for piece in rows.split(batch)]).mean())


def by_position(model: torch.nn.Module, tokens: Tensor, length: int, bins: int = 64) -> list[tuple[int, float]]:
    """Loss around each of some positions in rows of ``length`` tokens."""
    rows = tokens[: min(len(tokens), TOKENS_EVALUATED) // length * length].view(-1, 1, length)
    mean = torch.stack([losses(model, row)[0] for row in rows]).mean(0)
    width = max(1, length // bins)
    return [(start + width // 2, float(part.mean())) for start, part in _parts(mean, width)]


def _parts(values: Tensor, width: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(values), width):
        yield start, values[start : start + width]


def run(setting: Run, checkpoint: Path, device: str) -> dict[str, Any]:
    """Trains a model and measures it."""
    tokens = stream(setting.data, "train", device)
    if setting.epochs > 1:
        tokens = tokens[: setting.tokens // setting.epochs]
    others = {split: stream(setting.data, split, device) for split in ("validation", "test")}
    vocab_size = setting.vocab_size or -(-int(max(t.max() for t in (tokens, *others.values())) + 1) // 16) * 16
    model = trainer.new_model(setting.shape, vocab_size, setting.seed).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    recipe = Recipe(setting.steps, setting.learning_rate, setting.seed)

    def measure() -> dict[str, float]:
        return {split: held_out(model, each, setting.window, setting.batch) for split, each in others.items()}

    log = trainer.train(
        model,
        Batches(tokens, setting.window, setting.batch, setting.seed),
        recipe,
        checkpoint=checkpoint,
        every=max(1, setting.steps // 20),
        measure=measure,
    )
    if setting.keep:
        torch.save({n: p.to(torch.bfloat16) for n, p in model.state_dict().items()}, checkpoint.with_suffix(".bf16.pt"))
    result: dict[str, Any] = {
        "parameters": parameters,
        "outside_embedding": parameters - model.get_input_embeddings().weight.numel(),
        "steps": setting.steps,
        "tokens_a_second": _speed(log) * setting.batch * setting.window,
        **log[-1],
        "log": log,
    }
    if setting.far:
        model.eval()
        with torch.no_grad():
            result["positions"] = by_position(model, others["validation"], setting.far)
    return result


def _speed(log: list[dict[str, float]]) -> float:
    """Steps a second in the later half of a run, when all is compiled and captured."""
    early = log[len(log) // 2 - 1]
    return (log[-1]["step"] - early["step"]) / (log[-1]["seconds"] - early["seconds"])


def flops_a_token(shape: Shape, parameters: float, window: int) -> float:
    """Products of a training step for one token: six for each weight, and what mixing over time adds."""
    inner, mixers = 2 * shape.width, shape.layers
    attention = {"mamba2": 0, "attention": mixers, "hybrid": shape.attention_layers or 0}[shape.kind]
    chunk = 256
    ssd = 2 * inner * shape.state * 2 + chunk * (inner + shape.groups * shape.state)
    return 6 * parameters + 3 * ((mixers - attention) * ssd + attention * 2 * window * shape.width)


# --- the experiments ------------------------------------------------------------------------------------------------


def answer(data: str) -> list[Run]:
    """Four learning rates of each kind, and a second seed of the first."""
    grid = [
        Run(f"answer-{kind}-{RATES[kind][place]:g}-s0", data, shape, RATES[kind][place])
        for place in range(4)
        for kind, shape in SHAPES.items()
    ]
    again = [
        Run(f"answer-{kind}-{USUAL[kind]:g}-s1", data, shape, USUAL[kind], seed=1) for kind, shape in SHAPES.items()
    ]
    return grid + again


def repeated(data: str) -> list[Run]:
    """As many tokens as in `answer`, but those of a twelfth of them, twelve times over."""
    return [Run(f"repeated-{kind}", data, shape, USUAL[kind], epochs=12) for kind, shape in SHAPES.items()]


def share(data: str) -> list[Run]:
    """Twelve layers of which some have attention, and a Transformer of as many parameters."""
    counts = (0, 1, 6, 2, 3, 12)
    shapes = {
        f"{count}": Shape("hybrid", 256, 12, attention_layers=count, key_value_heads=4)
        for count in counts
        if count < 12
    }
    shapes["transformer"] = Shape("attention", 256, 6, mlp=864)
    return [
        Run(f"share-{name}-s{seed}", data, shape, 0.75 * USUAL[shape.kind], seed=seed)
        for seed in (0, 1)
        for name, shape in shapes.items()
    ]


def heads(data: str) -> list[Run]:
    """The four head patterns, with as many parameters; then settings between them and beside them."""
    layers = {"multi-value": 6, "multi-query": 6, "multi-key": 6, "multi-head": 4}
    shapes = {each: dataclasses.replace(ABLATED, pattern=each, layers=count) for each, count in layers.items()}
    shapes |= {
        "two groups": dataclasses.replace(ABLATED, groups=2),
        "small state": dataclasses.replace(ABLATED, state=16),
        "small heads": dataclasses.replace(ABLATED, head_dim=32),
    }
    return _two_seeds("heads", data, shapes)


def block(data: str) -> list[Run]:
    """Projections one after the other or at once, without and with the norm before the last; MLPs in place of some SSD.
    The first four have as many layers: the weights that make B, C and steps are twice as many where they are of x.
    """
    shapes = {
        f"{projections}{' with norm' * (norm != 'none')}": dataclasses.replace(
            ABLATED, projections=projections, norm=norm
        )
        for projections in ("sequential", "parallel")
        for norm in ("none", ABLATED.norm)
    }
    shapes["mlp"] = dataclasses.replace(ABLATED, layers=4, mlp=300)
    return _two_seeds("block", data, shapes)


def _two_seeds(name: str, data: str, shapes: dict[str, Shape]) -> list[Run]:
    return [
        Run(f"{name}-{each.replace(' ', '-')}-s{seed}", data, shape, USUAL["mamba2"], tokens=24_000_000, seed=seed)
        for seed in (0, 1)
        for each, shape in shapes.items()
    ]


def scaling(data: str) -> list[Run]:
    """Widths 128, 192, 256 and 384, the first three with ten tokens for each parameter and the last with five; a
    Transformer has an MLP in place of a layer. Narrow models get up to half as high a rate again. Two seeds.
    """
    runs = []
    sizes = (
        (128, 6, 528, 13_000_000, 1.5),
        (192, 6, 704, 24_000_000, 1.25),
        (256, 8, 864, 48_000_000, 1.0),
        (384, 10, 1312, 56_000_000, 0.75),
    )
    for seed, (width, layers, mlp, tokens, factor) in itertools.product((0, 1), sizes):
        shapes = {
            "mamba2": Shape("mamba2", width, layers),
            "hybrid": Shape("hybrid", width, layers, attention_layers=1, key_value_heads=width // 64),
            "attention": Shape("attention", width, layers // 2, mlp=mlp),
        }
        runs += [
            Run(f"scaling-{kind}-{width}" + "-s1" * seed, data, shape, factor * USUAL[kind], tokens=tokens, seed=seed)
            for kind, shape in shapes.items()
        ]
    return runs


def length(data: str) -> list[Run]:
    """Two state sizes, two training lengths; measured in rows of many times that length."""
    return [
        Run(
            f"length-{state}-{window}",
            data,
            dataclasses.replace(MAMBA2, state=state),
            USUAL["mamba2"],
            batch=16_384 // window,
            window=window,
            far=65_536,
        )
        for window in (512, 2048)
        for state in (16, 128)
    ]


def speed(data: str) -> list[Run]:
    """Each architecture at rows of 2048 and of 16384 tokens; for times, one process a GPU and nothing beside it."""
    shapes = {
        "mamba2": Shape("mamba2", 512, 12),
        "hybrid": Shape("hybrid", 512, 12, attention_layers=1, key_value_heads=8),
        "attention": Shape("attention", 512, 6, mlp=1408),
    }
    return [
        Run(f"speed-{kind}-{window}", data, shape, 1e-3, tokens=60 * 65_536, batch=65_536 // window, window=window)
        for window in (2048, 16_384)
        for kind, shape in shapes.items()
    ]


EXPERIMENTS = {f.__name__: f for f in (answer, repeated, share, heads, block, scaling, length, speed)}


def tiny(setting: Run) -> Run:
    """The same on a toy: a few steps of a model of two narrow layers."""
    shape = dataclasses.replace(setting.shape, width=32, layers=2, state=16, head_dim=16, mlp=setting.shape.mlp and 32)
    shape = dataclasses.replace(
        shape,
        groups=min(shape.groups, 4),
        key_value_heads=shape.key_value_heads and 1,
        attention_layers=None if shape.attention_layers is None else min(1, shape.attention_layers),
    )
    window = min(64, setting.window)
    return dataclasses.replace(
        setting, shape=shape, tokens=12 * window, batch=4, window=window, far=min(setting.far, 256), epochs=1
    )


# --- tables and plots -----------------------------------------------------------------------------------------------


def as_row(result: dict[str, Any]) -> dict[str, Any]:
    """A result as one line of a table."""
    shape = {name: value for name, value in result["shape"].items() if value not in (None, 0)}
    left_out = ("shape", "log", "positions", "data", "keep", "far", "vocab_size", "step", "seconds")
    rest = {name: value for name, value in result.items() if name not in left_out}
    rounded = {name: round(value, 5) if isinstance(value, float) else value for name, value in rest.items()}
    return {"name": rounded.pop("name"), **shape, **rounded, "seconds": round(result["seconds"], 1)}


def plot(name: str, results: list[dict[str, Any]], path: Path) -> None:
    """The plot of an experiment; where the paper has a table of it, that stands beside it."""
    if name in ("share", "heads", "block"):
        table = compare.TABLES[name]
        rows = compare.published(table)
        theirs = {title: [row.nats] for title, row in rows.items() if row.nats is not None}
        found: dict[str, list[float]] = {row.run: [] for row in rows.values() if row.run}  # in the order of the table
        for each in results:
            found.setdefault(compare.without_seed(each["name"]), []).append(each["test"])
        ours = {run.removeprefix(f"{name}-"): losses for run, losses in found.items() if losses}
        panels = {"here, each seed": ours, f"{table}, as published": theirs}
        trainer.draw_points(path, panels, x="nats per token")
        return
    lines: dict[str, list[tuple[float, float]]] = {}
    labels = {"x": "learning rate", "log": "x"}
    for each in results:
        shape = Shape(**each["shape"])
        if name == "answer":
            lines.setdefault(shape.kind, []).append((each["learning_rate"], each["test"]))
        elif name == "scaling":
            flops = flops_a_token(shape, each["parameters"], each["window"]) * each["tokens"]
            lines.setdefault(shape.kind + trainer.ANOTHER_SEED * (each["seed"] > 0), []).append((flops, each["test"]))
            labels = {"x": "products in training", "log": "xy"}
        elif name == "length":
            label = f"state {shape.state}, trained on {each['window']}"
            lines[label] = [(place, loss) for place, loss in each["positions"]]
            labels = {"x": "position", "log": "x"}
        else:
            lines[each["name"]] = [(row["step"], row["loss"]) for row in each["log"][1:]]
            labels = {"x": "step", "log": "x"}
    trainer.draw(path, lines, y="nats per token", **labels)


def main(
    experiments: Annotated[
        list[str],
        typer.Argument(help=f"Some of {', '.join(EXPERIMENTS)}; 'share:s0' for the runs with s0 in their name."),
    ],
    data: Annotated[Path, typer.Option(help="Folder of the token files.")],
    out: Annotated[Path, typer.Option(help="Folder of results and checkpoints.")] = Path("runs/experiments"),
    results: Annotated[Path, typer.Option(help="Folder of tables and plots.")] = trainer.HERE / "results",
    device: Annotated[str, typer.Option(help="cpu, cuda:1, ...; all GPUs by default.")] = "auto",
    processes: Annotated[int, typer.Option(help="Per GPU.")] = 1,
    seconds: Annotated[float, typer.Option(help="After which no further run is started.")] = math.inf,
    tokens: Annotated[int, typer.Option(help="At most so many of each run.")] = 10**12,
    toy: Annotated[bool, typer.Option("--tiny", help="A few steps of toys.")] = False,
) -> None:
    chosen = trainer.choose(experiments, {name: make(str(data)) for name, make in EXPERIMENTS.items()})
    if toy:
        chosen = [(name, tiny(each)) for name, each in chosen]
    chosen = [(name, dataclasses.replace(each, tokens=min(tokens, each.tokens))) for name, each in chosen]
    options = {"device": device, "processes": processes, "seconds": seconds}
    for result in trainer.run_chosen(run, chosen, out, results, as_row, plot, **options):
        console.print(f"{result['name']:32} {result['test']:.4f} nats per token")


if __name__ == "__main__":
    typer.run(main)
