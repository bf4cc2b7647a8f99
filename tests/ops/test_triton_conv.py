"""The Triton convolution against the PyTorch one in fp64: outputs, states and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mamba2_hf.errors import BackendError
from mamba2_hf.ops import causal_conv1d, causal_conv1d_update
from mamba2_hf.ops.conv import op
from mamba2_hf.ops.dispatch import backend_module

pytestmark = pytest.mark.usefixtures("poison", "triton_serves")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of the norm


def check(
    B: int = 2,
    T: int = 41,
    C: int = 5,
    K: int = 4,
    *,
    bias: bool = True,
    initial: bool = True,
    activation: str | None = "silu",
    seq_idx: list[list[int]] | None = None,
    cu_seqlens: list[int] | None = None,
    final: bool = True,
    dtype: torch.dtype = torch.float32,
) -> None:
    """x is a view in the middle of wider rows, as in a mixer."""
    generator = torch.Generator().manual_seed(T * C + K)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    states = B if cu_seqlens is None else len(cu_seqlens) - 1
    tensors = {"rows": draw(B, T, C + 7), "weight": draw(C, K)}
    tensors |= {"bias": draw(C)} if bias else {}
    tensors |= {"initial": draw(states, C, K - 1)} if initial else {}
    gradients = draw(B, T, C), draw(states, C, K - 1)

    def run(backend: str, device: str, kind: torch.dtype) -> dict[str, Tensor]:
        given = {k: v.to(device, kind).clone().requires_grad_() for k, v in tensors.items()}
        y, states = causal_conv1d(
            given["rows"][..., 3 : 3 + C],
            given["weight"],
            given.get("bias"),
            activation=activation,
            initial_states=given.get("initial"),
            seq_idx=None if seq_idx is None else torch.tensor(seq_idx, device=device),
            cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens, device=device),
            return_final_states=True,
            backend=backend,
        )
        outputs = [y, states] if final and K > 1 else [y]
        grads = [g.to(device, kind) for g in gradients]
        found = torch.autograd.grad(outputs, list(given.values()), grads[: len(outputs)], allow_unused=True)
        return {"y": y, "states": states} | {f"d{k}": g for k, g in zip(given, found, strict=True) if g is not None}

    expected = run("torch", "cpu", torch.float64)
    actual = run("triton", DEVICE, dtype)
    for name, tensor in expected.items():
        assert actual[name].dtype == dtype
        assert actual[name].shape == tensor.shape
        error = (actual[name].double().cpu() - tensor).norm()
        assert error <= TOLERANCE[dtype] * tensor.norm(), (name, error, tensor.norm())


@pytest.mark.parametrize("K", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("T", [1, 3, 41])
def test_any_length_and_taps(T: int, K: int) -> None:
    check(T=T, K=K)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": False},
        {"initial": False},
        {"activation": None},
        {"final": False},
        {"B": 3, "C": 130, "T": 9},
        {"C": 8, "T": 300, "B": 1},
        {"dtype": torch.float16, "T": 20},
    ],
)
def test_options(options: dict[str, Any]) -> None:
    check(**options)


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("K", [2, 4])
def test_documents_by_index(K: int, initial: bool) -> None:
    ids = [[0, 0, 1, 1, 1, 2, 0, 0, 0, 0, 0, 7], [5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 6, 6]]
    check(T=12, K=K, seq_idx=ids, initial=initial)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_negative_index_is_padding(backend: str) -> None:
    """It comes out as zeros, and nothing of it reaches gradients; documents beside it are as if they were alone."""
    seq_idx = [[-1, -1, 0, 0, 0, 0, 3, 3, -1], [1, 1, 1, 1, -1, -1, -1, 2, 2]]
    device = DEVICE if backend == "triton" else "cpu"
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=generator) for size in ((2, 9, 5), (5, 4), (5,)))
    x, weight, bias = (t.to(device).requires_grad_() for t in (x, weight, bias))
    initial = torch.ones(2, 5, 3, device=device, requires_grad=True)
    y = causal_conv1d(
        *(x, weight, bias),
        activation="silu",
        initial_states=initial,
        seq_idx=torch.tensor(seq_idx, device=device, dtype=torch.int32),
        backend=backend,
    )
    dx, dinitial = torch.autograd.grad(y.sum(), (x, initial))
    places = [(0, slice(2, 6), False), (0, slice(6, 8), False), (1, slice(0, 4), True), (1, slice(7, 9), False)]
    expected = torch.zeros_like(y)
    for row, columns, continues in places:
        history = initial[row : row + 1] if continues else None
        alone = causal_conv1d(
            *(x[row : row + 1, columns], weight, bias), activation="silu", initial_states=history, backend="torch"
        )
        expected[row, columns] = alone[0]
    torch.testing.assert_close(y, expected)
    wanted = torch.autograd.grad(expected.sum(), (x, initial))
    torch.testing.assert_close(dx, wanted[0])
    torch.testing.assert_close(dinitial, wanted[1])
    assert not dinitial[0].any()


@pytest.mark.parametrize("bounds", [[0, 12], [0, 5, 5, 6, 11], [0, 0, 1, 2, 12], [0, 0], [0, 3, 9]])
@pytest.mark.parametrize("initial", [True, False])
def test_documents_by_bounds(bounds: list[int], initial: bool) -> None:
    check(B=1, T=12, cu_seqlens=bounds, initial=initial)


def test_documents_across_runs() -> None:
    """A program walks 32 tokens here: documents begin just before and just after its first one."""
    check(B=1, T=100, cu_seqlens=[0, 28, 29, 31, 33, 57, 58, 64, 96])
    check(B=1, T=100, seq_idx=[[i // 29 for i in range(100)]])


def test_the_same_bits_twice() -> None:
    x, weight = torch.randn(2, 50, 8, device=DEVICE), torch.randn(8, 4, device=DEVICE, requires_grad=True)
    options = {"activation": "silu", "backend": "triton"}
    first, second = (torch.autograd.grad(causal_conv1d(x, weight, **options).sum(), weight)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("T", [None, 1, 2, 5, 20])
@pytest.mark.parametrize(("K", "L"), [(4, 3), (4, 6), (2, 1)])
def test_update(T: int | None, K: int, L: int) -> None:
    generator = torch.Generator().manual_seed(0)
    B, C = 3, 130
    shape = (B, C) if T is None else (B, T, C)
    x, state, weight, bias = (
        torch.randn(*size, generator=generator, dtype=torch.float64) for size in (shape, (B, C, L), (C, K), (C,))
    )
    given = [t.to(DEVICE, torch.float32) for t in (x, state.clone(), weight, bias)]
    expected = causal_conv1d_update(x, state, weight, bias, activation="silu", backend="torch")
    actual = causal_conv1d_update(*given, activation="silu", backend="triton")
    torch.testing.assert_close(actual.cpu(), expected.float())
    torch.testing.assert_close(given[1].cpu(), state.float())


def test_what_cannot_be_served_is_said() -> None:
    supports = backend_module("triton").supports
    assert supports("causal_conv1d", taps=4, dtype=torch.bfloat16)[0]
    assert "9 taps" in supports("causal_conv1d", taps=9, dtype=torch.bfloat16)[1]
    assert "float64" in supports("causal_conv1d", taps=4, dtype=torch.float64)[1]
    assert "'gelu'" in supports("causal_conv1d", taps=4, dtype=torch.bfloat16, activation="gelu")[1]


def test_pytorch_serves_an_activation_that_kernels_do_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(op.ACTIVATIONS, "relu", "relu")
    x, weight, state = torch.randn(2, 5, 4), torch.randn(4, 3), torch.zeros(2, 4, 2)
    expected = causal_conv1d(x, weight, backend="torch").relu()
    assert torch.equal(causal_conv1d(x, weight, activation="relu"), expected)
    torch.testing.assert_close(causal_conv1d_update(x, state, weight, activation="relu"), expected)
    with pytest.raises(BackendError, match="activation 'relu' has no kernel"):
        causal_conv1d(x, weight, activation="relu", backend="triton")
