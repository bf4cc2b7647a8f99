"""A mixer between its projections, its step, and a whole layer, in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conv.op import Conv, ConvUpdate
from ..conv.torch import causal_conv1d, causal_conv1d_update
from ..neighbors import Neighbors
from ..norm.op import Norm
from ..norm.torch import gated_rms_norm
from ..partners import Joined, Partners
from ..runtime.linear import linear
from ..runtime.modes import in_steps, product_dtype, recomputed, without_autocast
from ..scan.op import Scan, Update
from ..scan.reference import step_size
from ..scan.torch import ssd_chunk_scan, ssd_state_update
from ..spec import CHUNK_SIZE, NO_RING, UNPACKED, Block, Linear, MixerWeights, Ring, compute_dtype
from .op import BlockStep, Inner, Layer, LayerStep, Step

SEGMENT_TOKENS = 512  # of all rows, on a CPU: what they need stays in the caches and in the allocator


def mamba2_inner(call: Inner, neighbors: Neighbors | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.inner`. Where gradients are needed only the inputs are kept.

    The states come at no cost here, so they are there whether asked for or not.
    """
    u, packing, conv, ssm = call.zxbcdt, call.packing, call.conv_initial_states, call.ssm_initial_states

    def run(segment: Tensor, conv: Tensor | None, ssm: Tensor | None, *weights: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _segment(Inner(segment, MixerWeights(*weights), call.spec, packing, conv, ssm), neighbors)

    segments: tuple[Tensor, ...] = (u,)
    if in_steps(u.device) and packing == (None, None) and neighbors is None:
        segments = u.split(CHUNK_SIZE * max(1, SEGMENT_TOKENS // (CHUNK_SIZE * u.shape[0])), 1)
    ys = []
    with without_autocast(u.device):
        for segment in segments:
            y, conv, ssm = recomputed(run, segment, conv, ssm, *call.weights)
            ys.append(y)
    assert conv is not None  # there is a segment
    assert ssm is not None
    return torch.cat(ys, 1) if len(ys) > 1 else ys[0], conv, ssm


def _segment(call: Inner, neighbors: Neighbors | None) -> tuple[Tensor, Tensor, Tensor]:
    """The mixer over some tokens of each row."""
    _, weights, spec, packing, conv_initial, ssm_initial, _ = call
    shape = call.shape
    inner, bc = shape.heads * shape.head_dim, shape.groups * shape.state
    z, xbc, dt = call.zxbcdt.split([inner, inner + 2 * bc, shape.heads], -1)
    before = weights.conv_weight.shape[1] - 1
    if neighbors is not None and before:
        conv_initial = neighbors.columns_before(xbc[:, shape.tokens - before :].mT)
    xbc, conv_state = causal_conv1d(
        Conv(xbc, weights.conv_weight, weights.conv_bias, conv_initial, packing, spec.activation)
    )
    x, B, C = xbc.split([inner, bc, bc], -1)
    heads, groups = (shape.heads, shape.head_dim), (shape.groups, shape.state)
    gated = weights.gated_norm_weight is None  # without a norm the gate is the scan's own
    y, state = ssd_chunk_scan(
        Scan(
            *(x.unflatten(-1, heads), dt, weights.rates, B.unflatten(-1, groups), C.unflatten(-1, groups)),
            *(weights.D, z.unflatten(-1, heads) if gated else None, weights.dt_bias, ssm_initial, packing),
            *(True, spec.dt_limit, spec.chunk_size),
        ),
        neighbors,
        recompute=False,
    )
    return _normed(call, y.flatten(-2), z), conv_state, state


def mamba2_step(call: Step) -> Tensor:
    """See :func:`mamba2_hf.ops.mamba2_step`."""
    weights, spec, shape = call.weights, call.spec, call.shape
    A, inner, bc = weights.rates, shape.heads * shape.head_dim, shape.groups * shape.state
    z, xbc, dt = call.zxbcdt.split([inner, inner + 2 * bc, shape.heads], -1)
    convolved = causal_conv1d_update(
        ConvUpdate(xbc, call.conv_state, weights.conv_weight, weights.conv_bias, spec.activation)
    )
    x, B, C = convolved.split([inner, bc, bc], -1)
    heads, groups = (shape.heads, shape.head_dim), (shape.groups, shape.state)
    ys = [
        ssd_state_update(
            Update(
                *(call.ssm_state, x[:, t].unflatten(-1, heads), dt[:, t], A),
                *(B[:, t].unflatten(-1, groups), C[:, t].unflatten(-1, groups), weights.D),
                z[:, t].unflatten(-1, heads) if weights.gated_norm_weight is None else None,
                *(weights.dt_bias, True, spec.dt_limit),
            )
        )
        for t in range(shape.tokens)
    ]
    return _normed(call, torch.stack(ys, 1).flatten(-2), z)


def fold(conv_state: Tensor, ssm_state: Tensor, block: Block) -> None:
    """See :func:`mamba2_hf.ops.fold`. A row's kept tokens are added up in one product."""
    (_, heads, P, N), size = ssm_state.shape, block.inputs.shape[1]
    there = (torch.arange(size, device=block.kept.device) < block.kept[:, None])[..., None]  # (B, R, 1)
    decays, steps = torch.where(there[..., None], block.steps, 0).unbind(2)  # (B, R, H)
    since = decays.cumsum(1)
    total = since[:, -1:]
    convolved = torch.where(there, block.convolved, 0).to(steps.dtype)
    x, B = convolved[..., : heads * P].unflatten(-1, (heads, P)), convolved[..., heads * P :].unflatten(-1, (-1, N))
    weighed = x * (steps * torch.exp(total - since))[..., None]  # (B, R, H, P)
    maps = B.repeat_interleave(heads // B.shape[2], 2)  # (B, R, H, N)
    change = weighed.permute(0, 2, 3, 1) @ maps.transpose(1, 2)
    ssm_state.copy_(ssm_state * torch.exp(total[:, 0])[..., None, None] + change)
    columns = torch.cat([conv_state, block.inputs.to(conv_state.dtype).mT], 2)
    last = torch.arange(conv_state.shape[2], device=columns.device) + block.kept[:, None]  # (B, L)
    conv_state.copy_(columns.gather(2, last[:, None].expand(-1, columns.shape[1], -1)))
    block.kept.zero_()


def mamba2_block_step(call: BlockStep) -> Tensor:
    """See :func:`mamba2_hf.ops.block_step`."""
    _, conv_state, ssm_state, block, weights, spec = call
    fold(conv_state, ssm_state, block)
    shape, A = call.step.shape, weights.rates
    tokens, inner, bc = shape.tokens, shape.heads * shape.head_dim, shape.groups * shape.state
    z, inputs, dt = call.zxbcdt.split([inner, inner + 2 * bc, shape.heads], -1)
    before = conv_state[:, :, conv_state.shape[2] + 1 - weights.conv_weight.shape[1] :].to(inputs.dtype)
    xbc, _ = causal_conv1d(Conv(inputs, weights.conv_weight, weights.conv_bias, before, UNPACKED, spec.activation))
    x, B, C = xbc.split([inner, bc, bc], -1)
    steps = step_size(dt, weights.dt_bias, True, spec.dt_limit, compute_dtype(dt.dtype))
    heads, groups = (shape.heads, shape.head_dim), (shape.groups, shape.state)
    gated = weights.gated_norm_weight is None
    y, _ = ssd_chunk_scan(
        Scan(
            *(x.unflatten(-1, heads), steps, A, B.unflatten(-1, groups), C.unflatten(-1, groups), weights.D),
            *(z.unflatten(-1, heads) if gated else None, None, ssm_state, UNPACKED, False),
        )
    )
    block.inputs[:, :tokens] = inputs
    block.convolved[:, :tokens] = xbc[..., : inner + bc]
    block.steps[:, :tokens] = torch.stack([steps * A, steps], 2)
    block.kept.fill_(tokens)
    return _normed(call.step, y.flatten(-2), z)


def mamba2_layer(
    call: Layer, neighbors: Neighbors | None = None, partners: Partners | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.layer`; products are taken in ``dtype`` by the autocast that asked for it."""
    mixer = call.mixer(_entered(call, call.dtype, partners), call.weights.mixer.rates)
    if partners is not None and call.is_joint:
        mixer = mixer._replace(weights=mixer.weights._replace(gated_norm_weight=None))
    y, conv_state, ssm_state = mamba2_inner(mixer, neighbors)
    return _left(call, y) if partners is None else _left_by_all(call, y, partners), conv_state, ssm_state


def _left_by_all(call: Layer, y: Tensor, partners: Partners) -> Tensor:
    """As :func:`_left`, of ``y (B, T, H P)`` of the heads that are here."""
    spec, out, scale = call.spec, call.weights.out_proj, None
    norm = call.weights.mixer.gated_norm_weight
    if norm is not None and call.is_joint:
        squares = partners.total(y.to(compute_dtype(y.dtype)).square().sum(-1, keepdim=True))
        scale = torch.rsqrt(squares / spec.group_size + spec.gated_norm_eps)
        y = y * norm
    total = partners.total(_project(y, out._replace(bias=None)))
    mixed = total if scale is None else total * scale
    mixed = mixed if out.bias is None else mixed + out.bias
    residual = call.added_to
    return (residual + scaled(mixed, spec.output_multiplier)).to(residual.dtype)


def mamba2_layer_step(call: LayerStep) -> Tensor:
    """See :func:`mamba2_hf.ops.mamba2_layer_step`."""
    _, conv_state, ssm_state, weights, spec, *_ = call
    mixer, scale = weights.mixer, weights.mixer.gated_norm_weight
    zxbcdt = _entered(call, product_dtype(weights.in_proj.weight))
    if call.is_joint:
        mixer = mixer._replace(gated_norm_weight=None)
    y = mamba2_step(Step(zxbcdt, conv_state, ssm_state, mixer, spec))
    if not call.part:
        return _left(call, y)
    wide = compute_dtype(y.dtype)
    normed = y if scale is None or not call.is_joint else y * scale
    part = scaled(_project(normed, weights.out_proj._replace(bias=None)).to(wide), spec.output_multiplier)
    return torch.cat([part, y.to(wide).square().sum(-1, keepdim=True)], -1) if call.is_joint else part


def sums_over_peers(call: Any) -> bool:
    """Whether the step of a layer adds up over devices by itself: not here."""
    return False


def new_ring(conv_state: Tensor, ssm_state: Tensor) -> Ring:
    """See :func:`mamba2_hf.ops.new_ring`: states are written at every step here."""
    return NO_RING


def joined(call: Joined) -> Tensor:
    """Ends the step of a layer that devices share."""
    total, residual, bias, factor, size, eps = call
    if call.is_joint:
        total = total[..., :-1] * torch.rsqrt(total[..., -1:] / size + eps)
    if bias is not None:
        total = total + scaled(bias, factor)
    return (residual + total).to(residual.dtype)


def _entered(call: Layer | LayerStep, dtype: torch.dtype, partners: Partners | None = None) -> Tensor:
    """The stream between its norm and the mixer: what in_proj gives, times the multipliers."""
    stream, weights, spec = call.stream, call.weights, call.spec
    normed = gated_rms_norm(Norm(stream, None, weights.norm_weight, spec.norm_eps, stream.shape[2], False, dtype))
    normed = normed if partners is None else partners.entering(normed)
    zxbcdt = _project(scaled(normed, spec.input_multiplier), weights.in_proj)
    return times_parts(zxbcdt, spec.multipliers, weights.mixer.heads * spec.head_dim, weights.mixer.heads)


def _left(call: Layer | LayerStep, y: Tensor) -> Tensor:
    """What out_proj gives, times its multiplier, added to the residual."""
    return call.added_to + scaled(_project(y, call.weights.out_proj), call.spec.output_multiplier)


def times_parts(zxbcdt: Tensor, multipliers: tuple[float, ...], inner: int, heads: int) -> Tensor:
    """``(..., 2 H P + 2 G N + H)``, each of z, x, B, C and dt times its multiplier; ``inner`` is H P."""
    if not multipliers:
        return zxbcdt
    maps = (zxbcdt.shape[-1] - 2 * inner - heads) // 2
    parts = zxbcdt.split([inner, inner, maps, maps, heads], -1)
    return torch.cat([part * factor for part, factor in zip(parts, multipliers, strict=True)], -1)


def scaled(x: Tensor, factor: float) -> Tensor:
    """``x * factor``, and ``x`` itself for 1."""
    return x if factor == 1 else x * factor


def _normed(call: Inner | Step, y: Tensor, z: Tensor) -> Tensor:
    """The gated norm of ``y (B, T, H P)``, where there is one."""
    weight, spec = call.weights.gated_norm_weight, call.spec
    if weight is None:
        return y
    return gated_rms_norm(Norm(y, z, weight, spec.gated_norm_eps, spec.group_size, spec.norm_before_gate, y.dtype))


def _project(x: Tensor, weights: Linear) -> Tensor:
    """A projection and what is added to it."""
    y, lora = linear(x, weights.weight, weights.bias), weights.lora
    if lora is None:
        return y
    lowered = F.linear(x, lora.down.to(y.dtype)).flatten(0, 1)
    return torch.addmm(y.flatten(0, 1), lowered, lora.up.to(y.dtype).t(), alpha=lora.scale).view_as(y)
