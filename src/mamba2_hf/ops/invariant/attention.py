"""Attention of each query alone, over the keys that it sees from the first to itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..attention.op import Rotary
from ..runtime.modes import without_autocast
from ..spec import compute_dtype


class Queries(NamedTuple):
    """Arguments of :func:`attend`."""

    q: Tensor
    """``(B, H, T, D)``"""
    k: Tensor
    """``(B, H', S, D)``, each head of which serves H / H' heads of ``q``."""
    v: Tensor
    """As ``k``."""
    begin: Tensor
    """``(B, T)`` the first key that a query sees."""
    end: Tensor
    """``(B, T)`` the key behind the last that it sees; none is seen where that is not behind ``begin``."""
    origin: Tensor
    """``(B, T)`` where the key of the first token of its sequence would be: keys are summed in blocks from there on."""
    scale: float


def attend(call: Queries) -> Tensor:
    """Softmax attention, ``(B, T, H, D)``; zeros for a query that sees no key."""
    if dispatch.usable(call.q.device)[0]:
        of_triton: Tensor = dispatch.backend_module("triton").attend_each(*call)
        return of_triton
    with without_autocast(call.q.device):
        return _attend(call)


def _attend(call: Queries) -> Tensor:
    q, k, v, begin, end, _, scale = call
    batch, heads, tokens, size = q.shape
    dtype, groups = compute_dtype(q.dtype), k.shape[1]
    y = q.new_zeros(batch, tokens, heads, size)
    for row, (first, last) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        queries = q[row].to(dtype).unflatten(0, (groups, -1)) * scale  # (H', H / H', T, D)
        keys, values = k[row].to(dtype), v[row].to(dtype)
        for t in range(tokens):
            own = slice(first[t], last[t])
            if first[t] < last[t]:  # sizes, strides and alignment depend on the number of keys alone
                query, seen, found = map(_copy, (queries[:, :, t], keys[:, own], values[:, own]))
                out = torch.softmax(query @ seen.mT, -1) @ found  # (H', H / H', D)
                y[row, t] = out.flatten(0, 1).to(y.dtype)
    return y


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def rotary(call: Rotary) -> tuple[Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.rotary`: PyTorch's is single products and sums."""
    rotated: tuple[Tensor, Tensor] = dispatch.backend_module("torch").rotary(call)
    return rotated
