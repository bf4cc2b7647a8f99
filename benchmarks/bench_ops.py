"""Times the ops on a GPU beside whatever peers can be imported, after checking every result.

    python benchmarks/bench_ops.py --out benchmarks/results/ops.csv        # all cases
    python benchmarks/bench_ops.py --cases ssd_fwd                         # those whose name contains it
    python benchmarks/bench_ops.py --cases none --errors                   # errors against fp64, ours and the peer's
    python benchmarks/bench_ops.py --plot benchmarks/results/ops.csv       # draw what was measured

A row of the CSV is one case and one implementation: milliseconds at 20, 50 and 80 %, the median's ratio to the floor,
the peak of memory on top of the inputs, the device and the versions. The floor is the larger of two times: every input
read once and every output written once at the copy bandwidth, and the chunked form's products (chunks of 64) at the
matrix rate; both rates are measured in the same run. Calls are timed as they are made, from Python; where that is what
takes the time, ``mamba2_hf, graph`` is the same call replayed as a CUDA graph. The peer, if importable, is timed in the
``ssd`` cases, where its autotuner takes minutes; cuDNN's attention in the ``length`` cases.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from table import PLOTS, write_csv
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mamba2_hf.ops import mamba2_inner, mamba2_step, ssd_chunk_scan

FIELDS = ("case", "impl", "ms_p20", "ms_p50", "ms_p80", "ratio_to_floor", "peak_mib", "device", "versions")
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias")
OURS, GRAPH, PEER = "mamba2_hf", "mamba2_hf, graph", "mamba_ssm"
CHECKED_TOKENS, CHECKED_HEADS, TOLERANCE = 20480, 4, 1e-2
GRAPHED_TOKENS = 32768
PEER_CHUNK = 256  # its best at every size timed here
TAPS = 4


class Rates(NamedTuple):
    """What the device was seen to do in this run."""

    bandwidth: float  # bytes per second
    product: float  # FLOP per second

    def floor(self, moved: float, flops: float = 0.0) -> float:
        """Milliseconds that no implementation can be much faster than."""
        return max(moved / self.bandwidth, flops / self.product) * 1e3


class Run(NamedTuple):
    """One implementation of one case, checked when it is made."""

    case: str
    impl: str
    call: Callable[[], Any]
    floor: float


class Scan(NamedTuple):
    """Sizes of a scan, and whether its backward is timed too."""

    name: str
    B: int
    T: int
    H: int
    P: int
    N: int
    G: int
    backward: bool

    def floor(self, rates: Rates) -> float:
        _, B, T, H, P, N, G, backward = self
        x, maps, dt = 2 * B * T * H * P, 2 * B * T * G * N, 2 * B * T * H
        moved = 2 * x + 2 * maps + dt
        flops = 2 * B * T * (G * 64 * N + H * 64 * P + 2 * H * N * P)
        if backward:  # reads x, dy, B, C, dt, writes dx, dB, dC, ddt
            moved += 3 * x + 4 * maps + 2 * dt
            flops *= 3.5
        return rates.floor(moved, flops)


def scans() -> list[Scan]:
    sizes = {
        "H80_8x4096": (8, 4096, 80, 64, 128, 1),
        "H80_1x131072": (1, 131072, 80, 64, 128, 1),
        "H128_G8_4x8192": (4, 8192, 128, 64, 128, 8),
        "H24_16x2048": (16, 2048, 24, 64, 128, 1),
        "H80_1x2048": (1, 2048, 80, 64, 128, 1),
        "N128_4x4096": (4, 4096, 48, 64, 128, 1),
        "N256_4x4096": (4, 4096, 48, 64, 256, 1),
        "P128_4x4096": (4, 4096, 32, 128, 128, 1),
    }
    found = [Scan(f"ssd_{'fwdbwd' if b else 'fwd'}_{k}", *v, b) for k, v in sizes.items() for b in (False, True)]
    found += [Scan(f"length_fwd_{t}", 32768 // t, t, 32, 64, 64, 1, False) for t in (1024 << i for i in range(6))]
    return found + [Scan(f"state_fwd_{n}", 8, 4096, 32, 64, n, 1, False) for n in (16, 32, 64, 128, 256)]


def scan_inputs(case: Scan, seed: int = 0) -> list[Tensor]:
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


def our_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    return ssd_chunk_scan(x, dt, A, B, C, D=D, dt_bias=bias, dt_softplus=True, backend="triton")


def scan_peers() -> dict[str, Callable[..., Tensor]]:
    found: dict[str, Callable[..., Tensor]] = {OURS: our_scan}
    try:
        mamba = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    except ImportError as error:
        print(f"mamba_ssm: not importable ({error})", file=sys.stderr)
        return found

    def peer(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        return mamba(x, dt, A, B, C, chunk_size=PEER_CHUNK, D=D, dt_bias=bias, dt_softplus=True)

    return found | {PEER: peer}


def attention(x: Tensor) -> Callable[[], Tensor]:
    """cuDNN's causal attention with the scan's heads, ``x`` standing in for q, k and v."""
    q = x.detach().transpose(1, 2)

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    return call


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.double().norm()).item()


def scan_errors(case: Scan, scan: Callable[..., Tensor], seed: int = 0, random: bool = False) -> dict[str, float]:
    """Relative errors against fp64, of what a few heads of the first row's beginning give and take.

    The gradient handed in is the output itself, so that sums over many tokens are far from zero; or ``random``.
    """
    tensors = scan_inputs(case, seed)
    tokens, heads = min(case.T, CHECKED_TOKENS), min(CHECKED_HEADS, case.H // case.G)

    def cut(name: str, t: Tensor) -> Tensor:
        if name in ("x", "dt"):
            return t[:1, :tokens, :heads]
        return t[:1, :tokens, :1] if name in ("B", "C") else t[:heads]

    reference = [cut(n, t).detach().double().requires_grad_() for n, t in zip(NAMES, tensors, strict=True)]
    x, dt, A, B, C, D, bias = reference
    y0 = ssd_chunk_scan(x, dt, A, B, C, D=D, dt_bias=bias, dt_softplus=True, chunk_size=256, backend="torch")
    y = scan(*tensors)
    found = {"y": relative(cut("x", y), y0)}
    if case.backward:
        dy = torch.zeros_like(y)
        noise = torch.randn(y0.shape, generator=torch.Generator("cuda").manual_seed(seed + 1), device="cuda")
        dy[:1, :tokens, :heads] = noise if random else y0
        grads = torch.autograd.grad(y, tensors, dy)
        expected = torch.autograd.grad(y0, reference, dy[:1, :tokens, :heads].double())
        found |= {f"d{n}": relative(cut(n, a), b) for n, a, b in zip(NAMES, grads, expected, strict=True)}
    return found


def scan_runs(chosen: str, rates: Rates) -> Iterator[Run]:
    for case in scans():
        if chosen not in case.name:
            continue
        peers = scan_peers() if case.name.startswith("ssd") else {OURS: our_scan}
        for impl, scan in peers.items():
            checked(case.name, impl, scan_errors(case, scan))
            tensors = scan_inputs(case)
            call = backward_of(scan, tensors) if case.backward else forward_of(scan, tensors)
            yield Run(case.name, impl, call, case.floor(rates))
            if impl == OURS and case.name.startswith("ssd") and case.B * case.T <= GRAPHED_TOKENS:
                yield Run(case.name, GRAPH, captured(call), case.floor(rates))
        if case.name.startswith("length"):
            yield Run(case.name, "cuDNN attention", attention(scan_inputs(case)[0]), case.floor(rates))


def forward_of(run: Callable[..., Any], tensors: list[Tensor]) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return run(*tensors)

    return call


def backward_of(run: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[], Any]:
    leaves = [t.detach().requires_grad_() for t in tensors]  # no graph made on another stream holds on to them
    with torch.no_grad():
        dy = torch.randn_like(run(*leaves))
    return lambda: torch.autograd.grad(run(*leaves), leaves, dy)


def mixer_inputs(B: int, T: int, H: int, P: int, N: int) -> list[Tensor]:
    channels = H * P + 2 * N
    draw = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device="cuda")

    tensors = [
        normal(B, T, H * P + channels + H).bfloat16(),
        (normal(channels, TAPS) * 0.3).bfloat16(),
        (normal(channels) * 0.1).bfloat16(),
        torch.rand(H, generator=draw, device="cuda") * 2 - 5,
        -torch.exp(torch.rand(H, generator=draw, device="cuda") * 2.77),
        normal(H),
        (torch.rand(H * P, generator=draw, device="cuda") + 0.5).bfloat16(),
    ]
    return [t.requires_grad_() for t in tensors]


def mixer(P: int, backend: str) -> Callable[..., Tensor]:
    def run(u: Tensor, weight: Tensor, bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, norm: Tensor) -> Tensor:
        options = {"norm_weight": norm, "head_dim": P, "n_groups": 1, "backend": backend}
        return mamba2_inner(u, weight, bias, dt_bias, A, D, **options)

    return run


def mixer_runs(chosen: str, rates: Rates) -> Iterator[Run]:
    """Convolution, scan and gated norm, as one op."""
    P, N = 64, 128
    for B, T, H in ((8, 2048, 80), (16, 2048, 24)):
        names = [f"mixer_{kind}_H{H}_{B}x{T}" for kind in ("fwd", "fwdbwd")]
        if not any(chosen in name for name in names):
            continue
        tensors = mixer_inputs(B, T, H, P, N)
        short = [tensors[0][:1, :300].detach().requires_grad_(), *tensors[1:]]
        exact = [t.detach().double().requires_grad_() for t in short]
        y, y0 = mixer(P, "triton")(*short), mixer(P, "torch")(*exact)
        found = torch.autograd.grad(y, short, y0.to(y.dtype))
        expected = torch.autograd.grad(y0, exact, y0.detach())
        pairs = zip((y, *found), (y0, *expected), strict=True)
        errors = {str(i): relative(*pair) for i, pair in enumerate(pairs)}
        for name in names:
            checked(name, OURS, errors)
        width, inner = tensors[0].shape[-1], H * P
        forward = 2 * B * T * (width + inner)
        runs = (forward_of(mixer(P, "triton"), tensors), backward_of(mixer(P, "triton"), tensors))
        for name, call, moved in zip(names, runs, (forward, 2.5 * forward), strict=True):
            if chosen in name:
                yield Run(name, OURS, call, rates.floor(moved))
                yield Run(name, GRAPH, captured(call), rates.floor(moved))


def step_runs(chosen: str, rates: Rates) -> Iterator[Run]:
    """One token of every sequence through a mixer, with the norm; the floor is the state, read and written once."""
    H, P, N = 80, 64, 128
    for batch in (1, 64, 256):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"step_{batch}_{str(dtype).removeprefix('torch.')}"
            if chosen not in name:
                continue
            u, weight, bias, dt_bias, A, D, norm = (t.detach() for t in mixer_inputs(batch, 1, H, P, N))
            state = torch.randn(batch, H, P, N, device="cuda").to(dtype)
            window = torch.randn(batch, H * P + 2 * N, TAPS - 1, device="cuda").bfloat16()
            results = []
            for backend in ("triton", "torch"):
                states = window.clone(), state.clone()
                options = {"norm_weight": norm, "n_groups": 1, "backend": backend}
                y = mamba2_step(u, *states, weight, bias, dt_bias, A, D, **options)
                results.append((y, *states))
            errors = [relative(a, b.double()) for a, b in zip(*results, strict=True)]
            checked(name, OURS, dict(zip(("y", "window", "state"), errors, strict=True)))

            def call(u=u, window=window, state=state, rest=(weight, bias, dt_bias, A, D), norm=norm) -> Tensor:
                return mamba2_step(u, window, state, *rest, norm_weight=norm, n_groups=1, backend="triton")

            floor = rates.floor(2 * state.nbytes)
            yield Run(name, OURS, call, floor)
            yield Run(name, GRAPH, captured(call), floor)


def checked(case: str, impl: str, errors: dict[str, float]) -> None:
    """Raises for a wrong result: nothing wrong is timed."""
    wrong = {k: v for k, v in errors.items() if not v < TOLERANCE}
    if wrong:
        raise RuntimeError(f"{case} {impl}: relative errors {wrong}")


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """``call`` as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def measure_rates() -> Rates:
    """Bytes per second of a large copy, and FLOP per second of a large bf16 product."""
    a = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    bandwidth = 2 * a.nbytes / (timed(lambda: b.copy_(a))[1] * 1e-3)
    m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return Rates(bandwidth, 2 * 8192**3 / (timed(lambda: m @ m)[1] * 1e-3))


def timed(run: Callable[[], Any]) -> tuple[float, float, float]:
    return tuple(triton.testing.do_bench(run, warmup=20, rep=80, quantiles=[0.2, 0.5, 0.8]))


def versions() -> str:
    found = [f"torch {torch.__version__}", f"triton {triton.__version__}"]
    if "mamba_ssm" in sys.modules:
        found.append(f"mamba_ssm {getattr(sys.modules['mamba_ssm'], '__version__', '?')}")
    return ", ".join(found)


def measure(run: Run) -> dict[str, Any]:
    run.call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run.call()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    p20, p50, p80 = timed(run.call)
    row = (run.case, run.impl, f"{p20:.4f}", f"{p50:.4f}", f"{p80:.4f}", f"{p50 / run.floor:.2f}", f"{peak:.0f}")
    return dict(zip(FIELDS, (*row, torch.cuda.get_device_name(), versions()), strict=True))


def print_errors() -> None:
    """Medians over 20 seeds of every error, with gradients that are random or follow the output."""
    case = Scan("errors", 2, 1000, 16, 64, 128, 2, True)
    for random in (True, False):
        for impl, scan in scan_peers().items():
            found = [scan_errors(case, scan, seed, random) for seed in range(20)]
            medians = {k: statistics.median(e[k] for e in found) for k in found[0]}
            kind = "random dy" if random else "dy = y"
            print(f"{kind:10} {impl:10}", " ".join(f"{k} {v:.2e}" for k, v in medians.items()), flush=True)


def plot(path: Path) -> None:
    """Time against length, time against state size, and the ratio to the floor, beside the CSV."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "ops"}
    rows = list(csv.DictReader(path.open()))
    for kind, label in (("length_fwd_", "tokens of a sequence (32K tokens in all)"), ("state_fwd_", "state size N")):
        figure, axes = plt.subplots(figsize=(6, 4))
        chosen = [r for r in rows if r["case"].startswith(kind)]
        ticks = sorted({int(r["case"].removeprefix(kind)) for r in chosen})
        for impl in dict.fromkeys(r["impl"] for r in chosen):
            points = [(int(r["case"].removeprefix(kind)), float(r["ms_p50"])) for r in chosen if r["impl"] == impl]
            axes.plot(*zip(*points, strict=True), marker="o", label=impl)
        if kind == "state_fwd_":  # a Mamba-1 scan does its work N times: the slope that its paper shows
            first = next(p for p in chosen if p["impl"] == OURS)
            start = float(first["ms_p50"])
            axes.plot(ticks, [start * n / ticks[0] for n in ticks], "--", color="gray", label="in proportion to N")
        axes.set(xlabel=label, ylabel="forward, ms", xscale="log", yscale="log")
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatted("{x:g}")
        axes.legend()
        figure.tight_layout()
        figure.savefig(PLOTS / f"{path.stem}_{kind.split('_')[0]}.svg")
    figure, axes = plt.subplots(figsize=(7, 4))
    chosen = [r for r in rows if r["case"].startswith("ssd_")]
    names = list(dict.fromkeys(r["case"] for r in chosen))
    impls = list(dict.fromkeys(r["impl"] for r in chosen))
    height = 0.8 / len(impls)
    for i, impl in enumerate(impls):
        ratio = {r["case"]: float(r["ratio_to_floor"]) for r in chosen if r["impl"] == impl}
        places = [names.index(n) + (i - (len(impls) - 1) / 2) * height for n in ratio]
        axes.barh(places, list(ratio.values()), height, label=impl)
    axes.set_yticks(range(len(names)), [n.removeprefix("ssd_") for n in names], fontsize=8)
    axes.set(xlabel="time over floor", xscale="log", xlim=1)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(PLOTS / f"{path.stem}_floor.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="part of the names of the cases to time")
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--errors", action="store_true", help="then print errors over seeds")
    parser.add_argument("--plot", type=Path, help="CSV to draw")
    options = parser.parse_args()
    if options.plot:
        return plot(options.plot)
    rates = measure_rates()
    print(f"copy {rates.bandwidth / 1e12:.2f} TB/s, matrix product {rates.product / 1e12:.0f} TFLOP/s", flush=True)
    rows: list[dict[str, Any]] = []
    for runs in (mixer_runs, step_runs, scan_runs):
        for run in runs(options.cases, rates):
            rows.append(measure(run))
            print(" ".join(f"{v}" for v in list(rows[-1].values())[:7]), flush=True)
            write_csv(options.out, FIELDS, rows)
    if options.errors:
        print_errors()
    return None


if __name__ == "__main__":
    main()
