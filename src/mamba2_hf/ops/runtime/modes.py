"""What the surroundings of a call ask for and permit: autograd, the compiler, autocast, function transforms."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which matrix products keep the dtype of their operands: what the ops promise to compute in fp32 is
    no matter of taste.
    """
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will record an op on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def known(condition: bool) -> bool:
    """A condition on sizes, False where it depends on a size that a compiled or exported graph leaves open."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def in_steps(device: torch.device) -> bool:
    """Whether short loops beat wide operations: on a CPU, whose caches hold a step, and outside of graphs."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


# On a CPU, touching fresh memory costs several times the arithmetic, so these write over an operand that nothing else
# holds. Under ``torch.func`` they do not: there, an operand may be too small for the result.


def times(fresh: Tensor, factor: Tensor) -> Tensor:
    """``fresh * factor``, over ``fresh`` where no graph is recorded that needs its value."""
    return fresh * factor if torch.is_grad_enabled() or transformed() else fresh.mul_(factor)


def plus(fresh: Tensor, more: Tensor, factor: Tensor | None = None) -> Tensor:
    """``fresh + more``, or ``fresh + more * factor``, over ``fresh``, whose value no gradient may need."""
    if factor is None:
        return fresh + more if transformed() else fresh.add_(more)
    return torch.addcmul(fresh, more, factor) if transformed() else fresh.addcmul_(more, factor)


def transformed() -> bool:
    """Whether ``torch.func`` (vmap, jvp) rewrites operations."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
