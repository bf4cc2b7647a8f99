"""Everything between the two projections of a Mamba-2 mixer: convolution, scan, gated norm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..checks import SSDShape
from ..conv.torch import causal_conv1d
from ..norm.torch import gated_rms_norm
from ..runtime.modes import in_steps, needs_grad, without_autocast
from ..scan.torch import CHUNK_SIZE, ssd_chunk_scan

SEGMENT_TOKENS = 512  # of all rows, on a CPU: what they need stays in the caches and in the allocator


def mamba2_inner(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    *,
    norm_weight: Tensor | None,
    shape: SSDShape,
    activation: str | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    dt_limit: tuple[float, float],
    chunk_size: int | None,
    conv_initial_states: Tensor | None,
    ssm_initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    return_final_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.mamba2_inner`. Where gradients are needed only the inputs are kept.

    The states come at no cost here, so they are there whether asked for or not.
    """

    def run(
        zxbcdt: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        dt_bias: Tensor | None,
        A: Tensor,
        D: Tensor | None,
        norm_weight: Tensor | None,
        conv_initial_states: Tensor | None,
        ssm_initial_states: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inner, bc = shape.heads * shape.head_dim, shape.groups * shape.state
        z, xbc, dt = zxbcdt.split([inner, inner + 2 * bc, shape.heads], -1)
        xbc, conv_state = causal_conv1d(
            xbc,
            conv_weight,
            conv_bias,
            activation=activation,
            initial_states=conv_initial_states,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
        )
        x, B, C = xbc.split([inner, bc, bc], -1)
        gated = norm_weight is None  # without a norm the gate is the scan's own
        y, state = ssd_chunk_scan(
            x.unflatten(-1, (shape.heads, shape.head_dim)),
            dt,
            A,
            B.unflatten(-1, (shape.groups, shape.state)),
            C.unflatten(-1, (shape.groups, shape.state)),
            shape=shape,
            D=D,
            z=z.unflatten(-1, (shape.heads, shape.head_dim)) if gated else None,
            dt_bias=dt_bias,
            dt_softplus=True,
            dt_limit=dt_limit,
            chunk_size=chunk_size,
            initial_states=ssm_initial_states,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            recompute=False,
        )
        y = y.flatten(-2)
        if norm_weight is not None:
            y = gated_rms_norm(y, z, norm_weight, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate)
        return y, conv_state, state

    weights = (conv_weight, conv_bias, dt_bias, A, D, norm_weight)
    conv, ssm = conv_initial_states, ssm_initial_states
    recompute = needs_grad(zxbcdt, *weights, conv, ssm)
    segments: tuple[Tensor, ...] = (zxbcdt,)
    if in_steps(zxbcdt.device) and seq_idx is None and cu_seqlens is None:
        segments = zxbcdt.split(CHUNK_SIZE * max(1, SEGMENT_TOKENS // (CHUNK_SIZE * shape.batch)), 1)
    ys = []
    with without_autocast(zxbcdt.device):
        for segment in segments:
            tensors = (segment, *weights, conv, ssm)
            if recompute:
                y, conv, ssm = checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=False)
            else:
                y, conv, ssm = run(*tensors)
            ys.append(y)
    assert conv is not None  # there is a segment
    assert ssm is not None
    return torch.cat(ys, 1) if len(ys) > 1 else ys[0], conv, ssm
