"""The gated RMS norm: arguments, contract, and the choice of a backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_devices, check_floating, check_shape, fail


class Norm(NamedTuple):
    """Arguments of :func:`gated_rms_norm`, with nothing left to be chosen."""

    x: Tensor
    z: Tensor | None
    weight: Tensor
    eps: float
    group_size: int
    norm_before_gate: bool
    dtype: torch.dtype


def gated_rms_norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """RMSNorm over groups of channels with a SiLU gate, computed in fp32.

    ``norm(x * silu(z)) * weight``, or ``norm(x) * weight * silu(z)`` with ``norm_before_gate``.

    Args:
        x: ``(..., d)``.
        z: gate shaped as ``x``, or None.
        weight: ``(d,)``.
        eps: added to the mean square.
        group_size: channels that share one mean square; None for all ``d``.
        norm_before_gate: the order; the published Mamba-2 models gate first.
        dtype: of the result, rounded to it once; None for that of ``x``.
        backend: as in :func:`ssd_chunk_scan`.

    Returns:
        Shaped as ``x``.

    Raises:
        ArgumentError, BackendError: as in :func:`ssd_chunk_scan`.
    """
    size = check_norm(x, z, weight, eps, group_size, dtype)
    call = Norm(x, z, weight, eps, size, norm_before_gate, dtype or x.dtype)
    backend = dispatch.choose("gated_rms_norm", x.device, backend, group_size=size, dtype=x.dtype).name
    y: Tensor = dispatch.backend_module(backend).gated_rms_norm(call)
    return y


def check_norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    group_size: int | None,
    dtype: torch.dtype | None = None,
) -> int:
    """Contract of ``gated_rms_norm``; returns the group size, raises :class:`ArgumentError`."""
    check_floating(x=x)
    width = x.shape[-1]
    check_shape("weight", weight, (width,), "(d,), the last size of x")
    if z is not None:
        check_shape("z", z, tuple(x.shape), "as x")
    if not 0.0 <= eps < float("inf"):
        fail(f"eps is {eps}, expected a small number >= 0, such as 1e-5")
    if dtype is not None and not dtype.is_floating_point:
        fail(f"dtype is {dtype}, expected a floating point dtype, or None for that of x")
    size = width if group_size is None else group_size
    if size < 1 or width % size:
        fail(f"group_size is {group_size}, which does not divide the width {width}")
    check_devices(x.device, z=z, weight=weight)
    return size
