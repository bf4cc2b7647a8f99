"""Feed-forward layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.mlp.op import step_serves
from ..ops.mlp.torch import activate
from .norm import RMSNorm
from .projection import AddTo, linear
from .weights import is_unhooked, plain_linear, plain_weight


class Kind(NamedTuple):
    """Activation of a feed-forward layer, by its name in :mod:`mamba2_hf.ops`, and whether it gates a projection."""

    name: str
    gated: bool

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """The activation as a function."""
        return functools.partial(activate, name=self.name)


MLP_KINDS = {
    "swiglu": Kind("silu", True),
    "geglu": Kind("gelu", True),
    "gelu": Kind("gelu", False),
    "relu2": Kind("relu2", False),
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

    partners: ops.Partners | None = None
    """The devices that have the other inner channels; None if they are all here."""

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

    def forward(self, x: Tensor, add: AddTo | None = None) -> Tensor:
        """``(..., d)`` to ``(..., d)``; an adapter may ``add`` to gate and up projection."""
        entering = x if self.partners is None else self.partners.entering(x)
        up = linear(self.up_proj, entering)
        gate = linear(self.gate_proj, entering) if self.gated else up
        if add is not None:
            gate, up = add(x, gate, up)
        inner = ops.gated_activation(gate, up if self.gated else None, self.activation, self.multipliers[0])
        out = linear(self.down_proj, inner)
        return out if self.multipliers[1] == 1 else out * self.multipliers[1]

    def layer(self, stream: Tensor, norm: RMSNorm, output_multiplier: float = 1.0) -> Tensor:
        """``stream + output_multiplier * self(norm(stream))``, ``(B, T, d)``; in two launches for one token of one
        sequence on a GPU, where weights may be read.

        Args:
            stream: ``(B, T, d)``, the residual stream.
            norm: before the layer.
            output_multiplier: of the result.
        """
        if step_serves(stream):
            call = self._step(stream, norm, output_multiplier)
            if call is not None and self.partners is not None:
                return ops.mlp_step(call._replace(peers=self.partners.peers(stream)), total=self.partners.total)
            if call is not None:
                return ops.mlp_step(call)
        return torch.add(stream, self(norm(stream)), alpha=output_multiplier)

    def _step(self, stream: Tensor, norm: RMSNorm, output_multiplier: float) -> ops.MLPStep | None:
        """Arguments of the step of the layer; None where a module has to be called."""
        part = self.partners is not None
        weight, gate = plain_weight(norm), plain_linear(self.gate_proj, part) if self.gated else None
        up, down = plain_linear(self.up_proj, part), plain_linear(self.down_proj, part)
        if not is_unhooked(self) or weight is None or up is None or down is None or (gate is None and self.gated):
            return None
        read = [weight, up[0], down[0], *(() if gate is None else gate[:1])]
        adapted = any(linear.lora for linear in (gate, up, down) if linear is not None)
        if adapted or len({tensor.dtype for tensor in read}) > 1:
            return None
        gate_weight, gate_bias, *_ = (None, None) if gate is None else gate
        before, after = self.multipliers
        return ops.MLPStep(
            *(stream, weight, gate_weight, gate_bias, up, down, self.activation, norm.eps),
            *(before, after * output_multiplier),
        )
