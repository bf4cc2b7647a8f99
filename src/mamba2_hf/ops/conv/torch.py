"""Causal depthwise convolution in PyTorch.

A sum of K shifted, scaled copies: for the few taps of a Mamba it beats a general convolution and needs no transpose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import document_ids, document_numbers
from ..runtime.modes import plus
from ..slots import step_in_slots
from ..spec import compute_dtype
from .op import Conv, ConvUpdate, activate


def causal_conv1d(call: Conv) -> tuple[Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.causal_conv1d`; always returns the final states too."""
    x, weight, bias, initial_states, (seq_idx, cu_seqlens), activation = call
    batch, tokens, channels = x.shape
    taps = weight.shape[1]
    before = taps - 1
    dtype = compute_dtype(x.dtype)
    w = weight.to(dtype).T.contiguous()  # (K, C): taps whose channels lie side by side, as those of x do

    if cu_seqlens is not None:
        return _conv_packed(x, w, bias, activation, initial_states, cu_seqlens.to(x.device, torch.int64))

    history = x.new_zeros(batch, before, channels) if initial_states is None else initial_states.mT.to(x.dtype)
    padded = torch.cat([history, x], 1)  # (B, K - 1 + T, C)
    final = padded[:, tokens:]  # (B, K - 1, C)
    padded = padded.to(dtype)
    y = _first_tap(padded[:, before:], w[before], bias)
    if seq_idx is None:
        for tap in range(before):
            y = plus(y, padded[:, tap : tap + tokens], w[tap])
    else:
        segment = F.pad(document_numbers(seq_idx), (before, 0))  # the initial state belongs to the first document
        for tap in range(before):
            same = (segment[:, tap : tap + tokens] == segment[:, before:])[..., None]
            y = plus(y, padded[:, tap : tap + tokens] * same, w[tap])
        final = final * (segment[:, tokens:] == segment[:, -1:])[..., None]
    y = _activate(y, activation)
    if seq_idx is not None:
        y = torch.where((seq_idx >= 0)[..., None], y, 0)
    return y.to(x.dtype), final.mT


def _conv_packed(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Documents laid end to end in one row; taps that reach past a document's start read its initial state."""
    tokens, channels = x.shape[1:]
    documents, before = cu_seqlens.shape[0] - 1, w.shape[0] - 1
    owner = document_ids(cu_seqlens, tokens)  # (T,)
    owned, home = (owner < documents)[:, None], owner.clamp(max=documents - 1)
    history = x.new_zeros(documents, before, channels) if initial_states is None else initial_states.mT.to(x.dtype)
    # One table: the documents' histories, then the row itself.
    table = torch.cat([history.flatten(0, 1), x[0]])  # (S (K - 1) + T, C)

    def rows(position: Tensor, document: Tensor) -> Tensor:
        """Row of the table for a position of the flat row, seen from a document."""
        back = position - cu_seqlens[document]  # negative: inside the history
        return torch.where(back < 0, document * before + before + back, documents * before + position)

    positions = torch.arange(tokens, device=x.device)
    y = _first_tap(x[0].to(w.dtype), w[before], bias)
    for tap in range(before):
        y = plus(y, table[rows(positions - (before - tap), home)].to(w.dtype), w[tap])
    y = torch.where(owned, _activate(y, activation), 0).to(x.dtype)[None]

    ends = cu_seqlens[1:, None] - before + torch.arange(before, device=x.device)  # (S, K - 1)
    document = torch.arange(documents, device=x.device)[:, None].expand_as(ends)
    final = table[rows(ends, document)]  # (S, K - 1, C)
    return y, final.mT


def causal_conv1d_update(call: ConvUpdate) -> Tensor:
    """See :func:`mamba2_hf.ops.causal_conv1d_update`."""
    if call.slots is not None:
        return step_in_slots(
            call.conv_state, call.slots, lambda state: causal_conv1d_update(call._replace(conv_state=state, slots=None))
        )
    x, conv_state, weight, bias, activation, _ = call
    dtype = compute_dtype(x.dtype)
    tokens, taps = x.shape[1], weight.shape[1]
    window = torch.cat([conv_state.to(x.dtype), x.mT], -1)  # (B, C, L + T)
    conv_state.copy_(window[..., tokens:])
    window = window[..., window.shape[-1] - tokens - taps + 1 :].to(dtype)  # (B, C, K - 1 + T)
    y = (window.unfold(-1, taps, 1) * weight.to(dtype)[:, None]).sum(-1).mT  # (B, T, C)
    return _activate(y if bias is None else y + bias.to(dtype), activation).to(x.dtype)


def _first_tap(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return x * w if bias is None else torch.addcmul(bias.to(w.dtype), x, w)


def _activate(y: Tensor, activation: str | None) -> Tensor:
    """The activation of ``y``, written over it where no graph is recorded."""
    return activate(y, activation, inplace=not torch.is_grad_enabled())
