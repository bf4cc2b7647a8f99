"""Tensors of which processes hold pieces."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mamba2_hf.distributed.packed import Cut, Part


@given(data=st.data())
def test_pieces_make_the_whole(data: st.DataObject) -> None:
    """Of packed tensors too, whose parts have as many pieces as there are processes or fewer, then copied."""
    size = data.draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    counts = st.sampled_from([count for count in range(1, size + 1) if size % count == 0])
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 3), counts), min_size=1, max_size=5))
    parts = tuple(Part(length * pieces, pieces) for length, pieces in shapes)
    cut = Cut(data.draw(st.integers(0, 2)), parts)
    whole = torch.arange(sum(part.size for part in parts) * 6.0).view(-1, 2, 3).movedim(0, cut.dim)
    pieces = torch.stack([cut.piece(whole, rank, size) for rank in range(size)])
    assert torch.equal(cut.whole(pieces), whole)
    copied = torch.zeros(size, pieces.shape[cut.dim + 1], dtype=torch.bool)
    for start, length, count in cut.copies(size):
        copied[:, start : start + length] = True
        same = pieces.narrow(cut.dim + 1, start, length).unflatten(0, (-1, count))
        assert torch.equal(same, same[:, :1].expand_as(same))
    assert pieces.numel() - whole.numel() <= int(copied.sum()) * 6
    assert bool(copied.any()) == any(part.pieces < size for part in parts)
