"""Linear layers, whose products are the ops' where their weights may be read."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.runtime import linear as products
from .weights import plain_linear


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` for a linear layer, ``(..., d)`` to ``(..., d')``: on a CPU by
    :func:`mamba2_hf.ops.runtime.linear.linear`, where its weight may be read.
    """
    readable = plain_linear(module) if type(module) is nn.Linear and not x.is_cuda else None
    if readable is None:
        return module(x)  # type: ignore[no-any-return]
    weight, bias, *_ = readable
    return products.linear(x, weight, bias)
