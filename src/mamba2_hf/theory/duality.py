"""State space duality: one layer as a state space model and as masked attention (Section 5, Figure 4).

===============================  ==========================
state space model                masked attention
===============================  ==========================
C, contraction                   Q, queries
B, expansion                     K, keys
x, input                         V, values
A, decays of the state           L, mask
N, state size                    N, features of the kernel
H, states: linear                G = Q K^T, scores: quadratic
===============================  ==========================

Shapes of one sequence: ``x (T, H, P)``, ``dt (T, H)``, ``A (H,)``, ``B, C (T, G, N)``, as an SSD layer has them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import semiseparable
from .attention import SSD, structured_masked_attention


class MaskedAttention(NamedTuple):
    """An SSD layer in attention's words."""

    q: Tensor
    """``(H, T, N)``, or ``(1, T, N)`` for one group"""
    k: Tensor
    """as q"""
    v: Tensor
    """``(H, T, P)``"""
    mask: SSD

    def __call__(self, mode: str = "fast") -> Tensor:
        """The layer's output ``(T, H, P)``, before the skip ``D x`` and the gate."""
        return structured_masked_attention(self.q, self.k, self.v, self.mask, mode=mode).movedim(0, 1)

    def matrices(self) -> Tensor:
        """The attention matrix of each head, ``(H, T, T)``: mask times scores (Equation 16)."""
        return (self.q @ self.k.mT) * self.mask.matrix()


class StateSpaceModel(NamedTuple):
    """One head as a recurrence, by its generators; see :mod:`.semiseparable`."""

    A: Tensor
    """``(T,)``, ``(T, N)`` or ``(T, N, N)``"""
    B: Tensor
    """``(T, N)``"""
    C: Tensor
    """``(T, N)``"""

    def __call__(self, x: Tensor) -> Tensor:
        """``(T, P)`` to ``(T, P)``, token by token."""
        return semiseparable.multiply_recurrent(*self, x)

    def states(self, x: Tensor) -> Tensor:
        """The states after every token, ``(T, P, N)``."""
        return semiseparable.states(self.A, self.B, x)

    def matrix(self) -> Tensor:
        """The attention matrix ``(T, T)`` from states: what the head makes of an impulse at each token."""
        eye = torch.eye(len(self.B), dtype=self.B.dtype, device=self.B.device)
        return self(eye)


def as_attention(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> MaskedAttention:
    """An SSD layer as masked attention.

    Args:
        x, dt, A, B, C: of the layer, ``dt`` after bias, softplus and clamp.
    """
    q, k, v = (tensor.movedim(1, 0) for tensor in (C, B, x))
    if len(q) > 1:  # one group is broadcast
        q, k = (tensor.repeat_interleave(len(v) // len(tensor), 0) for tensor in (q, k))
    return MaskedAttention(q, k, v, SSD(dt.mT, A))


def as_state_space(attention: MaskedAttention) -> list[StateSpaceModel]:
    """Masked attention as state space models, one for each head: ``a = exp(A dt)``, and B takes the step size."""
    mask, heads = attention.mask, len(attention.v)
    decays = torch.exp(mask.A[:, None] * mask.dt)  # (H, T)
    expansion = (attention.k * mask.dt[..., None]).unbind()
    contraction = attention.q.expand(heads, -1, -1).unbind()
    return [StateSpaceModel(*head) for head in zip(decays, expansion, contraction, strict=True)]


def from_matrix(M: Tensor, tolerance: float | None = None) -> StateSpaceModel:
    """A state space model of the least state size that multiplies by ``M (T, T)``, whatever M came from.

    That is at most N for a head of an SSD layer, and the layer's own states up to a change of basis; for a softmax's
    weights it grows with T: no recurrence with a bounded state computes them (Theorem 5.2).

    Args:
        M: lower triangular.
        tolerance: see :func:`semiseparable.order`.

    Raises:
        ArgumentError: M has entries above the diagonal.
    """
    return StateSpaceModel(*semiseparable.generators(M, tolerance))
