"""Has Triton's interpreter patch its language once a launch for each module whose functions take part.

By itself it does so at every call of one function by another, which takes as long as all else that kernels do. What is
set stays set until the launch ends, so doing it again changes nothing.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    """Holds from now on in this process."""
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
