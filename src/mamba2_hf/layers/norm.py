"""RMSNorm, and the gated, grouped one inside the mixer."""

from __future__ import annotations

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
        dtype = torch.promote_types(x.dtype, torch.float32)
        return (x.to(dtype) * F.silu(z.to(dtype))).to(x.dtype)
