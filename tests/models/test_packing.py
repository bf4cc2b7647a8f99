"""Padding and packed documents change nothing: each document is as if it were run alone, in logits, loss, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DataCollatorWithFlattening

from mamba2_hf import Mamba2ForCausalLM, Mamba2Model
from mamba2_hf.errors import ArgumentError

Make = Callable[..., Any]
EXACT = {"rtol": 0, "atol": 1e-10}  # fp64: only the order of the sums differs
FP32 = {"rtol": 0, "atol": 2e-6, "check_dtype": False}  # transformers computes every loss in fp32
TOKENS = 12


@pytest.fixture(scope="module")
def model(tiny_model: Make) -> Mamba2ForCausalLM:
    """In fp64, with biases everywhere, so that a pad token which reached anything would show."""
    return tiny_model().double()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 61, (4, TOKENS), generator=torch.Generator().manual_seed(1))


def documents(mask: Tensor, seq_idx: Tensor | None = None) -> list[tuple[int, Tensor]]:
    """Row and columns of every document of a batch."""
    found = []
    for row, keep in enumerate(mask.bool()):
        columns = keep.nonzero()[:, 0]
        if not len(columns):
            continue
        names = torch.zeros_like(columns) if seq_idx is None else seq_idx[row, columns]
        starts = F.pad(names.diff() != 0, (1, 0)).long().cumsum(0)
        found += [(row, columns[starts == document]) for document in starts.unique()]
    return found


def alone(model: Any, ids: Tensor, places: list[tuple[int, Tensor]]) -> Tensor:
    """Logits of documents run one by one, at their places in a batch of zeros."""
    out = torch.zeros(*ids.shape, model.config.vocab_size, dtype=torch.float64)
    for row, columns in places:
        out[row, columns] = model(ids[row, columns][None], use_cache=False).logits[0]
    return out


def loss_alone(model: Any, ids: Tensor, places: list[tuple[int, Tensor]]) -> Tensor:
    """The mean over every token that stands next to one of its own document: padding predicts nothing."""
    losses = []
    for row, columns in places:
        logits = model(ids[row, columns][None], use_cache=False).logits[0, :-1]
        losses.append(F.cross_entropy(logits, ids[row, columns[1:]], reduction="none")[columns.diff() == 1])
    return torch.cat(losses).mean()


def gradients(model: Any, logits: Tensor) -> dict[str, Tensor]:
    """Of a random linear function of the logits, which is as good as any loss and stays in fp64."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=logits.dtype)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad((logits * weights).sum(), parameters), strict=True))


def check(model: Any, ids: Tensor, places: list[tuple[int, Tensor]], **arguments: Any) -> None:
    """Logits, loss and gradients of a batch against those of its documents alone; padding comes out as zeros."""
    out = model(ids, labels=ids, use_cache=False, **arguments)
    expected = alone(model, ids, places)
    torch.testing.assert_close(out.logits, expected, **EXACT)
    torch.testing.assert_close(out.loss, loss_alone(model, ids, places), **FP32)
    ours, theirs = gradients(model, out.logits), gradients(model, expected)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-9, msg=name)


MASKS = {
    "right": [[1] * 12, [1] * 7 + [0] * 5, [1] * 2 + [0] * 10, [1] + [0] * 11],
    "left": [[1] * 12, [0] * 5 + [1] * 7, [0] * 10 + [1] * 2, [0] * 11 + [1]],
    "both_sides": [[0] * 2 + [1] * 8 + [0] * 2, [1] * 12, [0] * 5 + [1] * 3 + [0] * 4, [0, 1] + [1] * 9 + [0]],
    "middle": [[1] * 3 + [0] * 4 + [1] * 5, [1, 0] * 6, [0, 1] * 6, [1] + [0] * 10 + [1]],
    "whole_rows": [[0] * 12, [1] * 12, [0] * 12, [0] * 6 + [1] * 6],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_padding_anywhere(model: Any, ids: Tensor, mask: list[list[int]]) -> None:
    check(model, ids, documents(torch.tensor(mask)), attention_mask=torch.tensor(mask))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.bfloat16])
def test_masks_of_any_dtype(model: Any, ids: Tensor, dtype: torch.dtype) -> None:
    mask = torch.tensor(MASKS["both_sides"])
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(model(ids, attention_mask=mask.to(dtype)).logits, expected, rtol=0, atol=0)


def test_what_stands_at_padding_is_never_read(model: Any, ids: Tensor) -> None:
    mask = torch.tensor(MASKS["middle"])
    other = torch.where(mask.bool(), ids, 60 - ids)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(model(other, attention_mask=mask).logits, expected, rtol=0, atol=0)
        embeds = model.get_input_embeddings()(ids).masked_fill(~mask.bool()[..., None], torch.nan)
        torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, expected, rtol=0, atol=0)


def test_hidden_states_of_padding_are_zero(tiny_model: Make, ids: Tensor) -> None:
    base, mask = tiny_model(Mamba2Model), torch.tensor(MASKS["both_sides"])
    with torch.no_grad():
        out = base(ids, attention_mask=mask, output_hidden_states=True)
        for hidden in (out.last_hidden_state, *out.hidden_states):
            assert not hidden[mask == 0].any()
            assert hidden[mask == 1].any(-1).all()


def test_a_batch_of_nothing_but_padding(model: Any, ids: Tensor) -> None:
    with torch.no_grad():
        out = model(ids, attention_mask=torch.zeros_like(ids), output_hidden_states=True, output_attentions=True)
    assert not out.logits.any()
    assert not any(tensor.any() for tensor in (*out.hidden_states, *out.attentions))


DOCUMENTS = {
    "halves": [[0] * 6 + [1] * 6] * 4,
    "each_row_its_own": [[0] * 12, [0] + [1] * 11, [0, 1, 2] + [3] * 9, [5] * 4 + [4] * 4 + [5] * 4],
    "single_tokens": [list(range(12))] * 4,
}


@pytest.mark.parametrize("seq_idx", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_seq_idx(model: Any, ids: Tensor, seq_idx: list[list[int]]) -> None:
    places = documents(torch.ones_like(ids), torch.tensor(seq_idx))
    if all(len(columns) == 1 for _, columns in places):  # nothing to predict, so no loss
        with torch.no_grad():
            out = model(ids, seq_idx=torch.tensor(seq_idx))
        torch.testing.assert_close(out.logits, alone(model, ids, places).detach(), **EXACT)
    else:
        check(model, ids, places, seq_idx=torch.tensor(seq_idx))


LENGTHS = [4, 1, 5, 2]
BOUNDS = torch.tensor([0, 4, 5, 10, 12], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])
OWNERS = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))


@pytest.mark.parametrize(
    "arguments",
    [
        {"cu_seq_lens_q": BOUNDS},
        {"cu_seq_lens_k": BOUNDS.long()},
        {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS.clone(), "max_length_q": 5, "max_length_k": 5},
        {"position_ids": POSITIONS[None]},
        {"seq_idx": OWNERS[None]},
        {"seq_idx": OWNERS[None].int(), "position_ids": POSITIONS[None]},
        {"position_ids": POSITIONS[None], "attention_mask": torch.ones(1, 12)},
    ],
    ids=["cu_seq_lens_q", "cu_seq_lens_k", "both", "position_ids", "seq_idx", "int32_and_positions", "full_mask"],
)
def test_every_name_of_one_flat_batch(model: Any, ids: Tensor, arguments: dict[str, Any]) -> None:
    check(model, ids[:1], documents(torch.ones(1, 12), OWNERS[None]), **arguments)


def test_positions_of_a_batch(model: Any, ids: Tensor) -> None:
    shared = documents(torch.ones_like(ids), OWNERS.expand_as(ids))
    check(model, ids, shared, position_ids=POSITIONS[None])
    rows = torch.stack([POSITIONS, torch.arange(12), torch.arange(12) % 3, torch.arange(12) % 7])
    check(model, ids, documents(torch.ones_like(ids), (rows == 0).long().cumsum(1)), position_ids=rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_seq_idx": True},
        {"return_seq_idx": True, "return_position_ids": False},
        {"return_flash_attn_kwargs": True},
        {"return_flash_attn_kwargs": True, "return_position_ids": False},
        {"return_flash_attn_kwargs": True, "return_seq_idx": True},
    ],
    ids=lambda options: "+".join(options) or "default",
)
def test_the_flattening_collator_of_transformers(model: Any, ids: Tensor, options: dict[str, bool]) -> None:
    sequences = [ids[0, :5], ids[1, :3], ids[2]]
    features = [{"input_ids": sequence.tolist()} for sequence in sequences]
    batch = DataCollatorWithFlattening(**options)(features, return_tensors="pt")
    out = model(**batch, use_cache=False)
    flat = batch["input_ids"]
    names = torch.arange(3).repeat_interleave(torch.tensor([5, 3, 12]))[None]
    places = documents(torch.ones_like(flat), names)
    torch.testing.assert_close(out.logits, alone(model, flat, places), **EXACT)
    torch.testing.assert_close(out.loss, loss_alone(model, flat, places), **FP32)


def test_packed_loss_is_the_token_weighted_mean(model: Any, ids: Tensor) -> None:
    """Also where a trainer divides by the tokens of several batches."""
    labels = ids[:1].clone()
    labels[0, :3] = -100
    with torch.no_grad():
        sums, counts = [], []
        for start, stop in ((0, 4), (4, 5), (5, 10), (10, 12)):
            own = labels[:, start:stop]
            count = int((own[:, 1:] != -100).sum())
            if count:
                sums.append(model(ids[:1, start:stop], labels=own).loss.double() * count)
            counts.append(count)
        total = sum(sums)
        packed = model(ids[:1], labels=labels, cu_seq_lens_q=BOUNDS)
        torch.testing.assert_close(packed.loss, total / sum(counts), **FP32)
        for items in (40, torch.tensor(40)):
            scaled = model(ids[:1], labels=labels, cu_seq_lens_q=BOUNDS, num_items_in_batch=items)
            torch.testing.assert_close(scaled.loss, total / 40, **FP32)
    assert (labels[0, 3:] != -100).all()  # the caller's labels are not written to


def test_tokens_behind_the_last_bound_belong_to_no_document(model: Any, ids: Tensor) -> None:
    places = [(0, torch.arange(4)), (0, torch.arange(4, 9))]
    row, bounds = ids[:1], torch.tensor([0, 4, 9], dtype=torch.int32)
    out = model(row, labels=row, cu_seq_lens_q=bounds)
    torch.testing.assert_close(out.logits[:, :9], alone(model, row, places)[:, :9], **EXACT)
    torch.testing.assert_close(out.loss, loss_alone(model, row, places), **FP32)


def test_empty_documents(model: Any, ids: Tensor) -> None:
    places = [(0, torch.arange(4)), (0, torch.arange(4, 12))]
    check(model, ids[:1], places, cu_seq_lens_q=torch.tensor([0, 0, 4, 4, 4, 12, 12], dtype=torch.int32))


@pytest.mark.parametrize("mask", [[0] + [1] * 11, [1] * 5 + [0] * 6 + [1]], ids=["left", "a whole document"])
def test_padding_in_a_flat_batch(model: Any, ids: Tensor, mask: list[int]) -> None:
    keep = torch.tensor([mask])
    check(model, ids[:1], documents(keep, OWNERS[None]), cu_seq_lens_q=BOUNDS, attention_mask=keep)


def test_padding_and_documents_together(model: Any, ids: Tensor) -> None:
    mask = torch.tensor(MASKS["both_sides"])
    seq_idx = torch.tensor(DOCUMENTS["each_row_its_own"])
    check(model, ids, documents(mask, seq_idx), attention_mask=mask, seq_idx=seq_idx)
    left = torch.tensor([[0] * 4 + [1] * 8] * 4)
    positions = torch.tensor([[1] * 4 + [0, 1, 2, 0, 1, 0, 1, 2]] * 4)
    check(model, ids, documents(left, (positions == 0).long().cumsum(1)), attention_mask=left, position_ids=positions)


@settings(max_examples=25)
@given(data=st.data())
def test_any_padding_and_any_documents(model: Any, data: st.DataObject) -> None:
    """Rows of random tokens, each kept or not, each starting a document or not."""
    rows, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    bits = st.lists(st.booleans(), min_size=rows * tokens, max_size=rows * tokens)
    mask = torch.tensor(data.draw(bits)).view(rows, tokens)
    seq_idx = torch.tensor(data.draw(bits)).view(rows, tokens).long().cumsum(1)
    ids = torch.randint(0, 61, (rows, tokens), generator=torch.Generator().manual_seed(rows * tokens))
    everything = torch.ones_like(mask)
    with torch.no_grad():
        for keep, names in ((mask, None), (everything, seq_idx), (mask, seq_idx)):
            expected = alone(model, ids, documents(keep, names))
            found = model(ids, attention_mask=keep, seq_idx=names, use_cache=False).logits
            torch.testing.assert_close(found, expected, **EXACT)
        flat, names = ids.view(1, -1), (seq_idx + torch.arange(rows)[:, None] * (tokens + 1)).view(1, -1)
        bounds = F.pad(torch.unique_consecutive(names, return_counts=True)[1].cumsum(0), (1, 0))
        for keep in (everything.view(1, -1), mask.view(1, -1)):
            found = model(flat, attention_mask=keep, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, use_cache=False).logits
            torch.testing.assert_close(found, alone(model, flat, documents(keep, names)), **EXACT)


def test_documents_longer_than_the_scans_own_tiles(model: Any) -> None:
    ids = torch.randint(3, 61, (2, 300), generator=torch.Generator().manual_seed(2))
    names = torch.zeros(2, 300, dtype=torch.long)
    names[0, 70:], names[1, 3:] = 1, 1
    names[0, 290:], names[1, 131:] = 2, 2
    mask = torch.ones(2, 300)
    mask[0, :17], mask[1, 250:], mask[0, 100:140] = 0, 0, 0
    with torch.no_grad():
        for keep, documents_ in ((mask, None), (torch.ones_like(mask), names), (mask, names)):
            found = model(ids, attention_mask=keep, seq_idx=documents_, use_cache=False).logits
            torch.testing.assert_close(found, alone(model, ids, documents(keep, documents_)), **EXACT)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_packed_and_padded_batches(tiny_model: Make, ids: Tensor, reentrant: bool) -> None:
    model = tiny_model().double().train()
    arguments = {"attention_mask": torch.tensor(MASKS["both_sides"]), "seq_idx": torch.tensor(DOCUMENTS["halves"])}
    expected = gradients(model, model(ids, **arguments).logits)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    logits = model(ids, **arguments).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=logits.dtype)
    (logits * weights).sum().backward()  # what the reentrant kind needs
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-9, msg=name)


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS + 1}, "cu_seq_lens_q and cu_seq_lens_k differ"),
            ({"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS[:-1]}, "cu_seq_lens_q and cu_seq_lens_k differ"),
            ({"cu_seq_lens_q": BOUNDS + 1}, "start at 0"),
            ({"cu_seq_lens_q": torch.tensor([0, 7, 5, 12])}, "never fall"),
            ({"cu_seq_lens_q": torch.tensor([0, 13])}, "T = 12"),
            ({"cu_seq_lens_q": BOUNDS.float()}, "int32 or int64"),
            ({"cu_seq_lens_q": BOUNDS + 1, "attention_mask": torch.tensor([[0] + [1] * 11])}, "start at 0"),
            ({"seq_idx": OWNERS[None].float()}, "integer"),
            ({"seq_idx": OWNERS}, "seq_idx has shape"),
            ({"position_ids": POSITIONS.flip(0)[None]}, "position_ids goes from"),
            ({"attention_mask": torch.ones(1, 1, 12, 12)}, "matrix of pairs"),
        ],
    )
    def test_by_name(self, model: Any, ids: Tensor, arguments: dict[str, Any], match: str) -> None:
        with pytest.raises(ArgumentError, match=match):
            model(ids[:1], **arguments)

    def test_flat_bounds_over_several_rows(self, model: Any, ids: Tensor) -> None:
        with pytest.raises(ArgumentError, match="batch 4"):
            model(ids, cu_seq_lens_q=BOUNDS)
