"""What the surroundings of a call ask for and permit: autograd, the compiler, autocast, function transforms."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which matrix products keep the dtype of their operands, as the ops promise."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which autocast, or its absence, has products with ``weight`` computed."""
    device = weight.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will record an op on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def recomputed(run: Callable[..., Result], *args: Any) -> Result:
    """``run(*args)``, of which autograd keeps the tensors among ``args`` and runs the rest again in the backward.

    Transforms differentiate no recomputation, so that under them everything is kept.
    """
    if transformed() or not needs_grad(*(arg for arg in args if isinstance(arg, Tensor))):
        return run(*args)
    result: Result = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
    return result


def known(condition: bool) -> bool:
    """A condition on sizes, False where it depends on a size that a compiled or exported graph leaves open."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def traced() -> bool:
    """Whether operations go into a graph: of ``torch.compile``, of an export, or of a TorchScript trace."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def in_steps(device: torch.device) -> bool:
    """Whether short loops beat wide operations: on a CPU, whose caches hold a step, and outside of graphs."""
    return device.type == "cpu" and not traced()


# On a CPU, touching fresh memory costs several times the arithmetic, so these write over an operand that nothing else
# holds. Under transforms they do not: there, an operand may be too small for the result.


def times(fresh: Tensor, factor: Tensor) -> Tensor:
    """``fresh * factor``, over ``fresh`` where no graph is recorded that needs its value."""
    return fresh * factor if torch.is_grad_enabled() or transformed() else fresh.mul_(factor)


def plus(fresh: Tensor, more: Tensor, factor: Tensor | None = None) -> Tensor:
    """``fresh + more``, or ``fresh + more * factor``, over ``fresh``, whose value no gradient may need."""
    if factor is None:
        return fresh + more if transformed() else fresh.add_(more)
    return torch.addcmul(fresh, more, factor) if transformed() else fresh.addcmul_(more, factor)


def transformed() -> bool:
    """Whether ``torch.func`` (grad, vmap, jvp) or ``torch.autograd.forward_ad`` sees more in tensors than values."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def observed() -> bool:
    """Whether a dispatch mode (``torch.utils.flop_counter``, fake tensors, ``make_fx``) looks at operations."""
    return torch._C._len_torch_dispatch_stack() > 0
