"""The Triton backend: kernels for GPUs, no CUDA build. One file per kernel family, launch code apart from kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .conv import triton as conv
from .conv import update as conv_update
from .conv.triton import causal_conv1d
from .conv.update import causal_conv1d_update
from .cross_entropy import triton as loss
from .cross_entropy.triton import cross_entropy_rows
from .layer import inner, one_row, train
from .layer import step as mixer_step
from .layer.inner import mamba2_inner
from .layer.one_row import mamba2_layer_step
from .layer.step import mamba2_step
from .layer.train import mamba2_layer
from .norm import triton as norm
from .norm.triton import gated_rms_norm
from .runtime import tables
from .scan import triton as scan
from .scan import update
from .scan.triton import ssd_chunk_scan
from .scan.update import ssd_state_update

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
    "step_rows",
    "supports",
]

_SCAN = f"head_dim up to {scan.LARGEST_HEAD}, state size up to {scan.LARGEST_STATE}"
_CONV = f"up to {conv.MAX_TAPS} taps"
_NORM = f"norm groups up to {norm.LARGEST_GROUP} channels"
_STEP = f"head_dim and state size up to {tables.LARGEST_STATE}, no gradient"

# Each op's own judge of a call, which returns whether it can be served and the reason; and what it goes by, in words.
SUPPORTS: dict[str, tuple[Callable[..., tuple[bool, str]], str]] = {
    "ssd_chunk_scan": (scan.supports, _SCAN),
    "ssd_state_update": (update.supports, _STEP),
    "causal_conv1d": (conv.supports, _CONV),
    "causal_conv1d_update": (conv_update.supports, f"{_CONV}, no gradient"),
    "gated_rms_norm": (norm.supports, _NORM),
    "linear_cross_entropy": (loss.supports, "any vocabulary"),
    "mamba2_inner": (inner.supports, f"{_SCAN}, {_CONV}, {_NORM}"),
    "mamba2_layer": (train.supports, f"{_SCAN}, {_CONV}, {_NORM}"),
    "mamba2_layer_step": (one_row.supports, f"one token, {_CONV}, {_STEP}"),
    "mamba2_step": (mixer_step.supports, f"{_CONV}, {_STEP}"),
}


def supports(op: str, **call: Any) -> tuple[bool, str]:
    """Whether this backend can serve a call of ``op``, and why (not); without a call, within which limits."""
    judge, limits = SUPPORTS[op]
    return judge(**call) if call else (True, f"serves bfloat16, float16 and float32, {limits}")


def step_rows(device: torch.device) -> int:
    """Up to how many sequences the step of a whole layer takes no longer than its parts."""
    return tables.step_rows(tables.chip_of(device))
