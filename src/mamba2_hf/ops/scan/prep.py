"""Step sizes: bias, softplus, clamp and the in-chunk running sum of ``dt * A``, forward and backward.

Everything is fp32. Log decays are kept in base 2 (``a * log2(e)``), the base of the GPU's exponential.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import chunk_bounds

LOG2E = tl.constexpr(1.4426950408889634)
# A step of exactly zero is stored as this: too small to act, and the gradient of dt survives the division by dt.
TINY = tl.constexpr(1e-30)
# 2^-160 is zero in fp32; a sum of many still resolves the decays inside of each document.
APART = tl.constexpr(160.0)


@triton.jit
def _silu(value):
    return value * tl.sigmoid(value)


@triton.jit
def layout_kernel(
    cu_seqlens, chunks, segments, first_segment, documents, per_segment,
    Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chunks and segments of packed documents; see ``tiles.chunk_bounds`` and ``tiles.segment_bounds``.

    Program ``s`` writes the entries of document ``s``. An empty document has one (empty) segment and no chunk.
    """
    s = tl.program_id(0)
    length = per_segment * Q
    chunk = 0
    segment = 0
    for first in range(0, s, BLOCK):
        i = first + tl.arange(0, BLOCK)
        lengths = tl.load(cu_seqlens + i + 1, mask=i < s, other=0) - tl.load(cu_seqlens + i, mask=i < s, other=0)
        chunk += tl.sum(tl.cdiv(lengths, Q)).to(tl.int32)
        segment += tl.sum(tl.where(i < s, tl.maximum(tl.cdiv(lengths, length), 1), 0)).to(tl.int32)
    start = tl.load(cu_seqlens + s).to(tl.int32)
    end = tl.load(cu_seqlens + s + 1).to(tl.int32)
    count = tl.cdiv(end - start, Q)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        tl.store(chunks + 2 * (chunk + i), start + i * Q, mask=i < count)
        tl.store(chunks + 2 * (chunk + i) + 1, tl.minimum(start + (i + 1) * Q, end), mask=i < count)
    count = tl.maximum(tl.cdiv(end - start, length), 1)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        entry = segments + 6 * (segment + i)
        tl.store(entry, start + i * length, mask=i < count)
        tl.store(entry + 1, tl.minimum(start + (i + 1) * length, end), mask=i < count)
        tl.store(entry + 2, chunk + i * per_segment, mask=i < count)
        tl.store(entry + 3, s + i * 0, mask=i < count)
        tl.store(entry + 4, (i == 0).to(tl.int32), mask=i < count)
        tl.store(entry + 5, (i == count - 1).to(tl.int32), mask=i < count)
    tl.store(first_segment + s, segment)
    if s == documents - 1:
        tl.store(first_segment + documents, segment + count)


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


@triton.jit
def softplus(v):
    """``log(1 + exp(v))``, accurate for very negative ``v`` too."""
    u = tl.exp(-tl.abs(v))
    w = 1.0 + u
    lost = w == 1.0  # u is all that log(1 + u) has left; otherwise the quotient mends the rounding of 1 + u
    return tl.maximum(v, 0.0) + tl.where(lost, u, tl.log(w) * u / tl.where(lost, 1.0, w - 1.0))


@triton.jit
def clamp(v, low, high):
    """``v`` between two limits; a NaN stays one."""
    return tl.where(v < low, low, tl.where(v > high, high, v))


@triton.jit
def prep_kernel(
    dt, dt_bias, A, steps, seq_idx, table,
    tokens, per_row, H, low, high, stride_row, stride_token, seq_row, seq_token,
    Q: tl.constexpr, BH: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr,
    PACKED: tl.constexpr, MARKS: tl.constexpr,
):  # fmt: skip
    """Stores ``steps (chunks, H, 2, Q)``: ``A log2(e)`` times the running sum of a chunk's step sizes, and these.

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
def add_pieces(first, apart, mask, PIECES: tl.constexpr):
    """The sum of ``PIECES`` tensors, each ``apart`` elements behind the one before it."""
    total = tl.load(first, mask=mask, other=0.0)
    for piece in tl.static_range(1, PIECES):
        total += tl.load(first + piece * apart, mask=mask, other=0.0)
    return total


@triton.jit
def prep_backward_kernel(
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
    column = add_pieces(sums + Q, DOTS * Q, mask, PIECES)
    at_end = add_pieces(ends + PIECES * index, 1, heads < H, PIECES)
    if DOTS == 4:
        at_end += tl.sum(add_pieces(sums + 2 * Q, DOTS * Q, mask, PIECES), 0)
        tl.store(out + 2 * H, tl.sum(add_pieces(sums + 3 * Q, DOTS * Q, mask, PIECES), 0), mask=heads < H)
    dlog = add_pieces(sums, DOTS * Q, mask, PIECES) - column
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
