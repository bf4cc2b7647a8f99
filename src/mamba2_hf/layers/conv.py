"""A depthwise causal convolution that knows documents and states, through its module where that has to be called."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from .sequence import SequenceLayout
from .weights import plain_weight


def causal_convolution(
    conv1d: nn.Conv1d, taps: int, x: Tensor, initial: Tensor | None, layout: SequenceLayout, activation: str | None
) -> tuple[Tensor, Tensor]:
    """Convolves ``x (B, T, C)`` and returns the result and every document's last inputs, ``(S, C, K - 1)``.

    Args:
        conv1d: depthwise over C channels, padded by K - 1 on both sides; it may be wrapped.
        taps: K.
        x: the input.
        initial: ``(S, C, K - 1)``, what was before each document; None for zeros.
        layout: the documents.
        activation: ``"silu"`` (``"swish"``) or None.
    """
    weight = plain_weight(conv1d)
    channels = x.shape[-1]

    def convolve(weight: Tensor, bias: Tensor | None, activation: str | None) -> tuple[Tensor, Tensor]:
        y, final = ops.causal_conv1d(
            *(x, weight, bias),
            activation=activation,
            initial_states=initial,
            seq_idx=layout.seq_idx,
            cu_seqlens=layout.cu_seqlens,
            return_final_states=True,
        )
        return y, final

    if weight is not None:
        return convolve(weight.squeeze(1), conv1d.bias, activation)
    if layout.is_plain:
        if initial is None:
            initial = x.new_zeros(x.shape[0], channels, taps - 1)
        padded = torch.cat([initial.to(x.dtype), x.transpose(1, 2)], -1)  # (B, C, K - 1 + T)
        y = conv1d(padded)[..., taps - 1 : padded.shape[-1]].transpose(1, 2)
        final = padded[..., padded.shape[-1] - taps + 1 :]
    else:
        # A convolution with one tap set moves tokens without mixing them, and knows documents and states: K of them
        # make the window that the module itself can be called on.
        one_tap = torch.eye(taps, device=x.device, dtype=x.dtype)[:, None].expand(-1, channels, -1)
        moved = [convolve(tap, None, None) for tap in one_tap]
        window = torch.stack([y for y, _ in moved], -1)  # (B, T, C, K)
        y, final = conv1d(window.flatten(0, 1))[..., taps - 1].view_as(x), moved[0][1]
    return ops.activate(y, activation), final
