"""A whole mixer step between the two projections, for one token or a short block, and a whole layer around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import SSDShape
from ..conv.torch import causal_conv1d_update
from ..norm.torch import gated_rms_norm
from ..scan.torch import ssd_state_update


def mamba2_step(
    zxbcdt: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
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
    log_rates: bool = False,
) -> Tensor:
    """See :func:`mamba2_hf.ops.mamba2_step`."""
    A = -torch.exp(A.to(torch.promote_types(A.dtype, torch.float32))) if log_rates else A
    inner, bc = shape.heads * shape.head_dim, shape.groups * shape.state
    z, xbc, dt = zxbcdt.split([inner, inner + 2 * bc, shape.heads], -1)
    convolved = causal_conv1d_update(xbc, conv_state, conv_weight, conv_bias, activation=activation)
    x, B, C = convolved.split([inner, bc, bc], -1)
    ys = [
        ssd_state_update(
            ssm_state,
            x[:, t].unflatten(-1, (shape.heads, shape.head_dim)),
            dt[:, t],
            A,
            B[:, t].unflatten(-1, (shape.groups, shape.state)),
            C[:, t].unflatten(-1, (shape.groups, shape.state)),
            shape=shape,
            D=D,
            z=z[:, t].unflatten(-1, (shape.heads, shape.head_dim)) if norm_weight is None else None,
            dt_bias=dt_bias,
            dt_softplus=True,
            dt_limit=dt_limit,
        )
        for t in range(shape.tokens)
    ]
    y = torch.stack(ys, 1).flatten(-2)  # (B, T, H P)
    if norm_weight is None:
        return y
    return gated_rms_norm(y, z, norm_weight, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate)


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
    ready: Tensor | None,
) -> Tensor:
    """See :func:`mamba2_hf.ops.mamba2_layer_step`."""
    normed = gated_rms_norm(
        *(stream, None, norm_weight),
        eps=norm_eps,
        group_size=stream.shape[2],
        norm_before_gate=False,
        dtype=in_weight.dtype,
    )
    y = mamba2_step(
        *(F.linear(normed, in_weight, in_bias), conv_state, ssm_state, conv_weight, conv_bias, dt_bias),
        *(A_log, D),
        norm_weight=gated_norm_weight,
        shape=shape,
        activation=activation,
        eps=gated_norm_eps,
        group_size=group_size,
        norm_before_gate=norm_before_gate,
        dt_limit=dt_limit,
        log_rates=True,
    )
    return stream + F.linear(y, out_weight, out_bias)
