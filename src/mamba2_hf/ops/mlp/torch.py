"""Feed-forward layers in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mixer.torch import scaled
from ..norm.op import Norm
from ..norm.torch import gated_rms_norm
from ..runtime.linear import linear
from ..runtime.modes import times
from ..spec import compute_dtype
from .op import ExpertsStep, Gated, MLPStep


def activate(x: Tensor, name: str) -> Tensor:
    """The activation of that name."""
    if name == "relu2":
        return F.relu(x).square()
    return F.silu(x) if name == "silu" else F.gelu(x)


def gated_activation(call: Gated) -> Tensor:
    """See :func:`mamba2_hf.ops.gated_activation`."""
    gate, up = call.halves
    gate = gate if call.multiplier == 1 else gate * call.multiplier
    active = activate(gate.to(compute_dtype(gate.dtype)), call.activation)
    return (active if up is None else times(active, up)).to(call.gate.dtype)


def mlp_step(call: MLPStep) -> Tensor:
    """See :func:`mamba2_hf.ops.mlp_step`."""
    x = _normed(call)
    up = linear(x, call.up.weight, call.up.bias)
    gate = None if call.gate_weight is None else linear(x, call.gate_weight, call.gate_bias)
    gate, other = (up, None) if gate is None else (gate, up)
    inner = gated_activation(Gated(gate, other, call.activation, call.multiplier))
    return _ended(call, linear(inner, call.down.weight, None if call.part else call.down.bias))


def experts_step(call: ExpertsStep) -> tuple[Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.experts_step`."""
    x = _normed(call)[:, 0]  # (B, d)
    logits = F.linear(x, call.router)
    logits = logits.to(compute_dtype(logits.dtype))
    chosen, index = logits.topk(call.top_k)  # (B, k)
    inner = (call.inner[index] @ x[:, None, :, None])[..., 0]  # (B, k, 2 I)
    gate, up = inner.chunk(2, -1) if call.gated else (inner, None)
    inner = gated_activation(Gated(gate, up, call.activation))
    each = (call.down[index] @ inner[..., None])[..., 0]  # (B, k, d)
    out = (torch.softmax(chosen, -1).to(x.dtype)[..., None] * each).sum(1)
    return _ended(call, out[:, None]), logits


def _normed(call: MLPStep | ExpertsStep) -> Tensor:
    stream, weight = call.stream, call.norm_weight
    return gated_rms_norm(Norm(stream, None, weight, call.norm_eps, stream.shape[2], False, weight.dtype))


def _ended(call: MLPStep | ExpertsStep, y: Tensor) -> Tensor:
    """What a step gives of the ``(B, 1, d)`` that the layer gives."""
    if call.part:
        return scaled(y.to(compute_dtype(y.dtype)), call.output_multiplier)
    return call.added_to + call.output_multiplier * y
