"""Rotary embedding, attention of one query a sequence, and a whole layer of attention for one token a sequence:
arguments, contracts, and the choice of a backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_devices, check_floating, check_rank, check_same_dtype, check_shape, fail
from ..partners import Joined
from ..runtime.modes import needs_grad
from ..spec import Index, Linear, Peers, State

MOST_ROWS = 64
"""Sequences up to which a step of a layer is the quickest way, on Triton."""


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


class AttentionStep(NamedTuple):
    """Arguments of :func:`attention_step`: ``residual + m' out(attend(q(x), k(x), v(x)))`` of ``x = m norm(stream)``,
    for one token of each sequence, whose keys and values join those of a buffer.
    """

    stream: Tensor
    """``(B, 1, d)``"""
    keys: State
    """``(B, H', S, D)``"""
    values: State
    """As ``keys``."""
    norm_weight: Tensor
    """``(d,)``"""
    q: Linear
    """To H D."""
    k: Linear
    """To H' D."""
    v: Linear
    """To H' D."""
    out: Linear
    """From H D."""
    lengths: Index
    """``(B,)`` keys of each sequence with the new one, from 1 to S, which goes to the last of these places."""
    cos: Index | None
    """``(B or 1, 1, D')`` as for :func:`rotary`; None for no rotation."""
    sin: Index | None
    scale: float
    """Of the scores."""
    norm_eps: float = 1e-5
    multiplier: float = 1.0
    """m"""
    key_multiplier: float = 1.0
    output_multiplier: float = 1.0
    """m'"""
    residual: Tensor | None = None
    """``(B, 1, d)``; None for the stream."""
    peers: Peers = Peers()
    """Devices that have the layer's other heads."""
    part: bool = False
    """Whether to find what is summed over devices, and no more: fp32 at least, without residual and bias of out."""

    @property
    def added_to(self) -> Tensor:
        """What the layer's result is added to."""
        return self.stream if self.residual is None else self.residual


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


def attention_step(
    call: AttentionStep, backend: str | None = None, total: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """A layer of attention for one token a sequence: ``(B, 1, d)`` in the dtype of the stream. ``keys`` and ``values``
    are written in place. On Triton no gradient is known. ``total`` is as in :func:`layer_step`, of a layer of which
    every device has some of the heads, and the bias of ``out``.
    """
    stream, keys = call.stream, call.keys
    check_rank("stream", stream, 3, "(B, 1, d)")
    check_rank("keys", keys, 4, "(B, H', S, D)")
    (batch, _, width), (_, groups, places, size) = stream.shape, keys.shape
    check_shape("stream", stream, (batch, 1, width), "(B, 1, d)")
    check_shape("keys", keys, (batch, groups, places, size), "(B, H', S, D)")
    check_shape("values", call.values, tuple(keys.shape), "as keys")
    check_rank("q", call.q.weight, 2, "(H D, d)")
    inner = call.q.weight.shape[0]
    if inner % (groups * size):
        fail(f"q has {inner} outputs, which is no multiple of the {groups} x {size} of k")
    for name, linear, shape in (
        *(("q", call.q, (inner, width)), ("k", call.k, (groups * size, width)), ("v", call.v, (groups * size, width))),
        ("out", call.out, (width, inner)),
    ):
        check_shape(name, linear.weight, shape, str(shape))
        check_same_dtype(**{name: linear.weight, "keys": keys})
        check_devices(stream.device, **{name: linear.weight, f"{name} bias": linear.bias})
        if linear.lora is not None:
            fail(f"{name} has LoRA factors, which a step does not take: call the modules")
    check_same_dtype(keys=keys, values=call.values)
    for name, buffer in (("keys", keys), ("values", call.values)):
        if buffer.stride(3) != 1:
            fail(f"the channels of {name} lie {buffer.stride(3)} elements apart, expected neighbors")
    check_shape("lengths", call.lengths, (batch,), "(B,)")
    if call.cos is not None and call.sin is not None:
        turned = call.cos.shape[-1]
        if turned > size or turned % 2:
            fail(f"cos has {turned} channels, expected an even number up to the {size} of a head")
        check_shape("cos", call.cos, (1 if call.cos.shape[0] == 1 else batch, 1, turned), "(B or 1, 1, D')")
        check_shape("sin", call.sin, tuple(call.cos.shape), "as cos")
    tensors = {"keys": keys, "values": call.values, "lengths": call.lengths, "cos": call.cos, "residual": call.residual}
    check_devices(stream.device, **tensors)
    differentiable = needs_grad(
        stream, keys, call.values, *(each.weight for each in (call.q, call.k, call.v, call.out))
    )
    options = {"dtype": keys.dtype, "width": size, "differentiable": differentiable}
    backend = dispatch.choose("attention_step", stream.device, backend, **options).name
    module = dispatch.backend_module(backend)
    if total is None or module.sums_over_peers(call):
        y: Tensor = module.attention_step(call)
        return y
    part = module.attention_step(call._replace(part=True))
    y = module.joined(Joined(total(part), call.added_to, call.out.bias, call.output_multiplier))
    return y


def attention_step_serves(stream: Tensor, keys: Tensor) -> bool:
    """Whether :func:`attention_step` is the quickest way for ``stream (B, T, d)``: one token of up to 64 sequences, on
    a GPU, under the conditions of :func:`attend_one_serves`.
    """
    few = stream.shape[1] == 1 and stream.shape[0] <= MOST_ROWS
    return few and attend_one_serves(keys, keys) and not torch.is_autocast_enabled("cuda")


def attend_one_serves(queries: Tensor, keys: Tensor) -> bool:
    """Whether :func:`attend_one` is the quickest way for one query a sequence: on a GPU that Triton serves, with no
    gradient and no graph in the making, heads that fit, and not under :func:`batch_invariant`.
    """
    if not queries.is_cuda or torch.is_grad_enabled() or queries.dtype != keys.dtype or torch.compiler.is_compiling():
        return False
    if dispatch.is_batch_invariant():
        return False
    options = {"dtype": queries.dtype, "width": queries.shape[-1]}
    return dispatch.choose("attend_one", queries.device, None, **options).name == "triton"
