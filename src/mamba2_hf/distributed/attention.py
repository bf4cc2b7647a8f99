"""Attention over the slices of all processes, with as much to do for each.

A causal query near the end of a sequence sees more keys than one at its beginning, so that consecutive slices would
cost the last of W processes nearly twice the average. The sequence is cut into 2 W pieces, and process r takes the
queries of pieces r and 2 W - 1 - r, which together see as many keys as any other such pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .collectives import gather_tokens
from .groups import Group

if TYPE_CHECKING:
    from ..layers.placement import Placement


def pieces_of(rank: int, size: int) -> tuple[int, int]:
    """The pieces, of ``2 size``, whose queries a process takes."""
    return rank, 2 * size - 1 - rank


def owner_of(piece: int, size: int) -> int:
    """The process that takes the queries of a piece; its tokens are held by ``piece // 2``."""
    return min(piece, 2 * size - 1 - piece)


class _Exchange(torch.autograd.Function):
    """The two pieces of a slice, ``(2, ...)``, to the two whose queries a process takes, or back."""

    @staticmethod
    def forward(ctx: Any, pieces: Tensor, group: Group, back: bool) -> Tensor:
        ctx.group, ctx.back = group, back
        return exchanged(pieces, group, back)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return exchanged(gradient, ctx.group, not ctx.back), None, None


def exchanged(pieces: Tensor, group: Group, back: bool) -> Tensor:
    """See :class:`_Exchange`."""
    rank, size = group.rank, group.size
    held, taken = (2 * rank, 2 * rank + 1), pieces_of(rank, size)
    mine, wanted = (taken, held) if back else (held, taken)

    def to(piece: int) -> int:
        return piece // 2 if back else owner_of(piece, size)

    def come(piece: int) -> int:
        return owner_of(piece, size) if back else piece // 2

    # Messages go by process, and pieces between the same two in the order of their numbers.
    order = sorted(range(2), key=lambda i: (to(mine[i]), mine[i]))
    arriving = sorted(range(2), key=lambda i: (come(wanted[i]), wanted[i]))
    sent, received = ([0] * size for _ in range(2))
    for i in range(2):
        sent[to(mine[i])] += 1
        received[come(wanted[i])] += 1
    found = group.exchange(pieces if order == [0, 1] else pieces.flip(0), sent, received)
    return found if arriving == [0, 1] else found.flip(0)


def attend_slices(
    module: Any, queries: Tensor, keys: Tensor, values: Tensor, placement: Placement, group: Group
) -> Tensor:
    """Softmax attention of slices: ``(B, H, n, D)`` and keys, values ``(B, H', n, D)`` to ``(B, n, H, D)``.

    Args:
        module: the :class:`~mamba2_hf.layers.Attention`.
        queries, keys, values: of this process's slice.
        placement: of the slice, with those of the pieces whose queries this process takes.
        group: its processes hold the slices in order.
    """
    half = queries.shape[2] // 2
    taken = _Exchange.apply(queries.transpose(1, 2).unflatten(1, (2, half)).movedim(1, 0), group, False)
    both = gather_tokens(torch.cat([keys, values], 1).transpose(1, 2), group).transpose(1, 2)  # (B, 2 H', n W, D)
    found = []
    for own, piece, number in zip(taken, placement.pieces, pieces_of(group.rank, group.size), strict=True):
        end = (number + 1) * half
        seen = both[:, :, end - piece.key_count(module.window) : end]
        attended, _ = module.attend(module, own.transpose(1, 2), *seen.chunk(2, 1), piece)
        found.append(attended)  # (B, n / 2, H, D)
    return _Exchange.apply(torch.stack(found), group, True).movedim(0, 1).flatten(1, 2)  # type: ignore[no-any-return]
