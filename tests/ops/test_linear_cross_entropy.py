"""The loss of a head whose logits are never held whole, against logits and their loss apart, in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mamba2_hf.errors import ArgumentError, BackendError
from mamba2_hf.ops import linear_cross_entropy
from mamba2_hf.ops.cross_entropy import op as loss
from mamba2_hf.ops.dispatch import backend_module

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, WIDTH, VOCAB = 37, 24, 61


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight rows a chunk, of which the last is not full."""
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", {"cpu": 8 * VOCAB, "cuda": 8 * VOCAB})


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A backend that serves where the tests run: Triton's in its interpreter, on a CPU."""
    module = backend_module(request.param)
    if request.param == "triton" and DEVICE == "cpu":
        monkeypatch.setattr(backend_module("torch"), "cross_entropy_rows", module.cross_entropy_rows)
    return request.param


def draw(rows: int = ROWS, vocab: int = VOCAB, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=source, dtype=torch.float64)
    weight = torch.randn(vocab, WIDTH, generator=source, dtype=torch.float64)
    labels = torch.randint(0, vocab, (rows,), generator=source)
    return hidden, weight, labels.where(torch.rand(rows, generator=source) > 0.2, -100)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, scale: float = 1.0) -> Tensor:
    return F.cross_entropy(scale * (hidden @ weight.T), labels, reduction="sum")


def leaves(*tensors: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [t.detach().to(DEVICE, dtype).requires_grad_() for t in tensors]


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Triton takes no fp64, and its interpreter no bf16.
_BY_TRITON = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
SERVED = [("torch", dtype) for dtype in TOLERANCE] + [("triton", dtype) for dtype in _BY_TRITON]


class TestValues:
    @pytest.mark.parametrize(("backend", "dtype"), SERVED, indirect=["backend"])
    @pytest.mark.parametrize("scale", [1.0, 0.3, -2.0])
    def test_loss_and_gradients_are_those_of_logits(self, backend: str, dtype: torch.dtype, scale: float) -> None:
        hidden, weight, labels = draw()
        given = leaves(hidden, weight, dtype=dtype)
        exact = leaves(*given)
        labels = labels.to(DEVICE)
        expected, actual = plain(*exact, labels, scale), linear_cross_entropy(*given, labels, scale=scale)
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert actual.item() == pytest.approx(expected.item(), rel=TOLERANCE[dtype])
        # An upstream factor that 16 bits cannot hold exactly.
        for found, wanted, leaf in zip(
            torch.autograd.grad(actual * 0.7123 / 3000, given),
            torch.autograd.grad(expected * 0.7123 / 3000, exact),
            given,
            strict=True,
        ):
            assert found.dtype == leaf.dtype
            assert distance(found, wanted) < TOLERANCE[dtype]

    @given(rows=st.integers(0, 40), vocab=st.integers(2, 150), ignored=st.booleans(), seed=st.integers(0, 99))
    def test_any_size(self, rows: int, vocab: int, ignored: bool, seed: int) -> None:
        hidden, weight, labels = draw(rows, vocab, seed)
        if ignored:
            labels = torch.full_like(labels, -100)
        one, other = leaves(hidden, weight), leaves(hidden, weight)
        labels = labels.to(DEVICE)
        expected, actual = plain(*one, labels), linear_cross_entropy(*other, labels, backend="torch")
        torch.testing.assert_close(actual, expected)
        for a, b in zip(torch.autograd.grad(actual, other), torch.autograd.grad(expected, one), strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("vocab", [1, 64, 4096, 5003])
    def test_kernel_over_blocks(self, backend: str, vocab: int) -> None:
        """And with labels in 32 bits."""
        hidden, weight, labels = draw(5, vocab)
        one, other = leaves(hidden, weight), leaves(hidden, weight, dtype=torch.float32)
        labels = labels.to(DEVICE)
        expected, actual = plain(*one, labels), linear_cross_entropy(*other, labels.int())
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
        for a, b in zip(torch.autograd.grad(actual, other), torch.autograd.grad(expected, one), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)

    def test_logits_of_any_size_overflow_nothing(self, backend: str) -> None:
        hidden, weight, labels = draw()
        one, other = leaves(hidden * 1e3, weight * 1e3), leaves(hidden * 1e3, weight * 1e3, dtype=torch.float32)
        labels = labels.to(DEVICE)
        expected, actual = plain(*one, labels), linear_cross_entropy(*other, labels)
        assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
        assert all(g.isfinite().all() for g in torch.autograd.grad(actual, other))

    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # from Triton's interpreter
    def test_infinities_and_nans_stay_in_their_rows(self, backend: str) -> None:
        hidden, weight, labels = draw()
        hidden[3, 0], hidden[4, 0], hidden[5, 0] = float("nan"), float("inf"), float("nan")
        labels[3], labels[4], labels[5] = 1, 2, -100
        given = leaves(hidden, weight, dtype=torch.float32)
        total = linear_cross_entropy(*given, labels.to(DEVICE))
        (dhidden,) = torch.autograd.grad(total, given[:1])
        assert total.isnan()
        assert dhidden[[3, 4]].isnan().all(1).all()
        assert torch.equal(dhidden[5], torch.zeros_like(dhidden[5]))
        assert dhidden[6:].isfinite().all()

    @pytest.mark.skipif(DEVICE == "cuda", reason="a label that is no index gives NaN there")
    def test_a_label_that_is_no_index_is_not_ignored(self) -> None:
        hidden, weight, labels = draw()
        labels[0] = VOCAB
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            linear_cross_entropy(hidden, weight, labels)

    def test_the_kernel_marks_a_label_that_is_no_index(self) -> None:
        logits, labels = torch.randn(3, VOCAB, device=DEVICE), torch.tensor([0, VOCAB, -1], device=DEVICE)
        losses = backend_module("triton").cross_entropy_rows(logits, labels, 1.0, -100, True)
        assert losses.isnan().tolist() == [False, True, True]


class TestAutograd:
    @pytest.mark.parametrize("frozen", [0, 1])
    def test_what_is_frozen_gets_no_gradient(self, frozen: int) -> None:
        hidden, weight, labels = draw()
        given, exact = leaves(hidden, weight), leaves(hidden, weight)
        given[frozen].requires_grad_(False)
        linear_cross_entropy(*given, labels.to(DEVICE)).backward()
        plain(*exact, labels.to(DEVICE)).backward()
        assert given[frozen].grad is None
        torch.testing.assert_close(given[1 - frozen].grad, exact[1 - frozen].grad)

    def test_without_gradients_none_are_computed(self) -> None:
        hidden, weight, labels = (t.to(DEVICE) for t in draw())
        with torch.no_grad():
            found = linear_cross_entropy(hidden, weight.requires_grad_(), labels)
        assert not found.requires_grad
        torch.testing.assert_close(found, plain(hidden, weight.detach(), labels))

    def test_a_second_derivative_is_refused(self) -> None:
        given = leaves(*draw()[:2])
        total = linear_cross_entropy(*given, draw()[2].to(DEVICE))
        with pytest.raises(BackendError, match="return_logits=True"):
            torch.autograd.grad(total, given, create_graph=True)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, dtype: torch.dtype) -> None:
        hidden, weight, labels = draw()
        one, other = leaves(hidden, weight), leaves(hidden, weight, dtype=torch.float32)
        with torch.autocast(DEVICE, dtype):
            actual = linear_cross_entropy(*other, labels.to(DEVICE))
        expected = plain(*one, labels.to(DEVICE))
        assert actual.item() == pytest.approx(expected.item(), rel=TOLERANCE[dtype])
        for a, b in zip(torch.autograd.grad(actual, other), torch.autograd.grad(expected, one), strict=True):
            assert a.dtype == torch.float32
            assert distance(a, b) < TOLERANCE[dtype]

    def test_compiled_is_one_graph_for_any_number_of_rows(self, backend: str) -> None:
        graphs = []

        def count(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(lambda *a: linear_cross_entropy(*a) / 7, fullgraph=True, dynamic=True, backend=count)
        for rows in (37, 12, 80):
            hidden, weight, labels = draw(rows)
            one, other = (leaves(hidden, weight, dtype=torch.float32) for _ in range(2))
            labels = labels.to(DEVICE)
            found, wanted = compiled(*one, labels), linear_cross_entropy(*other, labels) / 7
            torch.testing.assert_close(found, wanted)
            pairs = zip(torch.autograd.grad(found, one), torch.autograd.grad(wanted, other), strict=True)
            for a, b in pairs:
                torch.testing.assert_close(a, b)
        assert len(graphs) == 1

    def test_the_op_is_what_pytorch_takes_it_for(self) -> None:
        given = leaves(*draw()[:2], dtype=torch.float32)
        arguments = (*given, draw()[2].to(DEVICE), 0.5, -100, torch.float32, True, True, "torch")
        torch.library.opcheck(torch.ops.mamba2_hf.linear_cross_entropy.default, arguments)


class TestMemory:
    def test_no_tensor_is_larger_than_a_chunk_of_logits_or_an_input(self) -> None:
        rows, vocab = 200, 500
        largest = 0

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                nonlocal largest
                out = func(*args, **(kwargs or {}))
                for tensor in out if isinstance(out, (tuple, list)) else (out,):
                    if isinstance(tensor, Tensor):
                        largest = max(largest, tensor.untyped_storage().nbytes() // tensor.element_size())
                return out

        hidden, weight, labels = draw(rows, vocab)
        given = [t.to(DEVICE, torch.float32) for t in (hidden, weight)]
        with Watch():
            loss.loss_and_gradients(*given, labels.to(DEVICE), 1.0, -100, torch.float32, True, True, "torch")
        assert largest <= vocab * WIDTH
        assert largest < rows * vocab / 8

    def test_a_chunk_keeps_a_gpu_busy_and_within_its_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        for vocab in (50288, 32000, 131072, 262144):
            rows = loss.rows_per_chunk(vocab, torch.device("cuda"))
            assert 2**27 < rows * vocab <= 2**28


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels has shape \(3,\), expected \(37,\)"),
        ({"labels": torch.zeros(ROWS)}, "labels has dtype torch.float32, expected an integer dtype"),
        ({"weight": torch.zeros(VOCAB, 5, dtype=torch.float64)}, r"weight has shape \(61, 5\), expected \(61, 24\)"),
        ({"weight": torch.zeros(VOCAB, WIDTH)}, "hidden has dtype torch.float64, weight torch.float32"),
        ({"hidden": torch.zeros(2, 3, WIDTH)}, r"hidden has 3 dimensions \(2, 3, 24\), expected 2"),
        ({"scale": float("nan")}, "scale is nan"),
    ],
)
def test_bad_calls_are_refused(changes: dict[str, Any], message: str) -> None:
    call = dict(zip(("hidden", "weight", "labels"), draw(), strict=True)) | changes
    with pytest.raises(ArgumentError, match=message):
        linear_cross_entropy(**call)
