"""Feed-forward layers on both backends, beside PyTorch in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peers import found_by_two_devices
from torch import Tensor

from mamba2_hf import ops
from mamba2_hf.errors import ArgumentError
from mamba2_hf.ops import ExpertsStep, Linear, MLPStep

pytestmark = pytest.mark.usefixtures("poison", "triton_serves")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CURVES = {"silu": F.silu, "gelu": F.gelu, "relu2": lambda x: F.relu(x).square()}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double().cpu(), expected.detach().cpu()
    return float((actual - expected).norm() / expected.norm())


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("activation", CURVES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_gated_activation(activation: str, packed: bool, gated: bool, backend: str) -> None:
    """Of odd sizes and views too, with both gradients."""
    packed = packed and gated
    tensors = [draw(3, 5, 14), *([draw(3, 5, 14, seed=1)] if gated else [])]

    def results(dtype: torch.dtype, device: str, run: Any) -> list[Tensor]:
        given = [t.to(device, dtype)[..., ::2].requires_grad_() for t in tensors]
        out = run(given[0], given[1] if gated else None)
        return [out, *torch.autograd.grad(out, given, draw(3, 5, 7, seed=2).to(out))]

    def exact(gate: Tensor, up: Tensor | None) -> Tensor:
        active = CURVES[activation](0.7 * gate)
        return active if up is None else active * up

    def op(gate: Tensor, up: Tensor | None) -> Tensor:
        if packed and up is not None:
            return ops.gated_activation(torch.cat([gate, up], -1), None, activation, 0.7, packed, backend)
        return ops.gated_activation(gate, up, activation, 0.7, backend=backend)

    expected = results(torch.float64, "cpu", exact)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
        actual = results(dtype, DEVICE, op)
        assert {t.dtype for t in actual} == {dtype}
        assert max(map(error, actual, expected)) <= tolerance


@pytest.mark.parametrize("activation", CURVES)
@pytest.mark.parametrize(
    ("gated", "bias", "residual"), [(True, False, False), (True, True, True), (False, True, False)]
)
def test_mlp_step(activation: str, gated: bool, bias: bool, residual: bool) -> None:
    d, width = 20, 37
    given: dict[str, Any] = {"stream": draw(1, 1, d), "norm": draw(d), "up": draw(width, d), "down": draw(d, width)}
    given |= {"gate": draw(width, d, seed=1)} if gated else {}
    given |= {"up_bias": draw(width), "down_bias": draw(d, seed=3)} if bias else {}
    given |= {"gate_bias": draw(width, seed=4)} if bias and gated else {}
    given |= {"residual": draw(1, 1, d, seed=5)} if residual else {}
    get = given.get
    x = normed(given["stream"], given["norm"], 1e-3)
    up = F.linear(x, given["up"], get("up_bias"))
    inner = CURVES[activation](0.6 * (F.linear(x, given["gate"], get("gate_bias")) if gated else up))
    inner = inner * up if gated else inner
    expected = get("residual", given["stream"]) + 0.3 * F.linear(inner, given["down"], get("down_bias"))
    for backend, device, dtype, tolerance in (
        ("torch", "cpu", torch.float64, 1e-12),
        ("triton", DEVICE, torch.float32, 1e-6),
    ):
        cast = {name: t.to(device, dtype) for name, t in given.items()}.get
        call = MLPStep(
            *(cast("stream"), cast("norm"), cast("gate"), cast("gate_bias")),  # type: ignore[arg-type]
            *(Linear(cast("up"), cast("up_bias")), Linear(cast("down"), cast("down_bias"))),  # type: ignore[arg-type]
            *(activation, 1e-3, 0.6, 0.3, cast("residual")),
        )
        assert error(ops.mlp_step(call, backend), expected) <= tolerance


@pytest.mark.parametrize(("gated", "top_k", "rows"), [(True, 3, 1), (False, 1, 1), (True, 6, 1), (True, 2, 5)])
def test_experts_step(gated: bool, top_k: int, rows: int) -> None:
    d, width, experts = 20, 9, 6
    tensors = [
        draw(rows, 1, d),
        draw(d),
        draw(experts, d),
        draw(experts, (1 + gated) * width, d),
        draw(experts, d, width),
    ]
    stream, norm, router, inner, down = tensors
    normed_rows = normed(stream, norm, 1e-3)[:, 0]
    out = torch.zeros_like(normed_rows)
    for row, x in enumerate(normed_rows):
        chosen, index = (router @ x).topk(top_k)
        for share, expert in zip(torch.softmax(chosen, -1), index, strict=True):
            both = inner[expert] @ x
            value = F.silu(both[:width]) * both[width:] if gated else F.silu(both)
            out[row] += share * (down[expert] @ value)
    for backend, device, dtype, tolerance in (
        ("torch", "cpu", torch.float64, 1e-12),
        ("triton", DEVICE, torch.float32, 1e-6),
    ):
        cast = [t.to(device, dtype) for t in tensors]
        call = ExpertsStep(*cast, top_k, "silu", gated, 1e-3, 0.3, residual=2 * cast[0])  # type: ignore[arg-type]
        after, logits = ops.experts_step(call, backend)
        assert error(after, 2 * stream + 0.3 * out[:, None]) <= tolerance
        assert error(logits, normed_rows @ router.T) <= tolerance


SHARED = [("torch", "cpu", torch.float64, 1e-12), ("triton", DEVICE, torch.float32, 1e-6)]


@pytest.mark.parametrize(("backend", "device", "dtype", "tolerance"), SHARED, ids=["torch", "triton"])
@pytest.mark.parametrize(("gated", "bias", "residual"), [(True, True, True), (False, False, False)])
def test_mlp_step_that_devices_share(
    gated: bool, bias: bool, residual: bool, backend: str, device: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Each with some of the inner channels; bias and residual are added once."""
    d, width = 20, 38
    stream, norm, up, down = draw(1, 1, d), draw(d), draw(width, d), draw(d, width)
    gate = draw(width, d, seed=1) if gated else None
    gate_bias, up_bias, down_bias = (draw(n, seed=2) if bias else None for n in (width, width, d))
    to = draw(1, 1, d, seed=5) if residual else None

    def call(device: str, dtype: torch.dtype, own: slice) -> MLPStep:
        def cast(t: Tensor | None) -> Any:
            return None if t is None else t.to(device, dtype)

        rows = [cast(None if t is None else t[own]) for t in (gate, gate_bias if gated else None, up, up_bias)]
        ends = Linear(cast(down[:, own]), cast(down_bias))
        linears = (*rows[:2], Linear(*rows[2:]), ends)
        return MLPStep(cast(stream), cast(norm), *linears, "silu", 1e-3, 0.6, 0.3, cast(to))

    expected = ops.mlp_step(call("cpu", torch.float64, slice(None)), "torch")

    def step(rank: int, total: Any, peers: ops.Peers) -> Tensor:
        own = call(device, dtype, slice(rank * 19, rank * 19 + 19))
        return ops.mlp_step(own._replace(peers=peers), backend, total)

    for found in found_by_two_devices(step, backend == "triton"):
        assert found.dtype == dtype
        assert error(found, expected) <= tolerance


@pytest.mark.parametrize(("backend", "device", "dtype", "tolerance"), SHARED, ids=["torch", "triton"])
@pytest.mark.parametrize(("gated", "rows"), [(True, 1), (False, 1), (True, 5)])
def test_experts_step_that_devices_share(
    gated: bool, rows: int, backend: str, device: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Each with some of the inner channels of every expert."""
    d, width, experts = 20, 10, 6
    stream, norm, router = draw(rows, 1, d), draw(d), draw(experts, d)
    inner, down = draw(experts, (1 + gated) * width, d), draw(experts, d, width)

    def call(device: str, dtype: torch.dtype, own: slice) -> ExpertsStep:
        halves = torch.cat([half[:, own] for half in inner.split(width, 1)], 1)
        cast = [t.to(device, dtype) for t in (stream, norm, router, halves, down[..., own])]
        return ExpertsStep(*cast, 2, "silu", gated, 1e-3, 0.3, residual=2 * cast[0])  # type: ignore[arg-type]

    expected, expected_logits = ops.experts_step(call("cpu", torch.float64, slice(None)), "torch")

    def step(rank: int, total: Any, peers: ops.Peers) -> Tensor:
        own = call(device, dtype, slice(rank * 5, rank * 5 + 5))
        after, logits = ops.experts_step(own._replace(peers=peers), backend, total)
        assert error(logits, expected_logits) <= tolerance
        return after

    for found in found_by_two_devices(step, backend == "triton"):
        assert found.dtype == dtype
        assert error(found, expected) <= tolerance


def test_what_does_not_fit_is_named() -> None:
    x = torch.zeros(1, 1, 4)
    weights = (torch.ones(4), torch.zeros(6, 4), None, Linear(torch.zeros(6, 4)), Linear(torch.zeros(4, 6)))
    ops.mlp_step(MLPStep(x, *weights, "silu"))
    with pytest.raises(ArgumentError, match="activation is 'tanh', expected one of silu, gelu, relu2"):
        ops.mlp_step(MLPStep(x, *weights, "tanh"))
    with pytest.raises(ArgumentError, match=r"up has shape \(6, 4\)"):
        ops.mlp_step(MLPStep(torch.zeros(1, 1, 5), *weights, "silu"))
    experts = (torch.ones(4), torch.zeros(3, 4), torch.zeros(3, 12, 4), torch.zeros(3, 4, 6))
    with pytest.raises(ArgumentError, match="top_k is 7, expected 1 to 3 experts"):
        ops.experts_step(ExpertsStep(x, *experts, 7, "silu"))
    with pytest.raises(ArgumentError, match="gate"):
        ops.gated_activation(x.half(), x)
    with pytest.raises(ArgumentError, match="packed gate has 3 channels"):
        ops.gated_activation(x[..., :3], None, packed=True)
