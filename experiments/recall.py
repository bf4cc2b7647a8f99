"""Synthetic tasks of memory: associative recall, selective copying, induction heads.

    python experiments/recall.py mqar                                   # figure 8 of the paper, at our sizes
    python experiments/recall.py copying induction --processes 2        # section 4.1 of the Mamba paper
    python experiments/recall.py mqar copying induction --tiny --out /tmp/recall

mqar       multi-query associative recall: T tokens begin with T/4 pairs of key and value, the rest holds each key once
           among random tokens, and its value is asked for there. Trained with T/32 pairs first, T/4 in the end.
copying    sixteen tokens among noise, to be written out in order at the end; measured at lengths never trained on
induction  a token that came after a mark once is asked for when the mark comes again; measured likewise

Runs go on from where they stopped. Results are in `--out` as JSON; `results/` gets a CSV and a plot of each.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import trainer
import typer
from torch import Tensor, nn
from trainer import Batch, Recipe, Shape, console

from mamba2_hf import Mamba2HybridForCausalLM

Generator = torch.Generator


@dataclasses.dataclass(frozen=True)
class Run:
    """A task at a size, a model and how it is trained."""

    name: str
    task: str
    shape: Shape
    learning_rate: float
    length: int
    asked: int  # answers in a row
    vocab_size: int
    steps: int
    batch: int
    seed: int = 0
    stages: int = 1  # of a curriculum that doubles the number of pairs
    beyond: tuple[int, ...] = ()  # lengths that it is measured at too


def mqar(setting: Run, length: int, pairs: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``(B, T)``, and where and which the answers are, ``(B, T/4)``; answers that are not asked for are -100.

    Keys are of the first half of the vocabulary and distinct in a row, values of the second.
    """
    device, half = generator.device, setting.vocab_size // 2
    rows = setting.batch
    keys = torch.rand(rows, half, generator=generator, device=device).topk(pairs).indices  # (B, pairs)
    values = torch.randint(half, 2 * half, (rows, pairs), generator=generator, device=device)
    rest = length - 2 * pairs
    ids = torch.randint(half, 2 * half, (rows, length), generator=generator, device=device)
    ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
    where = 2 * pairs + torch.rand(rows, rest, generator=generator, device=device).topk(pairs).indices  # (B, pairs)
    ids.scatter_(1, where, keys)
    more = setting.asked - pairs
    return ids, F.pad(where, (0, more)), F.pad(values, (0, more), value=-100)


def copying(setting: Run, length: int, pairs: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Sixteen tokens (``asked``) at random places of ``length`` tokens of noise (0), then as many marks (1)."""
    device, rows, asked = generator.device, setting.batch, setting.asked
    tokens = torch.randint(2, setting.vocab_size, (rows, asked), generator=generator, device=device)
    places = torch.rand(rows, length, generator=generator, device=device).topk(asked).indices.sort().values
    ids = torch.zeros(rows, length + asked, dtype=torch.long, device=device)
    ids.scatter_(1, places, tokens)
    ids[:, length:] = 1
    return ids, torch.arange(length, length + asked, device=device).expand(rows, -1), tokens


def induction(setting: Run, length: int, pairs: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens with the mark 0 at one place and at the end; asked for is the token behind the first."""
    device, rows = generator.device, setting.batch
    ids = torch.randint(1, setting.vocab_size, (rows, length), generator=generator, device=device)
    place = torch.randint(0, length - 2, (rows, 1), generator=generator, device=device)
    answers = ids.gather(1, place + 1)
    ids.scatter_(1, place, torch.zeros_like(place))
    ids[:, -1] = 0
    return ids, torch.full((rows, 1), length - 1, device=device), answers


TASKS = {"mqar": mqar, "copying": copying, "induction": induction}


class Asked(nn.Module):
    """A language model whose head is asked at some places only."""

    def __init__(self, model: Mamba2HybridForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, where: Tensor, answers: Tensor) -> dict[str, Tensor]:
        hidden = self.model.backbone(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, d)
        picked = hidden.gather(1, where[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = self.model.lm_head(picked).float().flatten(0, 1)
        right = (logits.argmax(-1) == answers.flatten()).sum() / (answers != -100).sum()
        return {"loss": F.cross_entropy(logits, answers.flatten()), "accuracy": right}


def run(setting: Run, checkpoint: Path, device: str) -> dict[str, Any]:
    """Trains a model on a task and measures how often it is right."""
    model = Asked(trainer.new_model(setting.shape, setting.vocab_size, setting.seed)).to(device)
    task = TASKS[setting.task]

    def batch_at(step: int, length: int = setting.length, pairs: int | None = None) -> Batch:
        generator = Generator(device).manual_seed(2**32 * setting.seed + step)
        if pairs is None:
            stage = min(setting.stages - 1, step * (setting.stages + 1) // setting.steps)  # the last is twice as long
            pairs = setting.asked >> (setting.stages - 1 - stage)
        ids, where, answers = task(setting, length, pairs, generator)
        return {"input_ids": ids, "where": where, "answers": answers}

    def accuracy(length: int, batches: int = 8) -> float:
        """On batches that training never draws."""
        rows = max(1, min(setting.batch, 2**18 // length))
        found = []
        for index in range(batches):
            batch = batch_at(2**31 + index, length, setting.asked)
            with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
                found.append(model(**{name: value[:rows] for name, value in batch.items()})["accuracy"])
        return float(torch.stack(found).mean())

    log = trainer.train(
        model,
        batch_at,
        Recipe(setting.steps, setting.learning_rate, setting.seed),
        checkpoint=checkpoint,
        every=max(1, setting.steps // 10),
        measure=lambda: {"accuracy": accuracy(setting.length)},
    )
    result = {**log[-1], "log": log, "parameters": sum(p.numel() for p in model.parameters())}
    if setting.beyond:
        model.eval()
        with torch.no_grad():
            result["lengths"] = [(length, accuracy(length, 4)) for length in (setting.length, *setting.beyond)]
    return result


# --- the experiments ------------------------------------------------------------------------------------------------

MQAR_STEPS = 5000


def mqar_grid(widths: tuple[int, ...] = (64, 32), length: int = 256) -> list[Run]:
    """Two layers: Mamba-2 of several state sizes, and attention; the best of the learning rates counts."""
    runs = []
    for width in widths:
        shapes = {f"N{n}": Shape("mamba2", width, 2, state=n, head_dim=16) for n in (256, 16, 64)}
        shapes["attention"] = Shape("attention", width, 2, mlp=2 * width)
        sizes = {"length": length, "asked": length // 4, "vocab_size": 8192, "batch": 65_536 // length}
        for rate, seed in ((1e-2, 0), (2e-2, 0), (1e-2, 1), (5e-3, 0)):
            for name, shape in shapes.items():
                title = f"mqar-{length}-{width}-{name}-{rate:g}" + f"-s{seed}" * (seed > 0)
                runs.append(Run(title, "mqar", shape, rate, **sizes, steps=MQAR_STEPS, seed=seed, stages=4))
    return runs


FAR_STEPS = 16_000
"""One answer a row is little to learn induction from: after 3000 steps one seed of two had it, and no attention."""


def far_runs(task: str, asked: int) -> list[Run]:
    """Trained on 256 tokens, ``asked`` of which are asked for, and measured on up to 64 times as many."""
    beyond = tuple(256 * 4**k for k in range(1, 4))
    sizes = {"length": 256, "asked": asked, "vocab_size": 16, "steps": FAR_STEPS, "batch": 128, "beyond": beyond}
    shapes = {
        "mamba2": (Shape("mamba2", 64, 2, state=64, head_dim=16), 1e-2),
        "attention": (Shape("attention", 64, 2, mlp=128), 3e-3),
    }
    return [
        Run(f"{task}-{name}-s{seed}", task, shape, rate, **sizes, seed=seed)
        for seed in (0, 1)
        for name, (shape, rate) in shapes.items()
    ]


EXPERIMENTS = {
    "mqar": mqar_grid,
    "copying": lambda: far_runs("copying", 16),
    "induction": lambda: far_runs("induction", 1),
}


def tiny(setting: Run) -> Run:
    """The same on a toy: a few steps at a few tokens."""
    shape = dataclasses.replace(setting.shape, width=32, state=16, head_dim=16, mlp=setting.shape.mlp and 32)
    asked = min(4, setting.asked) if setting.task != "mqar" else 8
    return dataclasses.replace(
        setting,
        shape=shape,
        length=32,
        asked=asked,
        vocab_size=32,
        steps=8,
        batch=8,
        beyond=(64,) * bool(setting.beyond),
    )


# --- tables and plots -----------------------------------------------------------------------------------------------


def as_row(result: dict[str, Any]) -> dict[str, Any]:
    """A result as one line of a table."""
    shape = Shape(**result["shape"])
    row = {"name": result["name"], "kind": shape.kind, "width": shape.width, "layers": shape.layers}
    row["state"] = shape.state if shape.kind == "mamba2" else ""
    row |= {name: result[name] for name in ("length", "asked", "learning_rate", "seed", "steps", "batch", "parameters")}
    row |= {
        "loss": round(result["loss"], 4),
        "accuracy": round(result["accuracy"], 4),
        "seconds": round(result["seconds"], 1),
    }
    return row | {f"accuracy at {length}": round(value, 4) for length, value in result.get("lengths", ())}


def plot(name: str, results: list[dict[str, Any]], path: Path) -> None:
    """The plot of an experiment."""
    lines: dict[str, list[tuple[float, float]]] = {}
    if name == "mqar":
        best: dict[tuple[str, float], float] = {}
        for each in results:
            shape = Shape(**each["shape"])
            for state in (16, 256) if shape.kind == "attention" else (shape.state,):
                label = f"{shape.kind}, width {shape.width}, T {each['length']}"
                best[label, state] = max(best.get((label, state), 0.0), each["accuracy"])
        for (label, state), value in best.items():
            lines.setdefault(label, []).append((state, value))
        trainer.draw(path, lines, x="state size N", y="accuracy, best learning rate", log="x")
        return
    for each in results:
        lines[f"{each['shape']['kind']}, seed {each['seed']}"] = each["lengths"]
    trainer.draw(path, lines, x="tokens (trained on the fewest)", y="accuracy", log="x")


def main(
    experiments: Annotated[
        list[str],
        typer.Argument(help=f"Some of {', '.join(EXPERIMENTS)}; 'share:s0' for the runs with s0 in their name."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of results and checkpoints.")] = Path("runs/experiments"),
    results: Annotated[Path, typer.Option(help="Folder of tables and plots.")] = trainer.HERE / "results",
    device: Annotated[str, typer.Option(help="cpu, cuda:1, ...; all GPUs by default.")] = "auto",
    processes: Annotated[int, typer.Option(help="Per GPU.")] = 1,
    seconds: Annotated[float, typer.Option(help="After which no further run is started.")] = math.inf,
    steps: Annotated[int, typer.Option(help="At most so many of each run.")] = 10**9,
    toy: Annotated[bool, typer.Option("--tiny", help="A few steps of toys.")] = False,
) -> None:
    chosen = trainer.choose(experiments, {name: make() for name, make in EXPERIMENTS.items()})
    if toy:
        chosen = [(name, tiny(each)) for name, each in chosen]
    chosen = [(name, dataclasses.replace(each, steps=min(steps, each.steps))) for name, each in chosen]
    options = {"device": device, "processes": processes, "seconds": seconds}
    for result in trainer.run_chosen(run, chosen, out, results, as_row, plot, **options):
        console.print(f"{result['name']:36} {result['accuracy']:.4f} right")


if __name__ == "__main__":
    typer.run(main)
