"""A whole layer for training: norm, projections, mixer and residual as one op.

Kept are the stream, the output of in_proj and that of the scan. With the weight matrices inside of the op, the norms'
backward kernels write what the weights' gradients are products with: both normed tensors are made again on the way,
neither kept nor computed by a kernel of their own, and the scan runs once. The gradient that passes by the layer is
added where that of the norm is computed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..norm import triton as norm
from ..norm.op import Norm
from ..norm.triton import norm_backward, norm_forward
from ..runtime.launch import launch
from ..runtime.modes import without_autocast
from ..runtime.op import op
from ..runtime.tables import cdiv
from ..spec import LayerWeights, Linear, LowRank
from . import inner
from .inner import Mixer
from .op import Layer

BLOCK, WARPS = 2048, 8


@triton.jit
def add_kernel(a, b, total, size, BLOCK: tl.constexpr):
    """``total = a + b`` in fp32, a block of it."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    value = tl.load(a + i, mask=mask).to(tl.float32) + tl.load(b + i, mask=mask).to(tl.float32)
    tl.store(total + i, value.to(total.dtype.element_ty), mask=mask)


class Projection:
    """One of a layer's projections and, where there is one, what LoRA adds to it."""

    def __init__(self, call: Layer, linear: Linear) -> None:
        self.dtype, self.trains = call.dtype, call.trains
        self.weight, self.bias, self.lora = linear.weight, linear.bias, linear.lora

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

    def weight_gradients(self, dy: Tensor, dlowered: Tensor | None, x: Tensor | None) -> Linear:
        """Of weight, bias and LoRA's down and up, given the input where it is needed; of the weight None where it does
        not train.
        """
        flat = None if x is None else x.flatten(0, 1)
        dweight: Any = torch.mm(dy.t(), flat).to(self.weight.dtype) if self.trains and flat is not None else None
        dbias = None if self.bias is None else dy.sum(0).to(self.bias.dtype)
        if self.lora is None or dlowered is None or flat is None:
            return Linear(dweight, dbias)
        down, up, scale = self.lora
        # With a beta of 0 the first argument is not read.
        ddown = torch.addmm(self.cast(down), dlowered.t(), flat, beta=0, alpha=scale)
        dup = torch.addmm(self.cast(up), dy.t(), self._lowered(self.lora, flat), beta=0, alpha=scale)
        return Linear(dweight, dbias, ddown.to(down.dtype), dup.to(up.dtype))

    def _lowered(self, lora: LowRank, x: Tensor) -> Tensor:
        """``(B T, r)``."""
        return torch.mm(x, self.cast(lora.down).t())


def supports(*, stream: torch.dtype, width: int, **call: Any) -> tuple[bool, str]:
    """Whether all parts of a layer can be served, and why (not)."""
    parts = norm.supports(group_size=width, dtype=stream), inner.supports(**call)
    return next((part for part in parts if not part[0]), (True, "the Triton layer serves it"))


def _fake(call: Layer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, heads = call.stream.shape[:2], call.weights.mixer.heads
    products = call.stream.new_empty(0, dtype=call.dtype)
    return (
        call.stream.new_empty(call.stream.shape),
        products.new_empty(*rows, call.weights.in_proj.weight.shape[0]),
        products.new_empty(*rows, heads * call.spec.head_dim),
        products.new_empty(heads, dtype=torch.float32),
    )


@op("mamba2_layer", fake=_fake, kept=3)
def layer(call: Layer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stream after the layer; and for the backward the outputs of in_proj and of the scan, and A."""
    with without_autocast(call.stream.device):
        normed = norm_forward(_norm(call))
        zxbcdt = Projection(call, call.weights.in_proj).forward(normed)
        del normed
        A = call.weights.mixer.rates
        mixer = Mixer(call.mixer(zxbcdt, A))
        y, _ = mixer.scanned()
        mixed = Projection(call, call.weights.out_proj).forward(norm_forward(mixer.norm(y)))
        return add(call.stream, mixed), zxbcdt, y, A


@layer.backward
def _backward(call: Layer, dstream: Tensor, zxbcdt: Tensor, y: Tensor, A: Tensor) -> tuple[Tensor, LayerWeights]:
    with without_autocast(dstream.device):
        dstream = dstream.contiguous()
        dmixed = dstream.to(call.dtype).flatten(0, 1)
        mixer = Mixer(call.mixer(zxbcdt, A))
        du = _new(zxbcdt)
        leaving = Projection(call, call.weights.out_proj)
        dnormed, dlowered = leaving.input_gradient(dmixed)
        normed = _new(y) if leaving.needs_input else None
        dy, dgated_norm = mixer.norm_backward(dnormed.view_as(y), y, du, normed)
        dout = leaving.weight_gradients(dmixed, dlowered, normed)
        del dmixed, dnormed, normed
        dweights, _, _ = mixer.backward(dy, None, None, du, dgated_norm)
        assert dweights.A is not None  # it always trains
        dA_log = (dweights.A * A).to(call.weights.mixer.decay.dtype)
        del mixer, dy
        flat = du.flatten(0, 1)
        entering = Projection(call, call.weights.in_proj)
        dnormed, dlowered = entering.input_gradient(flat)
        dnormed = dnormed.view_as(dstream)
        normed = _new(dnormed) if entering.needs_input else None
        dx, _, dnorm = norm_backward(dnormed, _norm(call), more=dstream, y=normed)
        din = entering.weight_gradients(flat, dlowered, normed)
        return dx, LayerWeights(dnorm, din, dweights._replace(A=None, A_log=dA_log), dout)


def mamba2_layer(call: Layer) -> Tensor:
    """See :func:`mamba2_hf.ops.mamba2_layer`."""
    out: Tensor = layer(call)[0]
    return out


def _norm(call: Layer) -> Norm:
    """Arguments of the norm before the mixer."""
    stream = call.stream
    return Norm(stream, None, call.weights.norm_weight, call.spec.norm_eps, stream.shape[2], False, call.dtype)


def add(stream: Tensor, mixed: Tensor) -> Tensor:
    """``stream + mixed`` in the dtype of the stream; PyTorch is slow where that is not the other's."""
    stream, total = stream.contiguous(), _new(stream)
    size = stream.numel()
    launch(add_kernel, (cdiv(size, BLOCK),), stream, mixed, total, size, BLOCK=BLOCK, num_warps=WARPS)
    return total


def _new(like: Tensor) -> Tensor:
    """Memory for a tensor like a dense one."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)
