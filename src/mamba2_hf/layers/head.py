"""A language model's head, which can keep its logits to itself."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import linear_cross_entropy
from ..ops.runtime.linear import linear


class Head(nn.Linear):
    """Hidden states to logits or, with labels, to their loss.

    The loss is computed inside of the forward, so that what brings the weight when a module is called (FSDP2's hooks)
    has done so, and no logits are held however the model is sharded.
    """

    def forward(self, hidden_states: Tensor, labels: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Logits, or a loss in their place.

        Args:
            hidden_states: ``(..., d)``.
            labels: ``(R,)`` integers, one for each of the ``R`` hidden states, or -100 where none counts. The head must
                have no bias.
            scale: multiplies the logits of the loss.

        Returns:
            ``(..., vocab)``; with labels the summed cross-entropy ``()`` of :func:`mamba2_hf.ops.linear_cross_entropy`.
        """
        if labels is None:
            return linear(hidden_states, self.weight, self.bias)
        return linear_cross_entropy(hidden_states.flatten(0, -2), self.weight, labels, scale=scale)
