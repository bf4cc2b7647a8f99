"""Launches of kernels that have run before, without Triton's front end.

Finding a compiled kernel takes Triton longer than many kernels run. Here a launch is recognized by what Triton would
compile for, one value per argument, and goes to the compiled kernel itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .plan import noted

REMEMBERED = 4096  # launches, before all are forgotten

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


@noted
def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """Runs ``kernel[grid](*args, **constants)`` on the current device and stream.

    Its compiled code and the constants that this takes behind the arguments; None in the interpreter.

    Args:
        kernel: a kernel of ``triton.jit`` or ``gluon.jit``.
        grid: numbers of programs.
        args: in order, everything but the kernel's ``constexpr`` parameters: tensors, tile descriptors, numbers, None.
        constants: the ``constexpr`` parameters and compiler options.
    """
    kinds: list[Any] = [id(kernel), torch.cuda.current_device() if torch.cuda.is_initialized() else -1]
    for arg in args:  # what of an argument the compiled code depends on
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            kinds += arg.dtype, arg.data_ptr() % 16 == 0
        elif kind is int:
            kinds.append(1 if arg == 1 else (arg % 16 == 0, -(2**31) <= arg < 2**31))
        elif arg is None or kind is float:
            kinds.append(kind)
        elif isinstance(arg, Tensor):
            kinds += arg.dtype, arg.data_ptr() % 16 == 0
        else:
            kinds.append((arg.base.dtype, *arg.block_shape))
    key = (*kinds, *constants.items())
    found = _compiled.get(key)
    if found is not None:
        compiled, tail = found
        compiled[grid + (1, 1)](*args, *tail)
        return found
    compiled = kernel[grid](*args, **constants, enable_fp_fusion=True)
    if compiled is None:  # interpreted
        return None
    if len(_compiled) >= REMEMBERED:
        _compiled.clear()
    rest = [parameter.name for parameter in kernel.params[len(args) :]]
    found = _compiled[key] = compiled, tuple(constants[name] for name in rest)
    return found
