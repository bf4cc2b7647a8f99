"""Feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .projection import linear


class Kind(NamedTuple):
    """Activation of a feed-forward layer, and whether it gates a second projection."""

    activation: Callable[[Tensor], Tensor]
    gated: bool


def relu2(x: Tensor) -> Tensor:
    """``max(x, 0)`` squared."""
    return F.relu(x).square()


MLP_KINDS = {
    "swiglu": Kind(F.silu, True),
    "geglu": Kind(F.gelu, True),
    "gelu": Kind(F.gelu, False),
    "relu2": Kind(relu2, False),
}
"""By name; GELU is the exact one."""


class MLP(nn.Module):
    """``down(activation(gate(x)) * up(x))``, or ``down(activation(up(x)))`` of a kind without a gate.

    Args:
        hidden_size: width of input and output.
        intermediate_size: width in between.
        kind: one of ``MLP_KINDS``.
        bias: whether the projections have one.
        multipliers: of what the activation gets, and of the result.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        kind: str = "swiglu",
        bias: bool = False,
        multipliers: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        super().__init__()
        self.activation, self.gated = MLP_KINDS[kind]
        self.multipliers = multipliers
        if self.gated:
            self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """``(..., d)`` to ``(..., d)``; ``added (..., 2 I)`` goes to what gate and up projection give."""
        up = linear(self.up_proj, x)
        gate = linear(self.gate_proj, x) if self.gated else up
        if added is not None:
            more, rest = added.chunk(2, -1)
            gate, up = gate + more, up + rest
        if self.multipliers[0] != 1:
            gate = gate * self.multipliers[0]
        inner = self.activation(gate)
        out = linear(self.down_proj, inner * up if self.gated else inner)
        return out if self.multipliers[1] == 1 else out * self.multipliers[1]
