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

from . import tables


@triton.jit
def follow(OVERLAP: tl.constexpr):
    """Waits for the kernel before this one; what precedes runs beside it. Only then may the next kernel start, so that
    whatever it does before its own wait, all but this one are over.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def lead(OVERLAP: tl.constexpr):
    """As :func:`follow`, but the next kernel may start at once, before the kernel before this one is over.

    What that next one reads before its own wait has to be older than both.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def prefetch(matrix, row, column, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
             OVERLAP: tl.constexpr):  # fmt: skip
    """Has a tile of a dense ``(rows, WIDTH)`` brought to the L2 cache, whatever comes meanwhile; WIDTH is a multiple of
    16 bytes, COLUMNS 0 or a power of two from 64 on.
    """
    if OVERLAP and COLUMNS > 0:
        piece: tl.constexpr = COLUMNS // 4
        at = tl.minimum(row + tl.arange(0, ROWS), rows - 1).to(tl.int64)[:, None] * WIDTH
        at += tl.minimum(column, WIDTH - COLUMNS) + tl.arange(0, 4)[None, :] * piece
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
            "=r,l,r",
            [(matrix + at).to(tl.int64), piece * matrix.dtype.element_ty.primitive_bitwidth // 8],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def overlap() -> dict[str, Any]:
    """Launch options of a kernel that follows."""
    chip = tables.current_chip()
    able = chip.has_tma and not chip.interpreted
    return {"OVERLAP": True, "launch_pdl": True} if able else {"OVERLAP": False}
