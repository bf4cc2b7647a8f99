"""Mixers of the paper's ablations that are no setting of the package's: head patterns (table 5), projections one after
the other (table 4). They train; they keep no state, so that nothing is generated with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mamba2_hf import ops
from mamba2_hf.layers import Mamba2Mixer, RMSNorm, SequenceLayout, SSDState, linear
from mamba2_hf.layers.causal_conv1d import CausalConv1d
from mamba2_hf.theory.heads import OWN


class SharedRows(nn.Module):
    """Rows of a weight that several heads share, kept once.

    Args:
        parts: rows of each part of the weight, and how many heads share each row of it.
    """

    def __init__(self, parts: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.sizes, self.copies = [rows // copies for rows, copies in parts], [copies for _, copies in parts]

    def forward(self, kept: Tensor) -> Tensor:
        """The weight of all heads; gradients of a shared row are summed in the order of heads, alike in each run."""
        parts = zip(kept.split(self.sizes), self.copies, strict=True)
        return torch.cat([part.expand(copies, *part.shape).flatten(0, 1) for part, copies in parts])

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is kept of a weight: the first head's rows of what is shared."""
        rows = [size * copies for size, copies in zip(self.sizes, self.copies, strict=True)]
        return torch.cat([part[:size] for part, size in zip(weight.split(rows), self.sizes, strict=True)])


def share_rows(mixer: Mamba2Mixer, pattern: str) -> None:
    """Has the heads of a mixer, each with B and C of its own, share the rows that make x, B and C, as a pattern says.

    Args:
        mixer: with as many groups as heads.
        pattern: a key of :data:`mamba2_hf.theory.heads.OWN`.
    """
    if pattern == "multi-head":
        return
    heads, inner = mixer.num_heads, mixer.inner_size
    sizes = {"x": inner, "B": heads * mixer.state_size, "C": heads * mixer.state_size}
    xbc = [(rows, 1 if name in OWN[pattern] else heads) for name, rows in sizes.items()]
    weights: list[tuple[Any, str, list[tuple[int, int]]]] = [
        (mixer.in_proj, "weight", [(inner, 1), *xbc, (heads, 1)]),
        (mixer.conv1d, "weight", xbc),
        (mixer.conv1d, "bias", xbc),
    ]
    for module, name, parts in weights:
        parametrize.register_parametrization(module, name, SharedRows(parts))
        module.has_plain_weight = True  # to read it amounts to calling the module, so that layers run as ever


class SequentialMixer(Mamba2Mixer):
    """A mixer whose B, C and step sizes are made of x after its convolution, as in Mamba's block, and have none.

    Args:
        hidden_size, sizes: as of :class:`Mamba2Mixer`.
    """

    def __init__(self, hidden_size: int, **sizes: Any) -> None:
        super().__init__(hidden_size, **sizes)
        self.in_proj = nn.Linear(hidden_size, 2 * self.inner_size, bias=False)
        self.conv1d = CausalConv1d.depthwise(self.inner_size, self.conv_kernel, True)
        self.x_proj = nn.Linear(self.inner_size, 2 * self.n_groups * self.state_size + self.num_heads, bias=False)

    def layer(self, stream: Tensor, norm: RMSNorm, *arguments: Any, **options: Any) -> Tensor:
        """The layer around the mixer, ``(B, T, d)`` to ``(B, T, d)``."""
        return stream + self(norm(stream), *arguments)

    def forward(
        self,
        hidden_states: Tensor,
        layout: SequenceLayout | None = None,
        state: SSDState | None = None,
        output_attentions: bool = False,
    ) -> Tensor:
        """``(B, T, d)`` to ``(B, T, d)``, rows of one document each from its start."""
        if state is not None or output_attentions:
            raise NotImplementedError("sequential projections only train: call the model with use_cache=False")
        z, x = linear(self.in_proj, hidden_states).chunk(2, -1)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        x = ops.causal_conv1d(x, weight, bias, activation=self.activation)
        states = self.n_groups * self.state_size
        B, C, dt = linear(self.x_proj, x).split([states, states, self.num_heads], -1)
        groups = (self.n_groups, self.state_size)
        y = ops.ssd_chunk_scan(
            *(x.unflatten(-1, (self.num_heads, self.head_dim)), dt, self.A),
            *(B.unflatten(-1, groups), C.unflatten(-1, groups)),
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
        )
        return linear(self.out_proj, self.norm(y.flatten(-2), z))
