"""Documents packed in one row, laid out so that every chunk belongs to one document."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .runtime.modes import traced


def document_numbers(seq_idx: Tensor) -> Tensor:
    """Numbers the documents of each row ``(B, T)`` 0, 1, 2, ..., so that ids which return later stay apart."""
    return F.pad(_changes(seq_idx).long().cumsum(1), (1, 0))


def document_starts(seq_idx: Tensor) -> Tensor:
    """Marks the first token of each document, ``(B, T)``."""
    return F.pad(_changes(seq_idx), (1, 0), value=True)


def _changes(seq_idx: Tensor) -> Tensor:
    """Whether a token's document is not its left neighbor's, ``(B, T - 1)``."""
    return seq_idx[:, 1:] != seq_idx[:, :-1]


def document_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The document of each token, ``(T,)``; tokens past the last document get ``S``."""
    return _ended(cu_seqlens[1:], tokens)


def bounded_starts(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Marks the first token of each document of one row, and every token past the last document, ``(T,)``."""
    starts = torch.zeros(tokens + 1, dtype=torch.bool, device=cu_seqlens.device)
    starts = starts.index_fill(0, cu_seqlens.long().clamp(max=tokens), True)[:tokens]
    return starts | (torch.arange(tokens, device=starts.device) >= cu_seqlens[-1])


def _ended(ends: Tensor, count: int) -> Tensor:
    """How many of ``ends (S,)``, which do not fall, are at most 0, 1, ..., ``count - 1``. ONNX has no search."""
    if not traced():
        return torch.searchsorted(ends, torch.arange(count, dtype=ends.dtype, device=ends.device), right=True)
    ends = ends.to(torch.int64)
    at = torch.zeros(count + 1, dtype=torch.int64, device=ends.device)
    return at.scatter_add(0, ends.clamp(max=count), torch.ones_like(ends))[:count].cumsum(0)


class ChunkLayout(NamedTuple):
    """Where each slot of the chunked layout reads from and each token is found again.

    The number of chunks is the upper bound ``T // Q + S``, a function of shapes alone, so that nothing waits for the
    device and graphs stay static; chunks that no document needs hold padding.
    """

    source: Tensor  # (chunks * Q,) token read by each slot; any token where `valid` is False
    valid: Tensor  # (chunks * Q,) whether the slot holds a token
    slot: Tensor  # (T,) slot of each token; 0 where the token belongs to no document
    owned: Tensor  # (T,) whether the token belongs to a document
    document: Tensor  # (chunks,) document of each chunk, S where unused
    is_first: Tensor  # (chunks,) whether the chunk is its document's first
    last_chunk: Tensor  # (S,) last chunk of each document, meaningless where it is empty
    is_empty: Tensor  # (S,)


def chunk_layout(cu_seqlens: Tensor, tokens: int, chunk_size: int) -> ChunkLayout:
    """Lays documents out in whole chunks; see :class:`ChunkLayout`."""
    cu = cu_seqlens.to(torch.int64)
    device, documents = cu.device, cu.shape[0] - 1
    lengths = cu.diff()  # (S,)
    first_chunk = F.pad(((lengths + chunk_size - 1) // chunk_size).cumsum(0), (1, 0))  # (S + 1,)
    chunks = tokens // chunk_size + documents
    chunk = torch.arange(chunks, device=device)
    document = _ended(first_chunk[1:], chunks)  # (chunks,)
    known = document.clamp(max=documents - 1)
    offset = (chunk - first_chunk[known]) * chunk_size  # (chunks,) position of the chunk inside its document
    position = offset[:, None] + torch.arange(chunk_size, device=device)  # (chunks, Q)
    valid = (position < lengths[known][:, None]) & (document < documents)[:, None]
    source = torch.where(valid, cu[known][:, None] + position, 0)

    owner = document_ids(cu, tokens)  # (T,)
    owned = owner < documents
    home = owner.clamp(max=documents - 1)
    slot = torch.where(owned, first_chunk[home] * chunk_size + torch.arange(tokens, device=device) - cu[home], 0)
    return ChunkLayout(
        source=source.flatten(),
        valid=valid.flatten(),
        slot=slot,
        owned=owned,
        document=document,
        is_first=(offset == 0) & (document < documents),
        last_chunk=(first_chunk[1:] - 1).clamp(min=0),
        is_empty=lengths == 0,
    )
