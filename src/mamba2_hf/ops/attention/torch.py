"""Rotary embedding, one query a sequence, and one token of a layer in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..mixer.torch import scaled
from ..norm.op import Norm
from ..norm.torch import gated_rms_norm
from ..runtime.linear import linear
from ..spec import compute_dtype
from .op import AttentionStep, OneQuery, Rotary


def rotary(call: Rotary) -> tuple[Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.rotary`."""
    keys = call.k if call.multiplier == 1 else call.k * call.multiplier
    return _rotate(call.q, call.cos, call.sin), _rotate(keys, call.cos, call.sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    left, right = turned.chunk(2, -1)
    turned = (turned * cos[:, :, None] + torch.cat([-right, left], -1) * sin[:, :, None]).to(x.dtype)
    return torch.cat([turned, rest], -1) if size < x.shape[-1] else turned


def attend_one(call: OneQuery) -> Tensor:
    """See :func:`mamba2_hf.ops.attend_one`."""
    q, k, v, lengths, scale = call
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if lengths is not None:
        hidden = torch.arange(k.shape[2], device=k.device) >= lengths[:, None]  # (B, S)
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
        v = v.masked_fill(hidden[:, None, :, None], 0.0)  # what lies behind the keys may be anything
    return torch.softmax(scores, -1).to(v.dtype) @ v


def attention_step(call: AttentionStep) -> Tensor:
    """See :func:`mamba2_hf.ops.attention_step`."""
    stream, size = call.stream, call.keys.shape[3]
    weight = call.norm_weight
    x = gated_rms_norm(Norm(stream, None, weight, call.norm_eps, stream.shape[2], False, weight.dtype))
    x = x if call.multiplier == 1 else x * call.multiplier
    q, k, v = (linear(x, each.weight, each.bias).unflatten(-1, (-1, size)) for each in (call.q, call.k, call.v))
    if call.cos is not None and call.sin is not None:
        q, k = rotary(Rotary(q, k, call.cos, call.sin, call.key_multiplier))
    elif call.key_multiplier != 1:
        k = k * call.key_multiplier
    place = (call.lengths.long() - 1)[:, None, None, None].expand(-1, k.shape[2], 1, size)
    for buffer, new in ((call.keys, k), (call.values, v)):
        buffer.scatter_(2, place, new.transpose(1, 2))
    y = attend_one(OneQuery(q.transpose(1, 2), call.keys, call.values, call.lengths, call.scale))
    y = linear(y.transpose(1, 2).flatten(2), call.out.weight, None if call.part else call.out.bias)
    if call.part:
        return scaled(y.to(compute_dtype(y.dtype)), call.output_multiplier)
    return torch.add(call.added_to, y, alpha=call.output_multiplier)
