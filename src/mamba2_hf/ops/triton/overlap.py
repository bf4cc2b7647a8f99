"""Kernels of a decoding step that start while the ones before them end, on NVIDIA GPUs from Hopper on.

A short kernel costs mostly its beginning and its end. Programmatic dependent launch lets the next one begin meanwhile,
up to where it needs what the one before it writes. Between cuBLAS's kernels, which do not take part, it was measured to
cost more than it gives: only steps whose kernels are all our own overlap.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import configs


@triton.jit
def follow(OVERLAP: tl.constexpr):
    """Waits for the kernel before this one; what precedes runs beside it. Only then may the next kernel start, so that
    whatever it does before its own wait, all but this one are over.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


def overlap() -> dict[str, Any]:
    """Launch options of a kernel that follows."""
    chip = configs.current_chip()
    able = chip.has_tma and not chip.interpreted
    return {"OVERLAP": True, "launch_pdl": True} if able else {"OVERLAP": False}
