"""What launch code for rows of channels shares: strides that tell the compiler how wide it may load."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """``x`` itself where its channels are neighbors in memory, whatever its other strides; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dense(tensor: Tensor | None) -> Tensor | None:
    """A contiguous tensor of the same values, where there is one."""
    return None if tensor is None else tensor.contiguous()


def vector_strides(*rows: Any) -> tuple[int, list[int]]:
    """All strides but the last of each tensor, in units of the largest power of two (up to 16) that divides them all.

    The first tensor is there; others may be None, and count as zeros.

    Kernels multiply by that unit, a constant, so the compiler can prove alignment for any width of the in_proj output.
    """
    absent = (0,) * (rows[0].dim() - 1)
    strides = [stride for tensor in rows for stride in (absent if tensor is None else tensor.stride()[:-1])]
    unit = math.gcd(16, *strides)
    return unit, [stride // unit for stride in strides]
