"""A block of tokens of which each sequence may take some back, on Triton: one pass over the states.

The states lie as of before the last block. The first launch convolves, and moves the convolution's state on by the
tokens of that block that its row has kept. In the second a program folds these tokens into its head's state, stores it,
and has the new tokens read it, by the products of a chunk (paper, Section 6), without storing: should some of them go,
nothing has to be undone. What the states depend on of the new tokens (x, B, step sizes, inputs of the convolution) is a
few percent of a state. The third launch norms, and writes it to where the last block's was.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import flops
from ..conv.kernels import _when, activate, load_taps
from ..conv.op import ACTIVATIONS
from ..runtime import tables
from ..runtime.launch import launch
from ..runtime.op import op
from ..runtime.rows import channels_last, dense
from ..runtime.tables import cdiv, power_of_two
from ..scan.prep import _silu, _step_size
from .op import BlockStep
from .step import _scale


@triton.jit
def _before(conv, inputs, back, old, channel, mask, sc_c, sc_l, L, C, dtype):
    """The input ``back`` tokens before the first new one, in ``dtype``: of the ``old`` ones in ``inputs (R, C)``, or of
    those before them in the convolution's state ``conv (C, L)``.
    """
    at = old - back
    behind = tl.load(inputs + at * C + channel, mask=_when(at >= 0, mask), other=0.0).to(dtype)
    before = tl.load(conv + channel * sc_c + (at + L) * sc_l, mask=_when(at < 0, mask), other=0.0).to(dtype)
    return tl.where(at >= 0, behind, before)


@triton.jit
def convolve_block_kernel(u, conv, inputs, kept, weight, bias, dt_bias, A, fresh, fresh_steps, low, high, H, T, R, C,
                          inner, blocks, su_b, su_t, sc_b, sc_c, sc_l,
                          LOG_RATES: tl.constexpr, ACTIVATION: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
                          BT: tl.constexpr, BH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A block of channels of one row, convolved to ``fresh (rows, T, C)``, fp32; moves the state ``conv (rows, C, L)``
    on by the old tokens that were kept, and puts the new inputs in their place. One more program for each row finds
    decays and step sizes, ``fresh_steps (rows, T, 2, H)``.
    """
    row, part = (tl.program_id(0) // (blocks + 1)).to(tl.int64), tl.program_id(0) % (blocks + 1)
    token = tl.arange(0, BT)[:, None]
    u += row * su_b
    if part == blocks:
        head = tl.arange(0, BH)
        there = head < H
        rate = tl.load(A + head, mask=there, other=0.0).to(tl.float32)
        if LOG_RATES:
            rate = -tl.exp(rate)
        shift = tl.zeros([BH], tl.float32)
        if dt_bias is not None:
            shift = tl.load(dt_bias + head, mask=there, other=0.0).to(tl.float32)
        for first in range(0, T, BT):
            here = (first + token < T) & there[None, :]
            dt = tl.load(u + (first + token) * su_t + inner + C + head[None, :], mask=here, other=0.0)
            step = _step_size(dt, shift[None, :], low, high, True)
            to = fresh_steps + (row * T + first + token) * 2 * H + head[None, :]
            tl.store(to, step * rate[None, :], mask=here)
            tl.store(to + H, step, mask=here)
    else:
        channel = part * BLOCK + tl.arange(0, BLOCK)
        mask, wide = channel < C, channel[None, :]
        old = tl.load(kept + row)
        conv += row * sc_b
        inputs += row * R * C
        u += inner
        taps, offset = load_taps(weight, bias, channel, mask, K)
        columns = ()
        for i in tl.static_range(L):
            column = _before(conv, inputs, L - i, old, channel, mask, sc_c, sc_l, L, C, conv.dtype.element_ty)
            columns = columns + (column,)
        tl.debug_barrier()  # threads store to what others have loaded
        for i in tl.static_range(L):
            tl.store(conv + channel * sc_c + i * sc_l, columns[i], mask=mask)
        for first in range(0, T, BT):
            t = first + token
            total = tl.zeros([BT, BLOCK], tl.float32) + offset[None, :]
            inside = (t < T) & mask[None, :]
            for i in tl.static_range(K):
                at = t + i - (K - 1)
                value = tl.load(u + at * su_t + wide, mask=(at >= 0) & inside, other=0.0)
                for j in tl.static_range(i, K - 1):
                    earlier = columns[L - (K - 1) + j].to(u.dtype.element_ty)
                    value = tl.where(at == j - (K - 1), earlier[None, :], value)
                total += taps[i][None, :] * value.to(tl.float32)
            tl.store(fresh + (row * T + t) * C + wide, activate(total, ACTIVATION), mask=inside)
            tl.store(inputs + t * C + wide, value, mask=inside)


@triton.jit
def _steps(steps, line, first, count, head, H, BT: tl.constexpr):
    """Log decays and step sizes of a head for ``BT`` tokens from ``first`` on; zeros from ``count`` on."""
    t = first + tl.arange(0, BT)
    at = steps + (line + t) * 2 * H + head
    return tl.load(at, mask=t < count, other=0.0), tl.load(at + H, mask=t < count, other=0.0)


@triton.jit
def _rows(convolved, line, first, count, width, channel, mask, BT: tl.constexpr):
    """Channels of ``BT`` tokens from ``first`` on, fp32; zeros from ``count`` on."""
    t = first + tl.arange(0, BT)
    at = convolved + (line + t)[:, None] * width + channel[None, :]
    return tl.load(at, mask=(t < count)[:, None] & mask[None, :], other=0.0).to(tl.float32)


@triton.jit
def block_kernel(z, state, convolved, steps, kept, fresh, fresh_steps, D, y, squares, H, T, R, su_b, su_t,
                 ss_b, ss_h, ss_p, ss_n,
                 D_RANK: tl.constexpr, GATE: tl.constexpr, PER_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                 BT: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One block of a head's channels of one row: folds the tokens that are ``kept (rows,)`` of ``R`` old ones, and has
    ``T`` new ones read the state, to ``y`` and to ``squares (rows T, H, blocks)`` for the norm.

    ``convolved (rows, R, H P + G N)`` and ``steps (rows, R, 2, H)`` are of the old tokens, ``fresh (rows, T, H P + 2 G
    N)`` and ``fresh_steps (rows, T, 2, H)`` of the new ones. Tokens go ``BT`` at a time, states ``BN`` columns.
    """
    pid = tl.program_id(0)
    blocks: tl.constexpr = (P + BP - 1) // BP
    row, head, block = (pid // blocks // H).to(tl.int64), pid // blocks % H, pid % blocks
    p, piece, token = block * BP + tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, BT)
    mask_p = p < P
    state += row * ss_b + head.to(tl.int64) * ss_h
    old = tl.load(kept + row)
    inner, group, groups = H * P, head // PER_GROUP, H // PER_GROUP
    width = inner + groups * N
    of_x, of_b, all = head * P + p, inner + group * N, width + groups * N
    if D_RANK > 0:
        skip = tl.load(D + (head * P + p if D_RANK == 2 else head + p * 0), mask=mask_p, other=0.0).to(tl.float32)
    passed_before = 0.0  # of the tokens before these
    for first in range(0, T, BT):
        decay, _ = _steps(fresh_steps, row * T, first, T, head, H, BT)
        passed = passed_before + tl.cumsum(decay, 0)
        out = tl.zeros([BT, BP], tl.float32)
        for column in range(0, N, BN):
            n = column + piece
            mask_n = n < N
            at, mask = state + p[:, None] * ss_p + n[None, :] * ss_n, mask_p[:, None] & mask_n[None, :]
            s = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            if first == 0:
                for then in range(0, old, BT):
                    fade, step = _steps(steps, row * R, then, old, head, H, BT)
                    x = _rows(convolved, row * R, then, old, width, of_x, mask_p, BT)
                    b = _rows(convolved, row * R, then, old, width, of_b + n, mask_n, BT)
                    left = tl.sum(fade, 0)
                    x *= (step * tl.exp(left - tl.cumsum(fade, 0)))[:, None]
                    s = tl.dot(tl.trans(x), b, s * tl.exp(left), input_precision=PRECISION)
                s = s.to(state.dtype.element_ty)
                tl.store(at, s, mask=mask)
                s = s.to(tl.float32)
            c = _rows(fresh, row * T, first, T, all, of_b + groups * N + n, mask_n, BT)
            out = tl.dot(c, tl.trans(s), out, input_precision=PRECISION)
        out *= tl.exp(passed)[:, None]
        passed_before += tl.sum(decay, 0)
        passed_then = 0.0
        for then in range(0, first + 1, BT):
            decay, step = _steps(fresh_steps, row * T, then, T, head, H, BT)
            reached = passed_then + tl.cumsum(decay, 0)
            passed_then += tl.sum(decay, 0)
            scores = tl.zeros([BT, BT], tl.float32)
            for column in range(0, N, BN):
                n = column + piece
                b = _rows(fresh, row * T, then, T, all, of_b + n, n < N, BT)
                c = _rows(fresh, row * T, first, T, all, of_b + groups * N + n, n < N, BT)
                scores = tl.dot(c, tl.trans(b), scores, input_precision=PRECISION)
            before = (first + token)[:, None] >= (then + token)[None, :]
            fades = tl.exp(tl.where(before, passed[:, None] - reached[None, :], 0.0)) * step[None, :]
            x = _rows(fresh, row * T, then, T, all, of_x, mask_p, BT)
            out = tl.dot(tl.where(before, scores * fades, 0.0), x, out, input_precision=PRECISION)
        t = first + token
        inside = (t < T)[:, None] & mask_p[None, :]
        if D_RANK > 0:
            out += _rows(fresh, row * T, first, T, all, of_x, mask_p, BT) * skip[None, :]
        if GATE:
            gate = tl.load(z + row * su_b + t[:, None] * su_t + of_x[None, :], mask=inside, other=0.0)
            out *= _silu(gate.to(tl.float32))
        if squares is not None:
            sums = tl.sum(tl.where(inside, out * out, 0.0), 1)
            tl.store(squares + ((row * T + t) * H + head) * blocks + block, sums, mask=t < T)
        tl.store(y + (row * T + t)[:, None] * inner + of_x[None, :], out.to(y.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # the next tokens' threads read a state that others have stored


@triton.jit
def finish_block_kernel(raw, squares, u, weight, y, convolved, steps, kept, fresh, fresh_steps,
                        T, R, inner, parts, eps, C, width, H, scales, blocks, su_b, su_t,
                        SIZE: tl.constexpr, GATE: tl.constexpr, PARTS: tl.constexpr,
                        BLOCK: tl.constexpr):  # fmt: skip
    """What waits for all of a block: the first ``scales`` programs norm, the others have a block of channels of one new
    token each, and put what the states will need of it in the place of an old one's.
    """
    pid = tl.program_id(0)
    if pid < scales:
        if squares is not None:
            _scale(pid, raw, squares, u, weight, y, T, inner, parts, eps, su_b, su_t, SIZE, GATE, PARTS, BLOCK)
    else:
        line, part = ((pid - scales) // blocks).to(tl.int64), (pid - scales) % blocks
        row, token = line // T, line % T
        channel, to = part * BLOCK + tl.arange(0, BLOCK), row * R + token
        found = tl.load(fresh + line * C + channel, mask=channel < width)
        tl.store(convolved + to * width + channel, found.to(convolved.dtype.element_ty), mask=channel < width)
        found_steps = tl.load(fresh_steps + line * 2 * H + channel, mask=channel < 2 * H)
        tl.store(steps + to * 2 * H + channel, found_steps, mask=channel < 2 * H)
        if (part == 0) & (token == 0):
            tl.store(kept + row, T)


def _fake(call: BlockStep) -> Tensor:
    heads, head_dim = call.ssm_state.shape[1:3]
    return call.zxbcdt.new_empty(*call.zxbcdt.shape[:2], heads * head_dim)


@op("mamba2_block_step", fake=_fake, flops=(lambda call: flops.step(call.ssm_state, call.zxbcdt[1]),))
def mamba2_block_step(call: BlockStep) -> Tensor:
    """See :func:`mamba2_hf.ops.block_step`."""
    zxbcdt, conv_state, ssm_state, block, weights, spec = call
    u, (batch, tokens, _), device = channels_last(zxbcdt), zxbcdt.shape, zxbcdt.device
    conv_weight, conv_bias, dt_bias, A, _, D, gated_norm_weight = weights
    (_, heads, P, N), (room, channels) = ssm_state.shape, block.inputs.shape[1:]
    inner, width, norms = heads * P, block.convolved.shape[2], gated_norm_weight is not None
    bp, bt = tables.tile(P, tables.BLOCK_CHANNELS), tables.tile(tokens, tables.BLOCK_TOKENS)
    blocks, tile = cdiv(P, bp), tables.CONVOLVE_BLOCK
    pieces = cdiv(channels, tile)
    fresh = torch.empty(batch, tokens, channels, dtype=torch.float32, device=device)
    steps = torch.empty(batch, tokens, 2, heads, dtype=torch.float32, device=device)
    launch(
        convolve_block_kernel,
        (batch * (pieces + 1),),
        *(u, conv_state, block.inputs, block.kept, conv_weight.contiguous(), dense(conv_bias), dense(dt_bias)),
        *(weights.decay.contiguous(), fresh, steps, *spec.dt_limit, heads, tokens, room, channels, inner, pieces),
        *(*u.stride()[:2], *conv_state.stride()),
        LOG_RATES=A is None,
        ACTIVATION=ACTIVATIONS[spec.activation],
        K=conv_weight.shape[1],
        L=conv_state.shape[2],
        BT=bt,
        BH=power_of_two(heads),
        BLOCK=tile,
        num_warps=4,
    )
    raw = torch.empty(batch, tokens, inner, dtype=torch.float32 if norms else u.dtype, device=device)
    squares = torch.empty(batch * tokens, heads * blocks, dtype=torch.float32, device=device) if norms else None
    launch(
        block_kernel,
        (batch * heads * blocks,),
        *(u, ssm_state, block.convolved, block.steps, block.kept, fresh, steps, dense(D), raw, squares),
        *(heads, tokens, room, *u.stride()[:2], *ssm_state.stride()),
        D_RANK=0 if D is None else D.dim(),
        GATE=not norms or not spec.norm_before_gate,
        PER_GROUP=heads // spec.n_groups,
        P=P,
        N=N,
        BT=bt,
        BP=bp,
        BN=tables.tile(N, tables.BLOCK_COLUMNS),
        PRECISION=tables.precision(tables.current_chip(), torch.float32),
        num_warps=tables.BLOCK_WARPS[bt],
    )
    y, size, parts, scales, tile = raw, inner, 1, 0, tables.FINISH_BLOCK
    pieces = cdiv(max(width, 2 * heads), tile)
    if squares is not None:
        y, size = torch.empty(raw.shape, dtype=u.dtype, device=device), spec.group_size
        parts = heads * blocks // (inner // size)
        scales = batch * tokens * (inner // size) * cdiv(size, tile)
    launch(
        finish_block_kernel,
        (scales + batch * tokens * pieces,),
        *(raw, squares, u, dense(gated_norm_weight), y, block.convolved, block.steps, block.kept, fresh, steps),
        *(tokens, room, inner, parts, spec.gated_norm_eps, channels, width, heads, scales, pieces, *u.stride()[:2]),
        SIZE=size,
        GATE=norms and spec.norm_before_gate,
        PARTS=power_of_two(parts),
        BLOCK=tile,
        num_warps=4,
    )
    return y
