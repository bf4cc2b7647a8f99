"""A whole layer for training: norm, projections, mixer and residual as one op.

Kept are the stream, the output of in_proj and that of the scan. With the weight matrices inside of the op, the norms'
backward kernels write what the weights' gradients are products with: both normed tensors are made again on the way,
neither kept nor computed by a kernel of their own, and the scan runs once. The gradient that passes by the layer is
added where that of the norm is computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..checks import LowRank, SSDShape
from ..norm import triton as norm
from ..norm.triton import norm_backward, norm_forward
from ..runtime.launch import cdiv, launch
from ..runtime.modes import without_autocast
from ..runtime.op import call
from . import inner
from .inner import Mixer

BLOCK, WARPS = 2048, 8
_NO_LORA = (None, None, 0.0)


@triton.jit
def add_kernel(a, b, total, size, BLOCK: tl.constexpr):
    """``total = a + b`` in fp32, a block of it."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    value = tl.load(a + i, mask=mask).to(tl.float32) + tl.load(b + i, mask=mask).to(tl.float32)
    tl.store(total + i, value.to(total.dtype.element_ty), mask=mask)


class Arguments(NamedTuple):
    """The op's arguments, in one order for forward, backward and autograd."""

    stream: Tensor
    norm_weight: Tensor
    in_weight: Tensor
    in_bias: Tensor | None
    conv_weight: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor | None
    A_log: Tensor
    D: Tensor | None
    gated_norm_weight: Tensor
    out_weight: Tensor
    out_bias: Tensor | None
    in_down: Tensor | None
    in_up: Tensor | None
    out_down: Tensor | None
    out_up: Tensor | None
    seq_idx: Tensor | None
    cu_seqlens: Tensor | None
    head_dim: int
    n_groups: int
    silu: bool
    norm_eps: float
    gated_norm_eps: float
    group_size: int
    norm_before_gate: bool
    low: float
    high: float
    dtype: torch.dtype  # of the products
    trains: bool  # whether gradients of the projections' weights are wanted
    in_scale: float
    out_scale: float

    def entering(self) -> Projection:
        """in_proj."""
        return Projection(self, self.in_weight, self.in_bias, _lora(self.in_down, self.in_up, self.in_scale))

    def leaving(self) -> Projection:
        """out_proj."""
        return Projection(self, self.out_weight, self.out_bias, _lora(self.out_down, self.out_up, self.out_scale))

    def mixer(self, zxbcdt: Tensor, A: Tensor) -> Mixer:
        """What is between the projections."""
        return Mixer(
            inner.Arguments(
                *(zxbcdt, self.conv_weight, self.conv_bias, self.dt_bias, A, self.D, self.gated_norm_weight),
                *(None, None, self.seq_idx, self.cu_seqlens, self.head_dim, self.n_groups, self.silu),
                *(self.gated_norm_eps, self.group_size, self.norm_before_gate, False, self.low, self.high),
            )
        )


class Projection:
    """One of the projections and, where there is one, what LoRA adds to it.

    Args:
        call: what it is a part of.
        weight, bias: ``(d', d)`` and ``(d',)``.
    """

    def __init__(self, call: Arguments, weight: Tensor, bias: Tensor | None, lora: LowRank | None) -> None:
        self.dtype, self.trains = call.dtype, call.trains
        self.weight, self.bias, self.lora = weight, bias, lora

    @property
    def needs_input(self) -> bool:
        """Whether gradients of weights are wanted."""
        return self.trains or self.lora is not None

    def cast(self, tensor: Tensor) -> Tensor:
        """A weight or bias as its product takes it."""
        return tensor.to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, d)`` to ``(B, T, d')``."""
        y = F.linear(x, self.cast(self.weight), None if self.bias is None else self.cast(self.bias))
        if self.lora is not None:
            lowered = self._lowered(self.lora, x.flatten(0, 1))
            y.flatten(0, 1).addmm_(lowered, self.cast(self.lora.up).t(), alpha=self.lora.scale)
        return y

    def input_gradient(self, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        """From ``(B T, d')`` to ``(B T, d)``, and what reached LoRA's ``(B T, r)`` on the way."""
        dx = torch.mm(dy, self.cast(self.weight))
        if self.lora is None:
            return dx, None
        dlowered = torch.mm(dy, self.cast(self.lora.up))
        return dx.addmm_(dlowered, self.cast(self.lora.down), alpha=self.lora.scale), dlowered

    def weight_gradients(self, dy: Tensor, dlowered: Tensor | None, x: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of weight, bias and LoRA's down and up, given the input where it is needed; of the weight None where it does
        not train.
        """
        flat = None if x is None else x.flatten(0, 1)
        dweight = torch.mm(dy.t(), flat).to(self.weight.dtype) if self.trains and flat is not None else None
        dbias = None if self.bias is None else dy.sum(0).to(self.bias.dtype)
        if self.lora is None or dlowered is None or flat is None:
            return dweight, dbias, None, None
        down, up, scale = self.lora
        # With a beta of 0 the first argument is not read.
        ddown = torch.addmm(self.cast(down), dlowered.t(), flat, beta=0, alpha=scale)
        dup = torch.addmm(self.cast(up), dy.t(), self._lowered(self.lora, flat), beta=0, alpha=scale)
        return dweight, dbias, ddown.to(down.dtype), dup.to(up.dtype)

    def _lowered(self, lora: LowRank, x: Tensor) -> Tensor:
        """``(B T, r)``."""
        return torch.mm(x, self.cast(lora.down).t())


def supports(
    *, shape: SSDShape, dtype: torch.dtype, stream: torch.dtype, width: int, taps: int, group_size: int
) -> tuple[bool, str]:
    """Whether all parts of a layer can be served, and why (not)."""
    parts = (
        norm.supports(group_size=width, dtype=stream),
        inner.supports(shape=shape, dtype=dtype, taps=taps, group_size=group_size),
    )
    return next((part for part in parts if not part[0]), (True, "the Triton layer serves it"))


def mamba2_layer(
    stream: Tensor,
    *,
    norm_weight: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor | None,
    gated_norm_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    shape: SSDShape,
    dtype: torch.dtype,
    activation: str | None,
    norm_eps: float,
    gated_norm_eps: float,
    group_size: int,
    norm_before_gate: bool,
    dt_limit: tuple[float, float],
    chunk_size: int | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    in_lora: LowRank | None,
    out_lora: LowRank | None,
) -> Tensor:
    """See :func:`mamba2_hf.ops.mamba2_layer`."""
    in_down, in_up, in_scale = in_lora or _NO_LORA
    out_down, out_up, out_scale = out_lora or _NO_LORA
    out: Tensor = call(
        "mamba2_layer",
        *(stream, norm_weight, in_weight, in_bias, conv_weight, conv_bias, dt_bias, A_log, D, gated_norm_weight),
        *(out_weight, out_bias, in_down, in_up, out_down, out_up),
        *(seq_idx, cu_seqlens, shape.head_dim, shape.groups, activation is not None),
        *(norm_eps, gated_norm_eps, group_size, norm_before_gate, *map(float, dt_limit), dtype),
        *(in_weight.requires_grad or out_weight.requires_grad, float(in_scale), float(out_scale)),
    )[0]
    return out


def layer_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stream after the layer; and for the backward the outputs of in_proj and of the scan, and A."""
    call = Arguments(*args)
    with without_autocast(call.stream.device):
        width = call.stream.shape[-1]
        normed = norm_forward(call.stream, None, call.norm_weight, call.norm_eps, width, False, call.dtype)
        zxbcdt = call.entering().forward(normed)
        del normed
        A = torch.exp(call.A_log.float()).neg_()
        mixer = call.mixer(zxbcdt, A)
        y, _ = mixer.scanned()
        mixed = call.leaving().forward(mixer.normed(y, call.gated_norm_weight))
        return add(call.stream, mixed), zxbcdt, y, A


def layer_backward(dstream: Tensor, zxbcdt: Tensor, y: Tensor, A: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the sixteen tensors that open :class:`Arguments`, given that of the stream after the layer, and what
    :func:`layer_forward` left.
    """
    call = Arguments(*args)
    with without_autocast(dstream.device):
        dstream = dstream.contiguous()
        dmixed = dstream.to(call.dtype).flatten(0, 1)
        mixer = call.mixer(zxbcdt, A)
        du = _new(zxbcdt)
        leaving = call.leaving()
        dnormed, dlowered = leaving.input_gradient(dmixed)
        normed = _new(y) if leaving.needs_input else None
        dy, dgated_norm = mixer.norm_backward(dnormed.view_as(y), y, call.gated_norm_weight, du, normed)
        dout, dout_bias, *dout_lora = leaving.weight_gradients(dmixed, dlowered, normed)
        del dmixed, dnormed, normed
        dconv, dconv_bias, dbias, dA, dD, _, _ = mixer.backward(dy, None, None, du)
        assert dA is not None  # it always trains
        dA_log = (dA * A).to(call.A_log.dtype)
        del mixer, dy
        flat = du.flatten(0, 1)
        entering = call.entering()
        dnormed, dlowered = entering.input_gradient(flat)
        dnormed = dnormed.view_as(dstream)
        normed = _new(dnormed) if entering.needs_input else None
        dx, _, dnorm = norm_backward(
            *(dnormed, call.stream, None, call.norm_weight, call.norm_eps, dstream.shape[-1], False),
            more=dstream,
            y=normed,
        )
        din, din_bias, *din_lora = entering.weight_gradients(flat, dlowered, normed)
        return (
            *(dx, dnorm, din, din_bias, dconv, dconv_bias, dbias, dA_log, dD, dgated_norm, dout, dout_bias),
            *(*din_lora, *dout_lora),
        )


def add(stream: Tensor, mixed: Tensor) -> Tensor:
    """``stream + mixed`` in the dtype of the stream; PyTorch is slow where that is not the other's."""
    stream, total = stream.contiguous(), _new(stream)
    size = stream.numel()
    launch(add_kernel, (cdiv(size, BLOCK),), stream, mixed, total, size, BLOCK=BLOCK, num_warps=WARPS)
    return total


def _lora(down: Tensor | None, up: Tensor | None, scale: float) -> LowRank | None:
    return None if down is None or up is None else LowRank(down, up, scale)


def _new(like: Tensor) -> Tensor:
    """Memory for a tensor like a dense one."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)
