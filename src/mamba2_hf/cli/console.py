"""What all commands share: where they write, how they fail, and the types of their options."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
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


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A bar on stderr, where that is a terminal, while something goes on whose end nobody knows."""
    columns = (TextColumn(what), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as bar:
        bar.add_task("", total=None)
        yield


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
