"""Rotary embedding and one query a sequence in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .op import OneQuery, Rotary


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
