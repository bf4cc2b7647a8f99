"""The Triton backend: kernels for GPUs, no CUDA build. One file per kernel family, launch code apart from kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .conv import triton as conv
from .conv.triton import causal_conv1d
from .cross_entropy import triton as loss
from .cross_entropy.triton import cross_entropy_rows
from .layer import inner
from .layer import one_row as layer_step
from .layer import step as decode
from .layer import train as layer
from .layer.inner import mamba2_inner
from .layer.one_row import mamba2_layer_step
from .layer.step import causal_conv1d_update, mamba2_step, ssd_state_update
from .layer.train import mamba2_layer
from .norm import triton as norm
from .norm.triton import gated_rms_norm
from .runtime import library as library
from .scan import triton as ssd
from .scan.triton import ssd_chunk_scan

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
    "supports",
]

_SCAN = f"head_dim up to {ssd.LARGEST_HEAD}, state size up to {ssd.LARGEST_STATE}"
_CONV = f"up to {conv.MAX_TAPS} taps"
_NORM = f"norm groups up to {norm.LARGEST_GROUP} channels"
_STEP = f"head_dim and state size up to {decode.LARGEST}, no gradient"

# Each op's own judge of a call, which returns whether it can be served and the reason; and what it goes by, in words.
SUPPORTS: dict[str, tuple[Callable[..., tuple[bool, str]], str]] = {
    "ssd_chunk_scan": (ssd.supports, _SCAN),
    "ssd_state_update": (decode.supports_update, _STEP),
    "causal_conv1d": (conv.supports, _CONV),
    "causal_conv1d_update": (decode.supports_conv_update, f"{_CONV}, no gradient"),
    "gated_rms_norm": (norm.supports, _NORM),
    "linear_cross_entropy": (loss.supports, "any vocabulary"),
    "mamba2_inner": (inner.supports, f"{_SCAN}, {_CONV}, {_NORM}"),
    "mamba2_layer": (layer.supports, f"{_SCAN}, {_CONV}, {_NORM}"),
    "mamba2_layer_step": (layer_step.supports_layer_step, f"one token, {_CONV}, {_STEP}"),
    "mamba2_step": (decode.supports_step, f"{_CONV}, {_STEP}"),
}


def supports(op: str, **call: Any) -> tuple[bool, str]:
    """Whether this backend can serve a call of ``op``, and why (not); without a call, within which limits."""
    judge, limits = SUPPORTS[op]
    return judge(**call) if call else (True, f"serves bfloat16, float16 and float32, {limits}")
