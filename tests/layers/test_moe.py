"""Experts, whichever way they are run."""

from __future__ import annotations

import pytest
import torch

from mamba2_hf.layers import Experts


@pytest.mark.parametrize("kind", ["swiglu", "geglu", "relu2"])
def test_grouped_experts_are_the_experts_one_by_one(kind: str) -> None:
    """One of them gets no token. Gradients of tokens, weights and parameters too, twice with the same bits."""
    torch.manual_seed(0)
    experts = Experts(6, 16, 24, kind)
    x = torch.randn(11, 16, requires_grad=True)
    logits = torch.randn(11, 6)
    logits[:, 3] = -10
    weights, index = torch.softmax(logits, -1).topk(2)
    weights.requires_grad_()

    def results(run: str) -> list[torch.Tensor]:
        out = getattr(experts, run)(x, index, weights)
        probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        return [out, *torch.autograd.grad(out, [x, weights, *experts.parameters()], probe)]

    first, second, expected = results("grouped"), results("grouped"), results("forward")
    for one, other, wanted in zip(first, second, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5)


def test_grouped_experts_are_for_bf16_on_a_gpu() -> None:
    experts = Experts(2, 16, 8)
    assert not experts.can_group(torch.zeros(4, 16))
    assert not experts.bfloat16().can_group(torch.zeros(4, 16, dtype=torch.bfloat16))
