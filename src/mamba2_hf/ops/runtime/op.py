"""How the Triton ops are called: straight in eager mode, through PyTorch's dispatcher where somebody looks on.

``torch.compile``, export, fake tensors, dispatch modes and functorch see the registered ops of ``library.py``. Without
any of them the dispatcher's detour through Python, longer than some kernels run, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .plan import replayed

NAMESPACE = "mamba2_hf"

_direct: dict[str, Callable[..., Any]] = {}


def call(name: str, *args: Any) -> Any:
    """Calls an op of ``torch.ops.mamba2_hf``; its first argument is a tensor."""
    if _is_watched(args[0]):
        return getattr(getattr(torch.ops, NAMESPACE), name)(*args)
    return _direct[name](*args)


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """``launch``, run on the device of its first tensor, by a plan where there is one."""
    launch = replayed(launch)

    def run(*args: Any) -> Any:
        device = args[0].get_device()
        if device in (-1, torch.cuda.current_device() if device >= 0 else -1):
            return launch(*args)
        with torch.cuda.device(device):
            return launch(*args)

    return run


def set_direct(name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an op without gradients callable in eager mode, by what is returned."""
    run = _direct[name] = on_its_device(launch)
    return run


def set_differentiable(name: str, backward: Callable[..., Any], tensors: int, saved: int, kept: int) -> None:
    """Gives an op of :func:`set_direct` its gradients; see ``library._differentiate`` for the arguments."""
    forward, backward = _direct[name], on_its_device(backward)
    keep, run = autograd_parts(name, backward, tensors, saved, kept)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = forward(*args)
            keep(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            return run(ctx, *gradients)

    Function.__name__ = Function.__qualname__ = name

    def direct(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in args[:tensors]):
            return Function.apply(*args)
        return forward(*args)

    _direct[name] = direct


def autograd_parts(
    name: str, backward: Callable[..., Any], tensors: int, saved: int, kept: int
) -> tuple[Callable[..., None], Callable[..., tuple[Tensor | None, ...]]]:
    """What an op's autograd keeps, and its backward, as ``torch.library.register_autograd`` takes them."""
    from ...errors import BackendError

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        outputs = (output,) if isinstance(output, Tensor) else output
        y = outputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*outputs[len(outputs) - kept :], *inputs[:saved])
        ctx.options = inputs[saved:]
        ctx.like = y.shape, y.dtype, y.device

    def run(ctx: Any, first: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise BackendError(
                f"{name} has no second derivative on Triton: run the forward under mamba2_hf.ops.use_backend('torch')"
            )
        if first is None:  # only the states were used
            shape, dtype, device = ctx.like
            first = torch.zeros(shape, dtype=dtype, device=device)
        found = backward(first, *rest[: len(rest) - kept], *ctx.saved_tensors, *ctx.options)
        wanted = ctx.needs_input_grad
        result = [g if needed else None for g, needed in zip(found, wanted, strict=False)]
        return *result, *(None,) * (saved + len(ctx.options) - tensors)

    return setup_context, run


def _is_watched(tensor: Tensor) -> bool:
    """Whether a call is traced or intercepted rather than just run."""
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
