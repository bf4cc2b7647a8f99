"""Linear layers, whose products are the ops' where their weights may be read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import BackendError
from ..ops.runtime import linear as products
from .weights import is_unhooked, plain_linear


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` for a linear layer, ``(..., d)`` to ``(..., d')``: on a CPU by
    :func:`mamba2_hf.ops.runtime.linear.linear`, where its weight may be read.

    Raises:
        BackendError: under ``batch_invariant()``, for a module whose weights may not be read.
    """
    if ops.is_batch_invariant():
        return _invariant(module, x)
    readable = plain_linear(module) if type(module) is nn.Linear and not x.is_cuda else None
    if readable is None:
        return module(x)  # type: ignore[no-any-return]
    weight, bias, *_ = readable
    return products.linear(x, weight, bias)


def call(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` for a linear layer; under ``batch_invariant()`` as :func:`linear`."""
    return _invariant(module, x) if ops.is_batch_invariant() else module(x)  # type: ignore[no-any-return]


def _invariant(module: nn.Module, x: Tensor) -> Tensor:
    readable = plain_linear(module)
    if readable is None:
        raise BackendError(
            f"batch_invariant() cannot see the products of a {type(module).__name__} that is quantized, hooked, "
            "sharded, or adapted by more than plain LoRA: merge adapters, take hooks off, load weights as they are"
        )
    return products.project(x, readable)


AddTo = Callable[..., list[Tensor]]
""":meth:`Adapter.add_to` of an adapter."""


class Adapter(nn.Sequential):
    """Two linear layers of low rank beside projections that have the same input.

    Args:
        inputs: d.
        rank: in between.
        outputs: of all those projections together.
    """

    def __init__(self, inputs: int, rank: int, outputs: int) -> None:
        super().__init__(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False))

    def add_to(self, x: Tensor, *projected: Tensor) -> list[Tensor]:
        """What projections of ``x (..., d)`` gave, each plus its part of what this makes of ``x``, which is added by
        the product itself where weights may be read.
        """
        sizes, up = [each.shape[-1] for each in projected], plain_linear(self[1])
        if ops.is_batch_invariant():
            added = call(self[1], call(self[0], x))
            return [each + more for each, more in zip(projected, added.split(sizes, -1), strict=True)]
        if up is None or up.lora is not None or not is_unhooked(self):
            return [each + more for each, more in zip(projected, self(x).split(sizes, -1), strict=True)]
        inner, (weight, *_) = self[0](x).flatten(0, -2), up  # (R, r) and (sum of sizes, r)
        parts = zip(projected, weight.split(sizes), strict=True)
        return [torch.addmm(each.flatten(0, -2), inner, part.T).view_as(each) for each, part in parts]
