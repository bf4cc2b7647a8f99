"""Decoding a whole layer for one sequence: norm and in_proj, the mixer's step, gated norm, out_proj and residual.

With one row a layer is a matter of reading its weights once. A norm's scale is one number per row, so it may be
multiplied to the sums of a projection whose inputs it belongs to: every program of a projection sums the squares that
it needs itself, and nobody waits for a norm.

A wide layer takes three launches. A narrow one, whose launches are short, takes two: programs of a head project its
channels and move its states on. B and C belong to many heads; the programs with the lowest numbers, which a GPU starts
first, project and convolve them, and the others wait for those when they need them. Where programs take several turns,
that wait and the longer way from weights to results cost more than the launch.

Launches overlap (``overlap.py``): before it waits for the one before, a kernel reads its weights. Several sequences are
for ``rows.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..conv.kernels import columns_of, convolve_columns, load_taps, move_columns
from ..conv.op import ACTIVATIONS
from ..runtime import tables
from ..runtime.launch import launch
from ..runtime.overlap import follow, overlap
from ..runtime.peers import constants, send, sum_number, total
from ..runtime.rows import channels_last, dense
from ..runtime.tables import cdiv, power_of_two, state_programs
from ..scan.prep import _silu, _step_size
from ..spec import Linear, Peers
from .op import LayerStep
from .step import _shift, part_multiplier, step_kernel


@triton.jit
def _weight_tiles(weight, n, mask_n, WIDTH: tl.constexpr, BK: tl.constexpr):
    """Some rows of a weight ``(outputs, WIDTH)``, in tiles of ``BK`` columns."""
    tiles = ()
    for i in tl.static_range((WIDTH + BK - 1) // BK):
        k = i * BK + tl.arange(0, BK)
        at = weight + n.to(tl.int64)[:, None] * WIDTH + k[None, :]
        mask = mask_n[:, None] & (k < WIDTH)[None, :]
        tiles = tiles + (tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first"),)
    return tiles


@triton.jit
def _normed_tiles(x, norm_weight, eps, WIDTH: tl.constexpr, BK: tl.constexpr):
    """``x (WIDTH,)`` times the norm's weight, in tiles of ``BK``, and the norm's scale."""
    tiles = ()
    squares = tl.zeros([BK], tl.float32)
    for i in tl.static_range((WIDTH + BK - 1) // BK):
        k = i * BK + tl.arange(0, BK)
        value = tl.load(x + k, mask=k < WIDTH, other=0.0).to(tl.float32)
        squares += value * value
        tiles = tiles + (value * tl.load(norm_weight + k, mask=k < WIDTH, other=0.0).to(tl.float32),)
    return tiles, tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)


@triton.jit
def _project(weights, inputs, scale, bias, n, mask_n, dtype, WIDTH: tl.constexpr, BK: tl.constexpr):
    """Outputs ``n`` of the projection times ``scale``, rounded to ``dtype``, fp32."""
    sums = weights[0].to(tl.float32) * inputs[0][None, :]
    for i in tl.static_range(1, (WIDTH + BK - 1) // BK):
        sums += weights[i].to(tl.float32) * inputs[i][None, :]
    out = tl.sum(sums, 1) * scale
    if bias is not None:
        out += tl.load(bias + n, mask=mask_n, other=0.0).to(tl.float32)
    return out.to(dtype).to(tl.float32)


@triton.jit
def enter_kernel(x, norm_weight, weight, bias, y, outputs, inner, maps, of_z, of_x, of_b, of_c, of_dt, eps,
                 SCALED: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 OVERLAP: tl.constexpr):  # fmt: skip
    """``BN`` outputs of the projection of ``norm(x)``, ``x (D,)``; with ``SCALED`` times the multipliers of its parts,
    ``inner`` of z and of x and ``maps`` of B and of C first.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    mask_n = n < outputs
    weights = _weight_tiles(weight, n, mask_n, D, BK)
    follow(OVERLAP)
    inputs, scale = _normed_tiles(x, norm_weight, eps, D, BK)
    if SCALED:
        scale *= part_multiplier(n, inner, maps, of_z, of_x, of_b, of_c, of_dt)
    out = _project(weights, inputs, scale, bias, n, mask_n, y.dtype.element_ty, D, BK)
    tl.store(y + n, out.to(y.dtype.element_ty), mask=mask_n)


@triton.jit
def _enter_maps(pid, x, norm_weight, weight, bias, conv, taps, offset, maps, ready, inner, count, of_b, of_c, eps,
                sc_c, sc_l, SCALED: tl.constexpr, ACTIVATION: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr,
                L: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """``BO`` of the ``count`` channels of B and C, convolved, to ``maps (count,)``."""
    j = pid * BO + tl.arange(0, BO)
    mask, channel = j < count, inner + j
    weights = _weight_tiles(weight, inner + channel, mask, WIDTH, BK)
    columns = columns_of(conv, channel, mask, sc_c, sc_l, L)
    taps, offset = load_taps(taps, offset, channel, mask, K)
    follow(OVERLAP)
    inputs, scale = _normed_tiles(x, norm_weight, eps, WIDTH, BK)
    if SCALED:
        scale *= tl.where(2 * j < count, of_b, of_c)
    dtype: tl.constexpr = weight.dtype.element_ty
    new = _project(weights, inputs, scale, bias, inner + channel, mask, dtype, WIDTH, BK)
    tl.store(maps + j, convolve_columns(columns, new, taps, offset, dtype, ACTIVATION, L, K), mask=mask)
    tl.debug_barrier()
    tl.atomic_add(ready, 1, sem="release")
    move_columns(conv, columns, new, channel, mask, sc_c, sc_l, L)


@triton.jit
def enter_step_kernel(x, norm_weight, weight, bias, conv, state, taps, offset, dt_bias, A, D, scale, maps, ready, gate,
                      raw, squares, of_z, of_x, of_b, of_c, of_dt, eps, low, high, H, shared, sc_c, sc_l,
                      ss_h, ss_p, ss_n, SCALED: tl.constexpr, ACTIVATION: tl.constexpr, D_RANK: tl.constexpr,
                      PER_GROUP: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                      K: tl.constexpr, L: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr,
                      BK: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """From the residual stream ``x (WIDTH,)`` to the mixer's output before its norm.

    The first ``shared`` programs make B and C, each of the others ``BP`` channels of a head: ``raw (H P,)`` times the
    norm's weight ``scale``, the parts ``squares (H, blocks)`` of the sums of squares, both None without a norm, and
    ``gate (H P,)`` where that comes after the norm. ``ready`` counts the programs that are done with B and C; it begins
    at zero. With ``SCALED`` z, x, B, C and dt are taken times their multipliers.
    """
    pid = tl.program_id(0)
    inner, groups = H * P, H // PER_GROUP
    if pid < shared:
        _enter_maps(pid, x, norm_weight, weight, bias, conv, taps, offset, maps, ready, inner, 2 * groups * N,
                    of_b, of_c, eps, sc_c, sc_l, SCALED, ACTIVATION, WIDTH, K, L, BO, BK, OVERLAP)  # fmt: skip
        return
    blocks: tl.constexpr = (P + BP - 1) // BP
    head, block = (pid - shared) // blocks, (pid - shared) % blocks
    p, n = block * BP + tl.arange(0, BP), tl.arange(0, BN)
    mask_p, mask_n = p < P, n < N
    channel, channel_dt = head * P + p, 2 * inner + 2 * groups * N + head + tl.arange(0, 1)
    always = channel_dt >= 0
    weights_x = _weight_tiles(weight, inner + channel, mask_p, WIDTH, BK)
    weights_z = _weight_tiles(weight, channel, mask_p, WIDTH, BK)
    weights_dt = _weight_tiles(weight, channel_dt, always, WIDTH, BK)
    at = state + head.to(tl.int64) * ss_h + p[:, None] * ss_p + n[None, :] * ss_n
    mask = mask_p[:, None] & mask_n[None, :]
    s = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    columns = columns_of(conv, channel, mask_p, sc_c, sc_l, L)
    taps, offset = load_taps(taps, offset, channel, mask_p, K)
    rate = -tl.exp(tl.load(A + head).to(tl.float32))
    dt_offset = 0.0 if dt_bias is None else tl.load(dt_bias + head).to(tl.float32)
    if D_RANK > 0:
        skip = tl.load(D + (channel if D_RANK == 2 else head + p * 0), mask=mask_p, other=0.0).to(tl.float32)
    if scale is not None:
        weight_of_norm = tl.load(scale + channel, mask=mask_p, other=0.0).to(tl.float32)

    follow(OVERLAP)
    inputs, normed = _normed_tiles(x, norm_weight, eps, WIDTH, BK)
    normed_x, normed_z, normed_dt = normed, normed, normed
    if SCALED:
        normed_x, normed_z, normed_dt = normed * of_x, normed * of_z, normed * of_dt
    dtype: tl.constexpr = weight.dtype.element_ty
    new = _project(weights_x, inputs, normed_x, bias, inner + channel, mask_p, dtype, WIDTH, BK)
    z = _project(weights_z, inputs, normed_z, bias, channel, mask_p, dtype, WIDTH, BK)
    dt = tl.sum(_project(weights_dt, inputs, normed_dt, bias, channel_dt, always, dtype, WIDTH, BK), 0)
    value = convolve_columns(columns, new, taps, offset, dtype, ACTIVATION, L, K)
    step = _step_size(dt, dt_offset, low, high, True)
    seen = tl.atomic_add(ready, 0, sem="acquire")
    while seen < shared:
        seen = tl.atomic_add(ready, 0, sem="acquire")
    of_b = head // PER_GROUP * N + n
    b = tl.load(maps + of_b, mask=mask_n, other=0.0, cache_modifier=".cg")
    c = tl.load(maps + groups * N + of_b, mask=mask_n, other=0.0, cache_modifier=".cg")
    s = s * tl.exp(step * rate) + (value * step)[:, None] * b[None, :]
    out = tl.sum(s * c[None, :], 1)
    if D_RANK > 0:
        out += value * skip
    if gate is None:
        out *= _silu(z)
    else:
        tl.store(gate + channel, z.to(dtype), mask=mask_p)
    if scale is not None:
        tl.store(squares + head * blocks + block, tl.sum(tl.where(mask_p, out * out, 0.0), 0))
        out *= weight_of_norm
    tl.store(raw + channel, out.to(raw.dtype.element_ty), mask=mask_p)
    tl.store(at, s.to(state.dtype.element_ty), mask=mask)
    tl.debug_barrier()
    move_columns(conv, columns, new, channel, mask_p, sc_c, sc_l, L)


@triton.jit
def _leave(pid, programs, raw, squares, gate, weight, bias, x, y, ready, peers, outputs, eps, factor, joint_size,
           WIDTH: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, GATE: tl.constexpr, BN: tl.constexpr,
           BK: tl.constexpr, PADDED: tl.constexpr, JOINT: tl.constexpr, PLACE: tl.constexpr, PLACES: tl.constexpr,
           WORDS: tl.constexpr, CLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    n = pid * BN + tl.arange(0, BN)
    mask_n = n < outputs
    weights = _weight_tiles(weight, n, mask_n, WIDTH, BK)
    offset = 0.0 if bias is None else tl.load(bias + n, mask=mask_n, other=0.0).to(tl.float32) * factor
    if x is not None:
        offset += tl.load(x + n, mask=mask_n, other=0.0).to(tl.float32)
    follow(OVERLAP)
    if peers is not None:
        number = sum_number(peers, pid, programs)
    if ready is not None and pid == 0:
        tl.store(ready, 0)
    groups: tl.constexpr = WIDTH // SIZE if squares is not None else 0
    part = tl.arange(0, PADDED)
    scales = ()
    for group in tl.static_range(groups):
        found = tl.load(squares + group * PARTS + part, mask=part < PARTS, other=0.0)
        if JOINT:
            scale = 1.0
            own = tl.sum(found, 0) + tl.zeros([1], tl.float32)
            first = tl.arange(0, 1) == pid
            behind = outputs + tl.arange(0, 1)
            if peers is not None:
                send(peers, number, behind, own, first, PLACE, PLACES, WORDS)
            else:
                tl.store(y + behind, own.to(y.dtype.element_ty), mask=first)
        else:
            scale = tl.rsqrt(tl.sum(found, 0) / SIZE + eps)
        scales = scales + (scale,)
    sums = tl.zeros([BN, BK], tl.float32)
    for i in tl.static_range((WIDTH + BK - 1) // BK):
        k = i * BK + tl.arange(0, BK)
        value = tl.load(raw + k, mask=k < WIDTH, other=0.0).to(tl.float32)
        if GATE:
            value *= _silu(tl.load(gate + k, mask=k < WIDTH, other=0.0).to(tl.float32))
        if groups > 1:
            for group in tl.static_range(groups):
                value *= tl.where(k // SIZE == group, scales[group], 1.0)
        sums += weights[i].to(tl.float32) * value[None, :]
    out = tl.sum(sums, 1)
    if groups == 1:
        out *= scale
    if peers is None:
        tl.store(y + n, (out * factor + offset).to(y.dtype.element_ty), mask=mask_n)
    else:
        out *= factor
        send(peers, number, n, out, mask_n, PLACE, PLACES, WORDS)
        out = total(peers, number, n, out, mask_n, PLACE, PLACES, WORDS, CLOCK)
        if JOINT:
            every = total(peers, number, behind, own, behind == outputs, PLACE, PLACES, WORDS, CLOCK)
            out *= tl.rsqrt(tl.sum(every, 0) / joint_size + eps)
        tl.store(y + n, (out + offset).to(y.dtype.element_ty), mask=mask_n)


@triton.jit
def leave_kernel(raw, squares, u, weight, bias, x, y, conv, ready, peers, outputs, programs, channels, eps, factor,
                 joint_size, sc_b, sc_c, sc_l,
                 WIDTH: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, GATE: tl.constexpr,
                 BN: tl.constexpr, BK: tl.constexpr, PADDED: tl.constexpr, JOINT: tl.constexpr, L: tl.constexpr,
                 BLOCK: tl.constexpr, PLACE: tl.constexpr, PLACES: tl.constexpr, WORDS: tl.constexpr,
                 CLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """What waits for all of the mixer's step: the first ``programs`` give ``BN`` outputs each of ``x`` plus ``factor``
    times the projection of ``raw (WIDTH,)`` times the scales of its norm, others move the convolution's state on.

    Without ``x`` nothing is added. With ``peers`` the projections are added up over devices. With ``JOINT`` the norm's
    one group of ``joint_size`` goes on in them, and so the scale comes after the sum; without ``peers`` it is left
    out, and the sum of squares is stored behind the outputs.

    ``squares (groups, PARTS)`` are the parts of the sums of squares that the scales come from (None without a norm),
    ``u`` begins with
    the gate, where that comes after the norm. ``ready``, if given, goes back to zero.
    """
    pid = tl.program_id(0)
    if pid < programs:
        _leave(pid, programs, raw, squares, u, weight, bias, x, y, ready, peers, outputs, eps, factor, joint_size,
               WIDTH, SIZE, PARTS, GATE, BN, BK, PADDED, JOINT, PLACE, PLACES, WORDS, CLOCK, OVERLAP)  # fmt: skip
    elif ready is None:
        follow(OVERLAP)
        _shift(pid - programs, u, conv, 1, WIDTH, channels, 0, 0, sc_b, sc_c, sc_l, L, BLOCK)


def one_row_step(call: LayerStep) -> Tensor:
    """Launches the layer for ``stream (1, 1, d)``; both states are updated in place."""
    stream, conv_state, ssm_state, (norm_weight, into, mixer_weights, out), spec, ready, residual, peers, _, part = call
    in_weight, in_bias, *_ = into
    out_weight, out_bias, *_ = out
    conv_weight, conv_bias, dt_bias, _, _, D, gated_norm_weight = mixer_weights
    A_log, limits, norm_eps = mixer_weights.decay, spec.dt_limit, spec.norm_eps
    peers = Peers() if part else peers
    n_groups, group_size, norm_before_gate = spec.n_groups, min(spec.group_size, call.width), spec.norm_before_gate
    size = stream.shape[2]
    heads, P, N = ssm_state.shape[1:]
    channels, taps = conv_weight.shape
    width, entering, dtype, device = heads * P, in_weight.shape[0], in_weight.dtype, stream.device
    stream, options, narrow = channels_last(stream), overlap(), size <= tables.NARROW_LAYER
    bp, warps = (min(tables.NARROW_CHANNELS, power_of_two(P)), tables.NARROW_WARPS) if narrow else state_programs(1, P)
    blocks = cdiv(P, bp)
    raw = torch.empty(width, dtype=dtype, device=device)
    squares = None
    if gated_norm_weight is not None:
        squares = torch.empty(heads * blocks, dtype=torch.float32, device=device)
    gate_first = squares is None or not norm_before_gate
    multipliers = spec.entering or (1.0,) * 5
    before = (stream, norm_weight.contiguous(), in_weight.contiguous(), dense(in_bias))
    conv = (conv_weight.contiguous(), dense(conv_bias))
    per_head = (dense(dt_bias), A_log.contiguous(), dense(D))
    mixer = {
        "ACTIVATION": ACTIVATIONS[spec.activation],
        "D_RANK": 0 if D is None else D.dim(),
        "PER_GROUP": heads // n_groups,
        "P": P,
        "N": N,
        "K": taps,
        "BP": bp,
        "BN": power_of_two(N),
        "num_warps": warps,
    }
    if narrow:
        ready = torch.zeros(1, dtype=torch.int32, device=device) if ready is None else ready
        shared = cdiv(2 * n_groups * N, tables.OUTPUTS)
        maps = torch.empty(2 * n_groups * N, dtype=torch.float32, device=device)
        u = None if gate_first else torch.empty(width, dtype=dtype, device=device)
        launch(
            enter_step_kernel,
            (shared + heads * blocks,),
            *(*before, conv_state, ssm_state, *conv, *per_head, dense(gated_norm_weight), maps, ready, u),
            *(raw, squares, *multipliers, norm_eps, *limits, heads, shared),
            *(*conv_state.stride()[1:], *ssm_state.stride()[1:]),
            SCALED=bool(spec.entering),
            WIDTH=size,
            L=conv_state.shape[2],
            BO=tables.OUTPUTS,
            BK=tables.narrow_tile(size),
            **mixer,
            **options,
        )
    else:
        ready = None
        u = torch.empty(1, 1, entering, dtype=dtype, device=device)
        outputs, inputs, warps = tables.projection(size)
        launch(
            enter_kernel,
            (cdiv(entering, outputs),),
            *(*before, u, entering, width, n_groups * N, *multipliers, norm_eps),
            SCALED=bool(spec.entering),
            D=size,
            BN=outputs,
            BK=inputs,
            num_warps=warps,
            **options,
        )
        launch(
            step_kernel,
            (heads * blocks,),
            *(u, conv_state, ssm_state, *conv, *per_head, dense(gated_norm_weight), raw, squares),
            *(*limits, heads, 1, conv_state.shape[2], *u.stride()[:2], *conv_state.stride(), *ssm_state.stride()),
            LOG_RATES=True,
            GATE=gate_first,
            **mixer,
            **options,
        )

    kind, residual = (torch.float32, None) if part else (stream.dtype, stream if residual is None else residual)
    y = torch.empty(1, 1, size + (part and call.is_joint), dtype=kind, device=device)
    outputs, inputs, warps = tables.projection(width)
    programs, parts = cdiv(size, outputs), group_size // P * blocks
    launch(
        leave_kernel,
        (programs + (0 if narrow else cdiv(channels, tables.SHIFT_BLOCK)),),
        *(raw, squares, u, out_weight.contiguous(), None if part else dense(out_bias)),
        *(None if residual is None else channels_last(residual), y, conv_state, ready, peers.table),
        *(size, programs, channels, spec.gated_norm_eps, spec.output_multiplier, spec.group_size),
        *conv_state.stride(),
        WIDTH=width,
        SIZE=group_size,
        PARTS=parts,
        GATE=not gate_first,
        BN=outputs,
        BK=inputs,
        PADDED=power_of_two(parts),
        JOINT=call.is_joint,
        L=conv_state.shape[2],
        BLOCK=tables.SHIFT_BLOCK,
        num_warps=warps,
        **constants(peers),
        **options,
    )
    return y


@triton.jit
def project_back_kernel(h, weight, bias, x, y, peers, outputs, factor,
                        WIDTH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PLACE: tl.constexpr,
                        PLACES: tl.constexpr, WORDS: tl.constexpr, CLOCK: tl.constexpr,
                        OVERLAP: tl.constexpr):  # fmt: skip
    """``BN`` channels of ``x`` plus ``factor`` times the projection of ``h (WIDTH,)``, as :func:`leave_kernel`."""
    _leave(tl.program_id(0), tl.num_programs(0), h, None, None, weight, bias, x, y, None, peers, outputs, 0.0, factor,
           0, WIDTH, WIDTH, 1, False, BN, BK, 1, False, PLACE, PLACES, WORDS, CLOCK, OVERLAP)  # fmt: skip


def project_back(h: Tensor, down: Linear, residual: Tensor | None, factor: float, peers: Peers) -> Tensor:
    """``residual (1, 1, d)`` plus ``factor`` times the projection of a dense ``h (I,)``, added up over ``peers``;
    without a residual that of this device's ``h`` alone, fp32, without the bias.
    """
    size, width = down.weight.shape
    if residual is None:
        peers, down = Peers(), down._replace(bias=None)
    dtype = torch.float32 if residual is None else residual.dtype
    y = torch.empty(1, 1, size, dtype=dtype, device=h.device)
    outputs, inputs, warps = tables.projection(width)
    launch(
        project_back_kernel,
        (cdiv(size, outputs),),
        *(h, down.weight.contiguous(), dense(down.bias), None if residual is None else channels_last(residual), y),
        *(peers.table, size, factor),
        WIDTH=width,
        BN=outputs,
        BK=inputs,
        num_warps=warps,
        **constants(peers),
        **overlap(),
    )
    return y
