"""A scan made ready for kernels: arguments, chunks, segments, step sizes and decays.

Step sizes (bias, softplus, clamp) and the in-chunk running sum of ``dt * A`` are fp32. Log decays are kept in base 2
(``a * log2(e)``), the base of the GPU's exponential.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import document_numbers
from ..runtime import tables
from ..runtime.launch import launch
from ..runtime.rows import channels_last, dense
from ..runtime.tables import Chip, cdiv
from ..spec import Packing, SSDShape
from .op import Scan
from .prep import clamp, layout_kernel, softplus
from .tiles import chunk_bounds

LOG2E = tl.constexpr(1.4426950408889634)
# A step of exactly zero is stored as this: too small to act, and the gradient of dt survives the division by dt.
TINY = tl.constexpr(1e-30)
# 2^-160 is zero in fp32; a sum of many still resolves the decays inside of each document.
APART = tl.constexpr(160.0)


class Call(NamedTuple):
    """A scan's arguments made ready for kernels, and what follows from them.

    ``shape`` is that of ``x``; ``dt``, ``A`` and ``D`` have fewer heads where these are in pieces.
    """

    args: Scan
    shape: SSDShape
    chip: Chip
    tma: bool

    @property
    def packed(self) -> bool:
        """Whether one row holds several documents with states of their own."""
        return self.args.packing.cu_seqlens is not None

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """``(B or S, H, P, N)``."""
        return self.shape.states, self.shape.heads, self.shape.head_dim, self.shape.state

    @property
    def pieces(self) -> int:
        """Heads of the shape that a head of ``dt`` is; see :meth:`narrowed`."""
        return self.shape.heads // self.args.dt.shape[2]

    def narrowed(self, P: int) -> Call:
        """The same scan with heads of ``P`` channels: a head of several times as many is so many heads with one step,
        rate and skip. The call itself where its heads are no such.
        """
        args, (_, _, heads, head_dim, _, _, _) = self.args, self.shape
        pieces = head_dim // P
        if pieces * P != head_dim or pieces == 1 or args.x.stride(2) != head_dim:
            return self
        x = args.x.unflatten(3, (pieces, P)).flatten(2, 3)
        initial = args.initial_states
        if initial is not None:
            initial = initial.view(-1, heads * pieces, P, initial.shape[3])
        shape = self.shape._replace(heads=heads * pieces, head_dim=P)
        return self._replace(args=args._replace(x=x, initial_states=initial), shape=shape)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes that kernels are compiled for."""
        return {
            "PER_GROUP": self.shape.heads // self.shape.groups,
            "P": self.shape.head_dim,
            "N": self.shape.state,
        }


class Cut(NamedTuple):
    """How rows are cut into chunks and segments, and each chunk's decays and steps."""

    Q: int
    chunks: int  # of all rows together; an upper bound where packed
    per_row: int
    segments: int  # of all sequences together; an upper bound where packed
    per_segment: int  # chunks
    per_sequence: int  # segments of the longest sequence
    chunk_table: Tensor | None
    segment_table: Tensor | None
    first_segment: Tensor | None
    steps: Tensor  # (chunks, H, 2, Q): log2 decays from the chunk's start, step sizes
    document: Tensor | None  # (chunks, Q), where kernels are to tell documents apart


class Into(NamedTuple):
    """Where a backward is to leave gradients, where the caller has a place for them: views with a dense last size."""

    dx: Tensor  # (B, T, H, P)
    dB: Tensor  # (B, T, G, N)
    dC: Tensor  # (B, T, G, N)
    ddt: Tensor  # (B, T, H)


class Gradients(NamedTuple):
    """What the kernels of a backward give; ``dots`` and ``ends`` are for :func:`steps_backward_kernel`."""

    dx: Tensor
    dz: Tensor | None
    dB: Tensor
    dC: Tensor
    dD: Tensor | None  # None where `dots` holds what it sums
    dinitial: Tensor
    dots: Tensor
    ends: Tensor


def prepare(given: Scan) -> Call:
    """Makes the arguments ready: last dimensions contiguous, devices and sizes settled."""
    x, B, C = (channels_last(t) for t in (given.x, given.B, given.C))
    z = None if given.z is None else channels_last(given.z)
    seq_idx, cu_seqlens = given.packing
    chip = tables.current_chip()
    # A descriptor would read on into the next document: packed rows are read through masked pointers.
    aligned = all(fits_tma(t) for t in (x, B, C, z) if t is not None)
    args = given._replace(
        x=x,
        dt=channels_last(given.dt),
        A=given.A.contiguous(),
        B=B,
        C=C,
        D=dense(given.D),
        z=z,
        dt_bias=dense(given.dt_bias),
        initial_states=dense(given.initial_states),
        packing=Packing(seq_idx, cu_seqlens if cu_seqlens is None else cu_seqlens.to(x.device)),
    )
    return Call(args, given.shape, chip, tma=chip.has_tma and cu_seqlens is None and aligned)


def cut(call: Call, Q: int, *, marks: bool = False) -> Cut:
    """Cuts a scan into chunks of ``Q`` tokens.

    With ``marks`` the log decays themselves keep documents apart, and kernels need not know about them.
    """
    batch, tokens, *_, sequences = call.shape
    device = call.args.x.device
    seq_idx, cu_seqlens = call.args.packing
    length = tables.segment_tokens(call.chip, call.shape, call.args.x.dtype)
    per_segment = length // Q
    per_row = cdiv(tokens, Q)
    per_sequence = cdiv(tokens, length)
    chunk_table = segment_table = first_segment = None
    if cu_seqlens is None:
        chunks, segments = batch * per_row, batch * per_sequence
    else:
        chunks = tokens // Q + sequences
        segments = sequences if per_sequence == 1 else tokens // length + sequences
        sizes = [4 * cdiv(size, 4) for size in (2 * chunks, 6 * segments, segments + 1)]  # all aligned alike
        table = torch.full((sum(sizes),), -1, dtype=torch.int32, device=device)
        chunk_table, segment_table, first_segment = table.split(sizes)
        launch(
            layout_kernel,
            (sequences,),
            *(cu_seqlens, chunk_table, segment_table, first_segment, sequences, per_segment),
            Q=Q,
            BLOCK=tables.LAYOUT_BLOCK,
        )
    document = None
    marked = seq_idx if marks else None
    if seq_idx is not None and not marks:
        numbers = document_numbers(seq_idx)
        padding = numbers[:, -1:].expand(-1, per_row * Q - tokens)
        document = torch.cat([numbers, padding], 1).to(torch.int32)
    steps = step_sizes(call.args, Q, chunks, per_row, marked, chunk_table)
    return Cut(
        *(Q, chunks, per_row, segments, per_segment, per_sequence),
        *(chunk_table, segment_table, first_segment, steps, document),
    )


def strides(tensor: Tensor | None) -> tuple[int, ...]:
    """The first three strides; zeros for a tensor that is not there."""
    return (0, 0, 0) if tensor is None else tensor.stride()[:3]


def fits_tma(tensor: Tensor) -> bool:
    """Whether tiles of a tensor can be copied by descriptor: addresses are multiples of 16 bytes."""
    size = tensor.element_size()
    sixteen = all(stride * size % 16 == 0 for stride in (*tensor.stride()[:-1], tensor.shape[-1]))
    return sixteen and tensor.data_ptr() % 16 == 0


@triton.jit
def raw_step(dt, dt_bias, row, start, end, heads, stride_row, stride_token, H, Q: tl.constexpr, HAS_BIAS: tl.constexpr):
    """``dt + dt_bias`` of a chunk, ``(Q, heads)``, and the mask of what exists."""
    t = start + tl.arange(0, Q)
    mask = (t < end)[:, None] & (heads < H)[None, :]
    base = dt + tl.cast(row, tl.int64) * stride_row
    raw = tl.load(base + tl.cast(t, tl.int64)[:, None] * stride_token + heads[None, :], mask=mask, other=0.0)
    raw = raw.to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(dt_bias + heads, mask=heads < H, other=0.0).to(tl.float32)[None, :]
    return raw, mask


@triton.jit(do_not_specialize=["tokens", "per_row"])
def steps_kernel(
    dt, dt_bias, A, steps, seq_idx, table,
    tokens, per_row, H, low, high, stride_row, stride_token, seq_row, seq_token,
    Q: tl.constexpr, BH: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr,
    PACKED: tl.constexpr, MARKS: tl.constexpr,
):  # fmt: skip
    """``steps (chunks, H, 2, Q)``: the step sizes' running sum times ``A log2(e)``, restarted per chunk, and they.

    With ``MARKS`` the running sum falls by ``APART`` where ``seq_idx (B, T)`` changes, so that every decay from one
    document to another is exactly zero.
    """
    chunk = tl.program_id(0)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    row, start, end = chunk_bounds(chunk, table, tokens, per_row, Q, PACKED)
    if start < 0:
        return
    raw, mask = raw_step(dt, dt_bias, row, start, end, heads, stride_row, stride_token, H, Q, HAS_BIAS)
    if SOFTPLUS:
        raw = softplus(raw)
    if CLAMP:
        raw = clamp(raw, low, high)
    raw = tl.where(raw == 0.0, TINY, raw)
    step = tl.where(mask, raw, 0.0)  # (Q, BH)
    rate = tl.load(A + heads, mask=heads < H, other=0.0).to(tl.float32) * LOG2E
    log = step * rate[None, :]
    q = tl.arange(0, Q)
    if MARKS:
        t = start + q
        at = seq_idx + tl.cast(row, tl.int64) * seq_row + tl.cast(t, tl.int64) * seq_token
        follows = (t > 0) & (t < end)
        changes = tl.load(at, mask=follows, other=0) != tl.load(at - seq_token, mask=follows, other=0)
        log = tl.where(changes[:, None], log - APART, log)
    offsets = (tl.cast(chunk, tl.int64) * H + heads)[None, :] * (2 * Q) + q[:, None]
    tl.store(steps + offsets, tl.cumsum(log, 0), mask=(heads < H)[None, :])
    tl.store(steps + offsets + Q, step, mask=(heads < H)[None, :])


@triton.jit
def _add_pieces(first, apart, mask, PIECES: tl.constexpr):
    """The sum of ``PIECES`` tensors, each ``apart`` elements behind the one before it."""
    total = tl.load(first, mask=mask, other=0.0)
    for piece in tl.static_range(1, PIECES):
        total += tl.load(first + piece * apart, mask=mask, other=0.0)
    return total


@triton.jit
def steps_backward_kernel(
    dt, dt_bias, A, steps, dots, ends, ddt, shares, table,
    tokens, per_row, H, low, high, stride_row, stride_token, d_row, d_token,
    Q: tl.constexpr, BH: tl.constexpr, DOTS: tl.constexpr, PIECES: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """From the gradients of steps and log decays to those of ``dt``, ``A`` and ``dt_bias``.

    ``dots (chunks, H PIECES, DOTS, Q)`` holds a token's row and column sums (see ``ssd_backward.py``), and with
    ``DOTS`` = 4 the column sums' share that leaves the chunk and ``<x, dy>``; ``ends (chunks, H PIECES)`` what else
    concerns the chunk's end. The ``PIECES`` of a head are added. ``ddt`` is ``(B, T, H)``, its rows ``d_row`` and its
    tokens ``d_token`` apart. ``shares (chunks, 2, H)`` takes each chunk's share of the gradients of ``A`` and
    ``dt_bias``; with ``DOTS`` = 4 it has a third, of ``D``. The caller sums them.
    """
    SHARES: tl.constexpr = 3 if DOTS == 4 else 2
    chunk = tl.program_id(0)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    out = shares + tl.cast(chunk, tl.int64) * SHARES * H + heads
    row, start, end = chunk_bounds(chunk, table, tokens, per_row, Q, PACKED)
    if start < 0:
        for i in tl.static_range(SHARES):
            tl.store(out + i * H, tl.zeros([BH], tl.float32), mask=heads < H)
        return
    raw, mask = raw_step(dt, dt_bias, row, start, end, heads, stride_row, stride_token, H, Q, HAS_BIAS)
    q = tl.arange(0, Q)[:, None]
    index = tl.cast(chunk, tl.int64) * H + heads
    step = tl.load(steps + (2 * index + 1)[None, :] * Q + q, mask=mask, other=0.0)
    rate = tl.load(A + heads, mask=heads < H, other=0.0).to(tl.float32)
    sums = dots + (DOTS * PIECES * index)[None, :] * Q + q
    column = _add_pieces(sums + Q, DOTS * Q, mask, PIECES)
    at_end = _add_pieces(ends + PIECES * index, 1, heads < H, PIECES)
    if DOTS == 4:
        at_end += tl.sum(_add_pieces(sums + 2 * Q, DOTS * Q, mask, PIECES), 0)
        tl.store(out + 2 * H, tl.sum(_add_pieces(sums + 3 * Q, DOTS * Q, mask, PIECES), 0), mask=heads < H)
    dlog = _add_pieces(sums, DOTS * Q, mask, PIECES) - column
    dlog = tl.where(q == Q - 1, dlog + at_end[None, :], dlog)  # the last place, be that padding or not
    dlog = tl.cumsum(dlog, 0, reverse=True)  # gradient of dt * A
    grad = column / tl.where(step != 0.0, step, 1.0) + dlog * rate[None, :]
    if CLAMP:
        value = raw
        if SOFTPLUS:
            value = softplus(raw)
        grad = tl.where((value >= low) & (value <= high), grad, 0.0)
    if SOFTPLUS:
        grad = grad / (1.0 + tl.exp(-raw))
    grad = tl.where(mask, grad, 0.0)
    t = start + q
    target = ddt + tl.cast(row, tl.int64) * d_row + tl.cast(t, tl.int64) * d_token + heads[None, :]
    tl.store(target, grad, mask=mask)
    tl.store(out, tl.sum(tl.where(mask, dlog * step, 0.0), 0), mask=heads < H)
    tl.store(out + H, tl.sum(grad, 0), mask=heads < H)


def step_sizes(args: Scan, Q: int, chunks: int, per_row: int, seq_idx: Tensor | None, table: Tensor | None) -> Tensor:
    """``steps (chunks, H, 2, Q)`` of :func:`steps_kernel`; with ``seq_idx`` the log decays keep documents apart."""
    tokens, heads = args.dt.shape[1:]
    steps = torch.empty(chunks, heads, 2, Q, dtype=torch.float32, device=args.dt.device)
    launch(
        steps_kernel,
        (chunks, cdiv(heads, tables.PREP_HEADS)),
        *(args.dt, args.dt_bias, args.A, steps, seq_idx, table),
        *(tokens, per_row, heads, *args.dt_limit, *args.dt.stride()[:2]),
        *((0, 0) if seq_idx is None else seq_idx.stride()),
        **_flags(args, Q),
        MARKS=seq_idx is not None,
    )
    return steps


def step_gradients(
    args: Scan, steps: Tensor, dots: Tensor, ends: Tensor, ddt: Tensor, per_row: int, table: Tensor | None
) -> Tensor:
    """Leaves the gradient of dt in ``ddt``; ``shares (chunks, 2 or 3, H)`` of :func:`steps_backward_kernel`."""
    tokens, heads = args.dt.shape[1:]
    chunks, parts, sums, Q = dots.shape
    shares = torch.empty(chunks, 3 if sums == 4 else 2, heads, dtype=torch.float32, device=dots.device)
    launch(
        steps_backward_kernel,
        (chunks, cdiv(heads, tables.PREP_HEADS)),
        *(args.dt, args.dt_bias, args.A, steps, dots, ends, ddt, shares, table),
        *(tokens, per_row, heads, *args.dt_limit, *args.dt.stride()[:2], *ddt.stride()[:2]),
        **_flags(args, Q),
        DOTS=sums,
        PIECES=parts // heads,
    )
    return shares


def _flags(args: Scan, Q: int) -> dict[str, Any]:
    """Options of both kernels."""
    return {
        "Q": Q,
        "BH": tables.PREP_HEADS,
        "HAS_BIAS": args.dt_bias is not None,
        "SOFTPLUS": args.dt_softplus,
        "CLAMP": not args.dt_softplus or args.dt_limit != (0.0, math.inf),
        "PACKED": args.packing.cu_seqlens is not None,
    }
