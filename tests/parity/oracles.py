"""The original code's layers, written for one sequence and one token after the other, in fp64."""

from __future__ import annotations

import math
from collections.abc import Mapping

import minimal_mamba2
import torch
from torch import Tensor

State = Mapping[str, Tensor]


def rms_norm(x: Tensor, weight: Tensor, groups: int = 1, eps: float = 1e-5) -> Tensor:
    grouped = x.unflatten(-1, (groups, -1))
    return (grouped * (grouped.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2) * weight


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each channel of ``(T, C)`` with its own taps ``(C, 1, K)``."""
    taps = weight.shape[-1]
    padded = torch.cat([x.new_zeros(taps - 1, x.shape[1]), x])
    out = torch.stack([(padded[t : t + taps] * weight[:, 0].T).sum(0) for t in range(len(x))])
    return out if bias is None else out + bias


def mamba2(x: Tensor, state: State, prefix: str, *, head_dim: int, groups: int, states: int) -> Tensor:
    """``(T, d)`` to ``(T, d)``, by the layer of ``examples/minimal_mamba2.py``."""
    config = minimal_mamba2.Config(
        hidden_size=x.shape[1],
        num_heads=len(state[f"{prefix}.A_log"]),
        head_dim=head_dim,
        n_groups=groups,
        state_size=states,
        conv_kernel=state[f"{prefix}.conv1d.weight"].shape[-1],
    )
    layer = minimal_mamba2.Mamba2(config).to(x.dtype)
    layer.load_state_dict({name: state[f"{prefix}.{name}"] for name in layer.state_dict()})
    return layer(x[None])[0][0]


def rotate(x: Tensor, size: int, base: float = 10000.0) -> Tensor:
    """Rotary embedding of the first ``size`` channels of ``(T, H, D)``, its halves against each other."""
    out = x.clone()
    for t in range(len(x)):
        for pair in range(size // 2):
            angle = t / base ** (2 * pair / size)
            left, right = x[t, :, pair], x[t, :, pair + size // 2]
            out[t, :, pair] = left * math.cos(angle) - right * math.sin(angle)
            out[t, :, pair + size // 2] = right * math.cos(angle) + left * math.sin(angle)
    return out


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """``(T, H, D)`` and ``(T, H', D)`` to ``(T, H D)``: each head of queries with its group's keys and values."""
    each = queries.shape[1] // keys.shape[1]
    out = torch.zeros_like(queries)
    for head in range(queries.shape[1]):
        for t in range(len(queries)):
            scores = keys[: t + 1, head // each] @ queries[t, head] / math.sqrt(queries.shape[2])
            out[t, head] = scores.softmax(0) @ values[: t + 1, head // each]
    return out.flatten(1)
