"""Training on Triton: a mixer between its projections, and a whole layer around it, each as one op.

Of a mixer only the inputs are kept. Its backward runs the convolution and the scan once more, then the three backwards,
each of which writes its part of the gradient of the in_proj output where it belongs.

Of a layer the stream, the output of in_proj and that of the scan are kept. With the weight matrices inside of the op,
the norms' backward kernels write what the weights' gradients are products with: both normed tensors are made again on
the way, neither kept nor computed by a kernel of their own, and the scan runs once. The gradient that passes by the
layer is added where that of the norm is computed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import flops
from ..conv.op import Conv
from ..conv.triton import conv_backward, conv_forward, documents
from ..norm.op import Norm
from ..norm.triton import norm_backward, norm_forward
from ..runtime import tables
from ..runtime.launch import launch
from ..runtime.modes import without_autocast
from ..runtime.op import op
from ..runtime.tables import cdiv
from ..scan.op import Scan
from ..scan.problem import Into
from ..scan.triton import ScanPasses
from ..spec import LayerWeights, Linear, LowRank, MixerWeights, Packing
from .op import Inner, Layer


class Mixer:
    """One call: what its forward and its backward have in common is computed once.

    Args:
        call: the arguments.
    """

    def __init__(self, call: Inner) -> None:
        self.call, self.shape = call, call.shape
        weights, heads, inner = call.weights, self.shape.heads, self.shape.heads * self.shape.head_dim
        self.widths = inner, self.shape.groups * self.shape.state, heads
        self.z = call.zxbcdt[..., :inner]
        self.conv = Conv(
            *(call.zxbcdt[..., inner:-heads], weights.conv_weight, weights.conv_bias, call.conv_initial_states),
            *(call.packing, call.spec.activation),
        )
        self.packing = documents(call.zxbcdt, call.packing)
        self.convolved, self.conv_state = conv_forward(self.conv, self.packing, states=call.states)
        self.scan = ScanPasses(self._scan())

    def _scan(self) -> Scan:
        """Arguments of the scan. Without a norm the gate is the scan's own."""
        call, weights, (inner, maps, heads) = self.call, self.call.weights, self.widths
        x, B, C = self._heads_and_groups(*self.convolved.split([inner, maps, maps], -1))
        dt, packing, documents = call.zxbcdt[..., -heads:], call.packing, self.packing
        stateless = call.ssm_initial_states is None and not call.states
        if documents.ids is not None and packing.cu_seqlens is not None and stateless:
            # Documents without states of their own need no chunks of their own. Past the last one the convolution has
            # left zeros.
            packing = Packing(documents.ids[None])
            dt = dt.masked_fill((documents.ids[None] == documents.states)[..., None], 0.0)
        return Scan(
            *(x, dt, weights.rates, B, C, weights.D),
            self.z.unflatten(-1, (heads, -1)) if weights.gated_norm_weight is None else None,
            *(weights.dt_bias, call.ssm_initial_states, packing, True, call.spec.dt_limit),
        )

    def _heads_and_groups(self, x: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, T, H, P)`` and twice ``(B, T, G, N)``."""
        groups = (self.shape.groups, -1)
        return x.unflatten(-1, (-1, self.shape.head_dim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def scanned(self) -> tuple[Tensor, Tensor]:
        """The scan's output ``(B, T, H P)`` and final states."""
        y, states = self.scan.forward()
        return y.flatten(-2), states

    def norm(self, y: Tensor) -> Norm:
        """Arguments of the gated norm of the scan's output."""
        weight, spec = self.call.weights.gated_norm_weight, self.call.spec
        assert weight is not None  # asked for where there is one
        return Norm(y, self.z, weight, spec.gated_norm_eps, spec.group_size, spec.norm_before_gate, y.dtype)

    def norm_backward(self, dy: Tensor, y: Tensor, du: Tensor, again: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From the gradient of the gated norm of ``y`` to those of ``y`` and the weight; that of z goes to its place in
        ``du``, what the forward returned to ``again``.
        """
        found = norm_backward(dy, self.norm(y), dz=du[..., : self.z.shape[-1]], y=again)
        return found.x, found.weight

    def backward(
        self, dy: Tensor, dconv_state: Tensor | None, dssm_state: Tensor | None, du: Tensor, dnorm: Tensor | None
    ) -> tuple[MixerWeights, Tensor | None, Tensor | None]:
        """From the gradients of the scan's output and of the gated norm's weight to those of all weights and of both
        initial states. That of ``zxbcdt`` goes to ``du``, but for z's where there is a norm. Called once.
        """
        inner, maps, heads = self.widths
        dconvolved = torch.empty_like(self.convolved)
        into = Into(*self._heads_and_groups(*dconvolved.split([inner, maps, maps], -1)), du[..., -heads:])
        found: tuple[Any, ...] = self.scan.backward(dy.unflatten(-1, (heads, -1)), dssm_state, into)
        _, _, dA, _, _, dD, dz, dbias, dssm = found
        del self.convolved, self.scan, found  # what follows wants their memory
        if dz is not None:
            du[..., :inner] = dz.flatten(-2)
        conv = conv_backward(dconvolved, dconv_state, self.conv, self.packing, dx=du[..., inner:-heads])
        return MixerWeights(conv.weight, conv.bias, dbias, dA, None, dD, dnorm), conv.initial, dssm


def _inner_fake(call: Inner) -> tuple[Tensor, Tensor, Tensor]:
    u, (_, _, heads, P, _, N, states), weight = call.zxbcdt, call.shape, call.weights.conv_weight
    y = u.new_empty(*u.shape[:2], heads * P)
    if not call.states:
        return y, u.new_empty(0), u.new_empty(0)
    final = u.new_empty(states, heads, P, N, dtype=torch.float32)
    return y, u.new_empty(states, weight.shape[0], weight.shape[1] - 1), final


def _inner_flops(call: Any) -> int:
    weights, spec = call.weights, call.spec
    channels, heads = weights.conv_weight[0], (weights.A or weights.A_log)[0]
    return flops.inner(call.zxbcdt, channels, heads, spec.head_dim, spec.n_groups, call.packing.cu_seqlens)


@op("mamba2_inner", fake=_inner_fake, flops=(_inner_flops, lambda call: flops.BACKWARD * _inner_flops(call)))
def mamba2_inner(call: Inner) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.mamba2_inner`; states that are not asked for are empty."""
    mixer = Mixer(call)
    y, ssm_state = mixer.scanned()
    if call.weights.gated_norm_weight is not None:
        y = norm_forward(mixer.norm(y))
    return y, mixer.conv_state, ssm_state if call.states else y.new_empty(0)


@mamba2_inner.backward
def _inner_backward(
    call: Inner, dy: Tensor, dconv_state: Tensor | None, dssm_state: Tensor | None
) -> tuple[Tensor, MixerWeights, Tensor | None, Tensor | None]:
    u = call.zxbcdt
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    mixer = Mixer(call)
    dnorm = None
    if call.weights.gated_norm_weight is not None:
        dy, dnorm = mixer.norm_backward(dy, mixer.scanned()[0], du)
    return du, *mixer.backward(dy, dconv_state, dssm_state, du, dnorm)


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


def _layer_fake(call: Layer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, heads = call.stream.shape[:2], call.weights.mixer.heads
    products = call.stream.new_empty(0, dtype=call.dtype)
    return (
        call.stream.new_empty(call.stream.shape),
        products.new_empty(*rows, call.weights.in_proj.weight.shape[0]),
        products.new_empty(*rows, heads * call.spec.head_dim),
        products.new_empty(heads, dtype=torch.float32),
    )


def _layer_parts(call: Any) -> tuple[int, int, int]:
    """Operations of the projections, of what LoRA adds to them, and of the scan."""
    rows, linears = call.stream[0] * call.stream[1], (call.weights.in_proj, call.weights.out_proj)
    weights = sum(flops.product(rows, linear.weight) for linear in linears)
    lora = sum(flops.product(rows, factor) for linear in linears for factor in linear[2:4] if factor is not None)
    return weights, lora, _inner_flops(Inner(call.stream, call.weights.mixer, call.spec, call.packing))


def _layer_backward_flops(call: Any) -> int:
    weights, lora, scan = _layer_parts(call)
    return weights * (1 + call.trains) + 2 * lora + flops.BACKWARD * scan


@op("mamba2_layer", fake=_layer_fake, kept=3, flops=(lambda call: sum(_layer_parts(call)), _layer_backward_flops))
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
def _layer_backward(call: Layer, dstream: Tensor, zxbcdt: Tensor, y: Tensor, A: Tensor) -> tuple[Tensor, LayerWeights]:
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
    block, warps = tables.ADD
    launch(add_kernel, (cdiv(size, block),), stream, mixed, total, size, BLOCK=block, num_warps=warps)
    return total


def _new(like: Tensor) -> Tensor:
    """Memory for a tensor like a dense one."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)
