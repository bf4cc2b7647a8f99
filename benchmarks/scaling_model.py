"""Predicts what several GPUs take, from bytes and rates, beside what was measured. Runs on anything, in no time.

    python benchmarks/scaling_model.py                                        # 1 to 1,024 GPUs, eight to a node
    python benchmarks/scaling_model.py --out benchmarks/results/scaling.csv

Rates are of H200s: products and links of one node were measured on two of them, links between nodes are those of a
400 Gb/s card for each GPU. A step of data parallelism is

    compute + copies + share * communication + max(0, communication - compute) + optimizer

with copies into and out of FSDP2's buffers and the share of the GPU that communication takes from products beside it,
both fitted to two GPUs and the 1.3B model, so that the 130M is predicted, and so is every other number of GPUs. What
was measured comes from the result files of ``bench_distributed.py`` and ``bench_context.py``. A token is predicted as
the step that is replayed, with sums in other GPUs' memory, of a prototype. A prediction is no measurement: the column
says which rows have one.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from table import write_csv

FIELDS = (
    "what",
    "gpus",
    "mb_a_gpu",
    "communication_ms",
    "compute_ms",
    "ratio",
    "predicted_ms",
    "efficiency",
    "measured_ms",
)
NODE = 8

# Measured: FLOP/s of a whole step counted as 6 per weight and token; bytes/s received in a node, for the sum of a
# tensor by its size; the time of a small exchange in a graph. Assumed: bytes/s of a GPU between nodes.
FLOPS, GATHER, REDUCE, SUM, BETWEEN, LATENCY = 444e12, 242e9, 233e9, 301e9, 45e9, 15e-6
COPIES, SHARE, OPTIMIZER = 6.0e-12, 0.4, 2.2e-12  # seconds a weight, of communication, a weight: fitted


class Model(NamedTuple):
    """Sizes of a model, and the milliseconds of forward and backward of its batch on one GPU of the two, captured."""

    weights: float
    width: int
    layers: int
    heads: int
    tokens: int
    ms: float

    @property
    def state(self) -> int:
        """Bytes of a layer's state of one sequence: heads of 64 x 128 in fp32."""
        return 4 * self.heads * 64 * 128


MODELS = {
    "130M": Model(129e6, 768, 24, 24, 8 * 2048, 42.3),
    "1.3B": Model(1.344e9, 2048, 48, 64, 4 * 2048, 149.8),
    "2.7B": Model(2.7e9, 2560, 64, 80, 4 * 2048, 6e3 * 2.7e9 * 4 * 2048 / FLOPS),
}
GPUS = (1, 2, 8, 64, 1024)
LONG = {"1.3B": 3014.9}  # milliseconds of a training step of 131072 tokens in a row on one GPU, with checkpointing
RESULTS = Path(__file__).parent / "results"


class Prediction(NamedTuple):
    """What one way takes on so many GPUs: bytes a GPU receives, seconds of them, of compute, and of all together."""

    what: str
    gpus: int
    bytes: float
    communication: float
    compute: float
    total: float
    ideal: float


def fsdp(model: Model, gpus: int) -> tuple[float, float]:
    """Bytes and seconds of weights gathered twice in bf16, and gradients reduced in fp32, over all GPUs."""
    part = (gpus - 1) / gpus
    gathered, reduced = 4 * model.weights * part, 4 * model.weights * part
    if gpus <= NODE:
        return gathered + reduced, gathered / GATHER + reduced / REDUCE
    return gathered + reduced, (gathered + reduced) / BETWEEN


def hsdp(model: Model, gpus: int) -> tuple[float, float]:
    """The same in a node, and what each GPU has of the gradients summed over nodes."""
    if gpus <= NODE:
        return fsdp(model, gpus)
    inside, seconds = fsdp(model, NODE)
    nodes = gpus // NODE
    summed = 2 * 4 * model.weights / NODE * (nodes - 1) / nodes
    return inside + summed, seconds + summed / BETWEEN


def data_parallel(name: str) -> Iterator[Prediction]:
    model = MODELS[name]
    compute, optimizer = model.ms / 1e3, OPTIMIZER * model.weights
    for kind, cost in (("fsdp2", fsdp), ("fsdp2 in nodes, copies between", hsdp)):
        for gpus in GPUS:
            if (kind != "fsdp2" and gpus <= NODE) or (kind == "fsdp2" and gpus == 1):
                continue
            size, seconds = cost(model, gpus)
            exposed = max(0.0, seconds - compute)
            total = compute + COPIES * model.weights + SHARE * min(seconds, compute) + exposed + optimizer
            yield Prediction(f"{name} {kind}", gpus, size, seconds, compute, total, compute + optimizer)


def sequence_parallel(name: str, tokens: int) -> Iterator[Prediction]:
    """A layer's forward where every GPU has ``tokens`` of one sequence: it gathers the others' states."""
    model = MODELS[name]
    compute = 2 * model.weights / model.layers * tokens / FLOPS
    for gpus in GPUS[1:]:
        exchanges = gpus - 1 if gpus <= 2 * NODE else (gpus - 1).bit_length()  # in pairs beyond
        size = model.state * exchanges
        seconds = 2 * LATENCY + size / (GATHER if gpus <= NODE else BETWEEN)
        yield Prediction(
            f"{name} cp, a layer of {tokens} tokens", gpus, size, seconds, compute, compute + seconds, compute
        )


def long_sequence(name: str, tokens: int) -> Iterator[Prediction]:
    """A training step of one sequence over all GPUs: layers run forward twice and backward once, and exchange states
    each time; at the end gradients in bf16 are summed.
    """
    model, whole = MODELS[name], LONG[name] / 1e3
    for gpus in (1, 2, NODE):
        states = model.state * (gpus - 1)
        size = 3 * model.layers * states + 2 * model.weights * (gpus > 1)
        seconds = 3 * model.layers * (2 * LATENCY * (gpus > 1) + states / GATHER) + 2 * model.weights / SUM * (gpus > 1)
        yield Prediction(
            f"{name} cp, a step of {tokens} tokens",
            gpus,
            size,
            seconds,
            whole / gpus,
            whole / gpus + seconds,
            whole / gpus,
        )


def tensor_parallel(name: str) -> Iterator[Prediction]:
    """A layer's forward over the batch, and a token of one sequence over all layers."""
    model = MODELS[name]
    whole = 2 * model.weights / model.layers * model.tokens / FLOPS
    for gpus in (2, 4, NODE):
        size = 2.0 * model.tokens * model.width
        seconds = LATENCY + size / SUM
        yield Prediction(f"{name} tp, a layer", gpus, size, seconds, whole / gpus, whole / gpus + seconds, whole / gpus)
    if name == "2.7B":
        for gpus in (1, 2, 4, NODE):  # launches and small kernels, weights read, sums pushed: fitted
            compute, seconds = 0.587e-3 + 1.176e-3 / gpus, model.layers * 2.9e-6 * (gpus > 1)
            size = 4.0 * model.layers * model.width * (gpus > 1)
            yield Prediction(f"{name} decode tp", gpus, size, seconds, compute, compute + seconds, 1.763e-3 / gpus)


def predictions() -> Iterator[Prediction]:
    for name in ("130M", "1.3B"):
        yield from data_parallel(name)
    yield from long_sequence("1.3B", 131072)
    yield from sequence_parallel("1.3B", 131072)
    yield from sequence_parallel("1.3B", 16384)
    for name in ("1.3B", "2.7B"):
        yield from tensor_parallel(name)


def measured(folder: Path) -> dict[tuple[str, int], float]:
    """Milliseconds of captured steps and of long sequences, by what is predicted and GPUs."""
    found = {}
    for row in read(folder / "distributed.csv"):
        what = f"{row['case']} {row['impl'].removesuffix(', captured')}"
        if row["ms_p50"] and row["impl"].endswith(", captured"):
            found[what, int(row["gpus"])] = float(row["ms_p50"])
    for row in read(folder / "context.csv"):
        what = f"{row['case'].split(',')[0]} cp, a step of {row['tokens']} tokens"
        found[what, int(row["processes"])] = float(row["ms"])
    return found


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a result file; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--out", type=Path, help="CSV to write")
    options = parser.parse_args()
    known, rows = measured(options.measured), []
    for each in predictions():
        seen = known.get((each.what, each.gpus))
        values = (
            *(each.what, each.gpus, f"{each.bytes / 1e6:.1f}", f"{1e3 * each.communication:.3f}"),
            *(f"{1e3 * each.compute:.2f}", f"{each.communication / each.compute:.3f}", f"{1e3 * each.total:.2f}"),
            *(f"{each.ideal / each.total:.2f}", "" if seen is None else f"{seen:.2f}"),
        )
        rows.append(dict(zip(FIELDS, values, strict=True)))
    width = max(len(row["what"]) for row in rows)
    print(f"{FIELDS[0]:{width}}", *(f"{name:>16}" for name in FIELDS[1:]))
    for row in rows:
        print(f"{row['what']:{width}}", *(f"{row[name]:>16}" for name in FIELDS[1:]))
    write_csv(options.out, FIELDS, rows)


if __name__ == "__main__":
    main()
