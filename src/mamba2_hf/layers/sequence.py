"""From the many ways to say which tokens belong together to one layout.

Masks (either side, also in the middle), ``seq_idx``, ``cu_seq_lens`` and ``position_ids`` all come in here and leave as
a :class:`SequenceLayout`. Padding is not masked but left out: what mixes tokens (convolution and scan, attention) gets
those that count, end to end in one row or at the left of their rows, so that padding can reach neither the convolution
nor the state. Modules still take and return ``(B, T, ...)``, as the caller gave it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError
from ..ops import Packing
from ..ops.checks import check_packing
from ..ops.packing import bounded_starts, document_starts


@dataclass(frozen=True)
class SequenceLayout:
    """Tokens of a batch, grouped into documents.

    With ``source`` None the batch is used as it is, ``(B, T)``; else its tokens move to one row for ops (:meth:`pack`,
    :meth:`unpack`). The first document of a row continues the row's cached state and its last one leaves the next.

    Attributes:
        seq_idx: ``(B, T)`` documents of the batch as it is.
        cu_seqlens: ``(S + 1,)`` bounds of the documents of one row.
        source: ``(R,)`` position in the flat batch that each token of the packed row comes from.
        slot: ``(B, T)`` position in the packed row of each token.
        keep: ``(B, T)`` whether a token counts (padding does not).
        first, last: ``(B,)`` first and last document of each row; None if document b is row b.
        breaks: ``(B, T)`` whether a token may not be predicted from the one before it; None if every one may.
        neighbors: where rows are slices, those before and after them: a ``distributed.context_parallel.Slice``.
    """

    seq_idx: Tensor | None = None
    cu_seqlens: Tensor | None = None
    source: Tensor | None = None
    slot: Tensor | None = None
    keep: Tensor | None = None
    first: Tensor | None = None
    last: Tensor | None = None
    breaks: Tensor | None = None
    neighbors: Any = None

    @property
    def is_plain(self) -> bool:
        """Whether every row is one document without padding."""
        return self.seq_idx is None and self.cu_seqlens is None

    def to(self, device: torch.device | str) -> SequenceLayout:
        """The same layout on another device; layers may be spread over several."""
        example = next((tensor for tensor in (self.cu_seqlens, self.seq_idx, self.keep) if tensor is not None), None)
        if example is None or example.device == torch.device(device):
            return self
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return SequenceLayout(**{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})

    @property
    def row(self) -> SequenceLayout:
        """The layout of what :meth:`pack` returns."""
        return SequenceLayout(cu_seqlens=self.cu_seqlens, first=self.first, last=self.last)

    def pack(self, tensor: Tensor) -> Tensor:
        """``(B, T, ...)`` to ``(1, R, ...)`` where there is padding: the tokens that count."""
        return tensor if self.source is None else tensor.flatten(0, 1).index_select(0, self.source)[None]

    def unpack(self, tensor: Tensor) -> Tensor:
        """Inverse of :meth:`pack`; padding comes out as zeros."""
        slot = self.to(tensor.device).slot
        return tensor if slot is None else self.blank(take(tensor[0], slot))

    def blank(self, tensor: Tensor) -> Tensor:
        """``(B, T, ...)`` with zeros for padding."""
        keep = self.to(tensor.device).keep
        return tensor if keep is None else torch.where(_broadcast(keep, tensor), tensor, 0)

    @property
    def order(self) -> Tensor | None:
        """``(B, T)`` the columns of each row: those of tokens that count, then those of padding."""
        return None if self.keep is None else kept_first(self.keep)

    def align(self, tensor: Tensor) -> Tensor:
        """``(B, T, ...)`` with the tokens of each row at its left, padding behind them."""
        order = self.to(tensor.device).order
        if order is None:
            return tensor
        return tensor.gather(1, _broadcast(order, tensor).expand_as(tensor))

    def unalign(self, tensor: Tensor) -> Tensor:
        """Inverse of :meth:`align`; padding comes out as zeros."""
        keep = self.to(tensor.device).keep
        if keep is None:
            return tensor
        return self.blank(tensor.gather(1, _broadcast(rank(keep), tensor).expand_as(tensor)))

    def unalign_matrix(self, matrix: Tensor) -> Tensor:
        """``(B, H, T, T)`` over aligned rows to the batch's own positions; rows and columns of padding are zero."""
        keep = self.to(matrix.device).keep
        if keep is None:
            return matrix
        position = rank(keep)
        row = torch.arange(len(keep), device=matrix.device)[:, None, None]
        matrix = matrix[row, :, position[:, :, None], position[:, None, :]].permute(0, 3, 1, 2)
        return torch.where((keep[:, :, None] & keep[:, None, :])[:, None], matrix, 0)

    def spread_states(self, states: Tensor | None) -> Tensor | None:
        """A row's cached states ``(B, ...)`` to its documents' initial states ``(S, ...)``."""
        if states is None or self.first is None or self.cu_seqlens is None:
            return states
        spread = states.new_zeros(self.cu_seqlens.shape[0] - 1, *states.shape[1:])
        return spread.index_copy(0, self.first, states)

    def gather_states(self, states: Tensor) -> Tensor:
        """The documents' final states ``(S, ...)`` to the rows' ``(B, ...)``."""
        return states if self.last is None else states[self.last]


PLAIN = SequenceLayout()


def rank(keep: Tensor) -> Tensor:
    """How many tokens of its row count before each one that does, ``(B, T)``; any number in reach for padding."""
    return (keep.long().cumsum(1) - 1).clamp(min=0)


def kept_first(keep: Tensor) -> Tensor:
    """The columns of each row of ``keep (B, T)``: those that are true, then the others, both in order."""
    place = torch.where(keep, rank(keep), keep.sum(1, keepdim=True) + rank(~keep))
    columns = torch.arange(keep.shape[1], device=keep.device).expand_as(place)
    return torch.zeros_like(place).scatter(1, place, columns)  # a sort would do, but ONNX has no stable one


def _broadcast(of_tokens: Tensor, tensor: Tensor) -> Tensor:
    """``(B, T)`` as ``(B, T, 1, ...)``, with as many axes as ``tensor (B, T, ...)`` has."""
    return of_tokens.view(*of_tokens.shape, *[1] * (tensor.dim() - 2))


def take(tensor: Tensor, places: Tensor) -> Tensor:
    """``tensor[places]`` along the first axis. Its gradient is a sum into rows, where that of indexing sorts first."""
    return tensor.index_select(0, places.flatten()).unflatten(0, places.shape)


def sequence_layout(
    batch: int,
    tokens: int,
    *,
    attention_mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> SequenceLayout:
    """Reads every way to name padding and documents. Where several name documents, the most explicit one wins:
    ``cu_seqlens``, then ``seq_idx``, then ``position_ids``.

    Args:
        batch, tokens: of the input.
        attention_mask: ``(B, >= T)``, nonzero where a token counts; the last T columns are the input's.
        seq_idx: ``(B, T)`` integers; a document starts where the value changes.
        cu_seqlens: ``(S + 1,)`` bounds in the single row of a flat batch.
        position_ids: ``(B or 1, >= T)``; a document starts where the position is 0. An SSD layer has no positions, so
            they have no other effect.

    Raises:
        ArgumentError: a shape does not fit, or a combination cannot be honored.
    """
    keep = _mask(attention_mask, batch, tokens)
    if cu_seqlens is not None:
        return _flat(batch, tokens, keep, cu_seqlens)
    if seq_idx is None and position_ids is not None and tokens > 1:
        seq_idx = _from_positions(position_ids, keep, batch, tokens)
    elif seq_idx is not None and tuple(seq_idx.shape) != (batch, tokens):
        raise ArgumentError(f"seq_idx has shape {tuple(seq_idx.shape)}, expected (B, T) = {(batch, tokens)}")
    if keep is not None:
        return _without_padding(keep, seq_idx)
    if seq_idx is None:
        return PLAIN
    return SequenceLayout(seq_idx=seq_idx, breaks=document_starts(seq_idx))


def _mask(mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """The mask of the input's own tokens ``(B, T)``, or None if all of them count."""
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < tokens:
        raise ArgumentError(
            f"attention_mask has shape {tuple(mask.shape)}, expected (B, T) = {(batch, tokens)}, or wider with the "
            "cached tokens first; an SSD layer has no use for a matrix of pairs"
        )
    keep = mask[:, mask.shape[1] - tokens :] != 0
    if not torch.compiler.is_compiling() and bool(keep.all()):
        return None
    return keep


def _flat(batch: int, tokens: int, keep: Tensor | None, cu_seqlens: Tensor) -> SequenceLayout:
    if batch != 1:
        raise ArgumentError(f"cu_seq_lens were given with batch {batch}: lay the documents end to end in one row")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ArgumentError(f"cu_seq_lens has shape {tuple(cu_seqlens.shape)}, expected (S + 1,) for S >= 1 documents")
    starts = bounded_starts(cu_seqlens, tokens)
    first = cu_seqlens.new_zeros(1, dtype=torch.long)
    last = first + cu_seqlens.shape[0] - 2
    if keep is None:
        return SequenceLayout(cu_seqlens=cu_seqlens, first=first, last=last, breaks=starts[None])
    check_packing(batch, tokens, Packing(cu_seqlens=cu_seqlens))  # before the bounds move to where padding lets them
    counted = F.pad(keep[0].long().cumsum(0), (1, 0))  # (T + 1,) tokens that count before each position
    source, slot = _kept(keep)
    return SequenceLayout(
        cu_seqlens=counted[cu_seqlens.long().clamp(max=tokens)],
        source=source,
        slot=slot,
        keep=keep,
        first=first,
        last=last,
        breaks=starts | _gaps(keep),
    )


def _from_positions(position_ids: Tensor, keep: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] < tokens:
        raise ArgumentError(
            f"position_ids has shape {tuple(position_ids.shape)}, expected (B, T) = {(batch, tokens)} or (1, T)"
        )
    positions = position_ids[:, position_ids.shape[1] - tokens :].expand(batch, -1)
    counts = torch.ones_like(positions, dtype=torch.bool) if keep is None else keep
    starts = (positions == 0) & counts
    if not torch.compiler.is_compiling():
        row, column = counts.nonzero(as_tuple=True)  # the tokens that count, end to end
        position = positions[row, column]
        grows = torch.where(column.diff() == 1, position.diff() == 1, position.diff() > 0)  # by any step over padding
        steady = grows | (position[1:] == 0) | (row.diff() > 0)
        if not bool(steady.all()):
            at = int((~steady).nonzero()[0])
            raise ArgumentError(
                f"position_ids goes from {int(position[at])} to {int(position[at + 1])} in row {int(row[at])}: an SSD "
                "layer has no positions, it only reads where documents start (0, 1, 2, ..., 0, 1, ...); pass seq_idx "
                "to name documents in another way, or leave position_ids out"
            )
        if not bool(starts[:, 1:].any()):
            return None
    return starts.long().cumsum(1)


def _kept(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Where each token of the packed row comes from, and where each of the batch goes: ``source`` and ``slot``."""
    flat = keep.flatten()[None]
    slot = rank(flat).view_as(keep)
    if torch.compiler.is_compiling():
        return kept_first(flat)[0], slot  # padding stays behind the last document
    source = flat[0].nonzero()[:, 0]
    return source if source.numel() else source.new_zeros(1), slot  # ops want a token: any one, which no document owns


def _gaps(keep: Tensor) -> Tensor:
    """``(B, T)``: whether a token or its left neighbor is padding."""
    return F.pad(~(keep[:, 1:] & keep[:, :-1]), (1, 0), value=True)


def _without_padding(keep: Tensor, seq_idx: Tensor | None) -> SequenceLayout:
    """The tokens that count, end to end: a document per row, or several where ``seq_idx`` says so."""
    batch, tokens = keep.shape
    breaks = _gaps(keep)
    if torch.compiler.is_compiling() and seq_idx is not None:
        raise ArgumentError(
            "a graph with static shapes cannot hold an attention_mask and documents named by seq_idx or position_ids: "
            "name them by cu_seq_lens, drop the mask (mark padding by its own seq_idx), or run without torch.compile"
        )
    source, slot = _kept(keep)
    if seq_idx is None or not bool(keep.any()):
        cu_seqlens = F.pad(keep.sum(1).cumsum(0), (1, 0))
        return SequenceLayout(cu_seqlens=cu_seqlens, source=source, slot=slot, keep=keep, breaks=breaks)

    breaks = breaks | document_starts(seq_idx)
    row, document = source // tokens, seq_idx.flatten()[source]
    new = F.pad((row[1:] == row[:-1]) & (document[1:] != document[:-1]), (1, 0))
    more = torch.zeros(batch, dtype=torch.long, device=keep.device).index_add(0, row, new.long())
    last = (more + 1).cumsum(0) - 1  # (B,) each row holds one document and one more per change
    first = last - more
    owner = row + new.long().cumsum(0)  # every row before adds one document, every change another
    lengths = torch.zeros(int(last[-1]) + 1, dtype=torch.long, device=keep.device)
    lengths = lengths.index_add(0, owner, torch.ones_like(owner))
    return SequenceLayout(
        cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)),
        source=source,
        slot=slot,
        keep=keep,
        first=first,
        last=last,
        breaks=breaks,
    )
