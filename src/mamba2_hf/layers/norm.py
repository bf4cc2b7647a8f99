"""RMSNorm, and the gated, grouped one inside the mixer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops


class RMSNorm(nn.Module):
    """Root mean square norm over the last size, computed in fp32, returned in the weight's dtype."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d)`` of any floating dtype to ``(..., d)`` in the weight's dtype."""
        return ops.gated_rms_norm(x, None, self.weight, eps=self.eps, dtype=self.weight.dtype)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class GatedRMSNorm(nn.Module):
    """RMSNorm over groups of channels with a SiLU gate, before or after the norm; see ``ops.gated_rms_norm``."""

    def __init__(self, width: int, group_size: int, eps: float = 1e-5, norm_before_gate: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.group_size = group_size
        self.eps = eps
        self.norm_before_gate = norm_before_gate

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """``x (..., d)`` and gate ``z (..., d)`` to ``(..., d)`` in the dtype of ``x``."""
        return ops.gated_rms_norm(
            *(x, z, self.weight), eps=self.eps, group_size=self.group_size, norm_before_gate=self.norm_before_gate
        )

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"{self.weight.shape[0]}, group_size={self.group_size}, eps={self.eps}"


class JointGatedRMSNorm(GatedRMSNorm):
    """A :class:`GatedRMSNorm` of channels that are a part of one group, whose others are elsewhere.

    A base: the class of a norm says how the sum of squares of the whole group is found. ``group_size`` is that of the
    part, ``joint_size`` that of the group.
    """

    joint_size: int

    def total(self, sums: Tensor) -> Tensor:
        """The sums ``(..., 1)`` over the group, given those over the part; autograd does not look."""
        raise NotImplementedError

    def normed(self, x: Tensor) -> Tensor:
        """The norm without a gate, ``(..., d)`` to the same."""
        y: Tensor = _JointNorm.apply(x, self.weight, self.total, self.joint_size, self.eps)
        return y

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """``x (..., d)`` and gate ``z (..., d)`` to ``(..., d)`` in the dtype of ``x``."""
        gate = 1.0 if z is None else F.silu(z.to(torch.promote_types(z.dtype, torch.float32)))
        if self.norm_before_gate:
            return (self.normed(x) * gate).to(x.dtype)
        return self.normed((x * gate).to(x.dtype))


class _JointNorm(torch.autograd.Function):
    """The norm of a part of a group: a sum over the group in the forward, and one in the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, total: Callable[[Tensor], Tensor], size: int, eps: float
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square()
        scale = torch.rsqrt(total(squares) / size + eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.total, ctx.size = total, size
        return (x * scale * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        dnormed, given = dy.to(scale.dtype) * weight, x * scale
        dot = ctx.total((dnormed * given).sum(-1, keepdim=True))
        dx = (dnormed - given * (dot / ctx.size)) * scale
        dweight = (dy * given).flatten(0, -2).sum(0)
        return dx.to(x.dtype), dweight.to(weight.dtype), None, None, None


class SiluGate(nn.Module):
    """The gate of :class:`GatedRMSNorm` without the norm.

    Args:
        width: channels.
    """

    eps, norm_before_gate = 1e-5, False  # of no effect, as there is no norm

    def __init__(self, width: int) -> None:
        super().__init__()
        self.group_size = width

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """``x (..., d)`` times the SiLU of ``z (..., d)``, in the dtype of ``x``."""
        return ops.gated_activation(z, x).to(x.dtype)
