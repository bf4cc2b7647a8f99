"""A depthwise causal convolution that knows documents and states, through its module where that has to be called."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import ops
from ..errors import BackendError
from .causal_conv1d import CausalConv1d, LastInputs, convolve, convolve_by
from .sequence import SequenceLayout
from .weights import plain_weight


def causal_convolution(
    conv1d: Any, taps: int, x: Tensor, initial: Tensor | None, layout: SequenceLayout, activation: str | None
) -> tuple[Tensor, Tensor]:
    """Convolves ``x (B, T, C)`` and returns the result and every document's last inputs, ``(S, C, K - 1)``.

    Args:
        conv1d: a :class:`CausalConv1d`, or what wraps one and is called as an ``nn.Conv1d``.
        taps: K.
        x: the input.
        initial: ``(S, C, K - 1)``, what was before each document; None for zeros.
        layout: the documents.
        activation: ``"silu"`` (``"swish"``) or None.
    """
    weight = plain_weight(conv1d)
    if weight is not None:
        return convolve(x, weight.squeeze(1), conv1d.bias, layout, initial, activation)
    if ops.is_batch_invariant():
        raise BackendError(
            f"batch_invariant() cannot see the sums of a {type(conv1d).__name__} that is wrapped, hooked or sharded: "
            "merge adapters, take hooks off"
        )
    if type(conv1d).forward is CausalConv1d.forward and ("forward" not in vars(conv1d) or hasattr(conv1d, "_hf_hook")):
        left = LastInputs()
        y, final = conv1d(x.mT, layout, initial, left).mT, left.value
        assert final is not None
    else:
        y, final = convolve_by(conv1d, taps, x, layout, initial)
    return ops.activate(y, activation), final
