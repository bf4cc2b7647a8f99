"""The Triton norms against the PyTorch ones in fp64: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mamba2_hf.ops.dispatch import backend_module

pytestmark = pytest.mark.usefixtures("poison")
torch_backend, triton_backend = backend_module("torch"), backend_module("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of the norm


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    assert (actual.double().cpu() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("width", "group"), [(5, 5), (24, 8), (80, 80), (300, 100), (40, 1), (768, 768), (1536, 768), (5120, 5120)]
)
def test_gated_norm(width: int, group: int, gated: bool, norm_before_gate: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    B, T = 2, 3 if width > 1000 else 19

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x, wide, weight, dy = draw(B, T, width), draw(B, T, width + 6), draw(width), draw(B, T, width)
    results = []
    for backend, device, kind in ((torch_backend, "cpu", torch.float64), (triton_backend, DEVICE, dtype)):
        given = [t.to(device, kind).clone().requires_grad_() for t in (x, weight, wide)]
        z = given[2][..., :width] if gated else None
        y = backend.gated_rms_norm(given[0], z, given[1], eps=1e-5, group_size=group, norm_before_gate=norm_before_gate)
        results.append([y, *torch.autograd.grad(y, given[: 2 + gated], dy.to(device, kind))])
    for expected, actual in zip(*results, strict=True):
        close(actual, expected, dtype)


@pytest.mark.parametrize("used", ["both", "norm", "sum"])
@pytest.mark.parametrize(("dtype", "stream"), [(torch.float32, torch.float32), (torch.float16, torch.float32)])
def test_residual(dtype: torch.dtype, stream: torch.dtype, used: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shape, kinds = (2, 5, 80), (dtype, stream)
    x, residual, *gradients = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(kind) for kind in (*kinds, *kinds)
    )
    weight = torch.randn(80, generator=generator).to(dtype)
    pick = {"both": slice(0, 2), "norm": slice(0, 1), "sum": slice(1, 2)}[used]
    results = []
    for backend, device, exact in ((torch_backend, "cpu", True), (triton_backend, DEVICE, False)):
        given = [
            t.to(device, torch.float64 if exact else t.dtype).clone().requires_grad_() for t in (x, residual, weight)
        ]
        out = backend.add_rms_norm(*given, eps=1e-5)
        weights = [g.to(device, o.dtype) for g, o in zip(gradients, out, strict=True)]
        found = torch.autograd.grad(out[pick], given, weights[pick], allow_unused=True, materialize_grads=True)
        results.append([*out, *found])
    for expected, actual, kind in zip(*results, (*kinds, *kinds, dtype), strict=True):
        close(actual, expected, kind)


def test_the_same_bits_twice() -> None:
    x, weight = torch.randn(700, 80, device=DEVICE), torch.randn(80, device=DEVICE, requires_grad=True)
    options = {"eps": 1e-5, "group_size": 80, "norm_before_gate": False}
    first, second = (
        torch.autograd.grad(triton_backend.gated_rms_norm(x, x, weight, **options).sum(), weight)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_what_cannot_be_served_is_said() -> None:
    assert triton_backend.supports("gated_rms_norm", group_size=5120, dtype=torch.bfloat16)[0]
    assert "32768" in triton_backend.supports("gated_rms_norm", group_size=32768, dtype=torch.bfloat16)[1]
