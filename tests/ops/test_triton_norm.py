"""The Triton norms against the PyTorch ones in fp64: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mamba2_hf.ops import gated_rms_norm
from mamba2_hf.ops.dispatch import backend_module

pytestmark = pytest.mark.usefixtures("poison", "triton_serves")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of the norm


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    assert (actual.double().cpu() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


SIZES = [(5, 5), (24, 8), (80, 80), (300, 100), (40, 1), (768, 768), (1536, 768), (5120, 5120)]  # width, group
CASES = [(*size, torch.float32) for size in SIZES] + [(*size, torch.float16) for size in ((24, 8), (768, 768))]


@pytest.mark.parametrize("order", ["no gate", "gate first", "norm first"])
@pytest.mark.parametrize(("width", "group", "dtype"), CASES)
def test_gated_norm(width: int, group: int, dtype: torch.dtype, order: str) -> None:
    gated, norm_before_gate = order != "no gate", order == "norm first"
    generator = torch.Generator().manual_seed(width)
    B, T = 2, 3 if width > 1000 else 19

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x, wide, weight, dy = draw(B, T, width), draw(B, T, width + 6), draw(width), draw(B, T, width)
    results = []
    for backend, device, kind in (("torch", "cpu", torch.float64), ("triton", DEVICE, dtype)):
        given = [t.to(device, kind).clone().requires_grad_() for t in (x, weight, wide)]
        z = given[2][..., :width] if gated else None
        y = gated_rms_norm(given[0], z, given[1], group_size=group, norm_before_gate=norm_before_gate, backend=backend)
        results.append([y, *torch.autograd.grad(y, given[: 2 + gated], dy.to(device, kind))])
    for expected, actual in zip(*results, strict=True):
        close(actual, expected, dtype)


@pytest.mark.parametrize(("stream", "dtype"), [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_result_in_another_dtype(stream: torch.dtype, dtype: torch.dtype) -> None:
    """As of a residual stream in fp32 that is normed for half-precision weights."""
    generator = torch.Generator().manual_seed(0)
    shapes, kinds = ((2, 5, 80), (80,), (2, 5, 80)), (stream, dtype, dtype)
    tensors = [torch.randn(*s, generator=generator).to(kind) for s, kind in zip(shapes, kinds, strict=True)]
    results = []
    for backend, device, exact in (("torch", "cpu", True), ("triton", DEVICE, False)):
        x, weight, dy = (t.to(device, torch.float64 if exact else t.dtype) for t in tensors)
        given = [x.requires_grad_(), weight.requires_grad_()]
        y = gated_rms_norm(x, None, weight, dtype=weight.dtype, backend=backend)
        results.append([y, *torch.autograd.grad(y, given, dy)])
    for expected, actual, kind in zip(*results, (dtype, stream, dtype), strict=True):
        close(actual, expected, kind)


def test_the_same_bits_twice() -> None:
    x, weight = torch.randn(40, 80, device=DEVICE), torch.randn(80, device=DEVICE, requires_grad=True)
    first, second = (
        torch.autograd.grad(gated_rms_norm(x, x, weight, backend="triton").sum(), weight)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_what_cannot_be_served_is_said() -> None:
    assert backend_module("triton").supports("gated_rms_norm", group_size=5120, dtype=torch.bfloat16)[0]
    assert "32768" in backend_module("triton").supports("gated_rms_norm", group_size=32768, dtype=torch.bfloat16)[1]
