"""What ops need of the devices that have a layer's other heads.

As with ``neighbors.py``, who sends what to whom is decided above (``mamba2_hf.distributed``). A device computes its
heads from a stream that all have; what out_proj makes of them is a part of a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from .neighbors import Entering
from .spec import LayerWeights, Peers


class Partners(Protocol):
    """The devices that share a layer. Every device makes the same calls in the same order."""

    def begin(self, part: Tensor) -> Callable[[], Tensor]:
        """Begins to sum over all devices, in the place of a dense ``part`` that nobody else reads; not differentiable.

        Returns:
            What waits for the sum, and gives it.
        """

    def total(self, part: Tensor) -> Tensor:
        """The sum over all devices of a ``part`` that nobody else reads, and of which one use is made; differentiable:
        each device's gradient is that of its own part.
        """

    def entering(self, x: Tensor) -> Tensor:
        """``x``, the same in all devices, of which each makes its own use; differentiable: gradients are summed."""

    def peers(self, like: Tensor) -> Peers:
        """What kernels that send have to know of the devices, where ``like`` is."""

    def own(self, weights: LayerWeights) -> LayerWeights:
        """A layer's weights to be computed with; differentiable: gradients of what several devices hold (B and C of a
        group, LoRA's factors that are not cut) are summed over these.
        """


class Joined(NamedTuple):
    """Arguments of what ends the step of a layer that several devices share, where no kernel did it on the way."""

    total: Tensor
    """``(B, 1, d)``, the sum of all devices' parts, or, where a norm is not applied yet, ``(B, 1, d + 1)``: the sum of
    squares of its group last.
    """
    residual: Tensor
    """``(B, 1, d)``"""
    bias: Tensor | None
    """``(d,)`` of the last projection."""
    output_multiplier: float
    """Of what the layer gives; the total is multiplied already, the bias is not."""
    group_size: int = 0
    """Channels that share the sum of squares."""
    norm_eps: float = 0.0

    @property
    def is_joint(self) -> bool:
        """Whether the norm is not applied yet."""
        return self.total.shape[2] > self.residual.shape[2]


class Sharing:
    """One call of an op that devices share: what its forward leaves for its backward.

    Args:
        partners: the devices.
        entering: what enters rows that are slices; None where they are whole.
    """

    def __init__(self, partners: Partners, entering: Entering | None = None) -> None:
        self.partners, self.entering = partners, entering
        self.squares: Tensor | None = None
        """``(B, T)``, fp32: where the gated norm is one group over all devices, its sum of squares."""
