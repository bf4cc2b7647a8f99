"""Functions of single numbers that several ops share, and where the chunks of packed documents lie."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _silu(value):
    return value * tl.sigmoid(value)


@triton.jit(do_not_specialize=["documents", "per_segment"])
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
def _step_size(dt, dt_bias, low, high, SOFTPLUS: tl.constexpr):
    """``clamp(softplus(dt + dt_bias))`` of one head, fp32."""
    dt = dt.to(tl.float32) + dt_bias
    if SOFTPLUS:
        dt = softplus(dt)
    return clamp(dt, low, high)
