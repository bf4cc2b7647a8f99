"""Rotary embedding and one query a sequence on both backends, beside PyTorch in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peers import found_by_two_devices
from torch import Tensor

from mamba2_hf import ops
from mamba2_hf.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("poison", "triton_serves")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double().cpu(), expected.detach().cpu()
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("size", "turned"), [(8, 8), (10, 4), (12, 6)])
@pytest.mark.parametrize("shared", [True, False])
def test_rotary(size: int, turned: int, shared: bool, backend: str) -> None:
    """As products with complex numbers; queries and keys lie in one projection's output."""
    projected, angles = draw(2, 5, 5, size), draw(1 if shared else 2, 5, turned // 2, seed=1)

    def results(dtype: torch.dtype, device: str, run: Any) -> list[Tensor]:
        both = projected.to(device, dtype).requires_grad_()
        found = run(both[:, :, :3], both[:, :, 3:], angles.to(device, dtype))
        probes = [draw(*t.shape, seed=2).to(t) for t in found]
        return [*found, *torch.autograd.grad(found, both, probes)]

    def turn(x: Tensor, angles: Tensor) -> Tensor:
        half = turned // 2
        pairs = torch.complex(x[..., :half], x[..., half:turned]) * torch.exp(1j * angles)[:, :, None]
        return torch.cat([pairs.real, pairs.imag, x[..., turned:]], -1)

    def exact(q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        return turn(q, angles), turn(0.3 * k, angles)

    def op(q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))
        return ops.rotary(q, k, cos, sin, 0.3, backend)

    expected = results(torch.float64, "cpu", exact)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
        assert max(map(error, results(dtype, DEVICE, op), expected)) <= tolerance


@pytest.mark.parametrize(
    ("heads", "groups", "size", "keys"), [(4, 2, 16, 150), (6, 1, 10, 64), (3, 3, 32, 1), (2, 2, 8, 65)]
)
@pytest.mark.parametrize("own", [True, False])
def test_one_query(heads: int, groups: int, size: int, keys: int, own: bool) -> None:
    """Keys behind a sequence's own may be anything, as those of a cache's buffer are."""
    q, k, v = draw(3, heads, 1, size), draw(3, groups, keys, size), draw(3, groups, keys, size, seed=1)
    lengths = torch.tensor([1, max(1, keys // 2), keys]) if own else None
    expected = torch.empty_like(q)
    for row in range(3):
        seen = keys if lengths is None else int(lengths[row])
        for head in range(heads):
            kept_k, kept_v = (t[row, head // (heads // groups), :seen] for t in (k, v))
            expected[row, head, 0] = torch.softmax(0.4 * (kept_k @ q[row, head, 0]), 0) @ kept_v
            if head % (heads // groups) == heads // groups - 1:
                kept = k[row, head // (heads // groups)], v[row, head // (heads // groups)]
                for tensor in kept:
                    tensor[seen:] = float("nan")
    for backend, device, dtype, tolerance in (
        ("torch", "cpu", torch.float64, 1e-12),
        ("triton", DEVICE, torch.float32, 1e-6),
        ("triton", DEVICE, torch.float16, 3e-3),
    ):
        given = [t.to(device, dtype) for t in (q, k, v)]
        places = None if lengths is None else lengths.to(device)
        assert error(ops.attend_one(*given, places, 0.4, backend), expected) <= tolerance


LAYERS = {
    "one row": (1, 4, 2, 8, 24, 8, False),
    "several": (3, 4, 2, 8, 24, 4, True),
    "many": (33, 2, 1, 10, 20, 0, False),
    "more than a program takes": (70, 2, 1, 8, 16, 8, True),
    "each its keys": (2, 3, 3, 16, 40, 16, True),
    "one row, no rotation": (1, 2, 1, 10, 20, 0, True),
}


@pytest.mark.parametrize("case", LAYERS)
def test_step_of_a_layer(case: str) -> None:
    """Beside the parts of it in fp64; nothing but the new places of the buffers is written, or read behind them."""
    batch, heads, groups, size, width, turned, extras = LAYERS[case]
    of_k, keys = groups * size, 70
    stream, norm_weight = draw(batch, 1, width), 1 + draw(width) / 4
    weights = [draw(n, width, seed=i) / width**0.5 for i, n in enumerate((heads * size, of_k, of_k))]
    out = draw(width, heads * size) / (heads * size) ** 0.5
    biases = [draw(len(w), seed=7) if extras else None for w in (*weights, out)]
    angles = draw(1 if case == "several" else batch, 1, turned // 2, seed=1)
    cos, sin = (torch.cat([t, t], -1) if turned else None for t in (angles.cos(), angles.sin()))
    residual = draw(batch, 1, width, seed=9) if extras else None
    lengths = torch.arange(batch) % keys + 1
    held = [draw(batch, groups, keys, size, seed=seed) for seed in (3, 4)]
    for buffer in held:
        buffer.masked_fill_(torch.arange(keys)[:, None] >= lengths[:, None, None, None] - 1, float("nan"))
    numbers = (0.3, 1e-5, 1.5, 0.7, 0.6) if extras else (size**-0.5,)

    x = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + 1e-5) * norm_weight
    x = 1.5 * x if extras else x
    q, k, v = (torch.nn.functional.linear(x, *pair) for pair in zip(weights, biases, strict=False))
    q, k, v = (t.unflatten(-1, (-1, size)) for t in (q, k, v))
    if turned:
        q, k = ops.rotary(q, k, cos, sin, numbers[3] if extras else 1.0, "torch")
    elif extras:
        k = 0.7 * k
    filled = [buffer.clone() for buffer in held]
    for buffer, new in zip(filled, (k, v), strict=True):
        buffer[torch.arange(batch), :, lengths - 1] = new[:, 0]
    attended = ops.attend_one(q.transpose(1, 2), *filled, lengths, numbers[0], "torch").transpose(1, 2).flatten(2)
    attended = torch.nn.functional.linear(attended, out, biases[3])
    expected = (stream if residual is None else residual) + (0.6 if extras else 1.0) * attended

    for backend, device, dtype, tolerance in (
        ("torch", "cpu", torch.float64, 1e-12),
        ("triton", DEVICE, torch.float32, 2e-6),
        ("triton", DEVICE, torch.float16, 4e-3),
    ):

        def cast(t: Tensor | None, device: str = device, dtype: torch.dtype = dtype) -> Any:
            return None if t is None else t.to(device, dtype)

        buffers = [cast(t) for t in held]
        linears = [ops.Linear(cast(w), cast(b)) for w, b in zip((*weights, out), biases, strict=True)]
        given = (cast(stream).float() if dtype != torch.float64 else stream, *buffers, cast(norm_weight), *linears)
        call = ops.AttentionStep(*given, lengths.to(device), cast(cos), cast(sin), *numbers)
        found = ops.attention_step(call._replace(residual=cast(residual)), backend)
        assert error(found, expected) <= tolerance
        for buffer, known in zip(buffers, filled, strict=True):
            assert torch.equal(buffer.isnan().cpu(), known.isnan())
            assert error(buffer.nan_to_num(), known.nan_to_num()) <= tolerance


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "tolerance"),
    [("torch", "cpu", torch.float64, 1e-12), ("triton", DEVICE, torch.float32, 2e-6)],
    ids=["torch", "triton"],
)
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_step_of_a_layer_that_devices_share(
    rows: int, copied: bool, backend: str, device: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Each with some of the queries and their keys and values, or with the only ones of these."""
    heads, groups, size, width, places = 4, 1 if copied else 2, 8, 24, 9
    counts = (heads, groups, groups)
    weights = [draw(n * size, width, seed=i) / width**0.5 for i, n in enumerate(counts)]
    biases = [draw(n * size, seed=7) for n in counts]
    out, out_bias, norm = draw(width, heads * size) / (heads * size) ** 0.5, draw(width, seed=8), 1 + draw(width) / 4
    stream, residual = draw(rows, 1, width), draw(rows, 1, width, seed=9)
    lengths, angles = torch.arange(rows) % places + 1, draw(1, 1, size // 2)
    held = [draw(rows, groups, places, size, seed=seed) for seed in (3, 4)]

    def call(device: str, dtype: torch.dtype, rank: int, devices: int) -> ops.AttentionStep:
        def cut(t: Tensor, heads: int, dim: int = 0) -> Tensor:
            pieces = min(heads, devices)
            return t.chunk(pieces, dim)[rank * pieces // devices].to(device, dtype, copy=True)

        turns = (torch.cat([t, t], -1).to(device, dtype) for t in (angles.cos(), angles.sin()))
        linears = [ops.Linear(cut(w, n), cut(b, n)) for w, b, n in zip(weights, biases, counts, strict=True)]
        end = ops.Linear(cut(out, heads, 1), out_bias.to(device, dtype))
        buffers = [cut(buffer, groups, 1) for buffer in held]
        given = (stream.to(device, dtype), *buffers, norm.to(device, dtype), *linears, end, lengths.to(device), *turns)
        return ops.AttentionStep(*given, 0.3, 1e-5, 1.5, 0.7, 0.6, residual.to(device, dtype))

    known = call("cpu", torch.float64, 0, 1)
    expected = ops.attention_step(known, "torch")

    def step(rank: int, total: Any, peers: ops.Peers) -> Tensor:
        own = call(device, dtype, rank, 2)
        found = ops.attention_step(own._replace(peers=peers), backend, total)
        for name in ("keys", "values"):
            piece = getattr(known, name).chunk(groups, 1)[rank if groups > 1 else 0]
            assert error(getattr(own, name), piece) <= tolerance
        return found

    for found in found_by_two_devices(step, backend == "triton" and rows == 1):
        assert found.dtype == dtype
        assert error(found, expected) <= tolerance


def test_what_does_not_fit_is_named() -> None:
    q, k = torch.zeros(1, 4, 1, 8), torch.zeros(1, 3, 5, 8)
    with pytest.raises(ArgumentError, match="q has 4 heads, which is no multiple of the 3 of k"):
        ops.attend_one(q, k, k, None, 1.0)
    with pytest.raises(ArgumentError, match=r"q has shape \(1, 4, 2, 8\)"):
        ops.attend_one(q.expand(1, 4, 2, 8), k[:, :1], k[:, :1], None, 1.0)
    with pytest.raises(ArgumentError, match="cos has 3 channels"):
        ops.rotary(q, q, torch.zeros(1, 4, 3), torch.zeros(1, 4, 3))
    linear = ops.Linear(torch.zeros(8, 8))
    call = ops.AttentionStep(
        *(torch.zeros(2, 1, 8), torch.zeros(2, 1, 5, 8), torch.zeros(2, 1, 5, 8), torch.zeros(8), *[linear] * 4),
        *(torch.ones(2, dtype=torch.long), None, None, 1.0),
    )
    for change, message in (
        ({"stream": torch.zeros(2, 2, 8)}, r"stream has shape \(2, 2, 8\)"),
        ({"k": ops.Linear(torch.zeros(4, 8))}, r"k has shape \(4, 8\)"),
        ({"q": ops.Linear(torch.zeros(12, 8))}, "q has 12 outputs, which is no multiple of the 1 x 8 of k"),
        ({"keys": torch.zeros(2, 1, 8, 5).mT}, "the channels of keys lie 5 elements apart"),
        ({"v": ops.Linear(torch.zeros(8, 8), None, torch.zeros(2, 8), torch.zeros(8, 2), 1.0)}, "v has LoRA factors"),
    ):
        with pytest.raises(ArgumentError, match=message):
            ops.attention_step(call._replace(**change))
