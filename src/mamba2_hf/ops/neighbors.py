"""What ops need of the slices before and after theirs, where a sequence is spread over several devices.

Who sends what to whom is decided above (``mamba2_hf.distributed``): an op says what its slice gives, and is given what
comes out of all slices before it, or in the backward of all behind it.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Neighbors(Protocol):
    """The slices of the same rows on other devices. Every device makes the same calls in the same order.

    A state passes a slice as ``S <- decay * S + own``; with all slices' pairs at hand each device finds what enters its
    own, and nothing is computed twice.
    """

    def columns_before(self, last: Tensor) -> Tensor:
        """What the slice before gave, ``(B, C, K - 1)``, with zeros for other documents; differentiable.

        Args:
            last: ``(B, C, K - 1)``, the last inputs of this slice's convolution.
        """

    def columns_after(self, gradient: Tensor) -> Tensor:
        """The gradient of what was given to :meth:`columns_before`, from that of what came out of it."""

    def state_before(self, own: Tensor, decay: Tensor) -> Tensor:
        """The state that enters this slice, ``(B, H, P, N)``; differentiable.

        Args:
            own: ``(B, H, P, N)``, the state behind this slice if zeros entered it.
            decay: ``(B, H)``, of a state on its way through this slice.
        """

    def gradient_after(self, own: Tensor, decay: Tensor) -> Tensor:
        """The gradient of the state that leaves this slice, ``(B, H, P, N)``.

        Args:
            own: ``(B, H, P, N)``, the gradient of the state that enters this slice, from this slice's outputs alone.
            decay: as in :meth:`state_before`.
        """


class Entering:
    """What enters a slice in one call of an op: asked for in its forward, and kept for its backward.

    Args:
        neighbors: to ask.
    """

    def __init__(self, neighbors: Neighbors) -> None:
        self.neighbors = neighbors
        self._columns: Tensor | None = None
        self.state: Tensor | None = None

    def columns(self, inputs: Tensor, taps: int) -> Tensor | None:
        """``(B, C, K - 1)`` for a convolution of ``inputs (B, T, C)``; None if it has one tap."""
        if self._columns is None and taps > 1:
            self._columns = self.neighbors.columns_before(inputs[:, inputs.shape[1] - taps + 1 :].mT)
        return self._columns

    def ask_state(self, own: Tensor, decay: Tensor) -> Tensor:
        """See :meth:`Neighbors.state_before`."""
        self.state = self.neighbors.state_before(own, decay)
        return self.state
