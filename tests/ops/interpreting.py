"""Has Triton's interpreter leave out what it does again and again to no end, longer than all that kernels do takes.

It patches its language at every call of one function by another: once a launch is enough for each module whose
functions take part, since what is set stays set until the launch ends. It looks whether integers overflow, and then
drops what it found unless its option ``debug`` is set. It makes a table of all types to look one up, works out the same
types of blocks for each result, and compares shapes size by size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def work_once() -> None:
    """Holds from now on in this process."""
    _patch_once_a_launch()
    _skip_unread_checks()
    _keep_types()
    _pass_equal_shapes()


def _patch_once_a_launch() -> None:
    patch, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def patch_for(function: Any) -> Any:
        if function.__module__ in patched:
            return None  # only what is returned to a launch, whose patch is the first, is looked at
        patched.add(function.__module__)
        return patch(function)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        try:
            return execute(self, *args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang = patch_for
    interpreter.GridExecutor.__call__ = launch


def _skip_unread_checks() -> None:
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)


def _keep_types() -> None:
    find, found = interpreter._get_np_dtype, {}

    def look_up(of: Any) -> Any:
        name = of.scalar.name  # of a block, what its elements are
        if name not in found:
            found[name] = find(of)
        return found[name]

    make, made = tl.block_type.__init__, {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *shape
        if key not in made:
            make(self, element_ty, shape)
            made[key] = dict(vars(self))
        vars(self).update(made[key])

    interpreter._get_np_dtype = look_up
    tl.block_type.__init__ = block_type


def _pass_equal_shapes() -> None:
    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_unequal(self: Any, left: Any, right: Any) -> Any:
        shapes = [[*operand.type.shape] if operand.type.is_block() else [] for operand in (left, right)]
        return (left, right) if shapes[0] == shapes[1] else broadcast(self, left, right)

    TritonSemantic.broadcast_impl_value = broadcast_unequal
