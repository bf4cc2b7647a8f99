"""The original code's layers, written for one sequence and one token after the other, in fp64."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
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
    """``(T, d)`` to ``(T, d)``, by the recurrence."""
    heads = len(state[f"{prefix}.A_log"])
    inner = heads * head_dim
    z, xbc, dt = (x @ state[f"{prefix}.in_proj.weight"].T).split([inner, inner + 2 * groups * states, heads], -1)
    xbc = F.silu(convolve(xbc, state[f"{prefix}.conv1d.weight"], state[f"{prefix}.conv1d.bias"]))
    values, b, c = xbc.split([inner, groups * states, groups * states], -1)
    dt = F.softplus(dt + state[f"{prefix}.dt_bias"])
    decay = torch.exp(-dt * state[f"{prefix}.A_log"].exp())
    hidden, outputs = x.new_zeros(heads, head_dim, states), []
    for t in range(len(x)):
        v = values[t].view(heads, head_dim)
        bt, ct = (m[t].view(groups, states).repeat_interleave(heads // groups, 0) for m in (b, c))
        hidden = decay[t, :, None, None] * hidden + torch.einsum("h,hp,hn->hpn", dt[t], v, bt)
        outputs.append((torch.einsum("hpn,hn->hp", hidden, ct) + state[f"{prefix}.D"][:, None] * v).flatten())
    gated = torch.stack(outputs) * F.silu(z)
    return rms_norm(gated, state[f"{prefix}.norm.weight"], groups) @ state[f"{prefix}.out_proj.weight"].T


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
