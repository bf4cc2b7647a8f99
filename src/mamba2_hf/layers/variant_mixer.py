"""The mixer with what the hybrid families vary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mixer import Mamba2Mixer
from .norm import GatedRMSNorm, RMSNorm
from .sequence import SequenceLayout
from .state import SSDState

NORMS = ("gate_first", "norm_first", "none")


class SiluGate(nn.Module):
    """A gate without a norm."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """``x (..., d)`` times the SiLU of ``z (..., d)``, in the dtype of ``x``."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return (x.to(dtype) * F.silu(z.to(dtype))).to(x.dtype)


class VariantMixer(Mamba2Mixer):
    """:class:`Mamba2Mixer` with more choices.

    Args:
        hidden_size: width of input and output.
        norm: whether the gate comes before the norm, after it, or without one: one of ``NORMS``.
        norm_group_size: channels that are normed together; None for those of one group of the scan.
        use_bias: whether in_proj has a bias.
        out_bias: whether out_proj has one; None as in_proj.
        multipliers: of z, x, B, C and dt, as they leave in_proj; None for ones.
        options: all others of :class:`Mamba2Mixer`.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        norm: str = "gate_first",
        norm_group_size: int | None = None,
        use_bias: bool = False,
        out_bias: bool | None = None,
        multipliers: tuple[float, ...] | None = None,
        **options: object,
    ) -> None:
        super().__init__(
            hidden_size,
            use_bias=use_bias,
            norm_before_gate=norm == "norm_first",
            **options,  # type: ignore[arg-type]
        )
        self.multipliers = multipliers
        if norm == "none":
            self.norm = SiluGate()  # type: ignore[assignment]
        elif norm_group_size is not None:
            self.norm = GatedRMSNorm(self.inner_size, norm_group_size, self.norm.eps, self.norm.norm_before_gate)
        if out_bias not in (None, use_bias):
            self.out_proj = nn.Linear(self.inner_size, hidden_size, bias=bool(out_bias))

    def whole_layer(
        self, stream: Tensor, norm: RMSNorm, layout: SequenceLayout, state: SSDState | None
    ) -> Tensor | None:
        """As there; None also with multipliers."""
        return super().whole_layer(stream, norm, layout, state) if self.multipliers is None else None

    def _inner(self, zxbcdt: Tensor, layout: SequenceLayout, state: SSDState | None) -> Tensor:
        return super()._inner(self._scaled(zxbcdt), layout, state)

    def _attention_matrix(self, zxbcdt: Tensor, layout: SequenceLayout) -> Tensor:
        return super()._attention_matrix(self._scaled(zxbcdt), layout)

    def _scaled(self, zxbcdt: Tensor) -> Tensor:
        if self.multipliers is None:
            return zxbcdt
        bc = self.n_groups * self.state_size
        sizes = (self.inner_size, self.inner_size, bc, bc, self.num_heads)
        scale = [zxbcdt.new_full((size,), value) for size, value in zip(sizes, self.multipliers, strict=True)]
        return zxbcdt * torch.cat(scale)
