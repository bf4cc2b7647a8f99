"""Has Triton's interpreter leave out what it does again and again to no end, longer than all that kernels do takes.

It patches its language at every call of one function by another: once a launch is enough for each module whose
functions take part, since what is set stays set until the launch ends. It looks whether integers overflow, and then
drops what it found unless its option ``debug`` is set. And it makes a table of all types to look one up.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from triton.runtime import interpreter


def work_once() -> None:
    """Holds from now on in this process."""
    _patch_once_a_launch()
    _skip_unread_checks()
    _keep_types()


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

    interpreter._get_np_dtype = look_up
