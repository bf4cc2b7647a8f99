"""``mamba2-hf look``: one page of what a model does with a text."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .console import DType, err, fail, write
from .models import DEVICE_HELP, DTYPE_HELP, MODEL_HELP, find_device, load_model

LOOK_EXAMPLES = r"""[bold]Examples[/bold]

[cyan]mamba2-hf look mamba2 "def read_json(path):"[/cyan]

[cyan]mamba2-hf look hybrid - --out hybrid.html < module.py[/cyan]

[cyan]mamba2-hf look ./my-mamba2 "17 4 998 17 4" --ids[/cyan]
"""


def look(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} mamba2 or hybrid.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What it reads; [cyan]-[/cyan] takes it from stdin.")],
    destination: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The page to write; one that is there is replaced.")
    ] = Path("look.html"),
    ids: Annotated[
        bool, typer.Option("--ids", help="TEXT holds token ids, separated by spaces or commas, and no text.")
    ] = False,
    max_tokens: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Look at the first N tokens; matrices take the square of their number."),
    ] = 1024,
    device: Annotated[str, typer.Option(metavar="NAME", help=DEVICE_HELP)] = "auto",
    dtype: Annotated[DType, typer.Option(metavar="NAME", help=DTYPE_HELP)] = DType.auto,
) -> None:
    """Write a page that shows a model at work on a text.

    Each head's attention matrix, how long it remembers, how full its state is, which tokens gate: one HTML file, to be
    opened in a browser, without a server or a network. Prints the file's name.
    """
    if text == "-":
        text = sys.stdin.read()
    numbers = _ids(text) if ids else None
    if not text.strip():
        raise typer.BadParameter("the text is empty; give at least one token", param_hint="TEXT")
    if not destination.absolute().parent.is_dir():
        fail(f"no such directory: {destination.absolute().parent}; make it, or name another file with --out")

    from ..errors import Mamba2HFError
    from ..inspect import look as measure
    from ..inspect import write_page

    net, tokenizer = load_model(model, find_device(device), dtype, reads_text=not ids)
    try:
        found = measure(net, text if numbers is None else numbers, tokenizer, max_tokens=max_tokens)
        size = write_page(found, destination, f"{Path(model).name or model}: {found.model}")
    except (Mamba2HFError, OSError) as error:
        fail(str(error))
    notes = [f"{len(found.ids)} tokens", f"{sum(view.heads for view in found.mixers)} heads", f"{size / 1e6:.1f} MB"]
    if found.left_out:
        notes.append(f"{found.left_out} tokens left out (--max-tokens)")
    if found.block > 1:
        notes.append(f"matrices in blocks of {found.block} tokens")
    err.print(escape(", ".join(notes)), style="dim")
    write(f"{destination}\n")


def _ids(text: str) -> list[int]:
    try:
        return [int(number) for number in re.split(r"[\s,]+", text.strip(" \t\n,[]")) if number]
    except ValueError as error:
        raise typer.BadParameter(f"{error}; --ids takes numbers such as 17 4 998", param_hint="TEXT") from None
