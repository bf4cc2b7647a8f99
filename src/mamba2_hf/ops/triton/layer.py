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

from ..checks import SSDShape
from ..torch.modes import without_autocast
from . import inner, norm
from .calls import call
from .inner import Mixer
from .launch import cdiv, launch
from .norm import norm_backward, norm_forward

BLOCK, WARPS = 2048, 8


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

    def mixer(self, zxbcdt: Tensor, A: Tensor) -> Mixer:
        """What is between the projections."""
        return Mixer(
            inner.Arguments(
                *(zxbcdt, self.conv_weight, self.conv_bias, self.dt_bias, A, self.D, self.gated_norm_weight),
                *(None, None, self.seq_idx, self.cu_seqlens, self.head_dim, self.n_groups, self.silu),
                *(self.gated_norm_eps, self.group_size, self.norm_before_gate, False, self.low, self.high),
            )
        )

    def cast(self, tensor: Tensor | None) -> Any:
        """A projection's weight or bias as its product takes it."""
        return None if tensor is None else tensor.to(self.dtype)


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
) -> Tensor:
    """See :func:`mamba2_hf.ops.mamba2_layer`."""
    out: Tensor = call(
        "mamba2_layer",
        *(stream, norm_weight, in_weight, in_bias, conv_weight, conv_bias, dt_bias, A_log, D, gated_norm_weight),
        *(out_weight, out_bias, seq_idx, cu_seqlens, shape.head_dim, shape.groups, activation is not None),
        *(norm_eps, gated_norm_eps, group_size, norm_before_gate, *map(float, dt_limit), dtype),
        in_weight.requires_grad or out_weight.requires_grad,
    )[0]
    return out


def layer_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stream after the layer; and for the backward the outputs of in_proj and of the scan, and A."""
    call = Arguments(*args)
    with without_autocast(call.stream.device):
        width = call.stream.shape[-1]
        normed = norm_forward(call.stream, None, call.norm_weight, call.norm_eps, width, False, call.dtype)
        zxbcdt = F.linear(normed, call.cast(call.in_weight), call.cast(call.in_bias))
        del normed
        A = torch.exp(call.A_log.float()).neg_()
        mixer = call.mixer(zxbcdt, A)
        y, _ = mixer.scanned()
        mixed = F.linear(mixer.normed(y, call.gated_norm_weight), call.cast(call.out_weight), call.cast(call.out_bias))
        return add(call.stream, mixed), zxbcdt, y, A


def layer_backward(dstream: Tensor, zxbcdt: Tensor, y: Tensor, A: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the twelve tensors that open :class:`Arguments`, given that of the stream after the layer, and what
    :func:`layer_forward` left.
    """
    call = Arguments(*args)
    with without_autocast(dstream.device):
        dstream = dstream.contiguous()
        dmixed = dstream.to(call.dtype).flatten(0, 1)
        mixer = call.mixer(zxbcdt, A)
        du = _new(zxbcdt)
        dnormed = torch.mm(dmixed, call.cast(call.out_weight)).view_as(y)
        normed = _new(y) if call.trains else None
        dy, dgated_norm = mixer.norm_backward(dnormed, y, call.gated_norm_weight, du, normed)
        dout = _weight_gradients(dmixed, normed, call.out_weight, call.out_bias)
        del dmixed, dnormed, normed
        dconv, dconv_bias, dbias, dA, dD, _, _ = mixer.backward(dy, None, None, du)
        assert dA is not None  # it always trains
        dA_log = (dA * A).to(call.A_log.dtype)
        del mixer, dy
        flat = du.flatten(0, 1)
        dnormed = torch.mm(flat, call.cast(call.in_weight)).view_as(dstream)
        normed = _new(dnormed) if call.trains else None
        dx, _, dnorm = norm_backward(
            *(dnormed, call.stream, None, call.norm_weight, call.norm_eps, dstream.shape[-1], False),
            more=dstream,
            y=normed,
        )
        din = _weight_gradients(flat, normed, call.in_weight, call.in_bias)
        return dx, dnorm, *din, dconv, dconv_bias, dbias, dA_log, dD, dgated_norm, *dout


def add(stream: Tensor, mixed: Tensor) -> Tensor:
    """``stream + mixed`` in the dtype of the stream; PyTorch is slow where that is not the other's."""
    stream, total = stream.contiguous(), _new(stream)
    size = stream.numel()
    launch(add_kernel, (cdiv(size, BLOCK),), stream, mixed, total, size, BLOCK=BLOCK, num_warps=WARPS)
    return total


def _weight_gradients(
    dy: Tensor, x: Tensor | None, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Of a projection from ``x (B, T, d)``, None where it does not train, to what has the gradient ``dy (B T, d')``."""
    dweight = None if x is None else torch.mm(dy.t(), x.flatten(0, 1)).to(weight.dtype)
    return dweight, None if bias is None else dy.sum(0).to(bias.dtype)


def _new(like: Tensor) -> Tensor:
    """Memory for a tensor like a dense one."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)
