"""``torch.func`` through ops and whole models: the values of ordinary autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hybrids import make_hybrid
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from mamba2_hf import ops
from mamba2_hf.errors import BackendError
from mamba2_hf.ops import dispatch

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of forward differentiation itself
Values = dict[str, Tensor]
ROWS, TOKENS = 3, 70  # more than a chunk
PADDED = (torch.arange(TOKENS) >= 5).long()[None]
INPUTS: dict[str, dict[str, Tensor]] = {
    "plain": {},
    "padded": {"attention_mask": PADDED},
    "packed": {"seq_idx": (torch.arange(TOKENS) >= 30).long()[None]},
    "flat": {"cu_seq_lens_q": torch.tensor([0, 30, TOKENS]), "cu_seq_lens_k": torch.tensor([0, 30, TOKENS])},
}


@pytest.fixture(params=["pure", "hybrid"])
def model(request: pytest.FixtureRequest, tiny_model: Callable[..., Any]) -> Any:
    """In fp64, with attention that is differentiable in every way."""
    made = tiny_model() if request.param == "pure" else make_hybrid(attn_implementation="eager")
    return made.double()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 61, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def embeds(model: Any) -> Tensor:
    """``(1, 5, d)``."""
    source = torch.Generator().manual_seed(1)
    return torch.randn(1, 5, model.config.hidden_size, generator=source, dtype=torch.float64)


def values_of(model: Any) -> Values:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def loss_of(model: Any, **given: Any) -> Callable[[Values, Tensor], Tensor]:
    """The loss of one sequence ``(T,)``, a function of the parameters."""

    def loss(values: Values, row: Tensor) -> Tensor:
        out = functional_call(model, values, (), {"input_ids": row[None], "labels": row[None], **given})
        return out.loss

    return loss


def logits_of(model: Any) -> Callable[[Tensor], Tensor]:
    values = values_of(model)
    return lambda embeds: functional_call(model, values, (), {"inputs_embeds": embeds}).logits[..., :8]


def by_autograd(model: Any, row: Tensor, **given: Any) -> Values:
    model.zero_grad()
    model(input_ids=row[None], labels=row[None], **given).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


class TestPerSampleGradients:
    @pytest.mark.parametrize("layout", INPUTS)
    @pytest.mark.parametrize("training", [True, False])
    def test_are_those_of_each_row(self, model: Any, ids: Tensor, training: bool, layout: str) -> None:
        model.train(training)
        given = INPUTS[layout]
        found = vmap(grad(loss_of(model, **given)), (None, 0))(values_of(model), ids)
        for row in range(ROWS):
            for name, expected in by_autograd(model, ids[row], **given).items():
                assert_same(found[name][row], expected)

    def test_sum_to_the_gradient_of_what_is_batched(self, model: Any, ids: Tensor) -> None:
        loss, values = loss_of(model), values_of(model)
        found = grad(lambda values: vmap(loss, (None, 0))(values, ids).sum())(values)
        one_by_one = vmap(grad(loss), (None, 0))(values, ids)
        for name in values:
            assert_same(found[name], one_by_one[name].sum(0))

    def test_come_from_ordinary_autograd_around_what_is_batched(self, model: Any, ids: Tensor) -> None:
        loss = loss_of(model)
        expected = vmap(grad(loss), (None, 0))(values_of(model), ids)
        values = dict(model.named_parameters())
        vmap(loss, (None, 0))(values, ids).sum().backward()
        for name, parameter in values.items():
            assert_same(parameter.grad, expected[name].sum(0))


class TestDerivatives:
    def test_vjp(self, model: Any, embeds: Tensor) -> None:
        logits = logits_of(model)
        value, pull = vjp(logits, embeds)
        weight = torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(2))
        embeds.requires_grad_()
        expected = model(inputs_embeds=embeds).logits[..., :8]
        assert_same(value, expected)
        assert_same(pull(weight)[0], torch.autograd.grad(expected, embeds, weight)[0])

    def test_jacobians(self, model: Any, embeds: Tensor) -> None:
        logits = logits_of(model)
        found = jacrev(logits)(embeds)
        assert_same(found, torch.autograd.functional.jacobian(logits, embeds))
        assert_same(jacfwd(logits)(embeds), found)
        assert_same(jvp(logits, (embeds,), (embeds,))[1], (found * embeds).sum((-3, -2, -1)))

    def test_second_derivatives(self, model: Any, embeds: Tensor) -> None:
        logits = logits_of(model)

        def score(embeds: Tensor) -> Tensor:
            return logits(embeds).square().mean()

        _, expected = torch.autograd.functional.hvp(score, embeds, embeds)
        assert_same(jvp(grad(score), (embeds,), (embeds,))[1], expected)
        assert_same(grad(lambda e: (grad(score)(e) * embeds).sum())(embeds), expected)


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **packing: Any) -> Tensor:
    return ops.ssd_chunk_scan(x, dt, A, B, C, dt_softplus=True, chunk_size=4, **packing)


def inner(zxbcdt: Tensor, conv_weight: Tensor, A: Tensor, norm_weight: Tensor, **packing: Any) -> Tensor:
    return ops.mamba2_inner(
        *(zxbcdt, conv_weight, None, None, A, None),
        **{"norm_weight": norm_weight, "head_dim": 3, "n_groups": 1, "chunk_size": 4},
        **packing,
    )


def cross_entropy(hidden: Tensor, weight: Tensor, **nothing: Any) -> Tensor:
    return ops.linear_cross_entropy(hidden, weight, torch.tensor([0, 2, -100, 1], dtype=torch.int32), scale=0.7)


SHAPES: dict[Callable[..., Tensor], tuple[tuple[int, ...], ...]] = {
    scan: ((1, 9, 2, 3), (1, 9, 2), (2,), (1, 9, 1, 2), (1, 9, 1, 2)),
    inner: ((1, 9, 18), (10, 4), (2,), (6,)),
    cross_entropy: ((4, 5), (3, 5)),
}
PACKING: tuple[dict[str, Tensor], ...] = (
    {},
    {"seq_idx": torch.tensor([[0] * 5 + [1] * 4])},
    {"cu_seqlens": torch.tensor([0, 5, 9])},
)


@pytest.mark.parametrize("packing", PACKING, ids=lambda packing: next(iter(packing), "rows"))
@pytest.mark.parametrize("op", SHAPES)
def test_ops(op: Callable[..., Tensor], packing: dict[str, Tensor]) -> None:
    source = torch.Generator().manual_seed(0)
    tensors = tuple(torch.randn(shape, generator=source, dtype=torch.float64) for shape in SHAPES[op])
    every = tuple(range(len(tensors)))

    def score(*tensors: Tensor) -> Tensor:
        return op(*tensors, **packing).square().sum()

    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad(score(*leaves), leaves)
    for found, gradient in zip(grad(score, every)(*tensors), expected, strict=True):
        assert_same(found, gradient)
    several = [torch.stack([tensor, tensor]) for tensor in tensors]
    for found, gradient in zip(vmap(grad(score, every))(*several), expected, strict=True):
        assert_same(found, torch.stack([gradient, gradient]))
    slope = sum((gradient * tensor).sum() for gradient, tensor in zip(expected, tensors, strict=True))
    assert_same(jvp(score, tensors, tensors)[1], slope)
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(tensor, tensor) for tensor in tensors]
        assert_same(forward_ad.unpack_dual(score(*duals)).tangent, slope)


@pytest.mark.parametrize("op", [scan, inner])
def test_second_derivatives_of_ops(op: Callable[..., Tensor]) -> None:
    source = torch.Generator().manual_seed(0)
    first, *rest = (torch.randn(shape, generator=source, dtype=torch.float64) for shape in SHAPES[op])

    def score(first: Tensor) -> Tensor:
        return op(first, *rest).square().sum()

    assert_same(hessian(score)(first), torch.autograd.functional.hessian(score, first))


@pytest.mark.filterwarnings("error")
def test_pytorch_serves_them_where_triton_could(model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel computes has no derivatives but those of its backward."""
    model.float()
    loss, values = loss_of(model), values_of(model)
    expected = vmap(grad(loss), (None, 0))(values, ids)
    _, slope = jvp(lambda values: loss(values, ids[0]), (values,), (values,))
    monkeypatch.setattr(dispatch, "_usable", lambda device: (True, "by test"))
    found = vmap(grad(loss), (None, 0))(values, ids)
    for name in values:
        assert torch.equal(found[name], expected[name]), name
    assert torch.equal(jvp(lambda values: loss(values, ids[0]), (values,), (values,))[1], slope)
    with ops.use_backend("triton"), pytest.raises(BackendError, match=r"triton.*torch\.func"):
        grad(loss)(values, ids[0])
