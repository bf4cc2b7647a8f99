"""Cross-entropy of logits that become their own gradients, in two passes over a row that stays in the L2 cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime import tables
from ..runtime.launch import launch
from ..runtime.op import op
from ..runtime.rows import vector_strides
from ..runtime.tables import power_of_two
from ..spec import Index, State


@triton.jit
def cross_entropy_kernel(logits, labels, losses, stride, scale, ignore_index,
                         VOCAB: tl.constexpr, UNIT: tl.constexpr, GRADIENT: tl.constexpr,
                         BLOCK: tl.constexpr):  # fmt: skip
    """One row: the largest logit and the sum of exponentials, then the gradient over the logits."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride * UNIT
    label = tl.load(labels + row)
    columns = tl.arange(0, BLOCK)
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            for start in range(0, VOCAB, BLOCK):
                column = start + columns
                zeros = tl.zeros([BLOCK], base.dtype.element_ty)
                tl.store(base + column, zeros, mask=column < VOCAB)
    else:
        peak = tl.full([], float("-inf"), tl.float32)
        totals = tl.zeros([BLOCK], tl.float32)
        for start in range(0, VOCAB, BLOCK):
            column = start + columns
            x = tl.load(base + column, mask=column < VOCAB, other=0.0, eviction_policy="evict_last")
            x = tl.where(column < VOCAB, x.to(tl.float32) * scale, float("-inf"))
            higher = tl.maximum(peak, tl.max(x, 0))
            shift = tl.where(higher == float("-inf"), 0.0, higher)  # no difference of infinities
            totals = totals * tl.exp(peak - shift) + tl.exp(x - shift)
            peak = higher
        normalizer = peak + tl.log(tl.sum(totals, 0))
        known = (label >= 0) & (label < VOCAB)
        target = tl.load(base + label, mask=known, other=float("nan")).to(tl.float32) * scale
        tl.store(losses + row, normalizer - target)
        if GRADIENT:
            tl.debug_barrier()  # the target's logit is read before any warp overwrites it
            for start in range(0, VOCAB, BLOCK):
                column = start + columns
                x = tl.load(base + column, mask=column < VOCAB, other=0.0, eviction_policy="evict_first")
                p = tl.exp(x.to(tl.float32) * scale - normalizer)
                p = scale * tl.where(column == label, p - 1.0, p)
                tl.store(base + column, p.to(base.dtype.element_ty), mask=column < VOCAB)


class Rows(NamedTuple):
    """Arguments of :func:`rows`."""

    logits: State
    labels: Index
    scale: float
    ignore_index: int
    gradient: bool


def cross_entropy_rows(logits: Tensor, labels: Tensor, scale: float, ignore_index: int, gradient: bool) -> Tensor:
    """See :func:`mamba2_hf.ops.cross_entropy.torch.cross_entropy_rows`. A label that is no index gives NaN."""
    losses: Tensor = rows(Rows(logits, labels, float(scale), ignore_index, gradient))
    return losses


@op("cross_entropy_rows", fake=lambda call: call.logits.new_empty(call.logits.shape[0], dtype=torch.float32))
def rows(call: Rows) -> Tensor:
    """Computes the losses ``(R,)``; see :func:`cross_entropy_rows`."""
    logits, labels, scale, ignore_index, gradient = call
    count, vocab = logits.shape
    losses = torch.empty(count, dtype=torch.float32, device=logits.device)
    unit, (stride,) = vector_strides(logits)
    block = min(tables.LOSS_BLOCK, power_of_two(vocab))
    launch(
        cross_entropy_kernel,
        (count,),
        *(logits, labels.contiguous(), losses, stride, scale, ignore_index),
        VOCAB=vocab,
        UNIT=unit,
        GRADIENT=gradient,
        BLOCK=block,
        num_warps=tables.loss_warps(tables.current_chip(), block),
    )
    return losses
