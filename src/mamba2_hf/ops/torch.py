"""The PyTorch backend: runs wherever PyTorch runs, differentiable, exportable, one graph under ``torch.compile``."""

from __future__ import annotations

from .conv.torch import causal_conv1d, causal_conv1d_update
from .cross_entropy.torch import cross_entropy_rows
from .layer.torch import mamba2_inner, mamba2_layer, mamba2_layer_step, mamba2_step
from .norm.torch import gated_rms_norm
from .scan.torch import ssd_chunk_scan, ssd_state_update

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "cross_entropy_rows",
    "gated_rms_norm",
    "mamba2_inner",
    "mamba2_layer",
    "mamba2_layer_step",
    "mamba2_step",
    "ssd_chunk_scan",
    "ssd_state_update",
]
