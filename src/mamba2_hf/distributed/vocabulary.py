"""Embedding, head and loss of which every process has some of the vocabulary's rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Head
from ..ops.spec import compute_dtype
from .collectives import sum_backward
from .groups import Group
from .packed import CutModule, sum_of_parts

LOGITS_AT_ONCE = 2**24
"""Elements of the logits that a process holds while it computes a loss."""


class CutEmbedding(CutModule, nn.Embedding):
    """An embedding of whose rows every process has its own; ``num_embeddings`` are those of all."""

    def forward(self, ids: Tensor) -> Tensor:
        """``(...)`` ids to ``(..., d)``, the same in all processes. Ids that nobody has fail in all of them."""
        weight = self.weight
        rows = weight.shape[0]
        holder = ids // rows
        # A row that others hold too, or none at all.
        index = torch.sub(ids, holder.clamp(0, self.group.size - 1), alpha=rows)
        found = F.embedding(index, weight)
        return sum_of_parts(found.masked_fill((holder != self.group.rank)[..., None], 0), self.group)


class CutHead(CutModule, Head):
    """A head of whose outputs every process computes its own; ``out_features`` are those of all."""

    is_part = True

    def forward(self, hidden_states: Tensor, labels: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """All logits or, with labels, their loss; see :class:`Head`. The same in all processes."""
        if labels is not None:
            loss: Tensor = _Loss.apply(hidden_states.flatten(0, -2), self.weight, labels, scale, self.group)
            return loss
        own = F.linear(sum_backward(hidden_states, self.group), self.weight, self.bias)
        logits: Tensor = _GatherColumns.apply(own, self.group)
        return logits


class _GatherColumns(torch.autograd.Function):
    """``(..., n)`` of all processes side by side, of which each makes the same use."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.gather_columns(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.chunk(ctx.group.size, -1)[ctx.group.rank], None


class _Loss(torch.autograd.Function):
    """The summed cross-entropy ``()`` of ``hidden (R, d)``. Of every row three numbers are sent: the largest logit that
    a process has, the sum of the exponentials beside it, and the label's logit.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, scale: float, group: Group) -> Tensor:
        found = []
        for rows, of_rows in _pieces(hidden, labels, weight):
            logits = _logits(rows, weight, scale)
            largest = logits.amax(-1)
            mine, index = _own(of_rows, weight, group)
            target = logits.gather(1, index[:, None])[:, 0].masked_fill(~mine, 0)
            found.append(torch.stack([largest, (logits - largest[:, None]).exp().sum(-1), target]))
        largest, sums, targets = group.gather(torch.cat(found, 1)).unbind(1)  # (W, R) each
        normalizer = (largest + sums.log()).logsumexp(0)
        ctx.save_for_backward(hidden, weight, labels, normalizer)
        ctx.scale, ctx.group = scale, group
        return (normalizer - targets.sum(0)).masked_fill(labels == -100, 0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, normalizer = ctx.saved_tensors
        dhidden, dweight = torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:
            dweight = torch.zeros_like(weight, dtype=compute_dtype(weight.dtype))
        start = 0
        for rows, of_rows in _pieces(hidden, labels, weight):
            stop = start + rows.shape[0]
            dlogits = (_logits(rows, weight, ctx.scale) - normalizer[start:stop, None]).exp()
            mine, index = _own(of_rows, weight, ctx.group)
            dlogits.scatter_add_(1, index[:, None], -mine[:, None].to(dlogits.dtype))
            dlogits = (dlogits.masked_fill_((of_rows == -100)[:, None], 0) * (gradient * ctx.scale)).to(weight.dtype)
            dhidden[start:stop] = dlogits @ weight
            if dweight is not None:
                dweight += dlogits.t() @ rows.to(weight.dtype)
            start = stop
        summed = ctx.group.sum(dhidden) if ctx.needs_input_grad[0] else None
        return summed, None if dweight is None else dweight.to(weight.dtype), None, None, None


def _pieces(hidden: Tensor, labels: Tensor, weight: Tensor) -> Any:
    """Rows and their labels, as many at once as few logits belong to."""
    count = max(LOGITS_AT_ONCE // weight.shape[0], 1)
    return zip(hidden.split(count), labels.split(count), strict=True)


def _logits(rows: Tensor, weight: Tensor, scale: float) -> Tensor:
    logits = F.linear(rows.to(weight.dtype), weight)
    return logits.to(compute_dtype(logits.dtype)) * scale


def _own(labels: Tensor, weight: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Which labels are among the process's rows, and where."""
    own = labels - group.rank * weight.shape[0]
    mine = (own >= 0) & (own < weight.shape[0])
    return mine, own.where(mine, 0)
