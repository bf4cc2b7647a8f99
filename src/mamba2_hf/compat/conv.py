"""The functions of causal_conv1d, over this package's convolution: channels first, as there."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops.slots import step_in_slots


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution over the last dimension, differentiable.

    Args:
        x: ``(B, C, T)``; read in place where its channels are neighbors in memory (``(B, T, C).transpose(1, 2)``).
        weight: ``(C, K)``. bias: ``(C,)``.
        seq_idx: ``(B, T)`` integers, the document of each token; -1 marks padding, which comes out as zeros.
        initial_states: ``(B, C, K - 1)`` inputs before the first token.
        return_final_states: whether to return the last ``K - 1`` inputs as well, in ``final_states_out`` if given.
        activation: None, ``"silu"`` or ``"swish"``.

    Returns:
        ``(B, C, T)``, whose channels are neighbors in memory; with ``return_final_states`` also ``(B, C, K - 1)``.

    Raises:
        ArgumentError: a shape, dtype, device or name does not fit.
    """
    y, states = ops.causal_conv1d(
        x.mT,
        weight,
        bias,
        activation=activation,
        initial_states=initial_states,
        seq_idx=seq_idx,
        return_final_states=True,
    )
    if not return_final_states:
        return y.mT
    if final_states_out is not None:
        states = final_states_out.copy_(states)
    return y.mT, states


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The convolution of one token or a short block; ``conv_state`` is updated in place.

    Args:
        x: ``(B, C)`` or ``(B, C, T)``.
        conv_state: ``(B, C, L)``, the last ``L >= K - 1`` inputs.
        weight, bias, activation: as in :func:`causal_conv1d_fn`.
        cache_seqlens: ``(B,)`` tokens seen before. Given, ``conv_state`` is a ring in which token ``t`` has column
            ``t % L``; else the newest is last.
        conv_state_indices: ``(B,)``, the row of ``conv_state (S, C, L)`` that belongs to each row of ``x``. A row with
            a negative one has no state: its output is zero.

    Returns:
        Shaped as ``x``.

    Raises:
        ArgumentError: a shape, dtype, device or name does not fit.
    """
    block = x if x.dim() == 2 else x.mT
    if cache_seqlens is None:
        y = ops.causal_conv1d_update(block, conv_state, weight, bias, activation=activation, slots=conv_state_indices)
    elif conv_state_indices is None:
        y = _ring_update(block, conv_state, weight, bias, activation, cache_seqlens)
    else:
        y = step_in_slots(
            conv_state,
            conv_state_indices,
            lambda states: _ring_update(block, states, weight, bias, activation, cache_seqlens),
        )
    return y if x.dim() == 2 else y.mT


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last inputs of each document of a flat row.

    Args:
        x: ``(T, C)``.
        cu_seqlens: ``(S + 1,)`` bounds of the documents.
        state_len: inputs of each, L.

    Returns:
        ``(S, C, L)``, zeros where a document is shorter.
    """
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    at = ends + torch.arange(-state_len, 0, device=x.device)  # (S, L)
    taken = x[at.clamp(min=0)]  # (S, L, C)
    return torch.where((at >= starts)[..., None], taken, 0).mT


def _ring_update(
    block: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, seen: Tensor
) -> Tensor:
    """``block (B, C)`` or ``(B, T, C)`` after ``seen (B,)`` tokens, whose last inputs lie in a ring ``(B, C, L)``."""
    rows = block if block.dim() == 3 else block[:, None]
    tokens, length, before = rows.shape[1], state.shape[2], weight.shape[1] - 1
    device = rows.device

    def columns(ages: Tensor) -> Tensor:
        """Columns ``(B, C, n)`` of the inputs ``ages (n,)`` tokens after those seen."""
        return torch.remainder(seen.long()[:, None] + ages, length)[:, None].expand(-1, rows.shape[2], -1)

    history = state.gather(2, columns(torch.arange(-before, 0, device=device))).to(rows.dtype)
    y = ops.causal_conv1d(rows, weight, bias, activation=activation, initial_states=history)
    kept = torch.arange(max(0, tokens - length), tokens, device=device)
    state.scatter_(2, columns(kept), rows[:, kept].mT.to(state.dtype))
    assert isinstance(y, Tensor)  # no states were asked for
    return y if block.dim() == 3 else y[:, 0]
