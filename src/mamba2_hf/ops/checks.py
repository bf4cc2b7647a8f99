"""What the contracts of ops check, each in one way: shapes, dtypes, devices, ranges.

Shape checks read only metadata, so they cost nothing on a GPU and disappear under ``torch.compile``. Values are checked
where reading them is free: ``cu_seqlens`` on the CPU, outside of tracing.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import ArgumentError
from .spec import Packing


def fail(message: str) -> NoReturn:
    """Raises :class:`ArgumentError`."""
    raise ArgumentError(message)


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], dims: str) -> None:
    """Raises unless the tensor has the ``expected`` shape, in words ``dims``."""
    if tuple(tensor.shape) != expected:
        fail(f"{name} has shape {tuple(tensor.shape)}, expected {expected} = {dims}")


def check_rank(name: str, tensor: Tensor, rank: int, dims: str) -> None:
    """Raises unless the tensor has ``rank`` dimensions, in words ``dims``."""
    if tensor.dim() != rank:
        fail(f"{name} has {tensor.dim()} dimensions {tuple(tensor.shape)}, expected {rank}: {dims}")


def check_sizes(name: str, tensor: Tensor, *sizes: int) -> None:
    """Raises unless all of some of the tensor's sizes are positive."""
    if min(sizes) < 1:
        fail(f"{name} has shape {tuple(tensor.shape)}: every size has to be at least 1")


def check_floating(**tensors: Tensor) -> None:
    """Raises unless all have floating point dtypes."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            fail(f"{name} has dtype {tensor.dtype}, expected a floating point dtype")


def check_integers(**tensors: Tensor) -> None:
    """Raises unless all have integer dtypes."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            fail(f"{name} has dtype {tensor.dtype}, expected an integer dtype")


def check_devices(device: torch.device, **values: Any) -> None:
    """Raises unless all tensors among ``values`` are on ``device``."""
    for name, value in values.items():
        if isinstance(value, Tensor) and value.device != device:
            fail(f"{name} is on {value.device}, but the input is on {device}: move one of them with .to(...)")


def check_same_dtype(**tensors: Tensor) -> None:
    """Raises unless two tensors have one dtype."""
    (first, a), (second, b) = tensors.items()
    if a.dtype != b.dtype:
        fail(f"{first} has dtype {a.dtype}, {second} {b.dtype}: convert one of them")


def check_dt_limit(dt_limit: tuple[float, float]) -> None:
    """Raises unless ``dt_limit`` is a pair ``0 <= low < high`` (a NaN fails too)."""
    if len(dt_limit) != 2 or not 0.0 <= dt_limit[0] < dt_limit[1]:
        fail(f"dt_limit is {tuple(dt_limit)}, expected (low, high) with 0 <= low < high, such as (0.0, inf)")


def limits(dt_limit: tuple[float, float]) -> tuple[float, float]:
    """The clamp of the step size as records hold it: what kernels are compiled for knows numbers by their types."""
    return tuple(map(float, dt_limit))  # type: ignore[return-value]


def check_packing(batch: int, tokens: int, packing: Packing) -> int:
    """Checks the two ways to name documents and returns how many states go in and out (``B``, or ``S`` if packed)."""
    seq_idx, cu_seqlens = packing
    if seq_idx is not None and cu_seqlens is not None:
        fail("seq_idx and cu_seqlens were both given: name the documents in one way only")
    if seq_idx is not None:
        check_integers(seq_idx=seq_idx)
        check_shape("seq_idx", seq_idx, (batch, tokens), "(B, T)")
    if cu_seqlens is None:
        return batch
    check_rank("cu_seqlens", cu_seqlens, 1, "(S + 1,)")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.shape[0] < 2:
        fail(f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, expected int32 or int64 (S + 1,), S >= 1")
    if batch != 1:
        fail(f"cu_seqlens was given with batch {batch}: lay the documents end to end in one row, (1, T, ...)")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] > tokens or any(b > c for b, c in pairwise(bounds)):
            fail(f"cu_seqlens is {bounds}: it has to start at 0, never fall, and end at or before T = {tokens}")
    return cu_seqlens.shape[0] - 1


def check_slots(slots: Tensor, x: Tensor) -> int:
    """Raises unless ``slots`` names a row of the states for each row of ``x``; returns how many."""
    if slots.is_floating_point() or slots.dtype == torch.bool:
        fail(f"slots has dtype {slots.dtype}, expected an integer dtype")
    check_shape("slots", slots, (x.shape[0],), "(B,)")
    return x.shape[0]


def check_heads(
    heads: int, head_dim: int, groups: int, A: Tensor | None, D: Tensor | None, dt_bias: Tensor | None
) -> None:
    """Checks what belongs to heads, whose groups share B and C."""
    if groups < 1 or heads % groups:
        fail(f"B and C have {groups} groups, which does not divide the {heads} heads of x")
    if A is not None:
        check_shape("A", A, (heads,), "(H,)")
    # Compared one by one: a compiled graph that leaves the sizes open does not find one tuple among several.
    if D is not None and tuple(D.shape) != (heads,) and tuple(D.shape) != (heads, head_dim):
        fail(f"D has shape {tuple(D.shape)}, expected {(heads,)} = (H,) or {(heads, head_dim)} = (H, P)")
    if dt_bias is not None:
        check_shape("dt_bias", dt_bias, (heads,), "(H,)")
