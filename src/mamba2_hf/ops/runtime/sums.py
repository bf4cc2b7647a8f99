"""Sums of what many programs left, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables
from .launch import launch
from .tables import cdiv


@triton.jit
def sum_rows_kernel(rows, total, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``COLUMNS`` sums over ``rows (count, width)``."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    partial = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, count, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < count)[:, None] & (column < width)[None, :]
        partial += tl.load(rows + row[:, None] * width + column[None, :], mask=mask, other=0.0)
    tl.store(total + column, tl.sum(partial, 0).to(total.dtype.element_ty), mask=column < width)


def sum_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of a dense fp32 tensor over its first size, rounded to ``dtype`` once.

    One launch; ``torch.sum`` takes several times as long for a few hundred rows.
    """
    total = torch.empty(rows.shape[1:], dtype=dtype, device=rows.device)
    width = total.numel()
    launch(
        sum_rows_kernel,
        (cdiv(width, tables.SUM_COLUMNS),),
        *(rows, total, rows.shape[0], width),
        ROWS=tables.SUM_ROWS,
        COLUMNS=tables.SUM_COLUMNS,
        num_warps=tables.SUM_WARPS,
    )
    return total
