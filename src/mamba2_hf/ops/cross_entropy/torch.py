"""Cross-entropy of logits that become their own gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import compute_dtype


def cross_entropy_rows(logits: Tensor, labels: Tensor, scale: float, ignore_index: int, gradient: bool) -> Tensor:
    """Cross-entropy of ``scale * logits``, row by row.

    Args:
        logits: ``(R, V)``; overwritten, where ``gradient``, with the gradient of the sum of the losses.
        labels: ``(R,)`` integers.
        scale: of the logits.
        ignore_index: rows with this label have no loss and no gradient.
        gradient: whether to overwrite.

    Returns:
        ``(R,)`` in fp32 (fp64).
    """
    x = logits.to(compute_dtype(logits.dtype))
    if scale != 1.0:
        x = x * scale
    counts = labels != ignore_index
    target = torch.where(counts, labels, 0).long()[:, None]
    total = x.logsumexp(1, keepdim=True)
    losses = torch.where(counts, (total - x.gather(1, target))[:, 0], 0.0)
    if gradient:
        x.sub_(total).exp_().scatter_add_(1, target, x.new_full((), -1.0).expand_as(target))
        if scale != 1.0:
            x.mul_(scale)
        # Filled, not multiplied by zero: what overflowed in a row that does not count is not its gradient.
        x.masked_fill_(~counts[:, None], 0.0)
        if x is not logits:
            logits.copy_(x)
    return losses
