"""One token of several sequences through convolution and state: the state is written at every step, or once in R.

Most of a step's bytes are those of the states, in and out. With a ring they are only read: a state stays as of an
earlier token, beside what came since, the current token t included:

    y_t = exp(a_t) S C_t + sum_j exp(a_t - a_j) dt_j (C_t . B_j) x_j + D x_t,    a_t = sum of dt_j A since S

``clock (B,)`` counts the tokens of a row since its state was set, and lies on the device. A token's slot in the ring is
its number modulo R. The heads take turns: at the end of step t those with ``(t + 1 + head) % R == 0`` fold their ring
into the state, so that every step takes the same time, and a row's bits depend on its own clock alone. Before token t a
head has ``min(t, (t + head) % R)`` entries. From 2 R on the clock goes back by R, which changes none of this.

x, ``a`` and dt belong to a head, B and the products ``C . B`` to a group. What is no entry may be NaN: it is masked
wherever it is read. In 16 bits x and B are rounded once, as in prompts, and states once in R tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..conv.kernels import columns_of, convolve_columns, load_taps, move_columns
from ..conv.op import ACTIVATIONS
from ..runtime import tables
from ..runtime.launch import launch
from ..runtime.op import op
from ..runtime.overlap import follow, lead
from ..runtime.rows import dense
from ..runtime.tables import cdiv, power_of_two
from ..scan.prep import _silu, _step_size
from ..spec import NO_RING, MixerSpec, MixerWeights, Ring, RingState


@triton.jit
def one_later(t, R: tl.constexpr):
    """What a row's clock says after ``t``; it is written when all of a step have read it."""
    return tl.where(t + 1 < 2 * R, t + 1, R)


@triton.jit
def convolve_rows_kernel(u, conv, weight, bias, xbc, ring_b, products, clock, inner, channels, outputs, G,
                         sc_b, sc_c, sc_l, ACTIVATION: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
                         BLOCK: tl.constexpr, N: tl.constexpr, R: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """The convolution of a block of channels of one row of ``u (rows, outputs)``, to ``xbc (rows, channels)``, fp32;
    its state ``conv (rows, channels, L)`` moves on.

    With a ring the first programs of a row have the B and C of one of ``G`` groups each: they put B into ``ring_b
    (rows, G, R, N)``, and leave C's ``products (rows, G, R)`` with all that is there.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    conv += row * sc_b
    u += row * outputs + inner
    xbc += row * channels
    dtype: tl.constexpr = u.dtype.element_ty
    is_map, end = False, channels
    if ring_b is not None:
        is_map, end = part < G, inner
    if is_map:
        if ring_b is not None:
            n = tl.arange(0, N)
            always = n < N
            of_b = inner + part * N + n
            of_c = of_b + G * N
            columns_b = columns_of(conv, of_b, always, sc_c, sc_l, L)
            columns_c = columns_of(conv, of_c, always, sc_c, sc_l, L)
            taps_b, offset_b = load_taps(weight, bias, of_b, always, K)
            taps_c, offset_c = load_taps(weight, bias, of_c, always, K)
            now = tl.load(clock + row) % R
            slot = tl.arange(0, R)
            ring = ring_b + (row * G + part) * (R * N)
            old = tl.load(ring + slot[:, None] * N + n[None, :]).to(tl.float32)
            lead(OVERLAP)
            new_b, new_c = tl.load(u + of_b).to(tl.float32), tl.load(u + of_c).to(tl.float32)
            b = convolve_columns(columns_b, new_b, taps_b, offset_b, dtype, ACTIVATION, L, K)
            c = convolve_columns(columns_c, new_c, taps_c, offset_c, dtype, ACTIVATION, L, K)
            tl.store(xbc + of_c, c)
            found = tl.where(slot == now, tl.sum(b * c, 0), tl.sum(old * c[None, :], 1))
            tl.store(products + (row * G + part) * R + slot, found)
            tl.store(ring + now * N + n, b.to(ring_b.dtype.element_ty))
            tl.debug_barrier()  # threads store to columns that others have loaded
            move_columns(conv, columns_b, new_b, of_b, always, sc_c, sc_l, L)
            move_columns(conv, columns_c, new_c, of_c, always, sc_c, sc_l, L)
    else:
        block = part if ring_b is None else part - G
        channel = block * BLOCK + tl.arange(0, BLOCK)
        mask = channel < end
        columns = columns_of(conv, channel, mask, sc_c, sc_l, L)
        taps, offset = load_taps(weight, bias, channel, mask, K)
        lead(OVERLAP)
        new = tl.load(u + channel, mask=mask, other=0.0).to(tl.float32)
        total = convolve_columns(columns, new, taps, offset, dtype, ACTIVATION, L, K)
        tl.store(xbc + channel, total, mask=mask)
        tl.debug_barrier()
        move_columns(conv, columns, new, channel, mask, sc_c, sc_l, L)


@triton.jit
def advance_rows_kernel(u, xbc, state, dt_bias, A, D, scale, y, squares, low, high, H, outputs,
                        ss_b, ss_h, ss_p, ss_n,
                        LOG_RATES: tl.constexpr, D_RANK: tl.constexpr, GATE_LAST: tl.constexpr, PER_GROUP: tl.constexpr,
                        P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
                        DENSE: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """One step of a block of a head's channels of one row, with skip, gate and the gated norm's weight ``scale``.

    ``A (H,)`` holds decay rates, or with ``LOG_RATES`` the logarithms of their negatives.
    ``squares (rows, H, blocks)`` receive the sums of squares that the norm needs, ``y (rows, H P)`` what is left to be
    multiplied by its scales. Without a norm ``scale`` and ``squares`` are None.
    """
    pid = tl.program_id(0)
    blocks: tl.constexpr = (P + BP - 1) // BP
    row, head, block = (pid // blocks // H).to(tl.int64), pid // blocks % H, pid % blocks
    p, n = block * BP + tl.arange(0, BP), tl.arange(0, BN)
    mask_p, mask_n = p < P, n < N
    mask = mask_p[:, None] & mask_n[None, :]
    at = state + row * ss_b + head.to(tl.int64) * ss_h
    at += p[:, None] * N + n[None, :] if DENSE else p[:, None] * ss_p + n[None, :] * ss_n
    s = tl.load(at, mask=mask, other=0.0)
    rate = tl.load(A + head).to(tl.float32)
    if LOG_RATES:
        rate = -tl.exp(rate)
    bias = 0.0 if dt_bias is None else tl.load(dt_bias + head).to(tl.float32)
    channel = head * P + p
    skip = 0.0
    if D_RANK > 0:
        skip = tl.load(D + (channel if D_RANK == 2 else head + p * 0), mask=mask_p, other=0.0).to(tl.float32)
    if scale is not None:
        weight = tl.load(scale + channel, mask=mask_p, other=0.0).to(tl.float32)
    follow(OVERLAP)
    inner, groups = H * P, H // PER_GROUP
    maps = inner + head // PER_GROUP * N + n
    u += row * outputs
    xbc += row * (inner + 2 * groups * N)
    x = tl.load(xbc + channel, mask=mask_p, other=0.0)
    b = tl.load(xbc + maps, mask=mask_n, other=0.0)
    c = tl.load(xbc + groups * N + maps, mask=mask_n, other=0.0)
    gate = _silu(tl.load(u + channel, mask=mask_p, other=0.0).to(tl.float32))
    step = _step_size(tl.load(u + 2 * inner + 2 * groups * N + head), bias, low, high, True)
    s = s.to(tl.float32) * tl.exp(step * rate) + (x * step)[:, None] * b[None, :]
    tl.store(at, s.to(state.dtype.element_ty), mask=mask)
    out = tl.sum(s * c[None, :], 1) + x * skip
    if not GATE_LAST:
        out *= gate
    if scale is not None:
        tl.store(squares + (row * H + head) * blocks + block, tl.sum(tl.where(mask_p, out * out, 0.0), 0))
        out *= weight
    if GATE_LAST:
        out *= gate
    tl.store(y + row * inner + channel, out.to(y.dtype.element_ty), mask=mask_p)


@triton.jit
def _fold(state, ring_b, inside, xw, decay, p,
          N: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Brings channels ``p`` of a head's state up to the newest entry of its ring: ``xw (BP, R)`` holds x times what
    weighs it, ``inside (R,)`` says which slots are entries.

    Products of 16-bit numbers are exact: ``xw`` goes as three numbers of 8 bits each where B is bf16.
    """
    slot, piece = tl.arange(0, R), tl.arange(0, BN)
    for first in range(0, N, BN):
        n = first + piece
        at = state + p[:, None] * N + n[None, :]
        s = tl.load(at).to(tl.float32) * decay
        b = tl.load(ring_b + slot[:, None] * N + n[None, :], mask=inside[:, None], other=0.0)
        if ring_b.dtype.element_ty == tl.bfloat16:
            high = xw.to(tl.bfloat16)
            rest = xw - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            change = tl.dot(low, b)
            change = tl.dot(middle, b, change)
            change = tl.dot(high, b, change)
        else:
            change = tl.dot(xw, b.to(tl.float32), input_precision=PRECISION)
        tl.store(at, (s + change).to(state.dtype.element_ty))


@triton.jit
def ring_step_kernel(u, xbc, state, ring_x, ring_a, ring_b, products, clock, dt_bias, A, D, scale, y, squares,
                     low, high, H, outputs,
                     D_RANK: tl.constexpr, GATE_LAST: tl.constexpr, PER_GROUP: tl.constexpr,
                     P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
                     R: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """As ``advance_rows_kernel`` with ``LOG_RATES``, but the token goes into the ring, and the state stays as it is
    unless it is the head's turn to fold.

    The state is read in pieces of ``W`` columns, 128 bytes: a thread adds up what it has of all, and few threads share
    a row. The fold reads it again, ``BN`` columns at a time, as it is still near.
    """
    blocks: tl.constexpr = P // BP
    head, block, row = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1).to(tl.int64)
    group, groups = head // PER_GROUP, H // PER_GROUP
    line = row * H + head
    p, n, slot = block * BP + tl.arange(0, BP), tl.arange(0, W), tl.arange(0, R)
    t = tl.load(clock + row)  # first: the ring's loads wait for it
    state += line * (P * N)
    ring_x += line * (R * P)
    ring_a += line * (2 * R)
    pieces = ()
    for i in tl.static_range(N // W):
        pieces = pieces + (tl.load(state + p[:, None] * N + i * W + n[None, :]),)
    raw_rate = tl.load(A + head)
    channel = head * P + p
    skip = 0.0
    if D_RANK > 0:
        skip = tl.load(D + (channel if D_RANK == 2 else head + p * 0)).to(tl.float32)
    if scale is not None:
        weight = tl.load(scale + channel)
    bias = 0.0 if dt_bias is None else tl.load(dt_bias + head).to(tl.float32)
    age = (t + R - slot) % R  # 0 is the current token's
    older = (age > 0) & (age <= tl.minimum(t, (t + head) % R))
    a, dts = tl.load(ring_a + slot, mask=older, other=0.0), tl.load(ring_a + R + slot, mask=older, other=0.0)
    xs = tl.load(ring_x + slot[:, None] * P + p[None, :], mask=older[:, None], other=0.0)
    follow(OVERLAP)
    inner = H * P
    u += row * outputs
    xbc += row * (inner + 2 * groups * N)
    raw_step = tl.load(u + 2 * inner + 2 * groups * N + head)
    x = tl.load(xbc + channel)
    found = tl.load(products + (row * groups + group) * R + slot)
    z = tl.load(u + channel)
    total = tl.zeros([BP, W], tl.float32)
    for i in tl.static_range(N // W):
        c = tl.load(xbc + inner + (groups + group) * N + i * W + n)
        total += pieces[i].to(tl.float32) * c[None, :]
    step = _step_size(raw_step, bias, low, high, True)
    now = tl.sum(tl.where(older & (age == 1), a, 0.0), 0) - tl.exp(raw_rate.to(tl.float32)) * step
    w = tl.where(older, dts * tl.exp(tl.where(older, now - a, 0.0)), 0.0)
    weighed = tl.where(older, w * found, 0.0)
    out = tl.sum(total, 1) * tl.exp(now) + tl.sum(xs.to(tl.float32) * weighed[:, None], 0)
    out += x * (tl.sum(tl.where(age == 0, found, 0.0), 0) * step + skip)
    kept = x.to(ring_x.dtype.element_ty)
    tl.store(ring_x + (t % R) * P + p, kept)
    if block == 0:
        tl.store(ring_a + t % R, now)
        tl.store(ring_a + R + t % R, step)
    gate = _silu(z.to(tl.float32))
    if not GATE_LAST:
        out *= gate
    if scale is not None:
        tl.store(squares + line * blocks + block, tl.sum(out * out, 0))
        out *= weight.to(tl.float32)
    if GATE_LAST:
        out *= gate
    tl.store(y + row * inner + channel, out.to(y.dtype.element_ty))
    if (t + 1 + head) % R == 0:
        is_new = age == 0
        w = tl.where(is_new, step, w)
        xw = tl.trans(tl.where(is_new[:, None], kept[None, :], xs).to(tl.float32) * w[:, None])
        tl.debug_barrier()  # all of the state has been read
        _fold(state, ring_b + (row * groups + group) * (R * N), older | is_new, xw, tl.exp(now), p,
              N, R, BN, PRECISION)  # fmt: skip


@triton.jit
def settle_kernel(state, ring_x, ring_a, ring_b, clock, H,
                  PER_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
                  R: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Folds all heads between steps, a block of a head's channels, before the clock is set to zero."""
    blocks: tl.constexpr = P // BP
    head, block, row = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1).to(tl.int64)
    t = tl.load(clock + row)
    entries = tl.minimum(t, (t + head) % R)
    if entries > 0:
        line = row * H + head
        p, slot = block * BP + tl.arange(0, BP), tl.arange(0, R)
        age = (t + R - 1 - slot) % R  # 0 is the newest
        inside = age < entries
        at = ring_a + line * (2 * R) + slot
        a, dts = tl.load(at, mask=inside, other=0.0), tl.load(at + R, mask=inside, other=0.0)
        now = tl.sum(tl.where(inside & (age == 0), a, 0.0), 0)
        w = tl.where(inside, dts * tl.exp(tl.where(inside, now - a, 0.0)), 0.0)
        x = tl.load(ring_x + line * (R * P) + slot[:, None] * P + p[None, :], mask=inside[:, None], other=0.0)
        xw = tl.trans(x.to(tl.float32) * w[:, None])
        maps = ring_b + (row * (H // PER_GROUP) + head // PER_GROUP) * (R * N)
        _fold(state + line * (P * N), maps, inside, xw, tl.exp(now), p, N, R, BN, PRECISION)


def new_ring(conv_state: Tensor, ssm_state: Tensor) -> Ring:
    """See :func:`mamba2_hf.ops.new_ring`."""
    (rows, heads, P, N), device, R = ssm_state.shape, ssm_state.device, tables.RING
    if not tables.keeps_ring(tables.current_chip(), ssm_state.dtype, rows, P, N):
        return NO_RING
    groups = (conv_state.shape[1] - heads * P) // (2 * N)
    return Ring(
        torch.zeros(rows, heads, R, P, dtype=conv_state.dtype, device=device),
        torch.zeros(rows, heads, 2, R, dtype=torch.float32, device=device),
        torch.zeros(rows, groups, R, N, dtype=conv_state.dtype, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
    )


@op("settle_ring", fake=lambda call: call.ssm_state.new_empty(0))
def settle(call: RingState) -> Tensor:
    """See :func:`mamba2_hf.ops.settle`. Returns nothing in a tensor."""
    state, ring = call
    assert ring.B is not None
    assert ring.clock is not None
    rows, heads, P, N = state.shape
    tile = tables.ring_tile(state.dtype, ring.B.dtype, P, N)
    launch(
        settle_kernel,
        (heads * (P // tile.BP), rows),
        *(state, ring.x, ring.decays, ring.B, ring.clock, heads),
        PER_GROUP=heads // ring.B.shape[1],
        P=P,
        N=N,
        BP=tile.BP,
        BN=tile.BN,
        R=tables.RING,
        PRECISION=tables.precision(tables.current_chip(), torch.float32),
        num_warps=1,
    )
    ring.clock.zero_()
    return torch.empty(0, dtype=state.dtype, device=state.device)


def advance_rows(
    u: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    ring: Ring,
    weights: MixerWeights,
    spec: MixerSpec,
    group_size: int,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Launches a mixer's step between its projections but for the scales of its norm; states are updated in place.

    Args:
        u: ``(B, 2 H P + 2 G N + H)``, dense, what in_proj gives.
        conv_state, ssm_state, ring, weights, spec: of the mixer. Whoever has a ring has its clock moved on after this.
        group_size: of the gated norm.
        dtype: of the result.
        options: of the launches; see :func:`mamba2_hf.ops.runtime.overlap.overlap`.

    Returns:
        ``(B, H P)``, to be multiplied by the norm's scales, and what these come from: parts of the sums of squares
        ``(B, groups, parts)``. The latter is None without a norm.
    """
    rows, heads, P, N = ssm_state.shape
    conv_weight, conv_bias, dt_bias, A, _, D, gated_norm_weight = weights
    (channels, taps), inner, outputs, device = conv_weight.shape, heads * P, u.shape[1], u.device
    xbc = torch.empty(rows, channels, dtype=torch.float32, device=device)
    groups, convolved, products, kept = 0, channels, None, ring.clock is not None
    if kept:
        groups, convolved = spec.n_groups, inner
        products = torch.empty(rows, groups, tables.RING, dtype=torch.float32, device=device)
    launch(
        convolve_rows_kernel,
        (rows, groups + cdiv(convolved, tables.ROWS_CONV_BLOCK)),
        *(u, conv_state, conv_weight.contiguous(), dense(conv_bias), xbc, ring.B, products, ring.clock),
        *(inner, channels, outputs, groups, *conv_state.stride()),
        ACTIVATION=ACTIVATIONS[spec.activation],
        K=taps,
        L=conv_state.shape[2],
        BLOCK=tables.ROWS_CONV_BLOCK,
        N=N,
        R=tables.RING,
        num_warps=2,
        **options,
    )
    tile, bn = tables.ring_tile(ssm_state.dtype, conv_state.dtype, P, N), power_of_two(N)
    bp = tile.BP if kept else min(tables.ROWS_STATE_TILE // bn, power_of_two(P))
    blocks = cdiv(P, bp)
    raw, squares = torch.empty(rows, inner, dtype=dtype, device=device), None
    if gated_norm_weight is not None:
        squares = torch.empty(rows, inner // group_size, group_size // P * blocks, dtype=torch.float32, device=device)
    of_heads = (dense(dt_bias), weights.decay.contiguous(), dense(D), dense(gated_norm_weight), raw, squares)
    common = {
        "D_RANK": 0 if D is None else D.dim(),
        "GATE_LAST": spec.norm_before_gate and squares is not None,
        "PER_GROUP": heads // spec.n_groups,
        "P": P,
        "N": N,
        "BP": bp,
    }
    if kept:
        launch(
            ring_step_kernel,
            (heads * blocks, rows),
            *(u, xbc, ssm_state, ring.x, ring.decays, ring.B, products, ring.clock),
            *(*of_heads, *spec.dt_limit, heads, outputs),
            **common,
            W=tile.W,
            BN=tile.BN,
            R=tables.RING,
            PRECISION=tables.precision(tables.current_chip(), torch.float32),
            num_warps=1,
            maxnreg=tile.registers,
            **options,
        )
    else:
        launch(
            advance_rows_kernel,
            (rows * heads * blocks,),
            *(u, xbc, ssm_state, *of_heads, *spec.dt_limit, heads, outputs, *ssm_state.stride()),
            LOG_RATES=A is None,
            **common,
            BN=bn,
            DENSE=ssm_state.stride()[2:] == (N, 1),
            num_warps=1,
            **options,
        )
    return raw, squares
