"""The Triton backend: kernels for GPUs, no CUDA build. One file per kernel family, launch code apart from kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import library as library
from . import conv, decode, inner, norm, ssd
from .conv import causal_conv1d
from .decode import causal_conv1d_update, mamba2_step, ssd_state_update
from .inner import mamba2_inner
from .norm import add_rms_norm, gated_rms_norm
from .ssd import ssd_chunk_scan

__all__ = [
    "add_rms_norm",
    "causal_conv1d",
    "causal_conv1d_update",
    "gated_rms_norm",
    "mamba2_inner",
    "mamba2_step",
    "ssd_chunk_scan",
    "ssd_state_update",
    "supports",
]

# Each op's own judge of a call: (whether it can be served, the reason).
SUPPORTS: dict[str, Callable[..., tuple[bool, str]]] = {
    "ssd_chunk_scan": ssd.supports,
    "ssd_state_update": decode.supports_update,
    "causal_conv1d": conv.supports,
    "causal_conv1d_update": conv.supports,
    "gated_rms_norm": norm.supports,
    "add_rms_norm": norm.supports,
    "mamba2_inner": inner.supports,
    "mamba2_step": decode.supports_step,
}


def supports(op: str, **call: Any) -> tuple[bool, str]:
    """Whether this backend can serve a call of ``op``, and why (not)."""
    if op not in SUPPORTS:
        return False, f"there is no Triton kernel for {op}"
    return SUPPORTS[op](**call)
