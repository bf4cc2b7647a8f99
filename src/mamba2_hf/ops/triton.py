"""The Triton backend: kernels for GPUs, no CUDA build."""

from __future__ import annotations

from typing import Any

from .attention.op import AttentionStep
from .attention.triton import attend_one as attend_one
from .attention.triton import attention_step as attention_step
from .attention.triton import rotary as rotary
from .conv import kernels
from .conv import op as conv
from .conv.triton import causal_conv1d as causal_conv1d
from .conv.triton import causal_conv1d_update as causal_conv1d_update
from .cross_entropy.triton import cross_entropy_rows as cross_entropy_rows
from .invariant.kernels import attend_each as attend_each
from .invariant.kernels import recur as recur
from .mixer.advance import new_ring as new_ring
from .mixer.advance import settle as settle
from .mixer.block import mamba2_block_step as mamba2_block_step
from .mixer.op import LayerStep
from .mixer.step import mamba2_step as mamba2_step
from .mixer.triton import is_whole
from .mixer.triton import joined as joined
from .mixer.triton import mamba2_inner as mamba2_inner
from .mixer.triton import mamba2_layer as mamba2_layer
from .mixer.triton import mamba2_layer_step as mamba2_layer_step
from .mlp.op import ExpertsStep, MLPStep
from .mlp.triton import experts_step as experts_step
from .mlp.triton import gated_activation as gated_activation
from .mlp.triton import mlp_step as mlp_step
from .norm.triton import gated_rms_norm as gated_rms_norm
from .runtime import tables
from .scan.triton import ssd_chunk_scan as ssd_chunk_scan
from .scan.update import ssd_state_update as ssd_state_update


def supports(op: str, *, activation: str | None = None, **call: Any) -> tuple[bool, str]:
    """Whether this backend can serve a call of ``op``, and why (not); without a call, within which limits."""
    if conv.ACTIVATIONS.get(activation, activation) not in kernels.ACTIVATIONS:
        return False, f"activation {activation!r} has no kernel"
    if not call:
        return True, f"serves bfloat16, float16 and float32, {tables.limits(op)}".removesuffix(", ")
    refusal = next(tables.refusals(op, **call), None)
    return refusal is None, refusal or "Triton serves it"


def sums_over_peers(call: LayerStep | AttentionStep | MLPStep | ExpertsStep) -> bool:
    """Whether the last kernel of a layer's step adds up over devices."""
    rows, _, size = call.stream.shape
    if isinstance(call, LayerStep):
        return rows * (size + call.is_joint) <= call.peers.words and is_whole(call)
    # What several rows of attention are multiplied by last is PyTorch's product.
    return rows * size <= call.peers.words and (rows == 1 or not isinstance(call, AttentionStep))
