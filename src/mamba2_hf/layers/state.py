"""What one mixer remembers between calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import ops
from ..errors import CacheError
from ..ops.scan.reference import step_size

_Row = TypeVar("_Row")
_STATES = ("conv", "held")
_RING = ("ring_x", "ring_decays", "ring_B", "clock")
_BLOCK = ("block_inputs", "block_convolved", "block_steps", "kept")
NOT_RECORDED = (
    "the cache is recorded, to take tokens back, and padding or packed documents came: read those before "
    "activate_past_recording(). A compiled forward takes every attention_mask for padding: leave it out where all "
    "tokens count"
)
"""What a state says that records, and gets what it cannot take back."""


def check_rows(held: int, rows: int) -> None:
    """Raises :class:`CacheError` unless a cache of ``held`` sequences is given as many ``rows``."""
    if held != rows:
        raise CacheError(
            f"the cache holds {held} sequences and the input has {rows}: use batch_repeat_interleave or "
            "batch_select_indices, or start with an empty cache"
        )


def pick(buffer: Tensor, indices: Tensor) -> Tensor:
    """The rows of ``buffer`` at ``indices``, in its own memory where they are as many as before."""
    picked = buffer.index_select(0, indices.to(buffer.device))
    return buffer.copy_(picked) if picked.shape == buffer.shape else picked


def runs(rows: Sequence[_Row | None]) -> Iterator[tuple[int, int, _Row]]:
    """Of what stands at consecutive places: the first of them, how many they are, and what it is; nothing for None."""
    for row, places in groupby(range(len(rows)), rows.__getitem__):
        if row is not None:
            first, *others = places
            yield first, 1 + len(others), row


def last_before(columns: Tensor, width: int, removed: int | Tensor) -> Tensor:
    """The last ``width`` of ``columns (B, ., S)`` or ``(B, ., S, .)`` before as many as are removed at the end, of each
    row its own if that is ``(B,)``; what would be before the first is the first.
    """
    end = columns.shape[2]
    if isinstance(removed, int):
        return columns[:, :, end - removed - width : end - removed]
    index = torch.arange(end - width, end, device=columns.device) - removed.to(columns.device)[:, None]  # (B, width)
    index = index.clamp(min=0)[:, None].view(len(columns), 1, width, *[1] * (columns.dim() - 3))
    return columns.gather(2, index.expand(-1, columns.shape[1], -1, *columns.shape[3:]))


class Recorded(NamedTuple):
    """Tokens of one call, as far as a mixer's states depend on them: ``inputs (B, T, C)`` of the convolution, and of
    the scan ``x (B, T, H, P)``, ``dt (B, T, H)`` with its bias, before softplus, and ``B (B, T, G, N)``.
    """

    inputs: Tensor
    x: Tensor
    dt: Tensor
    B: Tensor


class Buffers:
    """Tensors that calls write in place, so that compiled and captured graphs find them where they were.

    A buffer is replaced by :meth:`replace`, and by nothing else. It calls ``on_move``, by which the owner of a graph
    learns that the graph would write to memory no longer read. A copy of the owner is told by copies of its buffers.
    """

    names: ClassVar[tuple[str, ...]]
    """Of the attributes that hold buffers, or None."""
    counts: ClassVar[tuple[str, ...]] = ()
    """Of the other attributes that calls change."""
    on_move: Callable[[], None] | None = None

    @property
    def changing(self) -> dict[str, bool]:
        """What :meth:`go_back` needs to know of an earlier time: the attribute, and whether calls write in place where
        it has to be copied.
        """
        return {**dict.fromkeys(self.names, True), **dict.fromkeys(self.counts, False)}

    def go_back(self, before: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Holds what it held when :attr:`changing` was ``before``, in the same buffers.

        Returns:
            those that the caller is to fill, and what with: few launches for all layers.
        """
        self.leave_inference_mode()
        copied, pairs = self.changing, []
        for name, then in before.items():
            now = getattr(self, name)
            if copied[name] and now is not None and then is not None:
                pairs.append((now, then))
            elif name in self.names:
                self.replace(**{name: then})
            else:
                setattr(self, name, then)
        return pairs

    def replace(self, **buffers: Tensor | None) -> None:
        """Puts other tensors, or None, in the place of buffers; the same ones do not count."""
        moved = self.on_move is not None and any(getattr(self, name) is not new for name, new in buffers.items())
        vars(self).update(buffers)
        if moved and self.on_move is not None:
            self.on_move()

    def leave_inference_mode(self) -> None:
        """Replaces buffers made under ``torch.inference_mode``, which nothing outside of it may write."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        for name in self.names:
            buffer: Tensor | None = getattr(self, name)
            if buffer is not None and buffer.is_inference():
                self.replace(**{name: buffer.clone()})

    def select(self, indices: Tensor) -> None:
        """Keeps the sequences at ``indices (B',)``, in that order, which may repeat."""
        self.leave_inference_mode()
        held = {name: getattr(self, name) for name in self.names}
        self.replace(**{name: pick(buffer, indices) for name, buffer in held.items() if buffer is not None})

    def to(self, device: torch.device | str) -> Buffers:
        """Moves the buffers; returns itself, as hooks that move a module's inputs expect."""
        held = {name: getattr(self, name) for name in self.names}
        self.replace(**{name: buffer.to(device) for name, buffer in held.items() if buffer is not None})
        return self


class SideBySide:
    """Memory for buffers of several layers' states: those of one name are parts of a tensor ``(L, B, ...)``, so that
    a sequence of all layers is copied at once.

    Args:
        layers: L.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._whole: dict[str, tuple[Tensor, tuple[Tensor, ...]]] = {}  # and its parts

    def new(self, name: str, layer: int, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory for a buffer of a layer, of the dtype and on the device of ``like``; elsewhere if the others' is of
        another kind, or if parts would not begin at multiples of 16 bytes, for which kernels are compiled. Where the
        first layer asks for another kind than before, all parts of the name are new.
        """
        if math.prod(shape) * like.element_size() % 16:
            return like.new_empty(shape)
        known = self._whole.get(name)
        if known is None or (layer == 0 and not _is_alike(known[1][0], shape, like)):
            self.adopt(name, like.new_empty(self.layers, *shape))
        part = self._whole[name][1][layer]
        return part if _is_alike(part, shape, like) else like.new_empty(shape)

    def adopt(self, name: str, whole: Tensor) -> tuple[Tensor, ...]:
        """Takes a tensor ``(L, B, ...)`` for the memory of a name; returns its parts."""
        self._whole[name] = whole, whole.unbind(0)
        return self._whole[name][1]

    def whole(self, name: str, states: Sequence[SSDState]) -> Tensor | None:
        """The tensor of which all these states' buffers are the parts; None if one of them lies elsewhere."""
        known = self._whole.get(name)
        if known is None:
            return None
        there = all(getattr(state, name) is part for state, part in zip(states, known[1], strict=True))
        return known[0] if there else None


def _is_alike(part: Tensor, shape: Sequence[int], like: Tensor) -> bool:
    return part.shape == tuple(shape) and part.dtype == like.dtype and part.device == like.device


class Recorder(Buffers):
    """A state that can take back the tokens since it was told to record."""

    counts = ("started", "record_past", "block_size")
    started = False
    record_past = False
    block_size: int | None = None
    """Tokens of a call at most, where each call is one block and :meth:`crop` comes before the next."""

    def activate_past_recording(self, block_size: int | None = None) -> None:
        """Records from here on, for :meth:`crop`; see :attr:`block_size`."""
        self.record_past, self.block_size = True, block_size
        self._forget()

    def stop_recording(self) -> None:
        """Records no more, and forgets what was recorded."""
        self.record_past, self.block_size = False, None
        self._forget()

    def count_block(self, tokens: int) -> None:
        """Notes that a captured call has fed a block of so many tokens."""
        raise NotImplementedError

    def go_back(self, before: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """See :meth:`Buffers.go_back`."""
        self._forget()
        return super().go_back(before)

    def _forget(self) -> None:
        raise NotImplementedError


class SSDState(Recorder):
    """The convolution's last inputs ``(B, C, K - 1)`` and the SSM state ``(B, H, P, N)`` of one layer.

    Buffers are made by the first :meth:`update`. The state holds no autograd graph.

    Steps of several sequences on a GPU keep the last tokens' inputs in a ring, and write the SSM state once in 16
    tokens. Nobody else sees that: whatever reads ``ssm`` finds the last token in it.

    A state cannot be run backwards. While it is recorded, it keeps a copy from before the recorded tokens, and of every
    token what it depends on; :meth:`crop` scans the tokens that stay again, from that copy. It calls no module and
    reads no parameter, as their weights need not be there outside of a forward: offloaded and sharded ones are not.

    Where each call is known to be one block that :meth:`crop` follows, there is neither copy nor scan: the states stay
    as they were before the block, which the next one, or whoever reads them, folds in as far as it was kept.

    Args:
        ssm_dtype: of the SSM state; None for what the scan computes in, fp32 (fp64 in an fp64 model).
        defer_writes: whether steps may write the SSM state once in 16 tokens, where that is faster.
    """

    names = ("conv", "held", "ready", *_RING, *_BLOCK)

    def __init__(self, ssm_dtype: torch.dtype | None = None, defer_writes: bool = True) -> None:
        self.ssm_dtype, self.defer_writes = ssm_dtype, defer_writes
        self.conv: Tensor | None = None
        self.held: Tensor | None = None  # the SSM state, as of the last token or an earlier one: see `ssm`
        self.ready: Tensor | None = None  # (1,) int32, zero between steps: for ops.mamba2_layer_step
        self.ring_x: Tensor | None = None  # these four are an ops.Ring
        self.ring_decays: Tensor | None = None
        self.ring_B: Tensor | None = None
        self.clock: Tensor | None = None
        self.block_inputs: Tensor | None = None  # these four are an ops.Block
        self.block_convolved: Tensor | None = None
        self.block_steps: Tensor | None = None
        self.kept: Tensor | None = None
        self._block_tokens = 0  # of the block that can be taken back
        self._in_use = False  # whether a step has ever got the ring; those of a captured graph tell nobody
        self._in_others_ring = False  # whether the ring is a copy of another state's, which is only to be settled
        self.started = False
        self.recorded: list[Recorded] = []
        self._before: tuple[Tensor, Tensor] | None = None
        self._decay: tuple[Tensor, tuple[float, float]] | None = None
        self.beside: tuple[SideBySide, int] | None = None
        """Where its buffers are made, and the number of its layer there; None for memory of their own."""

    def _new(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory for a buffer, of the dtype and on the device of ``like``."""
        if self.beside is None:
            return like.new_empty(shape)
        memory, layer = self.beside
        return memory.new(name, layer, shape, like)

    @property
    def ssm(self) -> Tensor | None:
        """The SSM state ``(B, H, P, N)`` behind the last token; None before the first update. To be written in place by
        whoever reads it, and not kept past the next step, which may put its token elsewhere.
        """
        self.settle()
        return self.held

    def settle(self, row: int | None = None) -> None:
        """Brings the states up to the last token: of all sequences, or of one, and the others keep their bits."""
        rows = slice(None) if row is None else slice(row, row + 1)
        if self._in_use or self.kept is not None:
            self.leave_inference_mode()
        if self._in_use:
            assert self.held is not None
            ops.settle(self.held[rows], ops.Ring(*(part[rows] for part in self._ring if part is not None)))
        if self._in_others_ring:
            self._in_others_ring = False
            self._make_ring()
        if self.kept is not None:
            assert self.conv is not None
            assert self.held is not None
            block: list[Tensor] = [getattr(self, name)[rows] for name in _BLOCK]
            ops.fold(self.conv[rows], self.held[rows], ops.Block(*block))

    @property
    def _ring(self) -> ops.Ring:
        return ops.Ring(*(getattr(self, name) for name in _RING))

    def _make_ring(self) -> None:
        """Makes a new ring for the states that are held, where there is to be one; they are settled."""
        ring, compiled = ops.NO_RING, torch.compiler.is_compiling()  # which cannot ask a GPU what it is
        if self.defer_writes and not compiled and self.conv is not None and self.held is not None:
            ring = ops.new_ring(self.conv, self.held)
        buffers = dict(zip(_RING, ring, strict=True))
        if self.beside is not None:
            # Clocks are few bytes, so that all but the first would lie where kernels do not expect them.
            large = {name: part for name, part in buffers.items() if part is not None and name != "clock"}
            buffers |= {name: self._new(name, part.shape, part).copy_(part) for name, part in large.items()}
        self.replace(**buffers)
        self._in_use = False

    def for_block(self, rows: int, tokens: int, groups: int) -> tuple[Tensor, Tensor, ops.Block] | None:
        """What ``ops.block_step`` updates in place: both states and the last block. None where the call is to be
        recorded in the other way.

        Args:
            rows, tokens: of the call.
            groups: G of the mixer.

        Raises:
            CacheError: the state belongs to another batch size.
        """
        size = self.block_size
        if size is None or tokens > size or not self.started or self.recorded:
            return None
        if torch.compiler.is_compiling() or ops.is_batch_invariant():
            return None
        assert self.conv is not None
        assert self.held is not None
        check_rows(self.conv.shape[0], rows)
        self.leave_inference_mode()
        if self.kept is None:
            self.settle()
            self.replace(**dict(zip(_BLOCK, ops.new_block(self.conv, self.held, groups, size), strict=True)))
        self._block_tokens = tokens
        return self.conv, self.held, ops.Block(*(getattr(self, name) for name in _BLOCK))

    def count_block(self, tokens: int) -> None:
        """See :meth:`Recorder.count_block`."""
        self._block_tokens = tokens

    def end_block(self) -> Tensor | None:
        """Settles which block may lose tokens, and returns how many of it each row keeps, ``(B,)``, all until now, to
        be written; None where :meth:`crop` is to be called.
        """
        if not self._block_tokens:
            return None
        self.leave_inference_mode()
        self._forget()
        return self.kept

    def record(
        self, inputs: Tensor, x: Tensor, dt: Tensor, B: Tensor, A: Tensor, dt_limit: tuple[float, float]
    ) -> None:
        """Notes what is about to change the states: B rows of a document each, without padding.

        Args:
            inputs, x, dt, B: see :class:`Recorded`.
            A: ``(H,)`` decay rates, a tensor of its own: what is kept of a parameter may be gone after the forward.
            dt_limit: clamp of the step sizes.
        """
        if not self.recorded:
            started = self.started and self.conv is not None
            self._before = (self.conv.clone(), self.ssm.clone()) if started else None  # type: ignore[union-attr]
            self._decay = A.detach(), dt_limit
        self.recorded.append(Recorded(inputs.detach(), x.detach(), dt.detach(), B.detach()))

    @property
    def recorded_tokens(self) -> int:
        """How many tokens :meth:`crop` can remove."""
        return self._block_tokens + sum(block.x.shape[1] for block in self.recorded)

    @torch.no_grad()
    def crop(self, tokens: int | Tensor) -> None:
        """Forgets the last ``tokens`` of those recorded, of each row its own where they are ``(B,)``, and settles the
        others: they cannot be removed later.
        """
        kept = self.recorded_tokens - tokens
        if self._block_tokens:
            assert self.kept is not None
            self.leave_inference_mode()
            self.kept.sub_(tokens if isinstance(tokens, int) else tokens.to(self.kept))
        elif isinstance(kept, Tensor) or (tokens and kept):
            self._scan_again(kept)
        elif tokens and self._before is not None:
            self.update(*self._before)
        elif tokens:
            self.started = False
        self._forget()

    def _scan_again(self, kept: int | Tensor) -> None:
        """Brings the states to where they are after the first ``kept`` of the recorded tokens, ``(B,)`` for rows of
        their own.
        """
        assert self.conv is not None  # the recorded tokens have made it
        assert self._decay is not None
        most = kept if isinstance(kept, int) else self.recorded_tokens
        inputs, x, dt, B = (torch.cat(parts, 1)[:, :most] for parts in zip(*self.recorded, strict=True))
        conv, ssm = (torch.zeros_like(self.conv), None) if self._before is None else self._before
        A, dt_limit = self._decay
        # C is of the output alone, which is not used.
        options: dict[str, Any] = {"dt_softplus": True, "dt_limit": dt_limit}
        if isinstance(kept, Tensor):  # a step of size zero leaves a state as it is
            kept, options = kept.to(dt.device), {}
            there = torch.arange(most, device=dt.device)[:, None] < kept[:, None, None]  # (B, T, 1)
            dt = torch.where(there, step_size(dt, None, True, dt_limit, A.dtype), 0)
        _, ssm = ops.ssd_chunk_scan(x, dt, A, B, B, initial_states=ssm, return_final_states=True, **options)
        columns = torch.cat([conv.to(inputs.dtype), inputs.transpose(1, 2)], 2)  # (B, C, K - 1 + T)
        self.update(last_before(columns, conv.shape[2], most - kept), ssm)

    def stop_recording(self) -> None:
        """See :meth:`Recorder.stop_recording`."""
        self._drop_block()
        super().stop_recording()

    def _drop_block(self) -> None:
        if self.kept is not None:
            self.settle()
            self.replace(**dict.fromkeys(_BLOCK))

    def _forget(self) -> None:
        self.recorded, self._before, self._decay, self._block_tokens = [], None, None, 0

    def update(self, conv: Tensor, ssm: Tensor) -> None:
        """Stores the states after a block of tokens."""
        conv, ssm = conv.detach(), ssm.detach()
        if self.conv is None or self.held is None or (not self.started and self.conv.shape != conv.shape):
            self.allocate(conv, ssm)
        else:
            self.leave_inference_mode()
            self.conv.copy_(conv)
            self.held.copy_(ssm)
            for counts in (self.clock, self.kept):
                if counts is not None:
                    counts.zero_()
        self.started = True

    def allocate(self, conv: Tensor, ssm: Tensor) -> None:
        """Makes the buffers, holding copies of these states."""
        kept = ssm.new_empty(0, dtype=self.ssm_dtype or ssm.dtype)
        self.replace(
            conv=self._new("conv", conv.shape, conv).copy_(conv),
            held=self._new("held", ssm.shape, kept).copy_(ssm),
            ready=torch.zeros(1, dtype=torch.int32, device=conv.device),
        )
        self.replace(**dict.fromkeys(_BLOCK))
        self._make_ring()

    def initial(self, batch: int) -> tuple[Tensor | None, Tensor | None]:
        """The states to continue from, or a pair of None before the first update: the buffers themselves, but copies
        where autograd may keep them for a backward that runs after the next update.

        Raises:
            CacheError: the state belongs to another batch size.
        """
        if not self.started or self.conv is None or self.held is None:
            return None, None
        check_rows(self.conv.shape[0], batch)
        self.leave_inference_mode()
        self.settle()
        return (self.conv.clone(), self.held.clone()) if torch.is_grad_enabled() else (self.conv, self.held)

    def for_step(self, batch: int) -> tuple[Tensor, Tensor, ops.Ring, Tensor | None]:
        """What ``ops.layer_step`` updates in place, of a state that has started: the convolution's last inputs, the SSM
        state with its ring, and what programs count in.

        Raises:
            CacheError: the state belongs to another batch size.
        """
        assert self.conv is not None
        assert self.held is not None
        check_rows(self.conv.shape[0], batch)
        self.leave_inference_mode()
        if self._in_others_ring:
            self.settle()
        if self.ready is None:
            self.replace(ready=torch.zeros(1, dtype=torch.int32, device=self.conv.device))
        if self.clock is not None:
            self._in_use = True
        return self.conv, self.held, self._ring, self.ready

    def leave_inference_mode(self) -> None:
        """Replaces buffers made under ``torch.inference_mode``, all or none: a step asks this of every layer."""
        if not torch.compiler.is_compiling() and self.conv is not None and self.conv.is_inference():
            super().leave_inference_mode()

    @property
    def batch_size(self) -> int:
        """Sequences held, -1 before the first update."""
        return self.conv.shape[0] if self.started and self.conv is not None else -1

    @property
    def nbytes_of_row(self) -> int:
        """Bytes of the states of one sequence, 0 before the first update."""
        return sum(held[0].nbytes for held in (self.conv, self.held) if held is not None)

    def reset(self) -> None:
        """Forgets everything, keeping the buffers for the next update."""
        self.started = False
        self._forget()

    def put(self, row: int, other: SSDState | None, place: int = 0) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        """Replaces a sequence by the one at ``place`` of another state, or by none, in place.

        Returns:
            what the caller is to fill, and what with; and what it is to set to zero: few launches for all layers.
        """
        self.leave_inference_mode()
        zeros = [counts[row : row + 1] for counts in (self.clock, self.kept) if counts is not None]
        into = [getattr(self, name)[row] for name in _STATES]
        if other is None:
            return [], [*zeros, *into]
        other.settle(place)
        return [(each, getattr(other, name)[place]) for each, name in zip(into, _STATES, strict=True)], zeros

    def gather(self, rows: Sequence[tuple[SSDState, int] | None]) -> list[tuple[Tensor, Tensor]]:
        """Holds copies of single sequences of other states from now on, zeros for None; not all are None.

        Returns:
            what the caller is to fill, and what with: few launches for all layers.
        """
        known = list(runs(rows))
        for _, _, (state, place) in known:
            state.settle(place)
        pairs, buffers = [], {}
        for name in _STATES:
            held: Tensor = getattr(known[0][2][0], name)
            buffers[name] = into = self._new(name, (len(rows), *held.shape[1:]), held)
            if None in rows:
                into.zero_()
            for first, count, (state, place) in known:
                own = getattr(state, name)[place : place + 1]
                pairs.append((into[first : first + count], own if count == 1 else own.expand(count, *own.shape[1:])))
        self.hold(buffers)
        return pairs

    def copied(self, place: int) -> tuple[str, ...]:
        """The names of the buffers that :meth:`hold` of a copy of one sequence is to be given: with those of the ring,
        where that is in use; settled else.
        """
        if self.kept is None and self._in_use:
            return (*_STATES, *_RING)
        self.settle(place)
        return _STATES

    def hold(self, buffers: dict[str, Tensor]) -> None:
        """Takes these buffers for its own. Those of a ring are settled when somebody goes on from them."""
        with_ring = "clock" in buffers
        self.replace(**{**dict.fromkeys(("ready", *_RING, *_BLOCK)), **buffers})
        if self.defer_writes and not with_ring:
            self._make_ring()
        self._in_use = self._in_others_ring = with_ring
        self.started = True

    def select(self, indices: Tensor) -> None:
        """Keeps the sequences at ``indices (B',)``, in that order; what was recorded is settled."""
        self._forget()
        self.leave_inference_mode()
        if self.conv is None:
            return
        names = ["conv", "held"]  # `ready` is not by sequence
        as_many = len(indices) == len(self.conv)
        self._drop_block()
        if not as_many:
            self.settle()
        elif self.clock is not None:
            names += _RING
        self.replace(**{name: pick(getattr(self, name), indices) for name in names})
        if not as_many:
            self._make_ring()

    def to(self, device: torch.device | str) -> SSDState:
        """Moves the buffers and what was recorded; returns itself, as hooks that move a module's inputs expect."""
        self.recorded = [Recorded(*(part.to(device) for part in block)) for block in self.recorded]
        if self._before is not None:
            self._before = self._before[0].to(device), self._before[1].to(device)
        if self._decay is not None:
            self._decay = self._decay[0].to(device), self._decay[1]
        before = self.held
        self._drop_block()
        self.settle()
        super().to(device)
        if self.held is not before:
            self._make_ring()
        return self
