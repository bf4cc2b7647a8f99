"""Feed-forward layers on Triton.

A step is two launches, each of which reads its weights while the one before ends (``overlap.py``): the norm with the
products to the inner width and the activation; the product back with the residual. A layer of experts takes two more
before, for its router; the experts' programs find their weights by the router's choice.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import flops
from ..mixer.one_row import _normed_tiles, _project, _weight_tiles, project_back
from ..runtime import tables
from ..runtime.launch import launch
from ..runtime.op import op
from ..runtime.overlap import follow, overlap
from ..runtime.peers import constants, send, sum_number, total
from ..runtime.rows import channels_last, dense
from ..runtime.tables import cdiv, power_of_two
from ..spec import Peers
from .op import ACTIVATIONS, ExpertsStep, Gated, MLPStep


@triton.jit
def _activate(x, KIND: tl.constexpr):
    """SiLU, GELU or the square of ReLU, by their place in ``ACTIVATIONS``; and its derivative."""
    if KIND == 0:
        sigmoid = tl.sigmoid(x)
        value = x * sigmoid
        slope = sigmoid * (1.0 + x - value)
    elif KIND == 1:
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * below
        slope = below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        positive = tl.maximum(x, 0.0)
        value = positive * positive
        slope = 2.0 * positive
    return value, slope


@triton.jit
def gated_kernel(gate, up, dy, y, dgate, dup, width, stride, multiplier, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a row of ``activation(multiplier * gate) * up`` to ``y``; given ``dy``, of the gradients instead.

    Rows of ``gate``, ``up`` and their gradients lie ``stride`` apart, those of ``y`` and ``dy`` behind each other.
    """
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < width
    at, dense_at = row * stride + i, row * width + i
    g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32) * multiplier
    value, slope = _activate(g, KIND)
    u = 1.0 if up is None else tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    if dy is None:
        tl.store(y + dense_at, (value * u).to(y.dtype.element_ty), mask=mask)
    else:
        gradient = tl.load(dy + dense_at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dgate + at, (gradient * u * slope * multiplier).to(dgate.dtype.element_ty), mask=mask)
        if up is not None:
            tl.store(dup + at, (gradient * value).to(dup.dtype.element_ty), mask=mask)


@triton.jit
def mlp_inner_kernel(x, norm_weight, gate, gate_bias, up, up_bias, h, outputs, eps, multiplier,
                     KIND: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                     OVERLAP: tl.constexpr):  # fmt: skip
    """``BN`` channels of ``activation(multiplier * gate(norm(x))) * up(norm(x))``, ``x (WIDTH,)``."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    mask = n < outputs
    weights = _weight_tiles(up, n, mask, WIDTH, BK)
    if gate is not None:
        gates = _weight_tiles(gate, n, mask, WIDTH, BK)
    follow(OVERLAP)
    inputs, scale = _normed_tiles(x, norm_weight, eps, WIDTH, BK)
    dtype: tl.constexpr = h.dtype.element_ty
    value = _project(weights, inputs, scale, up_bias, n, mask, dtype, WIDTH, BK)
    if gate is not None:
        active, _ = _activate(_project(gates, inputs, scale, gate_bias, n, mask, dtype, WIDTH, BK) * multiplier, KIND)
        value *= active
    else:
        value, _ = _activate(value * multiplier, KIND)
    tl.store(h + n, value.to(dtype), mask=mask)


@triton.jit
def router_kernel(x, norm_weight, weight, y, outputs, eps, stride,
                  WIDTH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """``BN`` of the logits ``y (rows, E)`` of ``norm(x)`` for one row of ``x (rows, WIDTH)``, rounded as the weights
    are.
    """
    row, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    mask = n < outputs
    x += row.to(tl.int64) * stride
    y += row * outputs
    weights = _weight_tiles(weight, n, mask, WIDTH, BK)
    follow(OVERLAP)
    inputs, scale = _normed_tiles(x, norm_weight, eps, WIDTH, BK)
    tl.store(y + n, _project(weights, inputs, scale, None, n, mask, weight.dtype.element_ty, WIDTH, BK), mask=mask)


@triton.jit
def choose_kernel(logits, index, weights, experts, E: tl.constexpr, TOP_K: tl.constexpr, K: tl.constexpr,
                  OVERLAP: tl.constexpr):  # fmt: skip
    """The ``TOP_K`` largest of one row of ``logits (rows, experts)`` by ``index (rows, TOP_K)``, and the softmax over
    them.
    """
    row, n, slot = tl.program_id(0), tl.arange(0, E), tl.arange(0, K)
    logits += row * experts
    weights += row * TOP_K
    index += row * TOP_K
    follow(OVERLAP)
    left = tl.load(logits + n, mask=n < experts, other=float("-inf"))
    chosen = tl.full([K], float("-inf"), tl.float32)
    places = tl.zeros([K], tl.int32)
    for i in tl.static_range(TOP_K):
        best, place = tl.max(left, 0), tl.argmax(left, 0)
        chosen, places = tl.where(slot == i, best, chosen), tl.where(slot == i, place, places)
        left = tl.where(n == place, float("-inf"), left)
    share = tl.exp(chosen - tl.max(chosen, 0))
    tl.store(weights + slot, share / tl.sum(share, 0), mask=slot < TOP_K)
    tl.store(index + slot, places, mask=slot < TOP_K)


@triton.jit
def experts_inner_kernel(x, norm_weight, weight, index, h, outputs, eps, stride,
                         KIND: tl.constexpr, GATED: tl.constexpr, TOP_K: tl.constexpr, WIDTH: tl.constexpr,
                         BN: tl.constexpr, BK: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """``BN`` inner channels of one chosen expert of a row, to ``h (rows, TOP_K, outputs)``. All choices of the same
    channels run side by side, so that an expert that several rows chose is read from memory once.
    """
    slot, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    mask = n < outputs
    x += (slot // TOP_K).to(tl.int64) * stride
    follow(OVERLAP)
    rows: tl.constexpr = 2 if GATED else 1
    weight += tl.load(index + slot).to(tl.int64) * (rows * outputs * WIDTH)
    weights = _weight_tiles(weight, n + (rows - 1) * outputs, mask, WIDTH, BK)
    if GATED:
        gates = _weight_tiles(weight, n, mask, WIDTH, BK)
    inputs, scale = _normed_tiles(x, norm_weight, eps, WIDTH, BK)
    dtype: tl.constexpr = h.dtype.element_ty
    value = _project(weights, inputs, scale, None, n, mask, dtype, WIDTH, BK)
    if GATED:
        active, _ = _activate(_project(gates, inputs, scale, None, n, mask, dtype, WIDTH, BK), KIND)
        value *= active
    else:
        value, _ = _activate(value, KIND)
    tl.store(h + slot * outputs + n, value.to(dtype), mask=mask)


@triton.jit
def experts_leave_kernel(h, weight, index, shares, x, y, peers, outputs, factor, stride,
                         TOP_K: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                         PLACE: tl.constexpr, PLACES: tl.constexpr, WORDS: tl.constexpr, CLOCK: tl.constexpr,
                         OVERLAP: tl.constexpr):  # fmt: skip
    """``BN`` channels of a row of ``x`` plus ``factor`` times what its experts make of ``h (rows, TOP_K, WIDTH)``, with
    ``peers`` added up over devices. Without ``x`` nothing is added.
    """
    row, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    mask = n < outputs
    h += row * (TOP_K * WIDTH)
    index += row * TOP_K
    shares += row * TOP_K
    follow(OVERLAP)
    found = tl.zeros([BN], tl.float32)
    for slot in tl.static_range(TOP_K):
        own = weight + tl.load(index + slot).to(tl.int64) * (outputs * WIDTH)
        sums = tl.zeros([BN, BK], tl.float32)
        for i in tl.static_range((WIDTH + BK - 1) // BK):
            k = i * BK + tl.arange(0, BK)
            at = own + n.to(tl.int64)[:, None] * WIDTH + k[None, :]
            tile = tl.load(at, mask=mask[:, None] & (k < WIDTH)[None, :], other=0.0).to(tl.float32)
            sums += tile * tl.load(h + slot * WIDTH + k, mask=k < WIDTH, other=0.0).to(tl.float32)[None, :]
        found += tl.sum(sums, 1) * tl.load(shares + slot)
    found *= factor
    if peers is not None:
        program = row + tl.program_id(1) * tl.num_programs(0)  # in the order in which they start
        number = sum_number(peers, program, tl.num_programs(0) * tl.num_programs(1))
        at = row * outputs + n
        send(peers, number, at, found, mask, PLACE, PLACES, WORDS)
        found = total(peers, number, at, found, mask, PLACE, PLACES, WORDS, CLOCK)
    if x is not None:
        found += tl.load(x + row.to(tl.int64) * stride + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * outputs + n, found.to(y.dtype.element_ty), mask=mask)


def _gated_fake(call: Gated) -> Tensor:
    return call.gate.new_empty(call.halves[0].shape)


@op("gated_activation", fake=_gated_fake)
def gated_activation(call: Gated) -> Tensor:
    """See :func:`mamba2_hf.ops.gated_activation`."""
    call = call._replace(gate=call.gate.contiguous(), up=dense(call.up))
    gate, up = call.halves
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _gated(call, gate, up, None, y, None, None)
    return y


@gated_activation.backward
def _gated_backward(call: Gated, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    call = call._replace(gate=call.gate.contiguous(), up=dense(call.up))
    found = Gated(torch.empty_like(call.gate), None if call.up is None else torch.empty_like(call.up), *call[2:])
    _gated(call, *call.halves, dy.contiguous(), None, *found.halves)
    return found.gate, found.up


def _gated(call: Gated, gate: Tensor, *others: Tensor | None) -> None:
    rows, width, (block, warps) = 1, gate.numel(), tables.ADD
    if call.packed:
        width = gate.shape[-1]
        rows, block = gate.numel() // max(width, 1), min(block, power_of_two(width))
        warps = max(1, warps * block // tables.ADD[0])
    launch(
        gated_kernel,
        (cdiv(width, block) * rows,),
        *(gate, *others, width, call.gate.shape[-1], call.multiplier),
        KIND=ACTIVATIONS.index(call.activation),
        BLOCK=block,
        num_warps=warps,
    )


def _mlp_flops(call: Any) -> int:
    widths = [call.up.weight, call.down.weight] + ([] if call.gate_weight is None else [call.gate_weight])
    return sum(flops.product(1, weight) for weight in widths)


def _like_result(call: MLPStep | ExpertsStep) -> Tensor:
    return torch.empty_like(call.stream, dtype=torch.float32 if call.part else None)


@op("mlp_step", fake=_like_result, flops=(_mlp_flops,))
def mlp_step(call: MLPStep) -> Tensor:
    """See :func:`mamba2_hf.ops.mlp_step`."""
    up, up_bias, *_ = call.up
    width, size = up.shape
    stream, options, gate = channels_last(call.stream), overlap(), call.gate_weight
    h = torch.empty(width, dtype=up.dtype, device=up.device)
    outputs, inputs, warps = tables.projection(size)
    outputs = outputs if gate is None else max(1, outputs // 2)
    launch(
        mlp_inner_kernel,
        (cdiv(width, outputs),),
        *(stream, call.norm_weight.contiguous(), dense(gate), dense(call.gate_bias), up.contiguous(), dense(up_bias)),
        *(h, width, call.norm_eps, call.multiplier),
        KIND=ACTIVATIONS.index(call.activation),
        WIDTH=size,
        BN=outputs,
        BK=inputs,
        num_warps=warps,
        **options,
    )
    return project_back(h, call.down, None if call.part else call.added_to, call.output_multiplier, call.peers)


def _experts_fake(call: ExpertsStep) -> tuple[Tensor, Tensor]:
    logits = call.stream.new_empty(call.stream.shape[0], call.router.shape[0], dtype=torch.float32)
    return _like_result(call), logits


def _experts_flops(call: Any) -> int:
    rows = call.stream.shape[0]
    each = flops.product(rows, call.inner[1:]) + flops.product(rows, call.down[1:])
    return flops.product(rows, call.router) + call.top_k * each


@op("experts_step", fake=_experts_fake, flops=(_experts_flops,))
def experts_step(call: ExpertsStep) -> tuple[Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.experts_step`."""
    down, device, dtype = call.down, call.down.device, call.down.dtype
    (experts, size, width), top_k, options = down.shape, call.top_k, overlap()
    stream, norm = channels_last(call.stream), call.norm_weight.contiguous()
    rows = stream.shape[0]
    logits = torch.empty(rows, experts, dtype=torch.float32, device=device)
    outputs, inputs, warps = tables.projection(size)
    launch(
        router_kernel,
        (rows, cdiv(experts, outputs)),
        *(stream, norm, call.router.contiguous(), logits, experts, call.norm_eps, stream.stride(0)),
        WIDTH=size,
        BN=outputs,
        BK=inputs,
        num_warps=warps,
        **options,
    )
    index = torch.empty(rows, top_k, dtype=torch.int32, device=device)
    shares = torch.empty(rows, top_k, dtype=torch.float32, device=device)
    launch(
        choose_kernel,
        (rows,),
        *(logits, index, shares, experts),
        E=power_of_two(experts),
        TOP_K=top_k,
        K=power_of_two(top_k),
        num_warps=1,
        **options,
    )
    h = torch.empty(rows, top_k, width, dtype=dtype, device=device)
    outputs = max(1, outputs // (1 + call.gated))
    launch(
        experts_inner_kernel,
        (rows * top_k, cdiv(width, outputs)),
        *(stream, norm, call.inner.contiguous(), index, h, width, call.norm_eps, stream.stride(0)),
        KIND=ACTIVATIONS.index(call.activation),
        GATED=call.gated,
        TOP_K=top_k,
        WIDTH=size,
        BN=outputs,
        BK=inputs,
        num_warps=warps,
        **options,
    )
    y = torch.empty(rows, 1, size, dtype=torch.float32 if call.part else stream.dtype, device=device)
    residual, peers = (None, Peers()) if call.part else (channels_last(call.added_to), call.peers)
    outputs, inputs, warps = tables.projection(width)
    launch(
        experts_leave_kernel,
        (rows, cdiv(size, outputs)),
        *(h, down.contiguous(), index, shares, residual, y, peers.table, size, call.output_multiplier),
        0 if residual is None else residual.stride(0),
        TOP_K=top_k,
        WIDTH=width,
        BN=outputs,
        BK=min(inputs, power_of_two(width)),
        num_warps=warps,
        **constants(peers),
        **options,
    )
    return y, logits
