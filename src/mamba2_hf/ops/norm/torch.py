"""RMSNorm with an optional gate, over groups of channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.modes import times
from ..spec import compute_dtype
from .op import Norm


def gated_rms_norm(call: Norm) -> Tensor:
    """See :func:`mamba2_hf.ops.gated_rms_norm`."""
    x, z, weight, eps, group_size, norm_before_gate, out = call
    dtype = compute_dtype(x.dtype)
    y = x.to(dtype)
    gate = None if z is None else F.silu(z.to(dtype))
    if gate is not None and not norm_before_gate:
        y = times(gate, y)
    grouped = y.unflatten(-1, (-1, group_size))
    y = (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    y = times(y, weight.to(dtype))
    if gate is not None and norm_before_gate:
        y = times(y, gate)
    return y.to(out)
