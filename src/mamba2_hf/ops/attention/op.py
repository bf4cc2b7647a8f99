"""Rotary embedding, and attention of one query a sequence: arguments, contracts, and the choice of a backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_devices, check_floating, check_rank, check_same_dtype, check_shape, fail
from ..runtime.modes import needs_grad
from ..spec import Index

LARGEST_HEAD = 256


class Rotary(NamedTuple):
    """Arguments of :func:`rotary`."""

    q: Tensor
    k: Tensor
    cos: Index
    sin: Index
    multiplier: float = 1.0


class OneQuery(NamedTuple):
    """Arguments of :func:`attend_one`."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Index | None
    scale: float


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, multiplier: float = 1.0, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of the first D' channels of each head, halves rotated against each other (RoFormer, Su
    et al. 2021); differentiable in ``q`` and ``k``.

    Args:
        q: ``(B, T, H, D)``.
        k: ``(B, T, H', D)``.
        cos, sin: ``(B or 1, T, D')`` with ``D' <= D``, each value twice.
        multiplier: of the keys.
        backend: as in :func:`ssd_chunk_scan`.

    Returns:
        ``q`` and ``k``, rotated, in their dtype.

    Raises:
        ArgumentError, BackendError: as in :func:`ssd_chunk_scan`.
    """
    check_floating(q=q, k=k)
    check_rank("q", q, 4, "(B, T, H, D)")
    check_rank("k", k, 4, "(B, T, H', D)")
    check_rank("cos", cos, 3, "(B or 1, T, D')")
    batch, tokens, _, size = q.shape
    check_shape("k", k, (batch, tokens, k.shape[2], size), "(B, T, H', D)")
    turned = cos.shape[2]
    if turned > size or turned % 2:
        fail(f"cos has {turned} channels, expected an even number up to the {size} of a head")
    check_shape("cos", cos, (1 if cos.shape[0] == 1 else batch, tokens, turned), "(B or 1, T, D')")
    check_shape("sin", sin, tuple(cos.shape), "as cos")
    check_same_dtype(q=q, k=k)
    check_devices(q.device, k=k, cos=cos, sin=sin)
    backend = dispatch.choose("rotary", q.device, backend, dtype=q.dtype).name
    rotated, others = dispatch.backend_module(backend).rotary(Rotary(q, k, cos, sin, multiplier))
    return rotated, others


def attend_one(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, backend: str | None = None
) -> Tensor:
    """Softmax attention of one query a sequence over the first ``lengths`` keys of its own.

    Args:
        q: ``(B, H, 1, D)``.
        k, v: ``(B, H', S, D)``, each head of which serves H / H' heads of ``q``.
        lengths: ``(B,)`` integers from 1 to S; None for S.
        scale: of the scores.
        backend: as in :func:`ssd_chunk_scan`.

    Returns:
        ``(B, H, 1, D)``. On Triton the keys are split among programs, and no gradient is known.

    Raises:
        ArgumentError, BackendError: as in :func:`ssd_chunk_scan`.
    """
    check_floating(q=q, k=k, v=v)
    check_rank("q", q, 4, "(B, H, 1, D)")
    check_rank("k", k, 4, "(B, H', S, D)")
    (batch, heads, _, size), (_, groups, keys, _) = q.shape, k.shape
    check_shape("q", q, (batch, heads, 1, size), "(B, H, 1, D)")
    check_shape("k", k, (batch, groups, keys, size), "(B, H', S, D)")
    check_shape("v", v, tuple(k.shape), "as k")
    if heads % groups:
        fail(f"q has {heads} heads, which is no multiple of the {groups} of k")
    if lengths is not None:
        check_shape("lengths", lengths, (batch,), "(B,)")
    check_same_dtype(q=q, k=k)
    check_same_dtype(k=k, v=v)
    check_devices(q.device, k=k, v=v, lengths=lengths)
    options = {"dtype": q.dtype, "width": size, "differentiable": needs_grad(q, k, v)}
    backend = dispatch.choose("attend_one", q.device, backend, **options).name
    y: Tensor = dispatch.backend_module(backend).attend_one(OneQuery(q, k, v, lengths, scale))
    return y


def attend_one_serves(queries: Tensor, keys: Tensor) -> bool:
    """Whether :func:`attend_one` is the quickest way for one query a sequence: on a GPU that Triton serves, with no
    gradient and no graph in the making, and heads that fit.
    """
    if not queries.is_cuda or torch.is_grad_enabled() or queries.dtype != keys.dtype or torch.compiler.is_compiling():
        return False
    usable = dispatch.usable(queries.device)[0] and queries.dtype != torch.float64
    return usable and queries.shape[-1] <= LARGEST_HEAD
