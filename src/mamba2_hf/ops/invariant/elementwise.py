"""Functions of single elements, and of single rows, each computed in one way wherever in a tensor it is.

PyTorch's SiLU, sigmoid, softplus and GELU on a CPU compute most elements by vector instructions and the last ones of a
tensor, or of a thread's share of it, by the C library, whose results differ. Its exp, log1p and erf do not, nor do
single additions, products, quotients and roots, which IEEE 754 defines.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..mlp.op import Gated
from ..norm.op import Norm
from ..spec import compute_dtype

_ROWS = 16  # for whose multiples Triton compiles as for each other
_LINEAR_FROM = 20.0  # softplus is its argument, to all digits


def sigmoid(x: Tensor) -> Tensor:
    """Returns ``1 / (1 + exp(-x))``."""
    return 1 / (1 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    """Returns ``x * sigmoid(x)``."""
    return x / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    """Returns ``log(1 + exp(x))``."""
    return torch.where(x > _LINEAR_FROM, x, torch.log1p(torch.exp(x)))


def activate(x: Tensor, name: str | None) -> Tensor:
    """The activation of that name: of a convolution, or of a feed-forward layer."""
    if name is None:
        return x
    if name == "relu2":
        return x.clamp(min=0).square()
    return x * 0.5 * (1 + torch.erf(x * 0.5**0.5)) if name == "gelu" else silu(x)


def sum_few(parts: Tensor) -> Tensor:
    """The sum over the last dimension, ``(..., k)`` to ``(..., 1)``, from left to right."""
    total = parts[..., :1]
    for place in range(1, parts.shape[-1]):
        total = total + parts[..., place : place + 1]
    return total


def sum_rows(x: Tensor) -> Tensor:
    """The sum over the last dimension of a dense tensor on a CPU, ``(..., d)`` to ``(..., 1)``."""
    # A single sum would be one of its own kind, over all threads if it is long.
    return torch.stack([x, x]).sum(-1, keepdim=True)[0] if x.shape[:-1].numel() == 1 else x.sum(-1, keepdim=True)


def softmax_few(scores: Tensor) -> Tensor:
    """Softmax over a few scores, ``(..., k)`` to the same."""
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / sum_few(weights)


def gated_activation(call: Gated) -> Tensor:
    """See :func:`mamba2_hf.ops.gated_activation`."""
    gate, up = call.halves
    gate = gate if call.multiplier == 1 else gate * call.multiplier
    active = activate(gate.to(compute_dtype(gate.dtype)), call.activation)
    return (active if up is None else active * up).to(call.gate.dtype)


def gated_rms_norm(call: Norm) -> Tensor:
    """See :func:`mamba2_hf.ops.gated_rms_norm`."""
    x, z, weight, eps, group_size, norm_before_gate, out = call
    if dispatch.usable(x.device)[0]:
        # Tiles are those of the group's size, and dense rows leave one way to load them.
        dense = call._replace(x=x.contiguous(), z=None if z is None else z.contiguous())
        normed: Tensor = dispatch.backend_module("triton").gated_rms_norm(dense)
        return normed
    dtype = compute_dtype(x.dtype)
    y = x.to(dtype)
    gate = None if z is None else silu(z.to(dtype))
    if gate is not None and not norm_before_gate:
        y = y * gate
    grouped = y.contiguous().unflatten(-1, (-1, group_size))
    y = (grouped * torch.rsqrt(sum_rows(grouped * grouped) / group_size + eps)).flatten(-2)
    y = y * weight.to(dtype)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(out)


def _dense(x: Tensor) -> Tensor:
    """``(..., d)`` as dense rows in a number, and at an address, for which Triton compiles one and the same kernel."""
    rows = x.reshape(-1, x.shape[-1])
    dense = rows.new_zeros(-(-rows.shape[0] // _ROWS) * _ROWS, rows.shape[1])
    dense[: rows.shape[0]] = rows
    return dense
