"""Rotary embedding on Triton, attention of one query a sequence, whose keys are split among programs, and a whole layer
of attention for one token a sequence.

With one query there is nothing to divide but heads and keys. Each program goes through a part of the keys of one head
of them, for all queries that share it; a second launch adds up what the parts found (Flash-Decoding, Dao et al. 2023).

In a layer a launch projects to queries, keys and values before that, and another turns them and brings keys and values
to their places. One row is a matter of reading weights once, as in ``mixer/one_row.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import flops
from ..mixer.one_row import _normed_tiles, _project, _weight_tiles, project_back
from ..mixer.rows import _products
from ..norm.op import Norm
from ..norm.triton import norm_forward
from ..runtime import tables
from ..runtime.launch import launch
from ..runtime.op import op
from ..runtime.overlap import follow, overlap
from ..runtime.rows import channels_last, dense
from ..runtime.tables import cdiv, power_of_two
from .op import AttentionStep, OneQuery, Rotary


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


@triton.jit
def _enter_one(pid, x, norm_weight, weight, bias, u, outputs, eps, factor,
               WIDTH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """``BN`` outputs of a projection of ``factor`` times the norm of ``x (WIDTH,)``."""
    n = pid * BN + tl.arange(0, BN)
    mask = n < outputs
    weights = _weight_tiles(weight, n, mask, WIDTH, BK)
    follow(OVERLAP)
    inputs, scale = _normed_tiles(x, norm_weight, eps, WIDTH, BK)
    out = _project(weights, inputs, scale * factor, bias, n, mask, u.dtype.element_ty, WIDTH, BK)
    tl.store(u + n, out.to(u.dtype.element_ty), mask=mask)


@triton.jit
def attention_enter_kernel(x, norm_weight, q, k, v, q_bias, k_bias, v_bias, u, of_q, of_k, eps, factor,
                           WIDTH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                           OVERLAP: tl.constexpr):  # fmt: skip
    """Queries, keys and values ``u (of_q + 2 of_k,)`` of one row."""
    pid = tl.program_id(0)
    first, second = tl.cdiv(of_q, BN), tl.cdiv(of_k, BN)
    if pid < first:
        _enter_one(pid, x, norm_weight, q, q_bias, u, of_q, eps, factor, WIDTH, BN, BK, OVERLAP)
    elif pid < first + second:
        _enter_one(pid - first, x, norm_weight, k, k_bias, u + of_q, of_k, eps, factor, WIDTH, BN, BK, OVERLAP)
    else:
        _enter_one(pid - first - second, x, norm_weight, v, v_bias, u + of_q + of_k, of_k, eps, factor,
                   WIDTH, BN, BK, OVERLAP)  # fmt: skip


@triton.jit
def attention_enter_rows_kernel(x, q, k, v, q_bias, k_bias, v_bias, u, rows, of_q, of_k, factor,
                                WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                                PRECISION: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """``BM`` rows of queries, keys and values ``u (rows, of_q + 2 of_k)`` of ``factor`` times ``x (rows, WIDTH)``."""
    tiles_m, first, second = tl.cdiv(rows, BM), tl.cdiv(of_q, BN), tl.cdiv(of_k, BN)
    pid, row = tl.program_id(0) // tiles_m, tl.program_id(0) % tiles_m * BM
    # One loop for all three: the buffers of each would take shared memory of their own.
    if pid < first:
        weight, bias, begin, outputs = q, q_bias, 0, of_q
    elif pid < first + second:
        weight, bias, begin, outputs = k, k_bias, of_q, of_k
        pid -= first
    else:
        weight, bias, begin, outputs = v, v_bias, of_q + of_k, of_k
        pid -= first + second
    m, n = (row + tl.arange(0, BM))[:, None], (pid * BN + tl.arange(0, BN))[None, :]
    follow(OVERLAP)
    offset = 0.0 if bias is None else tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)
    last: tl.constexpr = (WIDTH + BK - 1) // BK
    sums = _products(x, weight, None, row, pid * BN, 0, last, rows, outputs, 0.0,
                     WIDTH, WIDTH, 1, 1, BM, BN, BK, False, PRECISION)  # fmt: skip
    value = (tl.trans(sums) * factor + offset).to(u.dtype.element_ty)
    tl.store(u + m * (of_q + 2 * of_k) + begin + n, value, mask=(m < rows) & (n < outputs))


@triton.jit
def place_kernel(u, cos, sin, lengths, queries, keys, values, multiplier, sc_b, sk_b, sk_h, sk_s, sv_b, sv_h, sv_s,
                 H: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, TURNED: tl.constexpr, HALF: tl.constexpr,
                 REST: tl.constexpr, BD: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """One head of a row of ``u (rows, (H + 2 GROUPS) D)``: queries turned to a dense ``queries (rows, H, D)``, keys
    turned and values as they are to the last of their row's ``lengths`` places.
    """
    heads: tl.constexpr = H + 2 * GROUPS
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    follow(OVERLAP)
    u += (row * heads + head) * D
    if TURNED > 0:
        cos += row * sc_b
        sin += row * sc_b
    place = tl.load(lengths + row).to(tl.int64) - 1
    if head < H:
        _move(u, queries + (row * H + head) * D, cos, sin, 1.0, D, TURNED, HALF, REST, BD)
    elif head < H + GROUPS:
        at = keys + row * sk_b + (head - H) * sk_h + place * sk_s
        _move(u, at, cos, sin, multiplier, D, TURNED, HALF, REST, BD)
    else:
        at = values + row * sv_b + (head - H - GROUPS) * sv_h + place * sv_s
        _move(u, at, cos, sin, 1.0, D, 0, HALF, REST, BD)


@triton.jit
def _move(x, y, cos, sin, multiplier, D: tl.constexpr, TURNED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
          BD: tl.constexpr):  # fmt: skip
    """One head ``x (D,)`` to ``y``, times ``multiplier``, its first ``TURNED`` channels turned."""
    if TURNED > 0:
        _turn(x, y, cos, sin, 1.0, multiplier, D, 1, D, TURNED, 1, HALF, REST)
    else:
        d = tl.arange(0, BD)
        value = tl.load(x + d, mask=d < D, other=0.0).to(tl.float32) * multiplier
        tl.store(y + d, value.to(y.dtype.element_ty), mask=d < D)


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
    return _attend(call)


def _attend(call: OneQuery) -> Tensor:
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


def _step_flops(call: Any) -> int:
    rows = call.stream.shape[0]
    return sum(flops.product(rows, each.weight) for each in (call.q, call.k, call.v, call.out))


def _step_fake(call: AttentionStep) -> Tensor:
    return torch.empty_like(call.stream, dtype=torch.float32 if call.part else None)


@op("attention_step", fake=_step_fake, flops=(_step_flops,))
def attention_step(call: AttentionStep) -> Tensor:
    """See :func:`mamba2_hf.ops.attention_step`."""
    stream, keys, values, dtype = channels_last(call.stream), call.keys, call.values, call.keys.dtype
    (rows, _, width), (_, groups, _, size), options = stream.shape, keys.shape, overlap()
    of_q, of_k = call.q.weight.shape[0], groups * size
    heads = of_q // size
    linears = (call.q, call.k, call.v)
    weights, biases = [each.weight.contiguous() for each in linears], [dense(each.bias) for each in linears]
    u = torch.empty(rows, of_q + 2 * of_k, dtype=dtype, device=stream.device)
    if rows == 1:
        outputs, inputs, warps = tables.projection(width)
        launch(
            attention_enter_kernel,
            (cdiv(of_q, outputs) + 2 * cdiv(of_k, outputs),),
            *(stream, call.norm_weight.contiguous(), *weights, *biases, u, of_q, of_k, call.norm_eps, call.multiplier),
            WIDTH=width,
            BN=outputs,
            BK=inputs,
            num_warps=warps,
            **options,
        )
    else:
        norm = Norm(stream, None, call.norm_weight, call.norm_eps, width, False, dtype)
        tiles = tables.attention_enter(tables.current_chip(), dtype, rows, of_q + 2 * of_k)
        launch(
            attention_enter_rows_kernel,
            ((cdiv(of_q, tiles.BN) + 2 * cdiv(of_k, tiles.BN)) * cdiv(rows, tiles.BM),),
            *(norm_forward(norm), *weights, *biases, u, rows, of_q, of_k, call.multiplier),
            WIDTH=width,
            BM=tiles.BM,
            BN=tiles.BN,
            BK=tiles.BK,
            PRECISION=tables.precision(tables.current_chip(), dtype),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **options,
        )
    queries = torch.empty(rows, heads, 1, size, dtype=dtype, device=stream.device)
    cos, sin = dense(call.cos), dense(call.sin)
    turned = 0 if cos is None else cos.shape[2]
    lengths = call.lengths.contiguous()
    launch(
        place_kernel,
        (rows * (heads + 2 * groups),),
        *(u, cos, sin, lengths, queries, keys, values, call.key_multiplier),
        *(0 if cos is None or cos.shape[0] == 1 else cos.stride(0), *keys.stride()[:3], *values.stride()[:3]),
        H=heads,
        GROUPS=groups,
        D=size,
        TURNED=turned,
        HALF=power_of_two(max(turned // 2, 1)),
        REST=power_of_two(max(size - turned, 1)),
        BD=power_of_two(size),
        num_warps=1,
        **options,
    )
    y = _attend(OneQuery(queries, keys, values, lengths, call.scale))
    if rows == 1:
        return project_back(y, call.out, None if call.part else call.added_to, call.output_multiplier, call.peers)
    projected = F.linear(y.view(rows, 1, of_q), call.out.weight, None if call.part else call.out.bias)
    if call.part:
        return projected.float() * call.output_multiplier
    return torch.add(call.added_to, projected, alpha=call.output_multiplier)
