"""A mixer's step on Triton: the convolution's update, the state's, skip, gate and norm in two launches.

The SSM state is read and written once per call, however many tokens the call has, and stays in registers in between.
Every head recomputes the convolution of the B and C it shares with others, so the convolution's state may change only
when all of them have read it: the second launch, which the norm needs anyway, writes it. One token of many sequences
takes three launches: there the convolution of B and C, once for all heads, is worth one of its own (``advance.py``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import flops
from ..conv.kernels import _advance, _window, load_taps
from ..conv.op import ACTIVATIONS
from ..runtime import tables
from ..runtime.launch import launch
from ..runtime.op import op
from ..runtime.overlap import follow
from ..runtime.rows import channels_last, dense
from ..runtime.tables import cdiv, power_of_two, state_programs
from ..scan.prep import _silu, _step_size
from ..spec import NO_RING, Ring
from .advance import advance_rows, one_later
from .op import Step


@triton.jit
def part_multiplier(channel, inner, maps, of_z, of_x, of_b, of_c, of_dt):
    """The multiplier of channels of in_proj's output, ``inner`` of z and of x and ``maps`` of B and of C first."""
    value = tl.where(channel < inner, of_z, of_x)
    value = tl.where(channel < 2 * inner, value, of_b)
    value = tl.where(channel < 2 * inner + maps, value, of_c)
    return tl.where(channel < 2 * inner + 2 * maps, value, of_dt)


@triton.jit
def step_kernel(u, conv, state, weight, bias, dt_bias, A, D, scale, y, squares, low, high, H, T, L,
                su_b, su_t, sc_b, sc_c, sc_l, ss_b, ss_h, ss_p, ss_n,
                LOG_RATES: tl.constexpr, ACTIVATION: tl.constexpr, D_RANK: tl.constexpr, GATE: tl.constexpr,
                PER_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                BP: tl.constexpr, BN: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """All T tokens of one block of a head's channels, from the in_proj output ``u`` (z, x, B, C, dt) to ``y``.

    ``A (H,)`` holds decay rates, or with ``LOG_RATES`` the logarithms of their negatives. ``conv (B, C, L)`` is only
    read. Where a norm follows, ``squares (B T, H, blocks)`` receives the sum of squares of the block's outputs;
    ``scale (H P,)`` is multiplied to these after that.
    """
    pid = tl.program_id(0)
    blocks: tl.constexpr = (P + BP - 1) // BP
    row, head, block = (pid // blocks // H).to(tl.int64), pid // blocks % H, pid % blocks
    p, n = block * BP + tl.arange(0, BP), tl.arange(0, BN)
    mask_p, mask_n = p < P, n < N
    at = state + row * ss_b + head.to(tl.int64) * ss_h + p[:, None] * ss_p + n[None, :] * ss_n
    mask = mask_p[:, None] & mask_n[None, :]
    s = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    inner = H * P
    group, groups = head // PER_GROUP, H // PER_GROUP
    of_x, of_b = head * P + p, inner + group * N + n
    of_c = of_b + groups * N
    u += row * su_b
    conv += row * sc_b
    taps_x, bias_x = load_taps(weight, bias, of_x, mask_p, K)
    taps_b, bias_b = load_taps(weight, bias, of_b, mask_n, K)
    taps_c, bias_c = load_taps(weight, bias, of_c, mask_n, K)
    window_x = _window(conv, of_x, mask_p, u.dtype.element_ty, sc_c, sc_l, L, K)
    window_b = _window(conv, of_b, mask_n, u.dtype.element_ty, sc_c, sc_l, L, K)
    window_c = _window(conv, of_c, mask_n, u.dtype.element_ty, sc_c, sc_l, L, K)
    rate = tl.load(A + head).to(tl.float32)
    if LOG_RATES:
        rate = -tl.exp(rate)
    offset = 0.0 if dt_bias is None else tl.load(dt_bias + head).to(tl.float32)
    if D_RANK > 0:
        skip = tl.load(D + (head * P + p if D_RANK == 2 else head + p * 0), mask=mask_p, other=0.0).to(tl.float32)
    follow(OVERLAP)
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
        line = (row * T + t) * H + head
        if squares is not None:
            tl.store(squares + line * blocks + block, tl.sum(tl.where(mask_p, out * out, 0.0), 0))
        if scale is not None:
            out *= tl.load(scale + of_x, mask=mask_p, other=0.0).to(tl.float32)
        tl.store(y + line * P + p, out.to(y.dtype.element_ty), mask=mask_p)
    tl.store(at, s.to(state.dtype.element_ty), mask=mask)


@triton.jit
def _scale(pid, raw, squares, u, weight, y, T, width, parts, eps, su_b, su_t,
           SIZE: tl.constexpr, GATE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The rest of the norm for one block of one group, given the ``parts`` sums of squares of the group."""
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    groups = width // SIZE
    line, group = (pid // blocks // groups).to(tl.int64), pid // blocks % groups
    inside = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    channel, mask = group * SIZE + inside, inside < SIZE
    part = tl.arange(0, PARTS)
    total = tl.sum(tl.load(squares + (line * groups + group) * parts + part, mask=part < parts, other=0.0), 0)
    value = tl.load(raw + line * width + channel, mask=mask, other=0.0) * tl.rsqrt(total / SIZE + eps)
    if weight is not None:
        value *= tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    if GATE:
        z = tl.load(u + line // T * su_b + line % T * su_t + channel, mask=mask, other=0.0)
        value *= _silu(z.to(tl.float32))
    tl.store(y + line * width + channel, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _shift(pid, u, conv, T, width, C, su_b, su_t, sc_b, sc_c, sc_l, L: tl.constexpr, BLOCK: tl.constexpr):
    """Moves a block of channels of one row's ``conv (C, L)`` on by the T new inputs, in place."""
    blocks = tl.cdiv(C, BLOCK)
    row, channel = (pid // blocks).to(tl.int64), pid % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = channel < C
    at = conv + row * sc_b + channel * sc_c
    columns = ()
    for i in tl.static_range(L):
        new = T + i - L  # the token that column i will hold, or one from before
        kept = tl.load(at + (T + i) * sc_l, mask=channel < tl.where(new < 0, C, 0), other=0.0)
        token = u + row * su_b + new * su_t + width + channel
        value = tl.load(token, mask=channel < tl.where(new < 0, 0, C), other=0.0)
        columns = columns + (tl.where(new < 0, kept, value.to(conv.dtype.element_ty)),)
    tl.debug_barrier()  # threads store to columns that others have loaded
    for i in tl.static_range(L):
        tl.store(at + i * sc_l, columns[i], mask=inside)


@triton.jit
def finish_kernel(raw, squares, u, weight, y, conv, clock, rows, T, width, parts, eps, C, scales,
                  su_b, su_t, sc_b, sc_c, sc_l,
                  SIZE: tl.constexpr, GATE: tl.constexpr, PARTS: tl.constexpr, L: tl.constexpr,
                  BLOCK: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """What waits for all of a step: the first ``scales`` programs norm, the others move on the state ``conv`` of the
    convolution, or the ``clock (rows,)`` of a ring of ``R`` tokens.
    """
    pid = tl.program_id(0)
    if pid < scales:
        if squares is not None:
            _scale(pid, raw, squares, u, weight, y, T, width, parts, eps, su_b, su_t, SIZE, GATE, PARTS, BLOCK)
    elif clock is not None:
        row = (pid - scales) * BLOCK + tl.arange(0, BLOCK)
        tl.store(clock + row, one_later(tl.load(clock + row, mask=row < rows, other=0), R), mask=row < rows)
    elif conv is not None:
        _shift(pid - scales, u, conv, T, width, C, su_b, su_t, sc_b, sc_c, sc_l, L, BLOCK)


def _fake(call: Step) -> Tensor:
    heads, head_dim = call.ssm_state.shape[1:3]
    return call.zxbcdt.new_empty(*call.zxbcdt.shape[:2], heads * head_dim)


@op("mamba2_step", fake=_fake, flops=(lambda call: flops.step(call.ssm_state, call.zxbcdt[1]),))
def mamba2_step(call: Step) -> Tensor:
    """See :func:`mamba2_hf.ops.mamba2_step`."""
    return step(call)


def step(call: Step, ring: Ring = NO_RING) -> Tensor:
    """Launches the step; states are updated in place. A ring is for one token of each sequence."""
    zxbcdt, conv_state, ssm_state, weights, spec = call
    batch, tokens, _ = zxbcdt.shape
    u = channels_last(zxbcdt)
    if tokens == 1 and (batch > tables.MANY_ROWS or ring.clock is not None):
        u = u.contiguous()
        norms = weights.gated_norm_weight is not None
        group_size = spec.group_size if norms else ssm_state.shape[1] * ssm_state.shape[2]
        of_mixer = (conv_state, ssm_state, ring, weights, spec, group_size)
        # What is multiplied by the norm's scales later is rounded after that.
        dtype = torch.float32 if norms else u.dtype
        raw, squares = advance_rows(u[:, 0], *of_mixer, dtype, {"OVERLAP": False})
        return _finish(call, u, raw[:, None], squares, None, None, ring.clock)
    conv_weight, conv_bias, dt_bias, A, _, D, gated_norm_weight = weights
    heads, P, N = ssm_state.shape[1:]
    bp, warps = state_programs(batch, P, tokens)
    blocks = cdiv(P, bp)
    raw, squares = torch.empty(batch, tokens, heads * P, dtype=u.dtype, device=u.device), None
    if gated_norm_weight is not None:
        raw = torch.empty(raw.shape, dtype=torch.float32, device=u.device)
        squares = torch.empty(batch * tokens, heads * blocks, dtype=torch.float32, device=u.device)
    launch(
        step_kernel,
        (batch * heads * blocks,),
        *(u, conv_state, ssm_state, conv_weight.contiguous(), dense(conv_bias), dense(dt_bias)),
        *(weights.decay.contiguous(), dense(D), None, raw, squares, *spec.dt_limit, heads, tokens),
        *(conv_state.shape[2], *u.stride()[:2], *conv_state.stride(), *ssm_state.stride()),
        LOG_RATES=A is None,
        ACTIVATION=ACTIVATIONS[spec.activation],
        D_RANK=0 if D is None else D.dim(),
        GATE=gated_norm_weight is None or not spec.norm_before_gate,
        PER_GROUP=heads // spec.n_groups,
        P=P,
        N=N,
        K=conv_weight.shape[1],
        BP=bp,
        BN=power_of_two(N),
        OVERLAP=False,
        num_warps=warps,
    )
    return _finish(call, u, raw, squares, dense(gated_norm_weight), conv_state, None)


def _finish(
    call: Step,
    u: Tensor,
    raw: Tensor,
    squares: Tensor | None,
    weight: Tensor | None,
    conv_state: Tensor | None,
    clock: Tensor | None,
) -> Tensor:
    """The rest of a step: the norm of ``raw (B, T, H P)``, times a weight if it was not multiplied yet, and what moves
    on when all have read it.
    """
    (batch, tokens, width), spec = raw.shape, call.spec
    channels, block = call.conv_state.shape[1], tables.FINISH_BLOCK
    size = width if squares is None else spec.group_size
    scales, y = 0, raw
    if squares is not None:
        y = torch.empty(raw.shape, dtype=u.dtype, device=u.device)
        scales = batch * tokens * (width // size) * cdiv(size, block)
    parts = 1 if squares is None else squares.numel() // (batch * tokens * (width // size))
    more = 0 if conv_state is None else batch * cdiv(channels, block)
    more += 0 if clock is None else cdiv(batch, block)
    if scales + more:
        launch(
            finish_kernel,
            (scales + more,),
            *(raw, squares, u, weight, y, conv_state, clock, batch, tokens, width, parts, spec.gated_norm_eps),
            *(channels, scales, *u.stride()[:2], *call.conv_state.stride()),
            SIZE=size,
            GATE=weight is not None and spec.norm_before_gate,
            PARTS=power_of_two(parts),
            L=call.conv_state.shape[2],
            BLOCK=block,
            R=tables.RING,
        )
    return y
