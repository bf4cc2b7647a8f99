"""The command line: ``mamba2-hf generate``, ``look``, ``env``, ``convert``, ``verify``, ``card`` and ``push``.

Exit codes: 0 when the command did what was asked, 1 when it could not (the message says what to change), 2 when it was
called wrongly; 130 and 143 when it was stopped by SIGINT and SIGTERM. Only what a script wants goes to stdout;
everything said about it goes to stderr.
"""

from __future__ import annotations

from typing import Annotated

import typer

from . import checkpoints
from .environment import ENV_EXAMPLES, env, version_of
from .generate import GENERATE_EXAMPLES, generate
from .look import LOOK_EXAMPLES, look

__all__ = ["app", "main"]

app = typer.Typer(
    name="mamba2-hf",
    help="Mamba-2 on Hugging Face transformers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
)
app.command(epilog=GENERATE_EXAMPLES)(generate)
app.command(epilog=LOOK_EXAMPLES)(look)
app.command(epilog=checkpoints.CONVERT_EXAMPLES)(checkpoints.convert)
app.command(epilog=checkpoints.VERIFY_EXAMPLES)(checkpoints.verify)
app.command(epilog=checkpoints.CARD_EXAMPLES)(checkpoints.card)
app.command(epilog=checkpoints.PUSH_EXAMPLES)(checkpoints.push)
app.command(epilog=ENV_EXAMPLES)(env)


def main() -> None:
    """The console script."""
    app()


def _print_version(asked: bool) -> None:
    if asked:
        print(version_of("mamba2-hf"))
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Mamba-2 on Hugging Face transformers."""
