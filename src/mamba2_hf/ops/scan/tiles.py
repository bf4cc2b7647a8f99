"""What every SSD kernel shares: where a chunk lies, tiles of tensors, decays.

Chunks are numbered through all rows. Step sizes and log decays are kept per chunk, ``(chunks, H, Q)``, padded
with steps of zero, so that a chunk's numbers are one aligned run of memory wherever its tokens begin.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk_bounds(chunk, table, tokens, per_row, Q: tl.constexpr, PACKED: tl.constexpr):
    """Row, first token and end of a chunk; an unused chunk of a packed row starts at -1.

    ``table (chunks, 2)`` holds start and end where ``PACKED``; otherwise every row has ``per_row`` chunks.
    """
    if PACKED:
        row = 0
        start = tl.load(table + 2 * chunk)
        end = tl.load(table + 2 * chunk + 1)
    else:
        row = chunk // per_row
        start = (chunk % per_row) * Q
        end = tl.minimum(start + Q, tokens)
    return row, start, end


@triton.jit
def segment_bounds(segment, table, tokens, per_row, per_segment, Q: tl.constexpr, PACKED: tl.constexpr):
    """Row, first token, end, first chunk, sequence, and whether the segment is its sequence's first or last.

    A segment is a run of ``per_segment`` chunks (the last of a sequence may be shorter) that one program walks.
    ``table (segments, 6)`` holds the answer where ``PACKED``; an unused segment's sequence is -1.
    """
    if PACKED:
        row = 0
        start = tl.load(table + 6 * segment)
        end = tl.load(table + 6 * segment + 1)
        chunk = tl.load(table + 6 * segment + 2)
        sequence = tl.load(table + 6 * segment + 3)
        first = tl.load(table + 6 * segment + 4) != 0
        last = tl.load(table + 6 * segment + 5) != 0
    else:
        segments = tl.cdiv(per_row, per_segment)
        row = segment // segments
        index = segment % segments
        start = index * per_segment * Q
        end = tl.minimum(start + per_segment * Q, tokens)
        chunk = row * per_row + index * per_segment
        sequence = row
        first = index == 0
        last = index == segments - 1
    return row, start, end, chunk, sequence, first, last


@triton.jit
def load_tokens(
    source, stride_row, stride_token, stride_head, row, start, end, head, column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Tile ``(ROWS, COLUMNS)`` of a ``(B, T, heads, WIDTH)`` tensor, zero from token ``end`` and column ``WIDTH`` on.

    Where ``TMA``, ``source`` is a descriptor ``(B, heads, T, WIDTH)``, which knows the strides and stops at the row's
    end by itself. (Heads lead: only leading sizes of 1 are dropped for free, without a trip through registers.)
    """
    if TMA:
        tile = source.load([row, head, start, column]).reshape(ROWS, COLUMNS)
    else:
        rows = tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        base = source + tl.cast(row, tl.int64) * stride_row + tl.cast(start, tl.int64) * stride_token
        base += tl.cast(head, tl.int64) * stride_head
        mask = (start + rows < end)[:, None]
        if WIDTH % COLUMNS != 0:
            mask = mask & (columns < WIDTH)[None, :]
        tile = tl.load(base + rows[:, None] * stride_token + columns[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def store_tokens(
    target, tile, stride_row, stride_token, stride_head, row, start, end, head, column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Stores a tile where :func:`load_tokens` would load it; nothing is written past ``end`` or ``WIDTH``."""
    if TMA:
        target.store([row, head, start, column], tile.reshape(1, 1, ROWS, COLUMNS))
    else:
        rows = tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        base = target + tl.cast(row, tl.int64) * stride_row + tl.cast(start, tl.int64) * stride_token
        base += tl.cast(head, tl.int64) * stride_head
        mask = (start + rows < end)[:, None]
        if WIDTH % COLUMNS != 0:
            mask = mask & (columns < WIDTH)[None, :]
        tl.store(base + rows[:, None] * stride_token + columns[None, :], tile, mask=mask)


@triton.jit
def load_chunk_state(
    source, index, n0, p0,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Tile ``(BN, BP)`` of the state ``index`` in a ``(states, N, P)`` buffer, zero outside."""
    if TMA:
        tile = source.load([index, n0, p0]).reshape(BN, BP)
    else:
        n = n0 + tl.arange(0, BN)
        p = p0 + tl.arange(0, BP)
        mask = (n < N)[:, None] & (p < P)[None, :]
        base = source + tl.cast(index, tl.int64) * (N * P)
        tile = tl.load(base + n[:, None] * P + p[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def store_chunk_state(
    target, tile, index, n0, p0,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Stores a tile where :func:`load_chunk_state` would load it."""
    if TMA:
        target.store([index, n0, p0], tile.reshape(1, BN, BP))
    else:
        n = n0 + tl.arange(0, BN)
        p = p0 + tl.arange(0, BP)
        mask = (n < N)[:, None] & (p < P)[None, :]
        base = target + tl.cast(index, tl.int64) * (N * P)
        tl.store(base + n[:, None] * P + p[None, :], tile, mask=mask)


@triton.jit
def state_tile(n0, p0, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
    """Offsets and mask of a tile ``(BN, BP)`` in a state ``(P, N)`` as callers see it, N contiguous."""
    n = n0 + tl.arange(0, BN)
    p = p0 + tl.arange(0, BP)
    return p[None, :] * N + n[:, None], (n < N)[:, None] & (p < P)[None, :]


@triton.jit
def widen(tile, ASM: tl.constexpr):
    """fp32 copy of a tile. ``ASM`` hides the conversion from the compiler.

    It would otherwise convert once and keep the fp32 copy in registers across matrix products; this way the 16-bit tile
    is what stays.
    """
    if ASM:
        if tile.dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
                "=r,=r,r", [tile], dtype=tl.float32, is_pure=False, pack=2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                "{.reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}",
                "=f,=f,r", [tile], dtype=tl.float32, is_pure=False, pack=2,
            )  # fmt: skip
    else:
        return tile.to(tl.float32)


@triton.jit
def load_steps(steps, index, Q: tl.constexpr):
    """Step sizes and log2 decays of a chunk and head, ``(Q,)`` each, and the log2 decay of the whole chunk."""
    base = steps + tl.cast(index, tl.int64) * (2 * Q)
    q = tl.arange(0, Q)
    return tl.load(base + Q + q), tl.load(base + q), tl.load(base + Q - 1)


@triton.jit
def load_documents(document, chunk, start, Q: tl.constexpr):
    """Document numbers of a chunk's tokens, of the token before the chunk, and of the chunk's last token.

    Numbers count up from 0 in every row; what enters the row belongs to document 0.
    """
    base = document + tl.cast(chunk, tl.int64) * Q
    return tl.load(base + tl.arange(0, Q)), tl.load(base - 1, mask=start > 0, other=0), tl.load(base + Q - 1)
