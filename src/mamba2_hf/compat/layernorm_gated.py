"""The gated norms of ``mamba_ssm.ops.triton.layernorm_gated``: functions, and modules with the same parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.spec import compute_dtype


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """``norm(x) * weight + bias``, times ``silu(z)``; with ``norm_before_gate=False`` the norm of ``x * silu(z)``.

    Args:
        x: ``(..., d)``. z: gate shaped as ``x``, or None. weight: ``(d,)``. bias: ``(d,)`` or None.
        eps: added to the mean square.
        group_size: channels that share one mean square; None for all.
        norm_before_gate: the order.

    Returns:
        Shaped as ``x``, in its dtype.

    Raises:
        ArgumentError: a shape, dtype or device does not fit.
    """
    z = None if z is None else z.to(x.dtype)
    if bias is None:
        return ops.gated_rms_norm(x, z, weight, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate)
    before = None if norm_before_gate else z
    y = ops.gated_rms_norm(x, before, weight, eps=eps, group_size=group_size, dtype=compute_dtype(x.dtype))
    return _finish(y, bias, z if norm_before_gate else None, x.dtype)


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """:func:`rmsnorm_fn` with the mean taken off first, unless ``is_rms_norm``."""
    if is_rms_norm:
        return rmsnorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate)
    y = x.to(compute_dtype(x.dtype))
    if z is not None and not norm_before_gate:
        y = y * F.silu(z.to(y.dtype))
    size = x.shape[-1] if group_size is None else group_size
    y = F.layer_norm(y.unflatten(-1, (-1, size)), (size,), eps=eps).flatten(-2) * weight.to(y.dtype)
    return _finish(y, bias, z if norm_before_gate else None, x.dtype)


def _finish(y: Tensor, bias: Tensor | None, z: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = y if bias is None else y + bias.to(y.dtype)
    return (y if z is None else y * F.silu(z.to(y.dtype))).to(dtype)


class RMSNorm(nn.Module):
    """:func:`rmsnorm_fn` with a weight and no bias."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weight to ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """See :func:`rmsnorm_fn`."""
        return rmsnorm_fn(x, self.weight, None, z, self.eps, self.group_size, self.norm_before_gate)


class LayerNorm(nn.Module):
    """:func:`layernorm_fn` with a weight and a bias."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weight to ones and the bias to zeros."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """See :func:`layernorm_fn`."""
        return layernorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)
