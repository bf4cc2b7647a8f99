"""What one attention layer remembers between calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CacheError
from .placement import Placement
from .state import NOT_RECORDED, Recorder, check_rows, last_before, runs


class KeyValueState(Recorder):
    """Keys and values ``(B, H, S, D)`` of one layer, and the last inputs of its convolution ``(B, C, K - 1)``.

    Without a capacity they grow with the tokens, each row's own at the right end. With one, buffers are made by the
    first call and then written in place, filled from the left; those of a layer with a window stay aligned to the
    right. The state holds no autograd graph.

    While it is recorded, a window and a convolution keep what they held before the recorded tokens, and all that came
    since; :meth:`crop` puts together from them what they held after the tokens that stay.

    Args:
        window: how many keys a token sees, itself among them; None for all.
        capacity: tokens of a row to make buffers for; None to grow.
    """

    names = ("keys", "values", "conv")

    def __init__(self, window: int | None = None, capacity: int | None = None) -> None:
        self.window, self.capacity = window, capacity
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.conv: Tensor | None = None
        self.started = False
        self._forget()

    def _forget(self) -> None:
        self.recorded_tokens = 0
        self._was_started = False
        self._past: dict[str, list[Tensor]] = {}  # before the recorded tokens, and then of every call, (B, ., S, .)

    def _record(self, keys: Tensor, values: Tensor, placement: Placement) -> None:
        if placement.fresh is not None or placement.starts is not None:
            raise CacheError(NOT_RECORDED)
        if not self.recorded_tokens:
            self._was_started = self.started
        self.recorded_tokens += keys.shape[2]
        if self.window is not None:
            for name, new in (("keys", keys), ("values", values)):
                held = getattr(self, name)
                if name not in self._past:
                    self._past[name] = [held.clone()] if self.started and held is not None else []
                self._past[name].append(new.detach())

    @property
    def takes_back_in_place(self) -> bool:
        """Whether :meth:`crop` needs nothing that was recorded."""
        return self.capacity is not None and self.window is None and self.conv is None

    @property
    def changing(self) -> dict[str, bool]:
        """See :attr:`Buffers.changing`. Buffers that grow are made anew by every call, and others without a window are
        written behind what is counted.
        """
        known = super().changing
        if self.capacity is None:
            return {**known, "keys": False, "values": False}
        return known if self.window is not None else {"conv": True, **dict.fromkeys(self.counts, False)}

    def count_block(self, tokens: int) -> None:
        """See :meth:`Recorder.count_block`."""
        self.recorded_tokens = tokens

    def crop(self, tokens: int | Tensor, width: int) -> None:
        """Forgets the last ``tokens`` of those recorded, of each row its own where they are ``(B,)``, and settles the
        others: they cannot be removed later. ``width`` is how many keys the longest row has of all tokens that stay.
        """
        if self.keys is not None and (isinstance(tokens, Tensor) or tokens):
            self.started = self._was_started or width > 0
            if self.window is None and self.capacity is None:
                self._replace(*(last_before(held, width, tokens) for held in self.pair))
            for name, parts in self._past.items():
                held = torch.cat(parts, 2)
                if name == "conv":
                    self.update_conv(last_before(held, parts[0].shape[2], tokens))
                    continue
                assert self.limit is not None
                held = last_before(held, min(width, self.limit), tokens)
                if self.capacity is None:
                    self.replace(**{name: held.clone()})
                elif held.shape[2]:
                    getattr(self, name)[:, :, -held.shape[2] :] = held
        self._forget()

    @property
    def limit(self) -> int | None:
        """Keys of a row that any later token may see; None for all."""
        if self.window is None:
            return None
        return self.window - 1 if self.capacity is None else min(self.window - 1, self.capacity)

    def extend(self, keys: Tensor, values: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
        """Adds the keys and values of new tokens, ``(B, H, T, D)``, and returns all that those tokens may see.

        Raises:
            CacheError: the state belongs to another batch size.
        """
        if self.started:
            check_rows(self.batch_size, keys.shape[0])
        self.leave_inference_mode()
        if self.record_past:
            self._record(keys, values, placement)
        if self.capacity is None:
            return self._grow(keys, values, placement)
        if self.keys is None or (not self.started and self.keys.shape[0] != keys.shape[0]):
            self.allocate(keys, values)
        started, self.started = self.started, True
        if self.limit is not None:
            return self._slide(keys, values, placement, started)
        return self._fill(keys, values, placement, started)

    def step_buffers(self, rows: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values ``(B, H, S, D)`` to which one token a row may be added in place of :meth:`extend`, at its
        row's end; None where more than that is to be done.

        Raises:
            CacheError: the state belongs to another batch size.
        """
        if not self.started or self.capacity is None or self.window is not None or self.record_past:
            return None
        check_rows(self.batch_size, rows)
        self.leave_inference_mode()
        return self.pair

    def _grow(self, keys: Tensor, values: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
        stored = 0
        if self.started and self.keys is not None:
            stored = self.keys.shape[2]
            keys, values = self._joined(keys, values)
        width, index = placement.kept(stored, self.limit)
        self._replace(_keep(keys, width, index), _keep(values, width, index))
        self.started = True
        return keys, values

    def _joined(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What is held, then these."""
        held = self.pair
        return torch.cat([held[0], keys], 2), torch.cat([held[1], values], 2)

    def _replace(self, keys: Tensor, values: Tensor) -> None:
        self.replace(keys=keys, values=values)

    def _copy(self, pair: tuple[Tensor, Tensor], width: int, index: Tensor | None) -> None:
        """Fills the buffers with those of ``pair`` that :func:`_keep` chooses."""
        for buffer, new in zip(self.pair, pair, strict=True):
            buffer.copy_(_keep(new, width, index))

    def _slide(self, keys: Tensor, values: Tensor, placement: Placement, started: bool) -> tuple[Tensor, Tensor]:
        """Adds to buffers of the last keys, aligned to the right."""
        stored, joined = self.pair[0].shape[2], self._joined(keys, values)
        self._copy(joined, *placement.kept(stored, stored))
        return joined if started else (keys, values)

    def _fill(self, keys: Tensor, values: Tensor, placement: Placement, started: bool) -> tuple[Tensor, Tensor]:
        """Adds to buffers of all keys, filled from the left."""
        assert placement.past is not None
        held = self.pair
        past, tokens = placement.past[:, None], keys.shape[2]
        if started and tokens == 1:
            index = past[:, None, :, None].expand_as(keys)  # (B, H, 1, D)
            seen = held
            if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
                seen = held[0].scatter(2, index, keys), held[1].scatter(2, index, values)
            held[0].scatter_(2, index, keys.detach())
            held[1].scatter_(2, index, values.detach())
            return seen
        if placement.fresh is None and placement.starts is None and not started:
            held[0][:, :, :tokens] = keys.detach()
            held[1][:, :, :tokens] = values.detach()
            return keys, values
        # The key at a place of the buffer is a cached one or a new one, told relative to the first new one.
        assert placement.lengths is not None
        slots = torch.arange(held[0].shape[2], device=past.device)  # (L,)
        fresh = tokens if placement.fresh is None else placement.fresh[:, None]
        place = slots + fresh - placement.lengths[:, None]  # (B, L)
        seen, behind = (keys, values), 0
        if started:
            seen, behind = self._joined(keys, values), held[0].shape[2]
            place = torch.where(place < 0, place + past, place + behind)
        self._copy(seen, behind, place.clamp(0, behind + tokens - 1))
        return seen

    def allocate(self, keys: Tensor, values: Tensor) -> None:
        """Makes the buffers of a state with a capacity, of zeros, for keys and values of this dtype and ``(B, H, .,
        D)``.
        """
        assert self.capacity is not None
        length = self.capacity if self.limit is None else self.limit
        self._replace(*(new.new_zeros(*new.shape[:2], length, new.shape[3]) for new in (keys, values)))

    def reserve(self, capacity: int) -> None:
        """Makes room for ``capacity`` tokens of a row, no fewer than now, keeping what is there."""
        before, self.capacity = self.limit or self.capacity, capacity
        assert before is not None
        more = (self.limit or capacity) - before
        places = (0, 0, 0, more) if self.limit is None else (0, 0, more, 0)  # as they are aligned
        if self.keys is not None and more:
            self._replace(*(F.pad(held, places) for held in self.pair))

    def own_keys(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``(B, H, S, D)``, each row's own at the right end: as many as the longest of ``lengths (B,)``
        or, if there is a window, as it leaves of them.
        """
        keys, values = self.pair
        width, index = int(lengths.max()), None
        if self.capacity is not None and self.limit is None:
            columns = torch.arange(width, device=keys.device)[None]
            index = (columns + lengths.to(keys.device)[:, None] - width).clamp(min=0)
        elif self.limit is not None:
            width = min(width, self.limit)
        return _keep(keys, width, index), _keep(values, width, index)

    def restore(self, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        """Takes what :meth:`own_keys` gave, in whatever kind of buffers this state has."""
        if self.capacity is None:
            self._replace(keys.clone(), values.clone())
        else:
            self.allocate(keys, values)
            self.write_rows(slice(None), keys, values, lengths)
        self.started = True

    def write_rows(self, rows: slice, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        """Writes what :meth:`own_keys` gave into ``rows`` of buffers with a capacity."""
        width = keys.shape[2]
        if self.limit is None:
            columns = torch.arange(width, device=keys.device)[None]
            index = (columns + width - lengths.to(keys.device)[:, None]).clamp(max=width - 1)
            for held, new in zip(self.pair, (keys, values), strict=True):
                held[rows, :, :width] = _keep(new, width, index)
        elif width:
            width = min(width, self.limit)
            for held, new in zip(self.pair, (keys, values), strict=True):
                held[rows, :, -width:] = new[:, :, -width:]

    def put(self, row: int, other: KeyValueState | None, length: int, place: int = 0) -> None:
        """Replaces a sequence by the one at ``place`` of another state, which holds ``length`` keys, or by none, in
        place.
        """
        self.leave_inference_mode()
        if other is not None:
            keys, values = (own[None] for own in other.own_row(place, length))
            self.write_rows(slice(row, row + 1), keys, values, torch.tensor([keys.shape[2]]))
        if self.conv is not None:
            known = None if other is None else other.conv
            self.conv[row] = 0 if known is None else known[place]

    def own_row(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``(H, S, D)`` of one row that holds ``length`` of them, or as many as a window leaves."""
        if self.capacity is not None and self.limit is None:
            keys, values = (held[row, :, :length] for held in self.pair)
        else:
            width = self.pair[0].shape[2]
            first = width - (length if self.limit is None else min(length, self.limit))
            keys, values = (held[row, :, first:] for held in self.pair)
        return keys, values

    def gather(self, rows: Sequence[tuple[KeyValueState, int, int] | None]) -> None:
        """Holds copies of single sequences of other states from now on, in buffers that grow.

        Args:
            rows: the other state, the row and how many tokens that has seen; None for one that has seen nothing. Not
                all are None.
        """
        known = [(first, first + count, row[0], row[1], row[2]) for first, count, row in runs(rows)]
        source = known[0][2]
        pairs = [state.own_row(place, tokens) for _, _, state, place, tokens in known]
        width = max(pair[0].shape[1] for pair in pairs)
        buffers = [held.new_zeros(len(rows), held.shape[1], width, held.shape[3]) for held in source.pair]
        for (first, end, *_), pair in zip(known, pairs, strict=True):
            for buffer, own in zip(buffers, pair, strict=True):
                buffer[first:end, :, width - own.shape[1] :] = own
        conv = None if source.conv is None else source.conv.new_zeros(len(rows), *source.conv.shape[1:])
        if conv is not None:
            for first, end, state, place, _ in known:
                conv[first:end] = state.conv[place]  # type: ignore[index]
        self.replace(keys=buffers[0], values=buffers[1], conv=conv)
        self.started = True

    def initial_conv(self, rows: int) -> Tensor | None:
        """What the convolution continues from, ``(B, C, K - 1)``; None before the first call. A copy where autograd
        may keep it for a backward that runs after the next call.
        """
        if not self.started or self.conv is None:
            return None
        check_rows(self.batch_size, rows)
        self.leave_inference_mode()
        return self.conv.clone() if torch.is_grad_enabled() else self.conv

    def update_conv(self, conv: Tensor, inputs: Tensor | None = None) -> None:
        """Stores the last inputs of the convolution; ``inputs (B, T, C)`` are all of this call, to be recorded."""
        if self.record_past and inputs is not None:
            if "conv" not in self._past:
                known = self.started and self.conv is not None
                self._past["conv"] = [self.conv.clone() if known else torch.zeros_like(conv)]  # type: ignore[union-attr]
            self._past["conv"].append(inputs.detach().transpose(1, 2))  # (B, C, T)
        if self.conv is None or self.conv.shape != conv.shape:
            self.replace(conv=conv.detach().clone(memory_format=torch.contiguous_format))
        else:
            self.leave_inference_mode()
            self.conv.copy_(conv.detach())

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """Keys and values, of a state that has them."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    @property
    def batch_size(self) -> int:
        """Sequences held, -1 before the first call."""
        return self.keys.shape[0] if self.started and self.keys is not None else -1

    def reset(self) -> None:
        """Forgets everything, keeping buffers of a fixed size for the next call."""
        self.started = False
        self._forget()
        if self.capacity is None:
            self.replace(keys=None, values=None)

    def select(self, indices: Tensor) -> None:
        """Keeps the sequences at ``indices (B',)``, in that order; what was recorded is settled."""
        self._forget()
        super().select(indices)

    def to(self, device: torch.device | str) -> KeyValueState:
        """Moves the buffers and what was recorded; returns itself, as hooks that move a module's inputs expect."""
        self._past = {name: [part.to(device) for part in parts] for name, parts in self._past.items()}
        super().to(device)
        return self


def _keep(tensor: Tensor, width: int, index: Tensor | None) -> Tensor:
    """The last ``width`` of ``(B, H, S, D)``, or those at ``index (B, width)``, without their graph."""
    tensor = tensor.detach()
    if index is not None:
        return tensor.gather(2, index[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))
    return tensor if width == tensor.shape[2] else tensor[:, :, tensor.shape[2] - width :].clone()
