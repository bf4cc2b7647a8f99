"""The Triton scan against the recurrence in fp64: in the interpreter without a GPU, compiled where there is one."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba2_hf.ops import ssd_chunk_scan
from mamba2_hf.ops.dispatch import backend_module
from mamba2_hf.ops.runtime import tables
from mamba2_hf.ops.scan import problem
from mamba2_hf.ops.scan.op import Scan
from mamba2_hf.ops.scan.reference import ssd_recurrent
from mamba2_hf.ops.spec import Packing, SSDShape

pytestmark = pytest.mark.usefixtures("poison", "triton_serves")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW_PRECISION = ("x", "dt", "B", "C", "z")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of the norm, forward and backward


def make(
    B: int = 2,
    T: int = 70,
    H: int = 4,
    P: int = 16,
    G: int = 2,
    N: int = 16,
    *,
    D: int = 1,
    z: bool = False,
    initial: bool = True,
    states: int | None = None,
    softplus: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor | None]:
    """Inputs in fp64, rounded to what the op will be given."""
    generator = torch.Generator().manual_seed(B * T + H + P + N)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "x": draw(B, T, H, P),
        "dt": draw(B, T, H) - 2 if softplus else draw(B, T, H).abs() * 0.1,
        "A": -torch.exp(draw(H)),
        "B": draw(B, T, G, N) / math.sqrt(N),
        "C": draw(B, T, G, N),
        "D": (None, draw(H), draw(H, P))[D],
        "z": draw(B, T, H, P) if z else None,
        "dt_bias": draw(H) * 0.3 if softplus else None,
        "initial_states": draw(states or B, H, P, N) if initial else None,
    }
    return {
        k: v if v is None else v.to(dtype if k in LOW_PRECISION else torch.float32).double() for k, v in inputs.items()
    }


def cast(inputs: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    return {
        k: v if v is None else v.to(DEVICE, dtype if k in LOW_PRECISION else torch.float32).clone().requires_grad_()
        for k, v in inputs.items()
    }


def scan(inputs: dict[str, Tensor | None], backend: str = "triton", **options: Any) -> tuple[Tensor, Tensor]:
    options = {"dt_softplus": True, "return_final_states": True, "backend": backend} | options
    return ssd_chunk_scan(**inputs, **options)


def oracle(inputs: dict[str, Tensor | None], cu_seqlens: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    options = {"dt_softplus": True} | options
    if cu_seqlens is None:
        return ssd_recurrent(**inputs, **options)
    x, initial = inputs["x"], inputs["initial_states"]
    ys, states = [], []
    bounds = cu_seqlens.tolist()
    for s, (start, end) in enumerate(pairwise(bounds)):
        first = initial[s : s + 1] if initial is not None else x.new_zeros(1, *x.shape[2:], inputs["B"].shape[-1])
        if start < end:
            document = {k: v[:, start:end] for k, v in inputs.items() if k in LOW_PRECISION and v is not None}
            y, first = ssd_recurrent(**{**inputs, **document, "initial_states": first}, **options)
            ys.append(y)
        states.append(first)
    ys.append(x.new_zeros(1, x.shape[1] - bounds[-1], *x.shape[2:]))
    return torch.cat(ys, 1), torch.cat(states)


def compare(
    inputs: dict[str, Tensor | None],
    dtype: torch.dtype = torch.float32,
    final: bool = True,
    conditioned: bool = True,
    **options: Any,
) -> None:
    """Outputs and every gradient against the recurrence.

    Where inputs are not well ``conditioned``, what is asked is the PyTorch backend's own error in the same dtype.
    """
    expected = {k: v if v is None else v.clone().requires_grad_() for k, v in inputs.items()}
    y0, states0 = oracle(expected, **options)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y0.shape, generator=generator).to(dtype)
    dstates = torch.randn(states0.shape, generator=generator)
    torch.autograd.backward([y0, states0][: 1 + final], [dy.double(), dstates.double()][: 1 + final])

    options = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}

    def errors(backend: Any) -> dict[str, float]:
        given = cast(inputs, dtype)
        y, states = scan(given, backend, **options)
        assert y.dtype == dtype
        assert states.dtype == torch.float32
        torch.autograd.backward([y, states][: 1 + final], [dy.to(DEVICE), dstates.to(DEVICE)][: 1 + final])
        pairs = {"y": (y, y0), "states": (states, states0)}
        pairs |= {f"d{k}": (given[k].grad, v.grad) for k, v in expected.items() if v is not None}
        return {k: ((a.double().cpu() - b).norm() / b.norm().clamp(min=1e-30)).item() for k, (a, b) in pairs.items()}

    found = errors("triton")
    beside = dict.fromkeys(found, 0.0) if conditioned else errors("torch")
    assert all(error < max(TOLERANCE[dtype], beside[k]) for k, error in found.items()), (found, beside)


SIZES = {
    "plain": {},
    "gate": {"z": True},
    "gate, D per channel": {"z": True, "D": 2},
    "no skip": {"D": 0},
    "one token": {"T": 1},
    "one chunk": {"T": 64, "B": 1},
    "one more": {"T": 65, "B": 1},
    "one less": {"T": 63, "B": 1},
    "one group": {"G": 1, "T": 40},
    "a group per head": {"G": 4, "T": 40},
    "three heads": {"H": 3, "G": 1, "T": 40},
    "P 48, N 24": {"P": 48, "N": 24, "T": 40},
    "P 24, N 20": {"P": 24, "N": 20, "T": 40},
    "P 10, N 5": {"P": 10, "N": 5, "T": 40, "z": True, "D": 2},
    "no state": {"initial": False},
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_matches_the_recurrence(size: dict[str, Any]) -> None:
    compare(make(**size))


WIDE = {
    "P 80, N 80": {"P": 80, "N": 80, "T": 70, "B": 1, "H": 2, "G": 2},
    "P 64, N 256": {"P": 64, "N": 256, "T": 70, "B": 1, "H": 2, "G": 1},
    "P 256, N 16": {"P": 256, "N": 16, "T": 70, "B": 1, "H": 2, "G": 1},
    "P 256, N 200": {"P": 256, "N": 200, "T": 33, "B": 1, "H": 1, "G": 1, "z": True, "D": 2},
}


@pytest.mark.parametrize("size", WIDE.values(), ids=WIDE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_wide_heads_and_states(size: dict[str, Any], dtype: torch.dtype) -> None:
    compare(make(**size, dtype=dtype), dtype)


def test_parts_of_wide_states() -> None:
    """Packed, with an empty document, and two groups; the last part is narrower than the others."""
    packed = make(B=1, T=70, P=16, N=144, H=2, G=2, states=3, dtype=torch.float16)
    compare(packed, torch.float16, cu_seqlens=torch.tensor([0, 33, 33, 70]))
    compare(make(B=2, T=33, P=16, N=144, H=2, G=1, initial=False, dtype=torch.float16), torch.float16)


# The interpreter multiplies bf16 tiles wrongly, so bf16 waits for a GPU.
HALF = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", HALF, ids=["fp16", "bf16"])
@pytest.mark.parametrize("size", [{}, {"z": True, "D": 2, "T": 150}, {"P": 64, "N": 128, "G": 1, "T": 130}])
def test_half_precision(dtype: torch.dtype, size: dict[str, Any]) -> None:
    compare(make(**size, dtype=dtype), dtype)


HOPPER = {
    "one token": {"T": 1},
    "one less": {"T": 63, "initial": False},
    "one chunk": {"T": 64, "D": 0},
    "one more": {"T": 65},
    "three heads": {"H": 3, "G": 1, "T": 200},
    "a group per head": {"H": 3, "G": 3, "T": 200},
    "groups": {"H": 10, "G": 2, "T": 200, "N": 64},
    "N 16": {"N": 16, "T": 200},
    "N 32": {"N": 32, "T": 200, "H": 6, "G": 1},
    "many heads": {"H": 24, "G": 1, "T": 333},
    "N 256": {"N": 256, "T": 200},
    "N 256, a group per head": {"N": 256, "T": 100, "H": 3, "G": 3},
    "N 256, many heads": {"N": 256, "H": 24, "G": 1, "T": 333},
    "N 256, gate": {"N": 256, "T": 130, "z": True},
    "P 16, N 256": {"P": 16, "N": 256, "T": 130},
    "N 144": {"N": 144, "T": 130},
    "P 128": {"P": 128, "T": 200},
    "P 128, one token": {"P": 128, "T": 1, "D": 0},
    "P 128, a group per head": {"P": 128, "T": 65, "H": 3, "G": 3},
    "P 128, many heads": {"P": 128, "T": 333, "H": 12, "G": 1},
    "P 128, N 256": {"P": 128, "N": 256, "T": 130, "G": 1},
    "P 192, N 16": {"P": 192, "N": 16, "T": 130, "H": 3, "G": 1},
    "P 256": {"P": 256, "T": 130},
    "P 128, gate": {"P": 128, "T": 130, "z": True},
    "P 128, D per channel": {"P": 128, "T": 130, "D": 2},
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("size", HOPPER.values(), ids=HOPPER)
def test_sizes_with_kernels_of_their_own(size: dict[str, Any], dtype: torch.dtype) -> None:
    compare(make(**{"P": 64, "N": 128, **size}, dtype=dtype), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [False, True])
def test_documents_and_segments_on_a_gpu(monkeypatch: pytest.MonkeyPatch, segments: bool) -> None:
    if segments:
        monkeypatch.setattr(tables, "SEGMENT", 128)
        monkeypatch.setattr(tables, "CUT_COST", 0)
    ids = torch.tensor([[0] * 20 + [1] * 12 + [0] * 65 + [7] * 603, [3] * 700, list(range(100)) + [5] * 600])
    # Eight heads: dA has one number a head, a sum that may cancel, and of four of them one may be all that counts.
    compare(make(B=3, T=700, P=64, N=128, H=8, G=2, dtype=torch.bfloat16), torch.bfloat16, seq_idx=ids)
    compare(make(B=1, T=3000, P=64, N=128, H=3, G=1, dtype=torch.bfloat16), torch.bfloat16)
    wide = make(B=3, T=700, P=128, N=256, H=8, G=2, dtype=torch.bfloat16)
    compare(wide, torch.bfloat16, seq_idx=ids)
    packed = make(B=1, T=700, P=128, N=128, H=4, G=1, states=3, dtype=torch.bfloat16)
    compare(packed, torch.bfloat16, cu_seqlens=torch.tensor([0, 65, 300, 690]))
    wide = make(B=1, T=700, P=64, N=256, H=4, G=1, states=3, dtype=torch.bfloat16)
    compare(wide, torch.bfloat16, cu_seqlens=torch.tensor([0, 65, 300, 690]))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [(1, 200_000, 2, 64, 64), (68, 8192, 64, 64, 32)], ids=["200K tokens", "2^31 elements"]
)
def test_large_tensors(sizes: tuple[int, ...]) -> None:
    """The first and the last row, the latter behind 2^31 elements of the batch."""
    B, T, H, P, N = sizes
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)

    rows = draw(B, T, H, P), draw(B, T, H) - 3, draw(B, T, 1, N) / math.sqrt(N), draw(B, T, 1, N)
    A, dy = -torch.exp(draw(H).float()), draw(B, T, H, P)

    def run(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, dy: Tensor, scan: Any) -> tuple[Tensor, ...]:
        given = tuple(t.detach().requires_grad_() for t in (x, dt, B, C))
        y, _ = scan(given[0], given[1], A.to(torch.promote_types(x.dtype, A.dtype)), given[2], given[3])
        return y, *torch.autograd.grad(y, given, dy)

    scan = partial(ssd_chunk_scan, dt_softplus=True, return_final_states=True)
    actual = run(*rows, dy, partial(scan, backend="triton"))
    for row in {0, B - 1}:
        cut = [t[row : row + 1].double() for t in (*rows, dy)]
        expected = run(*cut, partial(scan, chunk_size=128, backend="torch"))
        for a, e in zip(actual, expected, strict=True):
            assert (a[row : row + 1].double() - e).norm() < TOLERANCE[torch.bfloat16] * e.norm()


def test_only_the_outputs_have_a_gradient() -> None:
    compare(make(), final=False)


def test_only_the_states_have_a_gradient() -> None:
    inputs = make(T=40)
    expected = {k: v if v is None else v.clone().requires_grad_() for k, v in inputs.items()}
    given = cast(inputs, torch.float32)
    oracle(expected)[1].square().sum().backward()
    scan(given)[1].square().sum().backward()
    for name in ("x", "dt", "A", "B", "dt_bias", "initial_states"):
        exact = expected[name].grad
        assert (given[name].grad.double().cpu() - exact).norm() < TOLERANCE[torch.float32] * exact.norm(), name


def test_seq_idx_separates_documents() -> None:
    """Ids that come back later name another document; boundaries fall inside chunks and between them."""
    ids = torch.tensor([[0] * 20 + [1] * 12 + [0] * 65 + [7] * 53, [3] * 150])
    compare(make(T=150, z=True), seq_idx=ids)


@pytest.mark.parametrize("bounds", [[0, 150], [0, 0, 33, 33, 97, 140], [0, 64, 128], [0, 1, 2, 150]])
@pytest.mark.parametrize("initial", [True, False])
def test_cu_seqlens_packs_documents(bounds: list[int], initial: bool) -> None:
    inputs = make(B=1, T=150, states=len(bounds) - 1, initial=initial, z=initial, D=1 + initial)
    compare(inputs, cu_seqlens=torch.tensor(bounds))


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SEGMENT", 64)
    monkeypatch.setattr(tables, "CUT_COST", 0)
    for tokens in (330, 400):
        shape = SSDShape(1, tokens, 2, 16, 1, 16, 1)
        assert tables.segment_tokens(tables.current_chip(), shape, torch.float32) < 150


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("bounds", [None, [0, 10, 10, 310, 360]])
@pytest.mark.parametrize("options", [{}, {"initial": False}, {"z": True}])
def test_long_sequences_are_walked_in_segments(bounds: list[int] | None, options: dict[str, Any]) -> None:
    inputs = make(B=1, T=400, H=2, G=1, states=4 if bounds else None, **options)
    compare(inputs, **({"cu_seqlens": torch.tensor(bounds)} if bounds else {}))


@pytest.mark.usefixtures("short_segments")
def test_segments_with_documents() -> None:
    ids = torch.zeros(1, 330, dtype=torch.int32)
    ids[:, 165:] = 1
    compare(make(B=1, T=330, H=2, G=1), seq_idx=ids)


def test_steps_as_given_and_clamped() -> None:
    """Without softplus a step may be zero, and its gradient is not; one below zero counts as zero."""
    inputs = make(softplus=False)
    inputs["dt"][:, 3:6] = 0.0
    inputs["dt"][:, 9:12] = -1.0
    compare(inputs, dt_softplus=False)
    compare(make(), dt_limit=(0.05, 0.3))


def test_large_and_tiny_steps() -> None:
    inputs = make(T=100)
    inputs["dt"][:, ::7] = 30.0
    inputs["dt"][:, 1::7] = -30.0
    # Log decays run into the hundreds within a chunk, and fp32 keeps their differences to a few 1e-5.
    compare(inputs, conditioned=False)


def test_views_of_the_projection() -> None:
    """x, B, C, dt and z are read where they lie, and the rows' padding is not."""
    width = 2 * 64 + 2 * 32 + 4 + 4
    packed = torch.randn(2, 40, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    packed = packed.float().double()
    sizes = [64, 64, 32, 32, 4, 4]
    tensors = {}

    def split(source: Tensor) -> dict[str, Tensor | None]:
        z, x, B, C, dt, _ = source.split(sizes, -1)
        return {
            "x": x.unflatten(-1, (4, 16)),
            "dt": dt,
            "A": tensors["A"],
            "B": B.unflatten(-1, (2, 16)),
            "C": C.unflatten(-1, (2, 16)),
            "D": None,
            "z": z.unflatten(-1, (4, 16)),
            "dt_bias": None,
            "initial_states": None,
        }

    tensors["A"] = -torch.arange(1.0, 5.0, dtype=torch.float64)
    reference = packed.clone().requires_grad_()
    y0, _ = oracle(split(reference))
    y0.square().sum().backward()
    tensors["A"] = tensors["A"].float().to(DEVICE)
    given = packed.float().to(DEVICE).requires_grad_()
    y, _ = scan(split(given))
    y.square().sum().backward()
    assert ((y.double().cpu() - y0).norm() / y0.norm()).item() < 2e-5
    assert ((given.grad.double().cpu() - reference.grad).norm() / reference.grad.norm()).item() < 2e-5


def test_tokens_without_a_document_influence_nothing() -> None:
    inputs = cast(make(B=1, T=100, states=2), torch.float32)
    with torch.no_grad():
        for name in ("x", "B", "C", "dt"):
            inputs[name][:, 80:] = math.nan
    y, states = scan(inputs, cu_seqlens=torch.tensor([0, 30, 80], device=DEVICE))
    assert (y[:, 80:] == 0).all()
    (y.sum() + states.sum()).backward()
    for name, tensor in inputs.items():
        if tensor is not None:
            assert tensor.grad.isfinite().all(), name
            assert name not in LOW_PRECISION or (tensor.grad[:, 80:] == 0).all(), name


def test_two_runs_give_the_same_bits() -> None:
    inputs = make(T=130, dtype=torch.float16)

    def run() -> list[Tensor]:
        given = cast(inputs, torch.float16)
        y, states = scan(given)
        (y.float().square().sum() + states.square().sum()).backward()
        return [y, states, *(t.grad for t in given.values() if t is not None)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_both_ways_of_reading_tiles_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors and masked pointers."""
    chip = tables.current_chip()
    inputs = make(T=70, P=32, N=32, z=True, dtype=torch.float16)
    expected = scan(cast(inputs, torch.float16))
    monkeypatch.setattr(tables, "current_chip", lambda: chip._replace(capability=80))
    assert not tables.current_chip().has_tma
    for a, b in zip(expected, scan(cast(inputs, torch.float16)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    compare(inputs, torch.float16)


def test_sizes_that_cannot_be_served_say_why() -> None:
    shape = SSDShape(1, 8, 2, 64, 1, 128, 1)
    supports = backend_module("triton").supports
    assert supports("ssd_chunk_scan", shape=shape, dtype=torch.bfloat16)[0]
    assert supports("ssd_chunk_scan", shape=shape._replace(state=256), dtype=torch.float32)[0]
    for changed, dtype in (({"state": 257}, torch.bfloat16), ({"head_dim": 257}, torch.float32), ({}, torch.float64)):
        ok, reason = supports("ssd_chunk_scan", shape=shape._replace(**changed), dtype=dtype)
        assert not ok
        assert any(word in reason for word in ("state size 257", "head_dim 257", "float64"))


@pytest.mark.parametrize("layout", ["rows", "one row for all", "every other token"])
def test_documents_are_marked_in_the_decays(layout: str) -> None:
    """How Hopper's kernels, which the interpreter does not run, keep documents apart."""
    source = torch.Generator().manual_seed(0)
    batch, tokens, heads, Q = 3, 150, 5, 64
    x, maps = (torch.randn(batch, tokens, n, 16, generator=source).to(DEVICE) for n in (heads, 1))
    dt, A = (
        torch.rand(batch, tokens, heads, generator=source).to(DEVICE),
        -torch.rand(heads, generator=source).to(DEVICE),
    )
    seq_idx = torch.randint(0, 2, (batch, tokens), generator=source).cumsum(1).to(DEVICE)
    if layout == "one row for all":
        seq_idx = seq_idx[:1].expand(batch, tokens)
    elif layout == "every other token":
        seq_idx = seq_idx.repeat_interleave(2, 1)[:, ::2]
    given = Scan(x, dt, A, maps, maps, packing=Packing(seq_idx))
    steps = problem.cut(problem.prepare(given), Q, marks=True).steps  # (chunks, H, 2, Q)
    found = steps[:, :, 0].view(batch, -1, heads, Q).mT.flatten(1, 2)[:, :tokens]
    changes = torch.zeros(batch, tokens, 1, device=DEVICE, dtype=torch.float64)
    changes[:, 1:, 0] = (seq_idx[:, 1:] != seq_idx[:, :-1]).double()
    logs = dt.double() * A.double() / math.log(2) - 160 * changes
    expected = torch.cat([part.cumsum(1) for part in logs.split(Q, 1)], 1)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_pieces_of_a_wide_head_add_up() -> None:
    """To Hopper's kernels, which the interpreter does not run, a head of 128 channels is two with one step size."""
    inputs = cast(make(B=2, T=70, H=3, P=128, G=1, N=16), torch.float32)
    whole = problem.prepare(Scan(*inputs.values(), dt_softplus=True))
    call = whole.narrowed(64)
    assert (call.pieces, whole.pieces) == (2, 1)
    assert whole.narrowed(128) is whole is whole.narrowed(80)
    assert call.shape[:4] == (2, 70, 6, 64)
    assert call.args.x.data_ptr() == whole.args.x.data_ptr()
    torch.testing.assert_close(call.args.x[:, :, 3], whole.args.x[:, :, 1, 64:], rtol=0, atol=0)
    torch.testing.assert_close(call.args.initial_states[:, 3], whole.args.initial_states[:, 1, 64:], rtol=0, atol=0)

    pieces = problem.cut(call, 64)
    draw = torch.Generator().manual_seed(0)
    dots = torch.randn(pieces.chunks, 3, 2, 4, 64, generator=draw).to(DEVICE)
    ends = torch.randn(pieces.chunks, 3, 2, generator=draw).to(DEVICE)

    def gradients(dots: Tensor, ends: Tensor, count: int) -> tuple[Tensor, Tensor]:
        ddt = torch.empty(2, 70, 3, device=DEVICE)
        flat = dots.view(pieces.chunks, 3 * count, 4, 64), ends.view(pieces.chunks, -1)
        return ddt, problem.step_gradients(call.args, pieces.steps, *flat, ddt, pieces.per_row, None)

    with torch.no_grad():
        found = gradients(dots, ends, 2)
        expected = gradients(dots.sum(2), ends.sum(2), 1)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()
