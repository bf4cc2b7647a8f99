"""Rotary embedding on Triton, and attention of one query a sequence, whose keys are split among programs.

With one query there is nothing to divide but heads and keys. Each program goes through a part of the keys of one head
of them, for all queries that share it; a second launch adds up what the parts found (Flash-Decoding, Dao et al. 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime import tables
from ..runtime.launch import launch
from ..runtime.op import op
from ..runtime.overlap import follow, overlap
from ..runtime.rows import channels_last, dense
from ..runtime.tables import cdiv, power_of_two
from .op import OneQuery, Rotary


@triton.jit
def _turn(x, y, cos, sin, sign, multiplier, s_h, H: tl.constexpr, D: tl.constexpr, TURNED: tl.constexpr,
          BH: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr):  # fmt: skip
    """All heads of one token, ``x (H, D)`` with strides ``(s_h, 1)`` to a dense ``y``."""
    half: tl.constexpr = TURNED // 2
    h, d = tl.arange(0, BH)[:, None], tl.arange(0, HALF)[None, :]
    mask = (h < H) & (d < half)
    left = tl.load(x + h * s_h + d, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(x + h * s_h + half + d, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + d, mask=d < half, other=0.0).to(tl.float32) * multiplier
    s = tl.load(sin + d, mask=d < half, other=0.0).to(tl.float32) * (sign * multiplier)
    tl.store(y + h * D + d, (left * c - right * s).to(y.dtype.element_ty), mask=mask)
    tl.store(y + h * D + half + d, (right * c + left * s).to(y.dtype.element_ty), mask=mask)
    if D > TURNED:
        d = TURNED + tl.arange(0, REST)[None, :]
        mask = (h < H) & (d < D)
        rest = tl.load(x + h * s_h + d, mask=mask, other=0.0).to(tl.float32) * multiplier
        tl.store(y + h * D + d, rest.to(y.dtype.element_ty), mask=mask)


@triton.jit
def rotary_kernel(q, k, cos, sin, q_out, k_out, T, sign, multiplier, sq_b, sq_t, sq_h, sk_b, sk_t, sk_h, sc_b, sc_t,
                  H: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, TURNED: tl.constexpr, BH: tl.constexpr,
                  BG: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr):  # fmt: skip
    """One token's queries and keys, turned; with ``sign`` -1 back again, as gradients are."""
    token = tl.program_id(0).to(tl.int64)
    row, t = token // T, token % T
    cos += row * sc_b + t * sc_t
    sin += row * sc_b + t * sc_t
    _turn(q + row * sq_b + t * sq_t, q_out + token * (H * D), cos, sin, sign, 1.0, sq_h, H, D, TURNED, BH, HALF, REST)
    _turn(k + row * sk_b + t * sk_t, k_out + token * (GROUPS * D), cos, sin, sign, multiplier, sk_h,
          GROUPS, D, TURNED, BG, HALF, REST)  # fmt: skip


@triton.jit
def attend_part_kernel(q, k, v, lengths, sums, maxima, totals, keys, part, scale, sq_b, sq_h, sk_b, sk_h, sk_s,
                       sv_b, sv_h, sv_s, GROUPS: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr,
                       BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
                       OVERLAP: tl.constexpr):  # fmt: skip
    """``part`` keys of one of ``GROUPS`` heads of them for its ``SHARED`` queries.

    ``sums (B, H, parts, D)`` receive the weighted values, ``maxima`` and ``totals (B, H, parts)`` the largest score, in
    powers of two, and the sum of the weights.
    """
    pid, number, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, group = (pid // GROUPS).to(tl.int64), pid % GROUPS
    m, n, d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    head = group * SHARED + m
    mask_m, mask_d = m < SHARED, d < D
    follow(OVERLAP)
    end = keys if lengths is None else tl.minimum(tl.load(lengths + row).to(tl.int32), keys)
    queries = tl.load(q + row * sq_b + head[:, None] * sq_h + d[None, :], mask=mask_m[:, None] & mask_d, other=0.0)
    k += row * sk_b + group * sk_h
    v += row * sv_b + group * sv_h
    best = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    found = tl.zeros([BM, BD], tl.float32)
    first = number * part
    for start in range(first, tl.minimum(first + part, end), BN):
        at = (start + n).to(tl.int64)
        seen = start + n < end
        tile = tl.load(k + at[:, None] * sk_s + d[None, :], mask=seen[:, None] & mask_d, other=0.0)
        scores = tl.dot(queries, tile.T, input_precision=PRECISION) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        top = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - top[:, None])
        fade = tl.exp2(best - top)
        total = total * fade + tl.sum(weights, 1)
        tile = tl.load(v + at[:, None] * sv_s + d[None, :], mask=seen[:, None] & mask_d, other=0.0)
        found = tl.dot(weights.to(tile.dtype), tile, found * fade[:, None], input_precision=PRECISION)
        best = top
    line = (row * (GROUPS * SHARED) + head) * parts + number
    tl.store(maxima + line, best, mask=mask_m)
    tl.store(totals + line, total, mask=mask_m)
    tl.store(sums + line[:, None] * D + d[None, :], found, mask=mask_m[:, None] & mask_d)


@triton.jit
def attend_sum_kernel(sums, maxima, totals, y, parts, D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
                      OVERLAP: tl.constexpr):  # fmt: skip
    """One query's output ``y (B H, D)`` of what the parts of its keys gave."""
    line = tl.program_id(0).to(tl.int64)
    part, d = tl.arange(0, BS), tl.arange(0, BD)
    mask = part < parts
    follow(OVERLAP)
    best = tl.load(maxima + line * parts + part, mask=mask, other=float("-inf"))
    weight = tl.exp2(best - tl.max(best, 0))
    total = tl.sum(weight * tl.load(totals + line * parts + part, mask=mask, other=0.0), 0)
    at = sums + (line * parts + part)[:, None] * D + d[None, :]
    found = tl.load(at, mask=mask[:, None] & (d < D)[None, :], other=0.0)
    value = tl.sum(found * weight[:, None], 0) / total
    tl.store(y + line * D + d, value.to(y.dtype.element_ty), mask=d < D)


def _rotary(call: Rotary, q: Tensor, k: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = channels_last(q), channels_last(k), call.cos.contiguous(), call.sin.contiguous()
    (batch, tokens, heads, size), groups, turned = q.shape, k.shape[2], cos.shape[2]
    turned_q, turned_k = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    launch(
        rotary_kernel,
        (batch * tokens,),
        *(q, k, cos, sin, turned_q, turned_k, tokens, sign, call.multiplier, *q.stride()[:3], *k.stride()[:3]),
        *(0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1)),
        H=heads,
        GROUPS=groups,
        D=size,
        TURNED=turned,
        BH=power_of_two(heads),
        BG=power_of_two(groups),
        HALF=power_of_two(turned // 2),
        REST=power_of_two(max(size - turned, 1)),
        num_warps=4,
    )
    return turned_q, turned_k


@op("rotary", fake=lambda call: (call.q.new_empty(call.q.shape), call.k.new_empty(call.k.shape)))
def rotary(call: Rotary) -> tuple[Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.rotary`."""
    return _rotary(call, call.q, call.k, 1.0)


@rotary.backward
def _rotary_backward(call: Rotary, dq: Tensor, dk: Tensor | None) -> tuple[Tensor, Tensor]:
    return _rotary(call, dq, torch.zeros_like(call.k) if dk is None else dk, -1.0)


@op("attend_one", fake=lambda call: call.q.new_empty(call.q.shape))
def attend_one(call: OneQuery) -> Tensor:
    """See :func:`mamba2_hf.ops.attend_one`."""
    q, k, v = map(channels_last, (call.q, call.k, call.v))
    (batch, heads, _, size), (_, groups, keys, _), device = q.shape, k.shape, q.device
    part, warps = tables.attend_part(tables.current_chip(), batch * groups, keys)
    parts, options = cdiv(keys, part), overlap()
    sums = torch.empty(batch, heads, parts, size, dtype=torch.float32, device=device)
    maxima, totals = (torch.empty(batch, heads, parts, dtype=torch.float32, device=device) for _ in range(2))
    launch(
        attend_part_kernel,
        (batch * groups, parts),
        *(q, k, v, dense(call.lengths), sums, maxima, totals, keys, part, call.scale * 1.4426950408889634),
        *(*q.stride()[:2], *k.stride()[:3], *v.stride()[:3]),
        GROUPS=groups,
        SHARED=heads // groups,
        D=size,
        BM=max(16, power_of_two(heads // groups)),
        BN=tables.ATTEND_KEYS,
        BD=max(16, power_of_two(size)),
        PRECISION=tables.precision(tables.current_chip(), q.dtype),
        num_warps=warps,
        **options,
    )
    y = torch.empty(batch, heads, 1, size, dtype=q.dtype, device=device)
    launch(
        attend_sum_kernel,
        (batch * heads,),
        *(sums, maxima, totals, y, parts),
        D=size,
        BS=power_of_two(parts),
        BD=power_of_two(size),
        num_warps=4,
        **options,
    )
    return y
