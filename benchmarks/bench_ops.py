"""Times the ops on a GPU beside whatever peers can be imported, after checking every result.

    python benchmarks/bench_ops.py --out benchmarks/results/ops.csv        # all cases
    python benchmarks/bench_ops.py --cases ssd_fwd                         # those whose name contains it
    python benchmarks/bench_ops.py --plot benchmarks/results/ops.csv       # draw what was measured

A row of the CSV is one case and one implementation: milliseconds at 20, 50 and 80 %, the median's ratio to the floor,
the peak of memory on top of the inputs, the device and the versions. The floor is the larger of two times: every input
read once and every output written once at the copy bandwidth, and the chunked form's products (chunks of 64) at the
matrix rate; both rates are measured in the same run.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.metadata
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mamba2_hf.ops import ssd_chunk_scan
from mamba2_hf.ops.reference import ssd_chunked

FIELDS = ("case", "impl", "ms_p20", "ms_p50", "ms_p80", "ratio_to_floor", "peak_mib", "device", "versions")
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias")
CHECKED_TOKENS, CHECKED_HEADS, TOLERANCE = 20480, 4, 1e-2


class Case(NamedTuple):
    """One scan: sizes, and whether its backward is timed too."""

    name: str
    B: int
    T: int
    H: int
    P: int
    N: int
    G: int
    backward: bool


def cases() -> list[Case]:
    sizes = {
        "H80_8x4096": (8, 4096, 80, 64, 128, 1),
        "H80_1x131072": (1, 131072, 80, 64, 128, 1),
        "H128_G8_4x8192": (4, 8192, 128, 64, 128, 8),
        "H24_16x2048": (16, 2048, 24, 64, 128, 1),
        "H80_1x2048": (1, 2048, 80, 64, 128, 1),
    }
    found = [Case(f"ssd_{'fwdbwd' if b else 'fwd'}_{k}", *v, b) for k, v in sizes.items() for b in (False, True)]
    lengths = [1024 << i for i in range(6)]
    found += [Case(f"length_fwd_{t}", 32768 // t, t, 32, 64, 64, 1, False) for t in lengths]
    return found + [Case(f"state_fwd_{n}", 8, 4096, 32, 64, n, 1, False) for n in (16, 32, 64, 128, 256)]


def inputs(case: Case, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    _, B, T, H, P, N, G, _ = case
    tensors = [
        draw(B, T, H, P).bfloat16(),
        draw(B, T, H).bfloat16(),
        -torch.exp(torch.rand(H, generator=generator, device="cuda") * 2.77),
        (draw(B, T, G, N) / math.sqrt(N)).bfloat16(),
        draw(B, T, G, N).bfloat16(),
        draw(H),
        torch.rand(H, generator=generator, device="cuda") * 2 - 5,
    ]
    return [t.requires_grad_() for t in tensors]


def ours(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    return ssd_chunk_scan(x, dt, A, B, C, D=D, dt_bias=bias, dt_softplus=True, backend="triton")


def peers() -> dict[str, Callable[..., Tensor]]:
    found: dict[str, Callable[..., Tensor]] = {"mamba2_hf": ours}
    try:
        mamba = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    except ImportError as error:
        print(f"mamba_ssm: not importable ({error})", file=sys.stderr)
        return found

    def peer(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        return mamba(x, dt, A, B, C, chunk_size=256, D=D, dt_bias=bias, dt_softplus=True)

    return found | {"mamba_ssm": peer}


def attention(x: Tensor, *_: Tensor) -> Tensor:
    """Causal attention of PyTorch's choice with the scan's heads, ``x`` standing in for q, k and v."""
    q = x.transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def errors(case: Case, scan: Callable[..., Tensor], seed: int = 0) -> dict[str, float]:
    """Relative errors against fp64, of what a few heads of the first row's beginning give and take."""
    tensors = inputs(case, seed)
    tokens, heads = min(case.T, CHECKED_TOKENS), min(CHECKED_HEADS, case.H // case.G)
    y = scan(*tensors)
    dy = torch.zeros_like(y)
    dy[:1, :tokens, :heads] = torch.randn(1, tokens, heads, case.P, device="cuda", dtype=y.dtype)

    def cut(name: str, t: Tensor) -> Tensor:
        if name in ("x", "dt"):
            return t[:1, :tokens, :heads]
        return t[:1, :tokens, :1] if name in ("B", "C") else t[:heads]

    reference = [cut(n, t).detach().double().requires_grad_() for n, t in zip(NAMES, tensors, strict=True)]
    x, dt, A, B, C, D, bias = reference
    y0, _ = ssd_chunked(x, dt, A, B, C, D=D, dt_bias=bias, dt_softplus=True, chunk_size=256)
    found = {"y": relative(cut("x", y), y0)}
    if case.backward:
        grads = torch.autograd.grad(y, tensors, dy)
        expected = torch.autograd.grad(y0, reference, dy[:1, :tokens, :heads].double())
        for name, a, b in zip(NAMES, grads, expected, strict=True):
            found[f"d{name}"] = relative(cut(name, a), b)
        # The bias collects ddt over all tokens, whose random signs may leave next to nothing to measure an error in: a
        # check measures it in the norm of what is collected.
        bias_error = (cut("dt_bias", grads[-1]).double() - expected[-1]).norm()
        found["ddt_bias in ddt"] = (bias_error / expected[NAMES.index("dt")].norm()).item()
    return found


def check(case: Case, scan: Callable[..., Tensor]) -> None:
    """Raises for a wrong result: nothing wrong is timed."""
    found = errors(case, scan)
    wrong = {k: v for k, v in found.items() if k != "ddt_bias" and not v < TOLERANCE}
    if wrong:
        raise RuntimeError(f"{case.name}: relative errors {wrong} against fp64")


def floor(case: Case, bandwidth: float, rate: float) -> float:
    """Milliseconds that no implementation can be much faster than."""
    _, B, T, H, P, N, G, backward = case
    x, maps, dt = 2 * B * T * H * P, 2 * B * T * G * N, 2 * B * T * H
    moved = 2 * x + 2 * maps + dt
    chunk = 64
    flops = 2 * B * T * (G * chunk * N + H * chunk * P + 2 * H * N * P)
    if backward:  # reads x, dy, B, C, dt, writes dx, dB, dC, ddt
        moved += 3 * x + 4 * maps + 2 * dt
        flops *= 3.5
    return max(moved / bandwidth, flops / rate) * 1e3


def measure_rates() -> tuple[float, float]:
    """Bytes per second of a large copy, and FLOP per second of a large bf16 product."""
    a = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    bandwidth = 2 * a.nbytes / (timed(lambda: b.copy_(a))[1] * 1e-3)
    m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return bandwidth, 2 * 8192**3 / (timed(lambda: m @ m)[1] * 1e-3)


def timed(run: Callable[[], Any]) -> tuple[float, float, float]:
    return tuple(triton.testing.do_bench(run, warmup=20, rep=100, quantiles=[0.2, 0.5, 0.8]))


def versions() -> str:
    found = [f"torch {torch.__version__}", f"triton {triton.__version__}"]
    if "mamba_ssm" in sys.modules:
        found.append(f"mamba_ssm {getattr(sys.modules['mamba_ssm'], '__version__', '?')}")
    return ", ".join(found)


def measure(case: Case, impl: str, scan: Callable[..., Tensor], rates: tuple[float, float]) -> dict[str, Any]:
    if impl != "attention":
        check(case, scan)
    tensors = inputs(case)
    dy = torch.randn_like(tensors[0])

    def forward() -> Tensor:
        with torch.no_grad():
            return scan(*tensors)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(scan(*tensors), tensors, dy)

    run = both if case.backward else forward
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    p20, p50, p80 = timed(run)
    limit = floor(case, *rates)
    row = (case.name, impl, f"{p20:.4f}", f"{p50:.4f}", f"{p80:.4f}", f"{p50 / limit:.2f}", f"{peak:.0f}")
    return dict(zip(FIELDS, (*row, torch.cuda.get_device_name(), versions()), strict=True))


def plot(path: Path) -> None:
    """Time against length, time against state size, and the ratio to the floor, beside the CSV."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = list(csv.DictReader(path.open()))
    for kind, label in (("length_fwd_", "tokens of a sequence (32K tokens in all)"), ("state_fwd_", "state size N")):
        figure, axes = plt.subplots(figsize=(6, 4))
        chosen = [r for r in rows if r["case"].startswith(kind)]
        for impl in dict.fromkeys(r["impl"] for r in chosen):
            points = [(int(r["case"].removeprefix(kind)), float(r["ms_p50"])) for r in chosen if r["impl"] == impl]
            axes.plot(*zip(*points, strict=True), marker="o", label=impl)
        axes.set(xlabel=label, ylabel="forward, ms", xscale="log", yscale="log")
        axes.legend()
        figure.tight_layout()
        figure.savefig(path.with_name(f"{path.stem}_{kind.split('_')[0]}.svg"))
    figure, axes = plt.subplots(figsize=(7, 4))
    chosen = [r for r in rows if r["case"].startswith("ssd_")]
    names = list(dict.fromkeys(r["case"] for r in chosen))
    impls = list(dict.fromkeys(r["impl"] for r in chosen))
    for i, impl in enumerate(impls):
        ratio = {r["case"]: float(r["ratio_to_floor"]) for r in chosen if r["impl"] == impl}
        places = [names.index(n) + (i - (len(impls) - 1) / 2) * 0.4 for n in ratio]
        axes.barh(places, list(ratio.values()), 0.4, label=impl)
    axes.set_yticks(range(len(names)), [n.removeprefix("ssd_") for n in names], fontsize=8)
    axes.set(xlabel="time over floor (1 is the limit)", xscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path.with_name(f"{path.stem}_floor.svg"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="part of the names of the cases to time")
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--errors", action="store_true", help="print errors over seeds instead of timing")
    parser.add_argument("--plot", type=Path, help="CSV to draw")
    options = parser.parse_args()
    if options.plot:
        return plot(options.plot)
    implementations = peers()
    if options.errors:
        case = Case("errors", 2, 1000, 16, 64, 128, 2, True)
        for impl, scan in implementations.items():
            found = [errors(case, scan, seed) for seed in range(20)]
            medians = {k: statistics.median(e[k] for e in found) for k in found[0]}
            print(impl, " ".join(f"{k} {v:.2e}" for k, v in medians.items()), flush=True)
        return None
    rates = measure_rates()
    print(f"copy {rates[0] / 1e12:.2f} TB/s, matrix product {rates[1] / 1e12:.0f} TFLOP/s", flush=True)
    rows = []
    for case in cases():
        if options.cases not in case.name:
            continue
        beside = {"attention": attention} if case.name.startswith("length") else {}
        for impl, scan in (implementations | beside).items():
            try:
                rows.append(measure(case, impl, scan, rates))
            except (RuntimeError, torch.OutOfMemoryError) as error:
                print(f"{case.name} {impl}: {error}", file=sys.stderr)
                continue
            print(" ".join(f"{v}" for v in list(rows[-1].values())[:7]), flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    return None


if __name__ == "__main__":
    main()
