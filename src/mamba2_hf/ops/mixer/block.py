"""A block of tokens of which each sequence may take some back, on Triton: one pass over the states.

The states lie as of before the last block. A program folds in the tokens of that block that its row has kept, stores
the state, and runs the new tokens through it without storing: should some of them go, nothing has to be undone. What
the states depend on of the new tokens (x, B, step sizes, inputs of the convolution) is a few percent of a state. The
second launch writes it to where the last block's was, when all programs have read that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import flops
from ..conv.kernels import _advance, _when, load_taps
from ..conv.op import ACTIVATIONS
from ..runtime import tables
from ..runtime.launch import launch
from ..runtime.op import op
from ..runtime.rows import channels_last, dense
from ..runtime.tables import cdiv, power_of_two, state_programs
from ..scan.prep import _silu, _step_size
from ..spec import compute_dtype
from .op import BlockStep
from .step import _scale


@triton.jit
def _column(conv, inputs, i, channel, mask, sc_c, sc_l, L, C, dtype):
    """Column ``i`` of the convolution's state ``conv (C, L)`` and the inputs ``(R, C)`` behind it, in ``dtype``."""
    before = tl.load(conv + channel * sc_c + i * sc_l, mask=_when(i < L, mask), other=0.0).to(dtype)
    behind = tl.load(inputs + (i - L) * C + channel, mask=_when(i >= L, mask), other=0.0).to(dtype)
    return tl.where(i < L, before, behind)


@triton.jit
def _window(conv, inputs, kept, channel, mask, sc_c, sc_l, L, C, dtype, K: tl.constexpr):
    """The K - 1 inputs before the new tokens, oldest first, rounded to the dtype of those."""
    window = ()
    for i in tl.static_range(K - 1):
        value = _column(conv, inputs, kept + L - (K - 1) + i, channel, mask, sc_c, sc_l, L, C, dtype)
        window = window + (value.to(tl.float32),)
    return window


@triton.jit
def block_kernel(u, conv, state, inputs, convolved, steps, kept, weight, bias, dt_bias, A, D, y, squares,
                 new_convolved, new_steps, were_kept, low, high, H, T, R, L,
                 su_b, su_t, sc_b, sc_c, sc_l, ss_b, ss_h, ss_p, ss_n,
                 LOG_RATES: tl.constexpr, ACTIVATION: tl.constexpr, D_RANK: tl.constexpr, GATE: tl.constexpr,
                 PER_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                 BP: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """One block of a head's channels of one row: folds the tokens that are ``kept (rows,)`` of ``R`` old ones, and runs
    ``T`` new ones, from the in_proj output ``u`` to ``y``; arguments as in ``step_kernel``.

    ``convolved (rows, R, H P + G N)``, ``steps (rows, R, 2, H)`` and ``inputs (rows, R, C)`` are of the old tokens.
    ``new_convolved (rows, T, .)`` and ``new_steps (rows, T, ..)`` receive those of the new ones, and ``were_kept
    (rows,)`` what ``kept`` says.
    """
    pid = tl.program_id(0)
    blocks: tl.constexpr = (P + BP - 1) // BP
    row, head, block = (pid // blocks // H).to(tl.int64), pid // blocks % H, pid % blocks
    p, n = block * BP + tl.arange(0, BP), tl.arange(0, BN)
    mask_p, mask_n = p < P, n < N
    at = state + row * ss_b + head.to(tl.int64) * ss_h + p[:, None] * ss_p + n[None, :] * ss_n
    mask = mask_p[:, None] & mask_n[None, :]
    old = tl.load(kept + row)
    s = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    inner = H * P
    group, groups = head // PER_GROUP, H // PER_GROUP
    channels, width = inner + 2 * groups * N, inner + groups * N
    of_x, of_b = head * P + p, inner + group * N + n
    of_c = of_b + groups * N
    u += row * su_b
    conv += row * sc_b
    inputs += row * R * channels
    for t in range(0, old):
        line = row * R + t
        decay = tl.load(steps + line * 2 * H + head)
        step = tl.load(steps + line * 2 * H + H + head)
        x = tl.load(convolved + line * width + of_x, mask=mask_p, other=0.0).to(tl.float32)
        b = tl.load(convolved + line * width + of_b, mask=mask_n, other=0.0).to(tl.float32)
        s = s * tl.exp(decay) + (x * step)[:, None] * b[None, :]
    s = s.to(state.dtype.element_ty)
    tl.store(at, s, mask=mask)
    s = s.to(tl.float32)
    dtype: tl.constexpr = u.dtype.element_ty
    taps_x, bias_x = load_taps(weight, bias, of_x, mask_p, K)
    taps_b, bias_b = load_taps(weight, bias, of_b, mask_n, K)
    taps_c, bias_c = load_taps(weight, bias, of_c, mask_n, K)
    window_x = _window(conv, inputs, old, of_x, mask_p, sc_c, sc_l, L, channels, dtype, K)
    window_b = _window(conv, inputs, old, of_b, mask_n, sc_c, sc_l, L, channels, dtype, K)
    window_c = _window(conv, inputs, old, of_c, mask_n, sc_c, sc_l, L, channels, dtype, K)
    rate = tl.load(A + head).to(tl.float32)
    if LOG_RATES:
        rate = -tl.exp(rate)
    offset = 0.0 if dt_bias is None else tl.load(dt_bias + head).to(tl.float32)
    if D_RANK > 0:
        skip = tl.load(D + (head * P + p if D_RANK == 2 else head + p * 0), mask=mask_p, other=0.0).to(tl.float32)
    if (head == 0) & (block == 0):
        tl.store(were_kept + row, old)
    for t in range(0, T):
        token = u + t * su_t
        new_x = tl.load(token + inner + of_x, mask=mask_p, other=0.0).to(tl.float32)
        new_b = tl.load(token + inner + of_b, mask=mask_n, other=0.0).to(tl.float32)
        new_c = tl.load(token + inner + of_c, mask=mask_n, other=0.0).to(tl.float32)
        dt = tl.load(token + 2 * inner + 2 * groups * N + head)
        x, window_x = _advance(window_x, new_x, taps_x, bias_x, ACTIVATION, K)
        b, window_b = _advance(window_b, new_b, taps_b, bias_b, ACTIVATION, K)
        c, window_c = _advance(window_c, new_c, taps_c, bias_c, ACTIVATION, K)
        step = _step_size(dt, offset, low, high, True)
        s = s * tl.exp(step * rate) + (x * step)[:, None] * b[None, :]
        out = tl.sum(s * c[None, :], 1)
        if D_RANK > 0:
            out += x * skip
        if GATE:
            out *= _silu(tl.load(token + of_x, mask=mask_p, other=0.0).to(tl.float32))
        line = row * T + t
        if squares is not None:
            tl.store(squares + (line * H + head) * blocks + block, tl.sum(tl.where(mask_p, out * out, 0.0), 0))
        tl.store(y + line * inner + of_x, out.to(y.dtype.element_ty), mask=mask_p)
        tl.store(new_convolved + line * width + of_x, x.to(dtype), mask=mask_p)
        if block == 0:
            tl.store(new_steps + line * 2 * H + head, step * rate)
            tl.store(new_steps + line * 2 * H + H + head, step)
            if head % PER_GROUP == 0:
                tl.store(new_convolved + line * width + of_b, b.to(dtype), mask=mask_n)


@triton.jit
def finish_block_kernel(raw, squares, u, weight, y, conv, inputs, convolved, steps, kept, new_convolved, new_steps,
                        were_kept, T, R, inner, parts, eps, C, width, H, scales, blocks, su_b, su_t, sc_b, sc_c, sc_l,
                        SIZE: tl.constexpr, GATE: tl.constexpr, PARTS: tl.constexpr, L: tl.constexpr,
                        BLOCK: tl.constexpr):  # fmt: skip
    """What waits for all of a block: the first ``scales`` programs norm, the others have a block of channels of one row
    each. They move the state ``conv (rows, C, L)`` of the convolution on by the old tokens that were kept, and put the
    new tokens in their place.
    """
    pid = tl.program_id(0)
    if pid < scales:
        if squares is not None:
            _scale(pid, raw, squares, u, weight, y, T, inner, parts, eps, su_b, su_t, SIZE, GATE, PARTS, BLOCK)
    else:
        row, part = ((pid - scales) // blocks).to(tl.int64), (pid - scales) % blocks
        channel = part * BLOCK + tl.arange(0, BLOCK)
        mask = channel < C
        old = tl.load(were_kept + row)
        conv += row * sc_b
        inputs += row * R * C
        columns = ()
        for i in tl.static_range(L):
            columns = columns + (
                _column(conv, inputs, old + i, channel, mask, sc_c, sc_l, L, C, conv.dtype.element_ty),
            )
        tl.debug_barrier()  # threads store to columns that others have loaded
        for i in tl.static_range(L):
            tl.store(conv + channel * sc_c + i * sc_l, columns[i], mask=mask)
        for t in range(0, T):
            tl.store(
                inputs + t * C + channel, tl.load(u + row * su_b + t * su_t + inner + channel, mask=mask), mask=mask
            )
            now, then = row * T + t, row * R + t
            found = tl.load(new_convolved + now * width + channel, mask=channel < width)
            tl.store(convolved + then * width + channel, found, mask=channel < width)
            found_steps = tl.load(new_steps + now * 2 * H + channel, mask=channel < 2 * H)
            tl.store(steps + then * 2 * H + channel, found_steps, mask=channel < 2 * H)
        if part == 0:
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
    bp, warps = state_programs(batch, P, tokens)
    blocks = cdiv(P, bp)
    raw = torch.empty(batch, tokens, inner, dtype=torch.float32 if norms else u.dtype, device=device)
    squares = torch.empty(batch * tokens, heads * blocks, dtype=torch.float32, device=device) if norms else None
    fresh = torch.empty(batch, tokens, width, dtype=u.dtype, device=device)
    steps = torch.empty(batch, tokens, 2, heads, dtype=compute_dtype(u.dtype), device=device)
    were_kept = torch.empty(batch, dtype=torch.int32, device=device)
    launch(
        block_kernel,
        (batch * heads * blocks,),
        *(u, conv_state, ssm_state, block.inputs, block.convolved, block.steps, block.kept),
        *(conv_weight.contiguous(), dense(conv_bias), dense(dt_bias), weights.decay.contiguous(), dense(D)),
        *(raw, squares, fresh, steps, were_kept, *spec.dt_limit, heads, tokens, room, conv_state.shape[2]),
        *(*u.stride()[:2], *conv_state.stride(), *ssm_state.stride()),
        LOG_RATES=A is None,
        ACTIVATION=ACTIVATIONS[spec.activation],
        D_RANK=0 if D is None else D.dim(),
        GATE=not norms or not spec.norm_before_gate,
        PER_GROUP=heads // spec.n_groups,
        P=P,
        N=N,
        K=conv_weight.shape[1],
        BP=bp,
        BN=power_of_two(N),
        num_warps=warps,
    )
    y, size, parts, scales, tile = raw, inner, 1, 0, tables.FINISH_BLOCK
    pieces = cdiv(max(channels, 2 * heads), tile)
    if squares is not None:
        y, size = torch.empty(raw.shape, dtype=u.dtype, device=device), spec.group_size
        parts = heads * blocks // (inner // size)
        scales = batch * tokens * (inner // size) * cdiv(size, tile)
    launch(
        finish_block_kernel,
        (scales + batch * pieces,),
        *(raw, squares, u, dense(gated_norm_weight), y, conv_state),
        *(block.inputs, block.convolved, block.steps, block.kept, fresh, steps, were_kept),
        *(tokens, room, inner, parts, spec.gated_norm_eps, channels, width, heads, scales, pieces),
        *(*u.stride()[:2], *conv_state.stride()),
        SIZE=size,
        GATE=norms and spec.norm_before_gate,
        PARTS=power_of_two(parts),
        L=conv_state.shape[2],
        BLOCK=tile,
        num_warps=4,
    )
    return y
