"""Whole models on the Triton backend, chosen as on a GPU: its kernels run in the interpreter where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hybrids import make_hybrid
from torch import Tensor

from mamba2_hf.ops import dispatch, use_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"num_heads": 4, "head_dim": 16}  # a program per head: the fewer, the faster the interpreter


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets Triton serve the CPU, and lists the ops that it served."""
    monkeypatch.setattr(dispatch, "_usable", torch.compiler.assume_constant_result(lambda device: (True, "by test")))
    triton, ops = dispatch.backend_module("triton"), []
    supports = triton.supports

    def noted(op: str, **call: Any) -> tuple[bool, str]:
        ops.append(op)
        return supports(op, **call)

    monkeypatch.setattr(triton, "supports", noted)
    return ops


@pytest.fixture
def tokens() -> Tensor:
    """``(2, 13)``."""
    return torch.randint(3, 61, (2, 13), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def on_both(run: Callable[[], Any]) -> tuple[Any, Any]:
    with use_backend("torch"):
        expected = run()
    return expected, run()


@pytest.mark.parametrize("packing", ["plain", "padded", "packed"])
def test_loss_and_gradients(tiny_model: Callable[..., Any], tokens: Tensor, served: list[str], packing: str) -> None:
    model = tiny_model(**SIZES).to(DEVICE).train()
    inputs = {
        "plain": {},
        "padded": {"attention_mask": (torch.arange(13) >= torch.tensor([[4], [0]])).long().to(DEVICE)},
        "packed": {"seq_idx": torch.arange(13).div(5, rounding_mode="floor").expand(2, 13).to(DEVICE)},
    }[packing]

    def run() -> tuple[Tensor, ...]:
        loss = model(tokens, labels=tokens, **inputs).loss
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    for expected, actual in zip(*on_both(run), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert set(served) == {"gated_rms_norm", "linear_cross_entropy", "mamba2_layer"}


def test_generation_steps_through_the_cache(tiny_model: Callable[..., Any], tokens: Tensor, served: list[str]) -> None:
    model = tiny_model(**SIZES).to(DEVICE)
    mask = (torch.arange(13) >= torch.tensor([[4], [0]])).long().to(DEVICE)

    def run() -> tuple[Any, ...]:
        out = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        states = [(layer.conv, layer.ssm) for layer in out.past_key_values.layers]
        return out.sequences, torch.stack(out.logits), *(state for pair in states for state in pair)

    for expected, actual in zip(*on_both(run), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert set(served) == {"gated_rms_norm", "mamba2_layer", "mamba2_layer_step"}


@pytest.mark.parametrize("name", ["plain", "parallel", "sigmoid"])
def test_hybrids(name: str, tokens: Tensor, served: list[str]) -> None:
    """Padded and packed, then a step through the cache; the mixers' variants of gate, norm and multipliers included."""
    model = make_hybrid(name, ssm_num_heads=2, ssm_head_dim=16, ssm_state_size=16).to(DEVICE)
    inputs = {
        "attention_mask": (torch.arange(13) >= torch.tensor([[4], [0]])).long().to(DEVICE),
        "seq_idx": torch.arange(13).div(5, rounding_mode="floor").expand(2, 13).to(DEVICE),
    }

    def run() -> tuple[Tensor, ...]:
        loss = model(tokens, labels=tokens, use_cache=False, **inputs).loss
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        with torch.no_grad():
            out = model(tokens, **inputs)
            step = model(tokens[:, :1], past_key_values=out.past_key_values).logits
        return loss, step, *(gradient for gradient in gradients if gradient is not None)

    for expected, actual in zip(*on_both(run), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert set(served) >= {"gated_rms_norm", "mamba2_layer", "mamba2_layer_step"}


@pytest.mark.slow
def test_one_graph(tiny_model: Callable[..., Any], tokens: Tensor, served: list[str]) -> None:
    """A training step and a cached step compile without a break, the backend found while tracing."""
    model = tiny_model(**SIZES).to(DEVICE)

    def train() -> Tensor:
        return model(tokens, labels=tokens, use_cache=False).loss

    expected = torch.autograd.grad(train(), list(model.parameters()))
    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(), list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(a, b)

    with torch.no_grad():
        caches = [model(tokens, use_cache=True).past_key_values for _ in range(2)]
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            logits = [
                m(tokens[:, :1], past_key_values=cache).logits for m, cache in zip((model, step), caches, strict=True)
            ]
            torch.testing.assert_close(*logits)
    assert {"gated_rms_norm", "mamba2_layer", "mamba2_layer_step"} <= set(served)
