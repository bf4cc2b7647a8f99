"""One layout for masks, ``seq_idx``, ``cu_seq_lens`` and ``position_ids``: what it moves where, and what it refuses."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mamba2_hf.errors import ArgumentError
from mamba2_hf.layers import SequenceLayout
from mamba2_hf.layers.sequence import PLAIN, sequence_layout


def layout_of(**arguments: Any) -> SequenceLayout:
    """The layout of nested lists, sized by the first of them."""
    tensors = {name: torch.as_tensor(value) for name, value in arguments.items()}
    shapes = [tensor.shape for tensor in tensors.values() if tensor.dim() == 2]
    return sequence_layout(*shapes[0], **tensors)


def rows(layout: SequenceLayout) -> list[list[int]]:
    """Which positions of the flat batch each document of the packed row holds."""
    assert layout.cu_seqlens is not None
    assert layout.source is not None
    bounds = layout.cu_seqlens.tolist()
    return [layout.source[start:stop].tolist() for start, stop in pairwise(bounds)]


class TestPadding:
    def test_nothing_to_say_is_plain(self) -> None:
        assert sequence_layout(2, 5) is PLAIN
        assert layout_of(attention_mask=[[1, 1], [1, 1]]) is PLAIN
        assert layout_of(position_ids=[[0, 1, 2], [0, 1, 2]]) is PLAIN
        assert layout_of(position_ids=[[7, 8, 9], [0, 1, 2]]) is PLAIN  # a continued sequence
        assert PLAIN.is_plain

    @pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.bool, torch.float32, torch.bfloat16])
    def test_tokens_that_count_are_laid_end_to_end(self, dtype: torch.dtype) -> None:
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]], dtype=dtype)
        layout = layout_of(attention_mask=mask)
        assert rows(layout) == [[2, 3], [4, 5, 6], [8, 11], []]
        assert not layout.is_plain

    def test_only_the_last_columns_of_a_wide_mask_are_the_inputs(self) -> None:
        layout = sequence_layout(1, 2, attention_mask=torch.tensor([[1, 0, 0, 1]]))
        assert rows(layout) == [[1]]
        assert sequence_layout(1, 2, attention_mask=torch.tensor([[0, 0, 1, 1]])) is PLAIN

    def test_a_batch_of_nothing_but_padding_keeps_a_token_that_no_document_owns(self) -> None:
        layout = layout_of(attention_mask=[[0, 0], [0, 0]])
        assert rows(layout) == [[], []]
        assert layout.pack(torch.ones(2, 2, 3)).shape == (1, 1, 3)
        assert not layout.unpack(torch.ones(1, 1, 3)).any()

    @given(mask=st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4))
    def test_unpack_is_the_inverse_of_pack(self, mask: list[list[bool]]) -> None:
        layout, keep = layout_of(attention_mask=mask), torch.tensor(mask)
        hidden = torch.randn(*keep.shape, 3)
        packed = layout.pack(hidden)
        assert packed.shape[:2] == ((1, max(1, int(keep.sum()))) if not keep.all() else keep.shape)
        torch.testing.assert_close(layout.unpack(packed), hidden * keep[..., None], rtol=0, atol=0)

    @given(mask=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3))
    def test_matrices_of_aligned_rows_find_their_positions(self, mask: list[list[bool]]) -> None:
        layout, keep = layout_of(attention_mask=mask), torch.tensor(mask)
        ids = torch.arange(1, keep.numel() + 1).view(keep.shape)
        aligned = layout.align(ids)  # (B, T)
        for row, counts in enumerate(keep):
            assert aligned[row, : int(counts.sum())].tolist() == ids[row, counts].tolist()
        pairs = torch.stack([aligned[:, :, None].expand(-1, -1, 6), aligned[:, None, :].expand(-1, 6, -1)], 1)
        found = layout.unalign_matrix(pairs)  # (B, 2, T, T): which tokens each entry stands for
        both = keep[:, :, None] & keep[:, None, :]
        assert torch.equal(found[:, 0], ids[:, :, None] * both)
        assert torch.equal(found[:, 1], ids[:, None, :] * both)

    def test_what_may_not_be_predicted_from_the_token_before(self) -> None:
        layout = layout_of(attention_mask=[[0, 0, 1, 1], [1, 1, 1, 0], [1, 0, 1, 1]])
        assert layout.breaks is not None
        assert layout.breaks.int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 1], [1, 1, 1, 0]]


class TestDocuments:
    def test_seq_idx_starts_one_wherever_it_changes(self) -> None:
        layout = layout_of(seq_idx=[[3, 3, 3, 1, 1], [0, 1, 1, 0, 0]])
        assert layout.breaks is not None
        assert layout.breaks.int().tolist() == [[1, 0, 0, 1, 0], [1, 1, 0, 1, 0]]
        assert layout.source is None  # nothing moves

    @pytest.mark.parametrize("shared", [False, True])
    def test_positions_start_one_at_zero(self, shared: bool) -> None:
        positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1]])
        layout = sequence_layout(2, 8, position_ids=positions if shared else positions.expand(2, -1))
        assert layout.seq_idx is not None
        assert layout.seq_idx.diff(dim=1).tolist() == [[0, 0, 1, 0, 1, 1, 0]] * 2

    def test_positions_may_be_wider_than_the_input(self) -> None:
        layout = sequence_layout(1, 3, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1]]))
        assert layout.seq_idx is not None
        assert layout.seq_idx.diff(dim=1).tolist() == [[1, 0]]

    def test_a_single_token_continues_whatever_its_position(self) -> None:
        assert sequence_layout(2, 1, position_ids=torch.tensor([[0], [17]])) is PLAIN

    def test_flat_batches(self) -> None:
        layout = sequence_layout(1, 6, cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32))
        assert layout.breaks is not None
        assert layout.breaks.int().tolist() == [[1, 0, 1, 0, 0, 1]]  # the last token belongs to no document

    def test_padding_in_a_flat_batch(self) -> None:
        bounds, mask = torch.tensor([0, 2, 4, 5, 5]), [[1, 1, 0, 1, 0, 1]]
        layout = sequence_layout(1, 6, cu_seqlens=bounds, attention_mask=torch.tensor(mask))
        assert rows(layout) == [[0, 1], [3], [], []]
        assert layout.breaks is not None
        assert layout.breaks.int().tolist() == [[1, 0, 1, 1, 1, 1]]
        assert sequence_layout(1, 4, cu_seqlens=bounds, attention_mask=torch.ones(1, 4)).cu_seqlens is bounds

    def test_the_most_explicit_name_wins(self) -> None:
        bounds, seq_idx = torch.tensor([0, 3, 4]), torch.tensor([[0, 1, 1, 1]])
        positions = torch.tensor([[0, 1, 0, 1]])
        flat = sequence_layout(1, 4, cu_seqlens=bounds, seq_idx=seq_idx, position_ids=positions)
        assert flat.cu_seqlens is bounds
        assert flat.seq_idx is None
        assert sequence_layout(1, 4, seq_idx=seq_idx, position_ids=positions).seq_idx is seq_idx

    def test_states_go_to_the_first_document_of_a_row_and_come_from_its_last(self) -> None:
        layout = layout_of(
            attention_mask=[[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]],
            seq_idx=[[0, 1, 1, 2], [0, 1, 2, 2], [0, 0, 0, 0], [5, 5, 6, 6]],
        )
        assert rows(layout) == [[0], [1, 2], [3], [6, 7], [], [12, 13], [14]]
        spread = layout.spread_states(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
        assert spread is not None
        assert spread.flatten().tolist() == [1, 0, 0, 2, 3, 4, 0]
        assert layout.gather_states(torch.arange(7)).tolist() == [2, 3, 4, 6]

    @pytest.mark.parametrize(
        ("mask", "positions"),
        [
            ([[0, 0, 1, 1, 1, 1]], [[1, 1, 0, 1, 0, 1]]),  # padding at 1, as generate fills it
            ([[0, 0, 1, 1, 1, 1]], [[0, 0, 0, 1, 0, 1]]),  # padding at 0
            ([[1, 1, 0, 0, 1, 1]], [[0, 1, 0, 0, 0, 1]]),
        ],
    )
    def test_padding_starts_no_document(self, mask: list[list[int]], positions: list[list[int]]) -> None:
        bounds = layout_of(attention_mask=mask, position_ids=positions).cu_seqlens
        assert bounds is not None
        assert bounds.tolist() == [0, 2, 4]

    @pytest.mark.parametrize(
        ("mask", "positions"),
        [
            ([[0, 0, 1, 1, 1]], [[0, 0, 0, 1, 2]]),
            ([[0, 0, 1, 1, 1]], [[0, 1, 2, 3, 4]]),
            ([[1, 1, 0, 0, 1]], [[0, 1, 1, 1, 2]]),  # a hole that positions do not count
            ([[1, 1, 0, 0, 1]], [[0, 1, 2, 3, 4]]),  # or do
        ],
    )
    def test_one_document_around_padding_is_one(self, mask: list[list[int]], positions: list[list[int]]) -> None:
        bounds = layout_of(attention_mask=mask, position_ids=positions).cu_seqlens
        assert bounds is not None
        assert bounds.tolist() == [0, 3]


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"attention_mask": torch.ones(2, 3)}, r"attention_mask has shape \(2, 3\), expected .*\(2, 4\)"),
            ({"attention_mask": torch.ones(3, 4)}, r"attention_mask has shape \(3, 4\)"),
            ({"attention_mask": torch.ones(2, 1, 4, 4)}, "no use for a matrix of pairs"),
            ({"seq_idx": torch.zeros(2, 3)}, r"seq_idx has shape \(2, 3\), expected \(B, T\) = \(2, 4\)"),
            ({"position_ids": torch.zeros(3, 4)}, r"position_ids has shape \(3, 4\)"),
            ({"position_ids": torch.zeros(4)}, r"position_ids has shape \(4,\)"),
            ({"position_ids": torch.zeros(2, 3)}, r"position_ids has shape \(2, 3\)"),
            ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seq_lens were given with batch 2"),
        ],
    )
    def test_shapes(self, arguments: dict[str, Tensor], match: str) -> None:
        with pytest.raises(ArgumentError, match=match):
            sequence_layout(2, 4, **arguments)

    @pytest.mark.parametrize("bounds", [[[0, 4]], [0], []])
    def test_bounds_that_hold_no_document(self, bounds: list[Any]) -> None:
        with pytest.raises(ArgumentError, match=r"cu_seq_lens has shape .* expected \(S \+ 1,\)"):
            sequence_layout(1, 4, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))

    @pytest.mark.parametrize(
        ("positions", "mask", "match"),
        [
            ([[0, 1, 2, 3], [0, 1, 3, 4]], None, "from 1 to 3 in row 1"),
            ([[0, 1, 1, 2], [0, 1, 2, 3]], None, "from 1 to 1 in row 0"),
            ([[0, 1, 2, 3], [0, 2, 0, 1]], None, "from 0 to 2 in row 1"),
            ([[3, 2, 1, 0], [0, 1, 2, 3]], None, "from 3 to 2 in row 0"),
            ([[0, 1, 0, 1], [0, 1, 3, 4]], [[1, 1, 1, 1], [0, 1, 1, 1]], "from 1 to 3 in row 1"),
            ([[0, 1, 0, 1], [0, 1, 2, 3]], [[1, 1, 0, 1], [1, 1, 1, 1]], "from 1 to 1 in row 0"),  # a start is masked
        ],
    )
    def test_positions_that_name_no_documents(self, positions: Any, mask: Any, match: str) -> None:
        arguments = {} if mask is None else {"attention_mask": mask}
        with pytest.raises(ArgumentError, match=f"{match}.*pass seq_idx"):
            layout_of(position_ids=positions, **arguments)


def test_moves_between_devices() -> None:
    layout = layout_of(attention_mask=[[0, 1], [1, 1]])
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert moved.cu_seqlens is not None
    assert moved.keep is not None
    assert {moved.cu_seqlens.device.type, moved.keep.device.type} == {"meta"}
    assert PLAIN.to("meta") is PLAIN


def test_under_compile_every_shape_is_static() -> None:
    """The packed row keeps its padding, behind the last document."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def packed(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        layout = sequence_layout(*mask.shape, attention_mask=mask)
        row = layout.pack(hidden)
        assert row.shape[1] == mask.numel()
        return layout.unpack(row * 2), layout.cu_seqlens  # type: ignore[return-value]

    hidden, mask = torch.randn(2, 5, 3), torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 0, 1]])
    doubled, bounds = packed(hidden, mask)
    torch.testing.assert_close(doubled, 2 * hidden * mask[..., None])
    assert bounds.tolist() == [0, 3, 6]
    torch.compiler.reset()
