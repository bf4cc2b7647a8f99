"""Decoding a whole layer for one sequence: norm and in_proj, the mixer's step, gated norm, out_proj and residual.

With one row a layer is a matter of reading its weights once. Three launches do it: a norm's scale is one number per
row, so it may be multiplied to the sums of a projection whose inputs it belongs to. Every program of a projection sums
the squares that it needs itself; nobody waits for a norm.

The launches overlap (``overlap.py``): before it waits for the one before, a kernel reads its weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import SSDShape
from .calls import call
from .decode import _dense, _shift, _silu, _tile, step_kernel, supports_step
from .launch import cdiv, launch, power_of_two
from .overlap import follow, overlap
from .rows import channels_last

OUTPUTS = 4  # of a program of a projection
PER_THREAD = 8  # neighboring weights of an output that a thread reads: 16 bytes
MOST_WEIGHTS = 160  # that a thread keeps
SHIFT_BLOCK = 1024  # channels of a program that moves the convolution's state


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
def enter_kernel(x, norm_weight, weight, bias, y, outputs, eps,
                 D: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """``BN`` outputs of the projection of ``norm(x)``, ``x (D,)``."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    mask_n = n < outputs
    tiles = _weight_tiles(weight, n, mask_n, D, BK)
    offset = 0.0 if bias is None else tl.load(bias + n, mask=mask_n, other=0.0).to(tl.float32)
    follow(OVERLAP)
    sums = tl.zeros([BN, BK], tl.float32)
    squares = tl.zeros([BK], tl.float32)
    for i in tl.static_range((D + BK - 1) // BK):
        k = i * BK + tl.arange(0, BK)
        value = tl.load(x + k, mask=k < D, other=0.0).to(tl.float32)
        scaled = value * tl.load(norm_weight + k, mask=k < D, other=0.0).to(tl.float32)
        squares += value * value
        sums += tiles[i].to(tl.float32) * scaled[None, :]
    out = tl.sum(sums, 1) * tl.rsqrt(tl.sum(squares, 0) / D + eps) + offset
    tl.store(y + n, out.to(y.dtype.element_ty), mask=mask_n)


@triton.jit
def _leave(pid, raw, squares, u, weight, bias, x, y, outputs, eps,
           WIDTH: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, GATE: tl.constexpr,
           BN: tl.constexpr, BK: tl.constexpr, PADDED: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    n = pid * BN + tl.arange(0, BN)
    mask_n = n < outputs
    tiles = _weight_tiles(weight, n, mask_n, WIDTH, BK)
    offset = 0.0 if bias is None else tl.load(bias + n, mask=mask_n, other=0.0).to(tl.float32)
    offset += tl.load(x + n, mask=mask_n, other=0.0).to(tl.float32)
    follow(OVERLAP)
    groups: tl.constexpr = WIDTH // SIZE
    sums = tl.zeros([BN, BK], tl.float32)
    for i in tl.static_range((WIDTH + BK - 1) // BK):
        k = i * BK + tl.arange(0, BK)
        value = tl.load(raw + k, mask=k < WIDTH, other=0.0).to(tl.float32)
        if GATE:
            value *= _silu(tl.load(u + k, mask=k < WIDTH, other=0.0).to(tl.float32))
        if groups > 1:
            value *= _group_scales(squares, k // SIZE, k < WIDTH, eps, SIZE, PARTS)
        sums += tiles[i].to(tl.float32) * value[None, :]
    out = tl.sum(sums, 1)
    if groups == 1:
        part = tl.arange(0, PADDED)
        found = tl.load(squares + part, mask=part < PARTS, other=0.0)
        out *= tl.rsqrt(tl.sum(found, 0) / SIZE + eps)
    tl.store(y + n, (out + offset).to(y.dtype.element_ty), mask=mask_n)


@triton.jit
def _group_scales(squares, group, mask, eps, SIZE: tl.constexpr, PARTS: tl.constexpr):
    """The norm's scale of each channel, given the parts of its group's sum of squares."""
    total = tl.zeros(group.shape, tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(squares + group * PARTS + part, mask=mask, other=0.0)
    return tl.rsqrt(total / SIZE + eps)


@triton.jit
def leave_kernel(raw, squares, u, weight, bias, x, y, conv, outputs, programs, channels, eps, sc_b, sc_c, sc_l,
                 WIDTH: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, GATE: tl.constexpr,
                 BN: tl.constexpr, BK: tl.constexpr, PADDED: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
                 OVERLAP: tl.constexpr):  # fmt: skip
    """What waits for all of ``step_kernel``: the first ``programs`` give ``BN`` outputs each of ``x`` plus the
    projection of ``raw (WIDTH,)`` times the scales of its norm, the others move the convolution's state on.

    ``squares (groups, PARTS)`` are the parts of the sums of squares that the scales come from; ``u`` begins with the
    gate.
    """
    pid = tl.program_id(0)
    if pid < programs:
        _leave(pid, raw, squares, u, weight, bias, x, y, outputs, eps,
               WIDTH, SIZE, PARTS, GATE, BN, BK, PADDED, OVERLAP)  # fmt: skip
    else:
        follow(OVERLAP)
        _shift(pid - programs, u, conv, 1, WIDTH, channels, 0, 0, sc_b, sc_c, sc_l, L, BLOCK)


def supports_layer_step(
    *, shape: SSDShape, dtype: torch.dtype, taps: int, group_size: int, differentiable: bool = False
) -> tuple[bool, str]:
    """Whether a layer's step can be served, and why (not)."""
    if shape.batch * shape.tokens != 1:
        return False, f"{shape.batch} rows of {shape.tokens} tokens are more than one token"
    return supports_step(shape=shape, dtype=dtype, taps=taps, group_size=group_size, differentiable=differentiable)


def mamba2_layer_step(
    stream: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    *,
    norm_weight: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor | None,
    gated_norm_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    shape: SSDShape,
    activation: str | None,
    norm_eps: float,
    gated_norm_eps: float,
    group_size: int,
    norm_before_gate: bool,
    dt_limit: tuple[float, float],
) -> Tensor:
    """See :func:`mamba2_hf.ops.mamba2_layer_step`."""
    return call(
        "mamba2_layer_step",
        *(stream, conv_state, ssm_state, norm_weight, in_weight, in_bias, conv_weight, conv_bias, dt_bias, A_log, D),
        *(gated_norm_weight, out_weight, out_bias, shape.groups, activation is not None, norm_eps, gated_norm_eps),
        *(group_size, norm_before_gate, *map(float, dt_limit)),
    )


def layer_step(
    stream: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    norm_weight: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor | None,
    gated_norm_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    n_groups: int,
    silu: bool,
    norm_eps: float,
    gated_norm_eps: float,
    group_size: int,
    norm_before_gate: bool,
    low: float,
    high: float,
) -> Tensor:
    """Launches the layer for ``stream (1, 1, d)``; both states are updated in place."""
    size = stream.shape[2]
    heads, P, N = ssm_state.shape[1:]
    channels, taps = conv_weight.shape
    width, entering = heads * P, in_weight.shape[0]
    stream = channels_last(stream)
    options = overlap()
    u = torch.empty(1, 1, entering, dtype=in_weight.dtype, device=stream.device)
    outputs, inputs, warps = _projection(size)
    launch(
        enter_kernel,
        (cdiv(entering, outputs),),
        *(stream, norm_weight.contiguous(), in_weight.contiguous(), _dense(in_bias), u, entering, norm_eps),
        D=size,
        BN=outputs,
        BK=inputs,
        num_warps=warps,
        **options,
    )

    bp, warps = _tile(1, P)
    blocks = cdiv(P, bp)
    raw = torch.empty(width, dtype=in_weight.dtype, device=stream.device)
    squares = torch.empty(heads * blocks, dtype=torch.float32, device=stream.device)
    launch(
        step_kernel,
        (heads * blocks,),
        *(u, conv_state, ssm_state, conv_weight.contiguous(), _dense(conv_bias), _dense(dt_bias), A_log.contiguous()),
        *(_dense(D), gated_norm_weight.contiguous(), raw, squares, low, high, heads, 1, conv_state.shape[2]),
        *(*u.stride()[:2], *conv_state.stride(), *ssm_state.stride()),
        LOG_RATES=True,
        SILU=silu,
        D_RANK=0 if D is None else D.dim(),
        GATE=not norm_before_gate,
        PER_GROUP=heads // n_groups,
        P=P,
        N=N,
        K=taps,
        BP=bp,
        BN=power_of_two(N),
        num_warps=warps,
        **options,
    )

    y = torch.empty(1, 1, size, dtype=stream.dtype, device=stream.device)
    outputs, inputs, warps = _projection(width)
    programs, parts = cdiv(size, outputs), group_size // P * blocks
    launch(
        leave_kernel,
        (programs + cdiv(channels, SHIFT_BLOCK),),
        *(raw, squares, u, out_weight.contiguous(), _dense(out_bias), stream, y, conv_state),
        *(size, programs, channels, gated_norm_eps, *conv_state.stride()),
        WIDTH=width,
        SIZE=group_size,
        PARTS=parts,
        GATE=norm_before_gate,
        BN=outputs,
        BK=inputs,
        PADDED=power_of_two(parts),
        L=conv_state.shape[2],
        BLOCK=SHIFT_BLOCK,
        num_warps=warps,
        **options,
    )
    return y


def _projection(inputs: int) -> tuple[int, int, int]:
    """Outputs of a program of a projection, inputs at a time, and warps.

    The threads lie side by side along the inputs, so that what a thread reads of these serves all of its outputs.
    """
    warps = 2 if inputs < 2048 else 4
    tile = PER_THREAD * 32 * warps
    kept = cdiv(inputs, tile) * PER_THREAD
    return max(1, min(OUTPUTS, power_of_two(MOST_WEIGHTS // kept + 1) // 2)), tile, warps
