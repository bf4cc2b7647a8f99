"""mamba2-hf against transformers' own Mamba-2 on a CPU: prefill, decode and a training step, in one run.

Both models hold the same random weights (the 130M size, fp32) and run in turns, so that whatever else the machine does
hits both. Outputs and gradients are compared first; where they differ no time is printed. Memory is the peak resident
size of a fresh process during one call, over what it was with the weights loaded.

    python benchmarks/cpu_vs_transformers.py
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from peers import stock_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from table import write_csv
from torch import Tensor

import mamba2_hf

OURS, STOCK = "mamba2-hf", "transformers"
SIZES: dict[str, dict[str, Any]] = {
    "130m": {"hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24, "state_size": 128, "vocab_size": 50288},
    "smoke": {"hidden_size": 128, "num_hidden_layers": 2, "num_heads": 4, "state_size": 32, "vocab_size": 512},
}
SHARED = {"head_dim": 64, "expand": 2, "n_groups": 1, "tie_word_embeddings": True, "use_cache": True}
TOLERANCE = 1e-4  # of the largest value compared; fp32 through 24 layers
FIELDS = (
    *("case", "implementation", "p20_ms", "p50_ms", "p80_ms", "ratio", "peak_mib", "memory_ratio"),
    *("size", "dtype", "device", "threads", "versions"),
)

console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)  # a pipe has none
app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Case:
    """One thing to time: ``prepare`` is not timed, ``run`` is; ``units`` of work share its time."""

    name: str
    run: Callable[[Any, Any], Any]
    prepare: Callable[[Any], Any] = lambda model: None
    units: int = 1


def build(implementation: str, size: str) -> Any:
    """The model in eval mode, its weights drawn by our initialization from one seed."""
    torch.manual_seed(0)
    ours = mamba2_hf.Mamba2ForCausalLM(mamba2_hf.Mamba2Config(**SIZES[size], **SHARED))
    return (ours if implementation == OURS else stock_model(ours)).eval()


def tokens(length: int, vocab_size: int) -> Tensor:
    return torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(length))


@torch.inference_mode()
def prefill(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=True, logits_to_keep=1).logits


@torch.inference_mode()
def fill_cache(model: Any, ids: Tensor) -> Any:
    return model(ids, use_cache=True, logits_to_keep=1).cache_params


@torch.inference_mode()
def decode(model: Any, cache: Any, ids: Tensor) -> Tensor:
    return torch.cat([model(token, cache_params=cache, use_cache=True).logits for token in ids.split(1, dim=1)], dim=1)


def clear_gradients(model: Any) -> None:
    model.train()
    model.zero_grad(set_to_none=True)


def train_step(model: Any, ids: Tensor) -> Tensor:
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach()


def cases(size: str, vocab_size: int) -> list[Case]:
    short = size == "smoke"
    long, prompt, steps, training = (tokens(n, vocab_size) for n in ((80, 16, 4, 40) if short else (1024, 64, 32, 512)))
    return [
        Case(f"prefill, {long.shape[1]} tokens", lambda model, _: prefill(model, long), lambda model: model.eval()),
        Case(
            f"decode, per token after {prompt.shape[1]}",
            lambda model, cache: decode(model, cache, steps),
            lambda model: fill_cache(model.eval(), prompt),
            units=steps.shape[1],
        ),
        Case(
            f"training step, {training.shape[1]} tokens", lambda model, _: train_step(model, training), clear_gradients
        ),
    ]


def check_agreement(ours: Any, stock: Any, every: list[Case]) -> None:
    """Exits where the two models do not compute the same: a time for a wrong result is worth nothing."""
    for case in every:
        mine, theirs = (case.run(model, case.prepare(model)) for model in (ours, stock))
        compared = {"output": (mine, theirs)}
        if mine.dim() == 0:  # a loss, which left gradients behind
            theirs_by_name = dict(stock.named_parameters())
            compared |= {name: (own.grad, theirs_by_name[name].grad) for name, own in ours.named_parameters()}
        for name, (left, right) in compared.items():
            error = float((left - right).abs().max() / right.abs().max())
            if not error < TOLERANCE:
                console.print(f"[bold red]{case.name}: {name} differs by {error:.1e}[/bold red]; nothing is timed")
                raise typer.Exit(1)
    for model in (ours, stock):
        clear_gradients(model)


def measure(models: dict[str, Any], case: Case, rounds: int) -> dict[str, list[float]]:
    """Milliseconds per unit of work, the implementations in turns and first by turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    order = list(models)
    for _ in track(range(rounds + 1), f"{case.name:32}", console=Console(stderr=True), transient=True):
        for name in order:
            prepared = case.prepare(models[name])
            start = time.perf_counter()
            case.run(models[name], prepared)
            times[name].append((time.perf_counter() - start) * 1e3 / case.units)
        order.reverse()
    return {name: values[1:] for name, values in times.items()}  # the first round warms up


def resident_kib(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def own_peak_mib(model: Any, case: Case) -> float:
    """Peak resident memory of one call over that of the loaded model, in this process."""
    prepared = case.prepare(model)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what loading left behind in the allocator is not the model's
    loaded = resident_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    case.run(model, prepared)
    return (resident_kib("VmHWM") - loaded) / 1024


def peak_mib(implementation: str, index: int, size: str, threads: int) -> float | None:
    """:func:`own_peak_mib` in a fresh process; None where the system has no /proc."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, __file__, "--size", size, "--threads", str(threads)]
    command += ["--memory-of", implementation, "--memory-case", str(index)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {implementation} failed:\n{done.stderr}")
    return float(json.loads(done.stdout)["peak_mib"])


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@app.command()
def main(
    threads: Annotated[int, typer.Option(min=1, help="Of PyTorch.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of runs per case; medians are reported.")] = 9,
    size: Annotated[str, typer.Option(help="130m, or smoke for a quick look at whether the script runs.")] = "130m",
    out: Annotated[Path, typer.Option(help="Where the CSV goes.")] = Path(__file__).parent / "results",
    memory_of: Annotated[str, typer.Option(hidden=True)] = "",
    memory_case: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Time mamba2-hf against transformers' Mamba-2 on this CPU, and write the ratios down."""
    if size not in SIZES:
        raise typer.BadParameter(f"{size!r} is none of {', '.join(SIZES)}", param_hint="--size")
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    every = cases(size, SIZES[size]["vocab_size"])
    if memory_of:
        print(json.dumps({"peak_mib": own_peak_mib(build(memory_of, size), every[memory_case])}))
        return

    models = {STOCK: build(STOCK, size), OURS: build(OURS, size)}
    parameters = sum(parameter.numel() for parameter in models[OURS].parameters())
    console.print(f"{parameters / 1e6:.0f}M parameters, fp32, {threads} threads of {processor()}")
    check_agreement(models[OURS], models[STOCK], every)
    console.print(f"Outputs and gradients agree to {TOLERANCE:.0e}.")

    common = {
        **{"size": size, "dtype": "float32", "device": processor(), "threads": threads},
        "versions": "; ".join(
            [f"python {platform.python_version()}", f"torch {torch.__version__}"]
            + [f"{name} {metadata.version(name)}" for name in ("transformers", "mamba2-hf")]
        ),
    }
    table = Table("case", "stock ms", "ours ms", "faster", "stock MiB", "ours MiB", "memory", box=None)
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    rows: list[dict[str, Any]] = []
    for index, case in enumerate(every):
        times = measure(models, case, rounds)
        faster = statistics.median(times[STOCK]) / statistics.median(times[OURS])
        peaks = {name: peak_mib(name, index, size, threads) for name in models}
        stock_peak, our_peak = peaks[STOCK], peaks[OURS]
        leaner = our_peak / stock_peak if our_peak is not None and stock_peak else None
        for name, values in times.items():
            low, middle, high = (f"{float(torch.tensor(values).quantile(q)):.3f}" for q in (0.2, 0.5, 0.8))
            ratios = (f"{faster:.2f}", _fixed(leaner, 2)) if name == OURS else ("1.00", "1.00")
            rows.append(
                {
                    **{"case": case.name, "implementation": name, "p20_ms": low, "p50_ms": middle, "p80_ms": high},
                    **{"ratio": ratios[0], "peak_mib": _fixed(peaks[name], 0), "memory_ratio": ratios[1], **common},
                }
            )
        medians = [f"{statistics.median(times[name]):.1f}" for name in (STOCK, OURS)]
        memory = [_fixed(stock_peak, 0), _fixed(our_peak, 0), _fixed(leaner, 2) and f"{_fixed(leaner, 2)}x"]
        table.add_row(case.name, *medians, f"{faster:.2f}x", *memory)
    console.print(table)

    path = out / ("cpu_vs_transformers.csv" if size == "130m" else f"cpu_vs_transformers_{size}.csv")
    write_csv(path, FIELDS, rows)
    console.print(f"Written to {path}")


def _fixed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    app()
