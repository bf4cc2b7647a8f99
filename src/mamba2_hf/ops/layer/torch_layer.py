"""A whole layer: norm, projections, mixer and residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import LowRank, SSDShape
from ..norm.torch import gated_rms_norm
from .torch_inner import mamba2_inner


def mamba2_layer(
    stream: Tensor,
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
    dtype: torch.dtype,
    activation: str | None,
    norm_eps: float,
    gated_norm_eps: float,
    group_size: int,
    norm_before_gate: bool,
    dt_limit: tuple[float, float],
    chunk_size: int | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    in_lora: LowRank | None,
    out_lora: LowRank | None,
) -> Tensor:
    """See :func:`mamba2_hf.ops.mamba2_layer`; products are taken in ``dtype`` by the autocast that asked for it."""
    normed = gated_rms_norm(
        stream, None, norm_weight, eps=norm_eps, group_size=stream.shape[2], norm_before_gate=False, dtype=dtype
    )
    A = -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))
    y, _, _ = mamba2_inner(
        *(_project(normed, in_weight, in_bias, in_lora), conv_weight, conv_bias, dt_bias, A, D),
        norm_weight=gated_norm_weight,
        shape=shape,
        activation=activation,
        eps=gated_norm_eps,
        group_size=group_size,
        norm_before_gate=norm_before_gate,
        dt_limit=dt_limit,
        chunk_size=chunk_size,
        conv_initial_states=None,
        ssm_initial_states=None,
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
        return_final_states=False,
    )
    return stream + _project(y, out_weight, out_bias, out_lora)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, lora: LowRank | None) -> Tensor:
    """A projection and what is added to it."""
    y = F.linear(x, weight, bias)
    if lora is None:
        return y
    lowered = F.linear(x, lora.down.to(y.dtype)).flatten(0, 1)
    return torch.addmm(y.flatten(0, 1), lowered, lora.up.to(y.dtype).t(), alpha=lora.scale).view_as(y)
