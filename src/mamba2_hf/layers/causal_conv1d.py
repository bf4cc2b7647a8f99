"""The depthwise causal convolution as a module, and how any convolution is called on documents and states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .. import ops
from .sequence import SequenceLayout

PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)  # torch.export traces with fake tensors
"""Types of tensors whose values are their meaning: others are quantized, sharded, or stand for something else."""


class LastInputs:
    """Holds every document's last inputs, ``(S, C, K - 1)``, once a convolution has been called with it.

    Hooks that move arguments to a module's device hand it on as it is, where they would copy a list.
    """

    value: Tensor | None = None


class CausalConv1d(nn.Conv1d):
    """``nn.Conv1d`` that, told the documents of its input, mixes no token with a later one, with padding or with
    another document. Alone, ``conv1d(x)``, it is ``nn.Conv1d``.
    """

    @classmethod
    def depthwise(cls, channels: int, taps: int, bias: bool) -> CausalConv1d:
        """Returns a convolution of C channels, a filter of K taps each, padded by K - 1 on both sides as in the
        published models.
        """
        return cls(channels, channels, taps, groups=channels, padding=taps - 1, bias=bias)

    def forward(
        self,
        x: Tensor,
        layout: SequenceLayout | None = None,
        initial: Tensor | None = None,
        final: LastInputs | None = None,
    ) -> Tensor:
        """Convolves ``x (B, C, T)``: to ``(B, C, T)``, token by token, where a layout is given.

        Args:
            x: the input.
            layout: of its tokens; None for ``nn.Conv1d``, which returns ``(B, C, T + K - 1)``.
            initial: ``(S, C, K - 1)``, what was before each document; None for zeros.
            final: gets every document's last inputs, as hooks may have changed them.
        """
        if layout is None:
            return super().forward(x)
        x = x.mT
        if type(self.weight) in PLAIN_TENSORS:
            y, last = convolve(x, self.weight.squeeze(1), self.bias, layout, initial)
        else:
            y, last = convolve_by(super().forward, self.kernel_size[0], x, layout, initial)
        if final is not None:
            final.value = last
        return y.mT


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: SequenceLayout,
    initial: Tensor | None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolves ``x (B, T, C)`` with ``weight (C, K)``; returns also every document's last inputs, ``(S, C, K - 1)``.

    Args:
        x: the input.
        weight, bias: ``(C, K)`` and ``(C,)``.
        layout: the documents.
        initial: ``(S, C, K - 1)``, what was before each document; None for zeros.
        activation: of the result.
    """
    y, final = ops.causal_conv1d(
        *(layout.pack(x), weight, bias),
        activation=activation,
        initial_states=initial,
        seq_idx=layout.seq_idx,
        cu_seqlens=layout.cu_seqlens,
        return_final_states=True,
    )
    return layout.unpack(y), final


def convolve_by(
    conv1d: Callable[[Tensor], Tensor], taps: int, x: Tensor, layout: SequenceLayout, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`convolve` by a callable that is padded as ``nn.Conv1d``: ``(B, C, T)`` to ``(B, C, T + K - 1)``."""
    # A convolution with one tap set moves tokens without mixing them, and knows documents and states.
    one_tap = torch.eye(taps, device=x.device, dtype=x.dtype)[:, None].expand(-1, x.shape[-1], -1)
    if layout.seq_idx is None and layout.first is None and (layout.cu_seqlens is None or layout.keep is not None):
        rows = layout.align(x).mT  # (B, C, T), one document each, at the left
        before = 0 if initial is None else taps - 1
        rows = rows if initial is None else torch.cat([initial.to(x.dtype), rows], -1)
        y = layout.unalign(conv1d(rows)[..., before : rows.shape[-1]].mT)
        return y, convolve(x, one_tap[0], None, layout, initial)[1]
    # As many moves as taps make the window of each token, on which any convolution can be called.
    moved = [convolve(x, tap, None, layout, initial) for tap in one_tap]
    window = torch.stack([y for y, _ in moved], -1)  # (B, T, C, K)
    return conv1d(window.flatten(0, 1))[..., taps - 1].view_as(x), moved[0][1]
