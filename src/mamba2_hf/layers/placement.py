"""Where the tokens of one call stand among those of a cache, for attention: which keys each of them may see.

Attention runs on a grid ``(B, T)`` in which the tokens of a row that count lie at its left, whatever padding the input
had. A key's place is told relative to the first new token of its row: 0, 1, ... are new, -1, -2, ... are cached. A
token sees the keys from the first one of its document (of its window) up to itself. Padding stands behind the tokens
that count, where no query sees it, so that a padded batch needs no more of a mask than one without padding.

The cache keeps the keys of each row's last document only, as no later token may see others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CacheError
from ..ops.packing import bounded_starts, document_starts
from .sequence import SequenceLayout, kept_first, rank, take
from .state import Buffers, check_rows

Visible = Callable[[Any, Any, Any, Any], Tensor]
"""Of row, head, query and key: whether the query sees the key. Indices may be numbers or tensors that broadcast."""


_NOWHERE = -(2**30)


def sent(values: list[Any], device: torch.device) -> Tensor:
    """Integers in a tensor on a device that may be busy: nothing waits for it."""
    held = torch.tensor(values)
    return held.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else held.to(device)


@dataclass(frozen=True)
class FlatDocuments:
    """Queries and keys of a call, laid end to end; see :meth:`Placement.flat`.

    Attributes:
        queries: ``(Q,)`` places in the flat grid, in order.
        keys: ``(K,)`` places in the flat ``(B, S)`` keys, in order.
        query_bounds, key_bounds: ``(N + 1,)`` int32 bounds of the documents among them; the last key of a document is
            that of its last query.
        most_queries, most_keys: of a document.
    """

    queries: Tensor
    keys: Tensor
    query_bounds: Tensor
    key_bounds: Tensor
    most_queries: int
    most_keys: int


@dataclass(frozen=True)
class SeenKeys:
    """Which keys each query of a call sees: those of one stretch; see :meth:`Placement.seen_keys`.

    Attributes:
        order: ``(B, S')`` places of the keys in the order of their tokens; None if they lie so.
        begin, end: ``(B, T)`` the first key in that order that a query sees, and the one behind the last.
        origin: ``(B, T)`` where the key of the first token of the query's document is in that order, or would be.
    """

    order: Tensor | None
    begin: Tensor
    end: Tensor
    origin: Tensor

    def in_order(self, keys: Tensor) -> Tensor:
        """Keys or values ``(B, H, S, D)`` in the order of their tokens."""
        if self.order is None:
            return keys
        return keys.gather(2, self.order[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3]))


class OwnKeys:
    """One query a sequence, which sees the first ``lengths (B,)`` keys of its own, all of them if None."""

    def __init__(self, lengths: Tensor | None) -> None:
        self.lengths = lengths
        self._mask: Tensor | None = None

    def additive(self, keys: Tensor) -> Tensor | None:
        """The same as a mask ``(B, 1, 1, S)`` for ``keys (B, H', S, D)``, made once for all layers."""
        if self.lengths is not None and self._mask is None:
            self._mask = (torch.arange(keys.shape[2], device=keys.device) < self.lengths[:, None])[:, None, None]
        return self._mask

    def to(self, device: torch.device) -> OwnKeys:
        """The same on another device."""
        return OwnKeys(None if self.lengths is None else self.lengths.to(device))


class KeyCounts(Buffers):
    """How many keys the attention layers of a cache hold for each row, the same for all layers without a window.

    Args:
        capacity: keys of a row for which buffers are made once and for all; None for buffers that grow.
    """

    names = ("lengths", "shift")
    counts = ("width",)

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.width = 0  # a bound, the same for all rows
        self.lengths: Tensor | None = None  # (B,), or None while every row holds `width`
        self.shift: Tensor | None = None  # (B,) positions of rotary embeddings past these counts

    def reset(self) -> None:
        """Forgets all keys."""
        self.width = 0
        if self.capacity is None:
            self.replace(lengths=None, shift=None)
            return
        self.replace(shift=None)
        if self.lengths is not None:
            self.leave_inference_mode()
            self.lengths.zero_()

    def crop(self, tokens: int | Tensor, fewest: int) -> None:
        """Forgets the last ``tokens`` of every row, of each its own where they are ``(B,)``; the longest row has
        ``fewest`` less than before then.
        """
        if isinstance(tokens, Tensor):
            if self.lengths is None:
                self.replace(lengths=torch.full_like(tokens, self.width))
            assert self.lengths is not None
            tokens = tokens.to(self.lengths.device)
        self.width -= fewest
        if self.lengths is not None and self.capacity is not None:
            self.leave_inference_mode()
            self.lengths.sub_(tokens)
        elif self.lengths is not None:
            self.replace(lengths=self.lengths - tokens)

    def put(self, row: int, length: int) -> None:
        """Says that ``row`` of buffers with a capacity holds ``length`` keys."""
        if self.lengths is not None:
            self.leave_inference_mode()
            self.lengths[row] = length
            self.width = max(int(self.lengths.max()), 1)

    def set(self, lengths: list[int]) -> None:
        """Says how many keys each row of buffers with a capacity holds."""
        if self.lengths is not None:
            self.leave_inference_mode()
            self.lengths.copy_(sent(lengths, self.lengths.device))
            self.width = max(*lengths, 1)

    def gather(self, lengths: list[int], device: torch.device) -> None:
        """Says how many keys each row holds in buffers that grow and were filled anew."""
        self.width = max(lengths)
        even = min(lengths) == self.width
        self.replace(lengths=None if even else torch.tensor(lengths, device=device), shift=None)


@dataclass
class Placement:
    """The tokens of one call: made by :func:`place`, shared by all attention layers, and by the cache afterwards.

    Attributes:
        rows, tokens: B and T of the grid.
        stored: cached keys per row in buffers that grow and have no window.
        capacity: of buffers that do not grow.
        past: ``(B,)`` cached keys that are a row's own; None if all ``stored`` ones are.
        fresh: ``(B,)`` new tokens that count; None if all T do.
        starts: ``(B, T)`` the column where the document of a token starts, 0 if it continues the cache; None if every
            row is one document.
        width: as ``stored``, after this call. Without a cache nothing is kept, and it is T.
        lengths: as ``past``, after this call; None without a cache.
        to_grid: ``(B, T)`` place in the flat input of each token of the grid; None if the input is the grid.
        from_grid: place in the flat grid of each token of the input, in the input's shape, ``(B, T)``.
        masks: whatever attention makes of :meth:`visible` or :meth:`flat`, by window.
        device: of all tensors.
        rotary: cosines and sines on the grid, ``(1, T, D')`` or ``(B, T, D')``.
        pieces: where rows are slices, the pieces of them whose queries are computed here; the slice itself is placed as
            if the tokens before it were cached.
    """

    rows: int
    tokens: int
    stored: int
    capacity: int | None
    past: Tensor | None
    fresh: Tensor | None
    starts: Tensor | None
    width: int
    lengths: Tensor | None
    to_grid: Tensor | None
    from_grid: Tensor | None
    masks: dict[int | None, Any]
    device: torch.device
    rotary: tuple[Tensor, Tensor] | None = None
    pieces: tuple[Any, ...] = ()

    @property
    def is_static(self) -> bool:
        """Whether keys live in buffers of a fixed size."""
        return self.capacity is not None

    @property
    def is_regular(self) -> bool:
        """Whether every token sees all cached keys (of its window), and the new ones up to itself."""
        return self.starts is None and (self.past is None or not self.stored)

    def align(self, tensor: Tensor) -> Tensor:
        """The input's ``(B, T, ...)`` to the grid; behind a row's tokens is anything finite."""
        return tensor if self.to_grid is None else take(tensor.flatten(0, 1), self.to_grid)

    def unalign(self, tensor: Tensor) -> Tensor:
        """Inverse of :meth:`align`; what comes out for padding is anything finite."""
        return tensor if self.from_grid is None else take(tensor.flatten(0, 1), self.from_grid)

    def of_row(self, layout: SequenceLayout) -> Placement:
        """The placement of what :meth:`SequenceLayout.pack` makes of the input, ``(1, R, ...)``."""
        if self.to_grid is None or self.from_grid is None or layout.slot is None or layout.source is None:
            return self
        to_grid = take(layout.slot.flatten(), self.to_grid)
        return replace(self, to_grid=to_grid, from_grid=self.from_grid.flatten()[layout.source][None])

    def first(self) -> Tensor | None:
        """``(B, T)`` the first key that each token may see, if there is no window; None if regular."""
        if self.is_regular:
            return None
        behind = self.stored if self.past is None else self.past[:, None]
        if self.starts is None:
            assert isinstance(behind, Tensor)
            return (-behind).expand(-1, self.tokens)
        return torch.where(self.starts == 0, -behind, self.starts)

    def positions(self, shift: Tensor | None) -> Tensor:
        """``(B or 1, T)`` on the grid: how many tokens of its document are before each one."""
        columns = torch.arange(self.tokens, device=self.device)[None]
        first = self.first()
        positions = columns + self.stored if first is None else columns - first
        if shift is not None:
            shift = shift.to(self.device)[:, None].expand(-1, self.tokens)
            positions = positions + (shift if self.starts is None else torch.where(self.starts == 0, shift, 0))
        return positions

    def key_count(self, window: int | None) -> int:
        """How many keys :meth:`KeyValueState.extend` returns for a row."""
        if self.capacity is None:
            return (self.stored if window is None else min(self.stored, window - 1)) + self.tokens
        if not self.stored:
            return self.tokens
        if window is not None:
            return min(self.capacity, window - 1) + self.tokens
        return self.capacity + (self.tokens if self.tokens > 1 else 0)

    @property
    def sees_all(self) -> bool:
        """Whether every token sees every key, as the one token of a decoding step does."""
        return self.is_regular and self.tokens == 1 and self.capacity is None

    @property
    def is_step(self) -> bool:
        """Whether every row has one new token, which sees all of the row's keys, those of a buffer from its left."""
        if self.tokens != 1 or self.starts is not None or self.fresh is not None:
            return False
        return self.is_static and bool(self.stored) if self.is_static else self.is_regular

    def is_plain_causal(self, window: int | None) -> bool:
        """Whether there is nothing but new tokens, each of which sees those up to itself."""
        return self.is_regular and not self.stored and (window is None or self.tokens <= window)

    def places(self, window: int | None, keys: int) -> Tensor:
        """``(B or 1, keys)`` where the keys are that :meth:`KeyValueState.extend` returns, relative to the first new
        one; far below all others where there is none.
        """
        key = torch.arange(keys, device=self.device)[None]
        behind = keys - self.tokens
        if self.past is None or self.capacity is None or window is not None or not behind:
            return key - behind
        past = self.past[:, None]
        if keys == self.capacity:  # the one new token was written behind its row's keys
            return key - past
        return torch.where(key < behind, torch.where(key < past, key - past, _NOWHERE), key - behind)

    def visible(self, window: int | None, keys: int) -> Visible:
        """Which of ``keys`` keys, as :meth:`KeyValueState.extend` returns them, a token of the grid may see."""
        first, places = self.first(), self.places(window, keys)
        shared = places.shape[0] == 1

        def visible(row: Any, head: Any, query: Any, key: Any) -> Tensor:
            place = places[0, key] if shared else places[row, key]
            seen = place <= query
            if first is not None:
                seen = seen & (place >= first[row, query])
            if window is not None:
                seen = seen & (place > query - window)
            return seen

        return visible

    def seen_keys(self, window: int | None, keys: int) -> SeenKeys:
        """As :meth:`visible`, for attention that takes each query alone."""
        columns = torch.arange(self.tokens, device=self.device)[None].expand(self.rows, -1)  # (B, T)
        first, order = self.first(), None
        origin = torch.full_like(columns, -self.stored) if first is None else first
        begin = origin if window is None else torch.maximum(origin, columns - window + 1)
        behind: Any = keys - self.tokens  # cached keys, as a place among all
        if self.past is not None and self.capacity is not None and window is None and behind:
            behind = self.past[:, None]
            if keys != self.capacity:  # new keys are behind the whole buffer
                place = torch.arange(keys, device=self.device)[None]
                order = torch.where(place < behind, place, place + self.capacity - behind).clamp(max=keys - 1)
        return SeenKeys(order, begin + behind, columns + 1 + behind, origin + behind)

    def flat(self, window: int | None, keys: int) -> FlatDocuments:
        """Queries and keys laid end to end, for kernels that take the bounds of documents."""
        columns = torch.arange(self.tokens, device=self.device)
        fresh = torch.full((self.rows,), self.tokens, device=self.device) if self.fresh is None else self.fresh
        counts = columns < fresh[:, None]  # (B, T)
        begins = counts & (columns == (0 if self.starts is None else self.starts))
        places = self.places(window, keys)
        stored = torch.full_like(fresh, self.stored) if self.past is None else self.past
        past = stored.clamp(max=keys - self.tokens)  # a window may have let go of some
        known = (places >= -past[:, None]) & (places < fresh[:, None]) & (fresh[:, None] > 0)
        row, column = begins.nonzero(as_tuple=True)
        queries = counts.flatten().nonzero()[:, 0]
        ends = F.pad(begins[counts].nonzero()[:, 0], (0, 1), value=queries.shape[0])
        query_lengths = ends.diff()
        key_lengths = query_lengths + torch.where(column == 0, past[row], 0)
        return FlatDocuments(
            queries=queries,
            keys=known.flatten().nonzero()[:, 0],
            query_bounds=F.pad(query_lengths.cumsum(0), (1, 0)).int(),
            key_bounds=F.pad(key_lengths.cumsum(0), (1, 0)).int(),
            most_queries=int(query_lengths.max()) if len(row) else 0,
            most_keys=int(key_lengths.max()) if len(row) else 0,
        )

    def kept(self, stored: int, limit: int | None) -> tuple[int, Tensor | None]:
        """Which of ``stored`` cached keys and T new ones to keep, at most ``limit`` for a row: how many, and their
        indices ``(B, width)``; None for the last of them.
        """
        width = self.width if limit is None else limit if self.is_static else min(self.width, limit)
        if self.fresh is None and self.starts is None:
            return width, None
        fresh = self.tokens if self.fresh is None else self.fresh[:, None]
        index = torch.arange(width, device=self.device)[None] + (stored - width) + fresh  # (B or 1, width)
        return width, index.clamp(min=0).expand(self.rows, -1)

    def to(self, device: torch.device | str) -> Placement:
        """The same on another device; layers may be spread over several."""
        device = torch.device(device)
        if self.device == device:
            return self

        def moved(value: Any) -> Any:
            return value.to(device) if hasattr(value, "to") else value

        changes: dict[str, Any] = {"device": device}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, dict):
                changes[field.name] = {name: moved(mask) for name, mask in value.items()}
            elif isinstance(value, tuple):
                changes[field.name] = tuple(moved(tensor) for tensor in value)
            elif field.name != "device":
                changes[field.name] = moved(value)
        return replace(self, **changes)

    def count(self, counts: KeyCounts, positions: Tensor | None) -> None:
        """Counts these tokens, once every layer has seen them.

        Args:
            counts: of the cache.
            positions: ``(B or 1, T)`` on the grid, if they were given and not counted.
        """
        shift = None
        if positions is not None:
            last = positions.expand(self.rows, -1).gather(1, self._last()[:, None])[:, 0]
            shift = last + 1 - (self.width if self.lengths is None else self.lengths)
            if self.fresh is not None:
                before = torch.zeros_like(shift) if counts.shift is None else counts.shift.to(shift)
                shift = torch.where(self.fresh > 0, shift, before)
        elif counts.shift is not None:
            shift = counts.shift.to(self.device)
            if self.starts is not None:
                shift = torch.where(self.starts.gather(1, self._last()[:, None])[:, 0] == 0, shift, 0)
        counts.replace(shift=shift)
        counts.width = self.width
        known, lengths = counts.lengths, self.lengths
        fits = self.is_static and known is not None and lengths is not None and len(known) == len(lengths)
        if fits and known is not None and lengths is not None and _is_writable(known):
            known.copy_(lengths)  # its address stays fixed for compiled and captured graphs
        else:
            counts.replace(lengths=lengths)

    def _last(self) -> Tensor:
        """``(B,)`` the column of each row's last token."""
        if self.fresh is not None:
            return (self.fresh - 1).clamp(min=0)
        return torch.full((self.rows,), self.tokens - 1, device=self.device)


def _is_writable(tensor: Tensor) -> bool:
    """Whether a tensor may be written here: not if ``torch.inference_mode`` made it and is over."""
    return torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not tensor.is_inference()


def place(layout: SequenceLayout, rows: int, tokens: int, counts: KeyCounts | None, device: torch.device) -> Placement:
    """Places the tokens of a call.

    Args:
        layout: their documents and padding.
        rows, tokens: B and T of the input.
        counts: of the cache to continue; None without a cache.
        device: of the input.

    Raises:
        CacheError: a static cache has no room for them, or holds other rows.
    """
    stored, past, capacity = 0, None, None
    if counts is not None:
        stored, past, capacity = counts.width, counts.lengths, counts.capacity
        if past is not None and past.shape[0] != rows and not stored:
            past = None  # of the rows before a reset
        if past is not None:
            past = past.to(device)
            check_rows(past.shape[0], rows)
            if torch.is_grad_enabled() or not _is_writable(past):
                past = past.clone()  # autograd may keep it for a backward that runs after the next call
    if capacity is not None:
        if stored + tokens > capacity:
            raise CacheError(
                f"the static cache has room for {capacity} tokens, it holds up to {stored} and {tokens} more came: "
                "make a larger one, Mamba2Cache(config, static=True, max_length=...)"
            )
        if past is None:
            past = torch.zeros(rows, dtype=torch.long, device=device)
    fresh = None if layout.keep is None else layout.keep.sum(1)
    to_grid, from_grid = None, None
    if layout.keep is not None:
        start = torch.arange(0, rows * tokens, tokens, device=layout.keep.device)[:, None]  # of each row
        to_grid, from_grid = start + kept_first(layout.keep), start + rank(layout.keep)
    starts = _document_starts(layout, rows, tokens, to_grid)
    # Nothing is counted without a cache, and a step that reads no values back can be captured.
    width, lengths = (tokens, None) if counts is None else _after(rows, tokens, stored, past, fresh, starts, capacity)
    return Placement(
        rows=rows,
        tokens=tokens,
        stored=stored,
        capacity=capacity,
        past=past if stored or capacity is not None else None,
        fresh=fresh,
        starts=starts,
        width=width,
        lengths=lengths,
        to_grid=to_grid,
        from_grid=from_grid,
        masks={},
        device=device,
    )


def _document_starts(layout: SequenceLayout, rows: int, tokens: int, to_grid: Tensor | None) -> Tensor | None:
    """``(B, T)`` the column where each token's document starts; None if every row is one document."""
    if layout.seq_idx is not None:
        changes = document_starts(layout.seq_idx)
    elif layout.cu_seqlens is not None and layout.first is not None:
        flags = bounded_starts(layout.cu_seqlens, tokens if layout.source is None else layout.source.shape[0])
        changes = flags[None]
        if layout.slot is not None and to_grid is not None:
            changes = take(flags, take(layout.slot.flatten(), to_grid))
    else:
        return None
    columns = torch.arange(tokens, device=changes.device)
    return torch.where(changes, columns, 0).cummax(1).values


def _after(
    rows: int,
    tokens: int,
    stored: int,
    past: Tensor | None,
    fresh: Tensor | None,
    starts: Tensor | None,
    capacity: int | None,
) -> tuple[int, Tensor | None]:
    """``width`` and ``lengths`` after a call."""
    width = stored + tokens
    if fresh is None and starts is None:
        return width, None if past is None else past + tokens
    device = None if starts is None else starts.device
    new = torch.full((rows,), tokens, device=device) if fresh is None else fresh  # (B,)
    before = torch.full_like(new, stored) if past is None else past
    lengths = before + new
    if starts is not None:
        start = starts.gather(1, (new - 1).clamp(min=0)[:, None])[:, 0]
        lengths = torch.where((start == 0) | (new == 0), lengths, new - start)
    if capacity is None and not torch.compiler.is_compiling():
        width = int(lengths.max())
        if bool((lengths == width).all()):
            return width, None
    return width, lengths
