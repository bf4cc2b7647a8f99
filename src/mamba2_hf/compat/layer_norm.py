"""The norms of ``mamba_ssm.ops.triton.layer_norm``, which add to the residual stream first: functions and a module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import ArgumentError
from ..ops.spec import compute_dtype


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """The norm of ``residual + dropout(x * rowscale) + dropout(x1)``, summed in fp32.

    Args:
        x: ``(..., d)``. residual, x1: shaped as ``x``, or None. rowscale: ``(...)`` or None.
        weight, bias: ``(d,)``. weight1, bias1: of a second norm of the same sum, or None.
        eps: added to the mean square or the variance.
        dropout_p: share of ``x``, and of ``x1``, that is dropped.
        prenorm: whether to return the sum as well, for the next residual.
        residual_in_fp32: whether that is in fp32 where no ``residual`` tells its dtype; else it is in that of ``x``.
        is_rms_norm: whether the mean stays in.
        return_dropout_mask: not served.

    Returns:
        ``y`` in the dtype of ``x``; then the second norm with ``weight1``; then the sum with ``prenorm``.

    Raises:
        ArgumentError: ``return_dropout_mask`` is set, or ``rowscale`` and ``x1`` are both given.
    """
    if return_dropout_mask:
        raise ArgumentError("return_dropout_mask=True is not served: leave it out")
    if rowscale is not None and x1 is not None:
        raise ArgumentError("rowscale was given with x1: scale x before the call")
    dtype = compute_dtype(x.dtype)
    total = x if rowscale is None else x.to(dtype) * rowscale[..., None].to(dtype)
    total = F.dropout(total, dropout_p)
    for more in (None if x1 is None else F.dropout(x1, dropout_p), residual):
        total = total if more is None else total.to(dtype) + more.to(dtype)

    def norm(weight: Tensor, bias: Tensor | None) -> Tensor:
        if is_rms_norm and bias is None:
            return ops.gated_rms_norm(total, None, weight, eps=eps, dtype=x.dtype)
        if is_rms_norm:
            y = ops.gated_rms_norm(total, None, weight, eps=eps, dtype=dtype)
            return (y + bias.to(dtype)).to(x.dtype)  # type: ignore[union-attr]
        y = F.layer_norm(
            total.to(dtype), total.shape[-1:], weight.to(dtype), None if bias is None else bias.to(dtype), eps
        )
        return y.to(x.dtype)

    results = [norm(weight, bias)]
    if weight1 is not None:
        results.append(norm(weight1, bias1))
    if prenorm:
        kept = torch.float32 if residual_in_fp32 else x.dtype
        results.append(total.to(kept if residual is None else residual.dtype))
    return tuple(results) if len(results) > 1 else results[0]


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """:func:`layer_norm_fn` with the mean left in."""
    return layer_norm_fn(
        *(x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale),
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=True,
        return_dropout_mask=return_dropout_mask,
    )


class RMSNorm(nn.Module):
    """:func:`rms_norm_fn` with a weight, and dropout in training."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weight to ones."""
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        """See :func:`layer_norm_fn`."""
        return rms_norm_fn(
            *(x, self.weight, None, residual),
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )
