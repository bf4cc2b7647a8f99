"""Models on slices of sequences, in threads of one process, against the same models on whole ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slices import in_slices
from ssd_cases import relative_error
from torch import Tensor

from mamba2_hf import Mamba2Config, Mamba2ForSequenceClassification
from mamba2_hf.distributed import Context, Group, context_parallel
from mamba2_hf.distributed.attention import owner_of, pieces_of
from mamba2_hf.errors import ArgumentError

with pytest.MonkeyPatch.context() as process:  # as which the worker's file takes itself
    process.setenv("RANK", "0")
    process.setenv("WORLD_SIZE", "1")
    from distributed_worker import make_hybrid, make_model

ROWS, TOKENS = 2, 17


class Alone(Group):
    """A group of one."""

    def __init__(self) -> None:
        super().__init__(None, 0, 1)

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor[None].clone()

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.clone()


def ids(rows: int = ROWS, tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, 62, (rows, tokens), generator=torch.Generator().manual_seed(0))


def documents() -> Tensor:
    return torch.tensor([[0] * 3 + [1] * 4 + [2] * 10, [5] * 6 + [6] * 6 + [5] * 5])


def right_padding() -> Tensor:
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[0, 12:] = 0
    return mask


def positions() -> Tensor:
    return torch.cat([torch.arange(n) for n in (5, 1, 11)]).expand(ROWS, -1)


INPUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "seq_idx": {"seq_idx": documents()},
    "position_ids": {"position_ids": positions()},
    "right padding": {"attention_mask": right_padding()},
    "right padding and documents": {"attention_mask": right_padding(), "seq_idx": documents()},
}
MODELS: dict[str, Any] = {
    "pure": make_model,
    "hybrid": make_hybrid,
    "window and convolution in attention": lambda: make_hybrid(
        layer_blocks=["ssd moe", "sliding_attention", "attention", "shared>ssd"],
        num_hidden_layers=4,
        sliding_window=5,
        attention_conv_kernel=4,
        ssm_norm="none",
    ),
    "eager attention, scaled": lambda: make_hybrid(
        attn_implementation="eager", residual_multiplier=0.7, ssm_multipliers=[0.5, 1.5, 2.0, 0.8, 1.1]
    ),
}


def assert_like_one_process(model: Any, size: int, input_ids: Tensor, **inputs: Any) -> None:
    """Loss, hidden states and every gradient."""
    model = model.double().train()
    labels = input_ids.masked_fill(input_ids % 7 == 0, -100)
    tokens = input_ids.shape[1]

    def run(model: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        out = model(input_ids, labels=labels, output_hidden_states=True, **inputs)
        names, parameters = zip(*model.named_parameters(), strict=True)
        found = torch.autograd.grad(out.loss, parameters, allow_unused=True)
        gradients = {name: g for name, g in zip(names, found, strict=True) if g is not None}
        return out.loss.detach(), torch.stack(out.hidden_states, 2).detach(), gradients

    def slice_of(group: Group) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        spread = context_parallel(copy.deepcopy(model), group)
        loss, hidden, gradients = run(spread)
        return loss, spread.backbone.context.join(hidden, tokens), gradients

    loss, hidden, gradients = run(model)
    found = in_slices(size, slice_of)
    for own_loss, own_hidden, _ in found:
        assert torch.equal(own_loss, found[0][0])
        assert torch.equal(own_hidden, found[0][1])
    assert relative_error(found[0][0], loss) < 1e-12
    assert relative_error(found[0][1], hidden) < 1e-12
    for name, gradient in gradients.items():
        mean = torch.stack([own[name] for *_, own in found]).mean(0)
        assert relative_error(mean, gradient) < 1e-12, name


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_any_inputs(model: Any, inputs: dict[str, Any]) -> None:
    assert_like_one_process(model(), 3, ids(), **inputs)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("tokens", [2, 5, 16, 19])
def test_any_length(size: int, tokens: int) -> None:
    """Also where the last slices hold nothing but padding."""
    assert_like_one_process(make_hybrid(), size, ids(1, tokens))


@settings(max_examples=8)
@given(data=st.data())
def test_any_cut_gives_the_same(data: st.DataObject) -> None:
    """Documents that end anywhere behind the first one's start, and padding on the right, in slices of any number."""
    size, tokens, rows = (data.draw(st.integers(*bounds)) for bounds in ((1, 4), (8, 24), (1, 2)))
    flags = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    starts = torch.tensor([data.draw(flags) for _ in range(rows)])
    lengths = torch.tensor([data.draw(st.integers(7, tokens)), data.draw(st.integers(1, tokens))])[:rows, None]
    starts[0, :7] = False  # every parameter has a gradient that is more than rounding
    inputs: dict[str, Tensor] = {"seq_idx": starts.long().cumsum(1)}
    if bool((lengths < tokens).any()):
        inputs["attention_mask"] = (torch.arange(tokens) < lengths).long()
    model = data.draw(st.sampled_from(list(MODELS.values())))
    assert_like_one_process(model(), size, ids(rows, tokens), **inputs)


def test_flat_documents() -> None:
    assert_like_one_process(make_model(), 4, ids(1), cu_seq_lens_q=torch.tensor([0, 3, 3, 9, 17]))


def test_experts_are_balanced_over_all_slices() -> None:
    model = make_hybrid(output_router_logits=True, router_aux_loss_coef=10.0)
    given, mask = ids(), right_padding()
    expected = model(given, labels=given, attention_mask=mask)

    def run(group: Group) -> tuple[Tensor, Tensor]:
        out = context_parallel(copy.deepcopy(model), group)(given, labels=given, attention_mask=mask)
        return out.loss, out.aux_loss

    for loss, aux_loss in in_slices(3, run):
        torch.testing.assert_close(loss, expected.loss)
        torch.testing.assert_close(aux_loss, expected.aux_loss)


def test_slices_are_as_long_as_a_convolution_looks_back() -> None:
    context = Context(Alone(), make_model(conv_kernel=4))
    assert [context.length(tokens) for tokens in (1, 3, 5, 100)] == [3, 3, 5, 100]


@pytest.mark.parametrize("size", range(1, 9))
def test_queries_are_balanced(size: int) -> None:
    taken = [pieces_of(rank, size) for rank in range(size)]
    assert sorted(piece for pieces in taken for piece in pieces) == list(range(2 * size))
    assert len({sum(pieces) for pieces in taken}) == 1
    assert all(owner_of(piece, size) == rank for rank, pieces in enumerate(taken) for piece in pieces)


class TestRefusals:
    def test_torch_compile(self) -> None:
        """Whether it takes the whole graph or gives up on the model's forward."""
        compiled = torch.compile(context_parallel(make_model(), Alone()), backend="eager")
        with pytest.raises(ArgumentError, match=r"torch\.compile cannot be had while sequences are spread"):
            compiled(ids())

    def test_classifiers(self) -> None:
        sizes = {"hidden_size": 16, "num_heads": 4, "head_dim": 8, "state_size": 8, "num_hidden_layers": 1}
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        model = Mamba2ForSequenceClassification(Mamba2Config(vocab_size=62, n_groups=1, **sizes, **tokens))
        with pytest.raises(ArgumentError, match="Mamba2ForSequenceClassification cannot be had"):
            context_parallel(model, Alone())(ids())

    def test_a_loss_of_the_users_own(self) -> None:
        model = context_parallel(make_model(), Alone())
        model.loss_function = lambda logits, **_: logits.sum()
        with pytest.raises(ArgumentError, match="a loss function other than transformers' for language models"):
            model(ids(), labels=ids())

    def test_different_batches(self) -> None:
        """In every process, rather than that some slices are another text's."""

        def run(group: Group, mine: dict[str, Any]) -> str:
            with pytest.raises(ArgumentError) as refusal:
                context_parallel(make_model(), group)(**mine if group.rank == 2 else {"input_ids": ids()})
            return str(refusal.value)

        for changed in (
            {"input_ids": ids() + 1},
            {"input_ids": ids(), "attention_mask": right_padding()},
            {"input_ids": ids(), "attention_mask": right_padding().flip(1)},
            {"input_ids": ids(), "seq_idx": documents()},
            {"input_ids": ids(), "cu_seq_lens_q": torch.tensor([0, 5, 17])} | {"input_ids": ids(1)},
        ):
            for message in in_slices(3, lambda group, mine=changed: run(group, mine)):
                assert message.startswith("the 3 processes that share sequences were given different batches")

    def test_padding_in_front(self) -> None:
        with pytest.raises(ArgumentError, match="padding before a token in row 0: rows that are spread"):
            context_parallel(make_model(), Alone())(ids(), attention_mask=right_padding().flip(1))

    def test_models_of_others(self) -> None:
        with pytest.raises(ArgumentError, match="Linear holds no model of mamba2_hf"):
            context_parallel(torch.nn.Linear(2, 2), Alone())
