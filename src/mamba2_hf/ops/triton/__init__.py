"""The Triton backend: kernels for GPUs, no CUDA build. One file per kernel family, launch code apart from kernels."""

from __future__ import annotations

from typing import Any

from . import ssd
from .ssd import ssd_chunk_scan

__all__ = ["ssd_chunk_scan", "supports"]

# Each op's own judge of a call: (whether it can be served, the reason).
SUPPORTS = {
    "ssd_chunk_scan": ssd.supports,
}


def supports(op: str, **call: Any) -> tuple[bool, str]:
    """Whether this backend can serve a call of ``op``, and why (not)."""
    if op not in SUPPORTS:
        return False, f"there is no Triton kernel for {op}"
    return SUPPORTS[op](**call)
