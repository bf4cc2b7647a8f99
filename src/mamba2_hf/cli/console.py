"""What all commands share: where they write, how they fail, and the types of their options."""

from __future__ import annotations

import sys
from enum import Enum
from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text

# Text of models and users passes through here: no markup, no highlighting, no wrapping.
out = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class DType(str, Enum):
    """What ``--dtype`` accepts."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def write(text: str) -> None:
    """Puts text on stdout as it is, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def fail(message: str) -> NoReturn:
    """Says on stderr what went wrong and exits with 1."""
    err.print(Text.assemble(("error: ", "bold red"), message))
    raise typer.Exit(1)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
