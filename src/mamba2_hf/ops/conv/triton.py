"""Launches of the causal convolution and of its update."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..packing import document_ids
from ..runtime import tables
from ..runtime.launch import launch
from ..runtime.op import op
from ..runtime.rows import channels_last, dense, vector_strides
from ..runtime.sums import sum_rows
from ..runtime.tables import cdiv
from ..slots import step_in_slots
from ..spec import UNPACKED, Packing
from .kernels import (
    BY_BOUNDS,
    BY_INDEX,
    NO_PACKING,
    conv_backward_kernel,
    conv_forward_kernel,
    conv_initial_gradient_kernel,
    conv_state_kernel,
    conv_update_kernel,
)
from .op import ACTIVATIONS, Conv, ConvUpdate


class Documents(NamedTuple):
    """Packed documents as the kernels read them."""

    mode: int  # NO_PACKING, BY_INDEX or BY_BOUNDS
    ids: Tensor | None  # (B, T) seq_idx, or (T,) the document of each token, S past the last bound
    bounds: Tensor | None  # (S + 1,)
    states: int  # in and out


def documents(x: Tensor, packing: Packing) -> Documents:
    """Lays out the documents of a row tensor ``x (B, T, ...)``."""
    seq_idx, cu_seqlens = packing
    if cu_seqlens is not None:
        bounds = cu_seqlens.to(x.device)
        return Documents(BY_BOUNDS.value, document_ids(bounds, x.shape[1]), bounds, bounds.shape[0] - 1)
    if seq_idx is not None:
        return Documents(BY_INDEX.value, seq_idx.contiguous(), None, x.shape[0])
    return Documents(NO_PACKING.value, None, None, x.shape[0])


def conv_forward(call: Conv, packing: Documents, *, states: bool = True) -> tuple[Tensor, Tensor]:
    """Launches the convolution: ``y (B, T, C)`` and, if wanted, the final states ``(B or S, C, K - 1)``, contiguous."""
    x, weight, bias, initial, _, activation = call
    batch, tokens, channels = x.shape
    x, initial = channels_last(x), _history_like(initial, x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    vector, strides = vector_strides(x, y)
    block, warps, steps = tables.CONV_FORWARD
    blocks = cdiv(channels, block)
    run = tables.conv_run(batch * tokens, blocks)
    common = dict(MODE=packing.mode, VEC=vector, K=weight.shape[1], BLOCK=block, num_warps=warps)
    launch(
        conv_forward_kernel,
        (batch * cdiv(tokens, run) * blocks,),
        *(x, weight.contiguous(), bias, initial, packing.ids, packing.bounds, y),
        *(tokens, channels, run, packing.states, *strides),
        ACTIVATION=ACTIVATIONS[activation],
        STEPS=steps,
        **common,
    )
    if not states:
        return y, x.new_empty(0)
    final = torch.empty(packing.states, channels, weight.shape[1] - 1, dtype=x.dtype, device=x.device)
    if weight.shape[1] > 1:
        launch(
            conv_state_kernel,
            (packing.states, blocks),
            *(x, initial, packing.ids, packing.bounds, final, tokens, channels, *strides[:2]),
            **common,
        )
    return y, final


class ConvGradients(NamedTuple):
    """Gradients of a convolution's inputs."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial: Tensor | None


def conv_backward(
    dy: Tensor, dfinal: Tensor | None, call: Conv, packing: Documents, *, dx: Tensor | None = None
) -> ConvGradients:
    """Launches the convolution's backward; ``dx`` may name the (strided) tensor that receives the gradient of x."""
    x, weight, bias, initial, _, activation = call
    batch, tokens, channels = x.shape
    taps = weight.shape[1]
    state, dfinal = _history_like(initial, x), _history_like(dfinal, x)
    x, dy = channels_last(x), channels_last(dy)
    if dx is None:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    vector, strides = vector_strides(x, dy, dx)
    block, warps, steps = tables.CONV_BACKWARD
    blocks = cdiv(channels, block)
    run = tables.conv_run(batch * tokens, blocks) - (taps - 1)  # whole steps, with the K - 1 tokens walked twice
    runs = batch * cdiv(tokens, run)
    partial = torch.empty(runs, taps + 1, channels, dtype=torch.float32, device=x.device)
    inputs = (x, weight.contiguous(), bias, state, packing.ids, packing.bounds, dy, dfinal)
    common = dict(
        ACTIVATION=ACTIVATIONS[activation], MODE=packing.mode, VEC=vector, K=taps, BLOCK=block, num_warps=warps
    )
    launch(
        conv_backward_kernel,
        (runs * blocks,),
        *(*inputs, dx, partial, tokens, channels, run, packing.states, *strides),
        STEPS=steps,
        **common,
    )
    dinitial = None
    if initial is not None:
        dinitial = torch.empty(initial.shape, dtype=initial.dtype, device=x.device)
        if taps > 1:
            launch(
                conv_initial_gradient_kernel,
                (packing.states, blocks),
                *(*inputs, dinitial, tokens, channels, packing.states, *strides[:4]),
                **common,
            )
    several = bias is not None and bias.dtype != weight.dtype
    total = sum_rows(partial, torch.float32 if several else weight.dtype)  # (K + 1, C)
    dweight = total[:taps].T.to(weight.dtype).contiguous()
    return ConvGradients(dx, dweight, None if bias is None else total[taps].to(bias.dtype), dinitial)


def _fake(call: Conv) -> tuple[Tensor, Tensor]:
    x, taps = call.x, call.weight.shape[1]
    return x.new_empty(x.shape), x.new_empty(call.packing.states(x.shape[0]), x.shape[2], taps - 1)


@op("causal_conv1d", fake=_fake)
def causal_conv1d(call: Conv) -> tuple[Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.causal_conv1d`; always returns the final states too."""
    return conv_forward(call, documents(call.x, call.packing))


@causal_conv1d.backward
def _backward(call: Conv, dy: Tensor, dfinal: Tensor | None) -> ConvGradients:
    return conv_backward(dy, dfinal, call, documents(call.x, call.packing))


def _history_like(state: Tensor | None, x: Tensor) -> Tensor | None:
    return None if state is None else state.to(x.dtype).contiguous()


@op("causal_conv1d_update", fake=lambda call: call.x.new_empty(call.x.shape))
def causal_conv1d_update(call: ConvUpdate) -> Tensor:
    """See :func:`mamba2_hf.ops.causal_conv1d_update`."""
    x, conv_state, weight, bias, activation, slots = call
    batch, tokens, channels = x.shape
    if tokens > tables.CONV_UPDATE_TOKENS and slots is not None:
        return step_in_slots(
            conv_state, slots, lambda state: causal_conv1d_update(call._replace(conv_state=state, slots=None))
        )
    if tokens > tables.CONV_UPDATE_TOKENS:
        history = conv_state[..., conv_state.shape[2] - weight.shape[1] + 1 :]
        y, _ = conv_forward(Conv(x, weight, bias, history, UNPACKED, activation), documents(x, UNPACKED))
        conv_state.copy_(torch.cat([conv_state, x.mT.to(conv_state.dtype)], -1)[..., tokens:])
        return y
    x = channels_last(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        conv_update_kernel,
        (batch * cdiv(channels, tables.CONV_UPDATE_CHANNELS),),
        *(x, conv_state, weight.contiguous(), dense(bias), y, slots, channels),
        *(*x.stride()[:2], *conv_state.stride()),
        ACTIVATION=ACTIVATIONS[activation],
        T=tokens,
        L=conv_state.shape[2],
        K=weight.shape[1],
        BLOCK=tables.CONV_UPDATE_CHANNELS,
        num_warps=1,
    )
    return y
