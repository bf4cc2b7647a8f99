"""The causal convolution and its update: arguments, contract, and the choice of a backend."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..checks import (
    check_devices,
    check_floating,
    check_packing,
    check_rank,
    check_shape,
    check_sizes,
    check_slots,
    fail,
)
from ..runtime.modes import needs_grad
from ..spec import UNPACKED, Index, Packing, State

ACTIVATIONS = {None: None, "silu": "silu", "swish": "silu"}
"""By name: what ``torch.nn.functional`` and ``kernels.activate`` call it."""


class Conv(NamedTuple):
    """Arguments of :func:`causal_conv1d`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    initial_states: Tensor | None = None
    packing: Packing = UNPACKED
    activation: str | None = None


class ConvUpdate(NamedTuple):
    """Arguments of :func:`causal_conv1d_update`."""

    x: Tensor
    conv_state: State
    weight: Tensor
    bias: Tensor | None = None
    activation: str | None = None
    slots: Index | None = None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time, channels last, with an optional activation.

    Args:
        x: ``(B, T, C)``; may be a view into a wider tensor. Channels that are no neighbors in memory cost a copy.
        weight: ``(C, K)``; tap ``K - 1`` multiplies the current token.
        bias: ``(C,)``.
        activation: ``None``, ``"silu"`` or ``"swish"`` (the same function).
        initial_states: ``(B, C, K - 1)`` inputs before the first token (``(S, C, K - 1)`` with ``cu_seqlens``).
        seq_idx, cu_seqlens: as in :func:`ssd_chunk_scan`; no tap reaches into another document. A negative ``seq_idx``
            marks padding, which comes out as zeros.
        return_final_states: whether to return each sequence's last ``K - 1`` inputs, shaped as ``initial_states``.
        backend: as in :func:`ssd_chunk_scan`.

    Returns:
        ``y (B, T, C)`` in the dtype of ``x``; with ``return_final_states`` also the states.

    Raises:
        ArgumentError, BackendError: as in :func:`ssd_chunk_scan`.
    """
    call = Conv(x, weight, bias, initial_states, Packing(seq_idx, cu_seqlens), activation)
    check_conv(call)
    backend = dispatch.choose(
        *("causal_conv1d", x.device, backend), taps=weight.shape[1], dtype=x.dtype, activation=activation
    ).name
    y, states = dispatch.backend_module(backend).causal_conv1d(call)
    return (y, states) if return_final_states else y


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    slots: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`causal_conv1d` for one token or a short block, with the last inputs kept in ``conv_state`` (in place).

    Args:
        x: ``(B, C)`` or ``(B, T, C)``.
        conv_state: ``(B, C, L)``, the last ``L >= K - 1`` inputs, newest last. With ``slots``, ``(S, C, L)``.
        weight, bias, activation, backend: as in :func:`causal_conv1d`.
        slots: as in :func:`ssd_state_update`.

    Returns:
        ``y``, shaped as ``x``.

    Raises:
        ArgumentError, BackendError: as in :func:`ssd_chunk_scan`.
    """
    block = x.unsqueeze(1) if x.dim() == 2 else x
    call = ConvUpdate(block, conv_state, weight, bias, activation, slots)
    y: Tensor | None = dispatch.again("causal_conv1d_update", call, backend)
    if y is None:
        check_conv_update(call)
        backend = dispatch.choose(
            *("causal_conv1d_update", x.device, backend),
            taps=weight.shape[1],
            dtype=x.dtype,
            activation=activation,
            differentiable=needs_grad(x, weight, bias),
        ).name
        y = dispatch.backend_module(backend).causal_conv1d_update(call)
    return y.squeeze(1) if x.dim() == 2 else y


def check_conv(call: Conv) -> int:
    """Contract of ``causal_conv1d``; returns the number of states in and out, raises :class:`ArgumentError`."""
    x, weight, bias, initial_states, packing, activation = call
    check_rank("x", x, 3, "(B, T, C)")
    check_floating(x=x)
    batch, tokens, channels = x.shape
    check_sizes("x", x, *x.shape)
    taps = _check_taps(channels, weight, bias, activation)
    states = check_packing(batch, tokens, packing)
    if initial_states is not None:
        check_shape("initial_states", initial_states, (states, channels, taps - 1), "(B or S, C, K - 1)")
    check_devices(x.device, **call._asdict(), seq_idx=packing.seq_idx)
    return states


def check_conv_update(call: ConvUpdate) -> None:
    """Contract of ``causal_conv1d_update``; raises :class:`ArgumentError`."""
    x, conv_state, weight, bias, activation, slots = call
    if x.dim() != 3:
        fail(f"x has shape {tuple(x.shape)}, expected (B, T, C) for a short block, or (B, C)")
    taps = _check_taps(x.shape[-1], weight, bias, activation)
    check_rank("conv_state", conv_state, 3, "(B, C, L)")
    rows = x.shape[0] if slots is None else conv_state.shape[0]
    if slots is not None:
        check_slots(slots, x)
    if tuple(conv_state.shape[:2]) != (rows, x.shape[-1]) or conv_state.shape[2] < taps - 1:
        fail(
            f"conv_state has shape {tuple(conv_state.shape)}, expected (B, C, L) with "
            f"B = {rows}, C = {x.shape[-1]} and L >= K - 1 = {taps - 1}"
        )
    check_devices(x.device, **call._asdict())


def _check_taps(channels: int, weight: Tensor, bias: Tensor | None, activation: str | None) -> int:
    check_rank("weight", weight, 2, "(C, K)")
    check_shape("weight", weight, (channels, weight.shape[1]), "(C, K)")
    if bias is not None:
        check_shape("bias", bias, (channels,), "(C,)")
    check_activation(activation)
    return weight.shape[1]


def check_activation(activation: str | None) -> None:
    """Raises unless there is such an activation."""
    if activation not in ACTIVATIONS:
        fail(f"activation is {activation!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")


def activate(y: Tensor, activation: str | None, *, inplace: bool = False) -> Tensor:
    """The activation of ``y``, written over it where ``inplace``."""
    check_activation(activation)
    name = ACTIVATIONS[activation]
    return y if name is None else getattr(F, name)(y, inplace=inplace)
