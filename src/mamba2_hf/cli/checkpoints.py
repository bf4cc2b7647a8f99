"""``mamba2-hf convert``, ``verify``, ``card`` and ``push``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from .console import DType, busy, err, fail, out, write


class Source(str, Enum):
    """What ``--from`` accepts."""

    auto = "auto"
    mamba2 = "mamba2"
    mamba_ssm = "mamba_ssm"
    codestral = "codestral"
    mamba2_hybrid = "mamba2_hybrid"
    bamba = "bamba"
    granitemoehybrid = "granitemoehybrid"
    nemotron_h = "nemotron_h"
    falcon_h1 = "falcon_h1"
    zamba2 = "zamba2"
    mamba2attn = "mamba2attn"
    megatron = "megatron"
    megatron_mamba2 = "megatron_mamba2"


class Target(str, Enum):
    """What ``--to`` accepts."""

    auto = "auto"
    mamba2 = "mamba2"
    mamba_ssm = "mamba_ssm"
    mamba2_hybrid = "mamba2_hybrid"
    bamba = "bamba"
    granitemoehybrid = "granitemoehybrid"
    nemotron_h = "nemotron_h"
    falcon_h1 = "falcon_h1"
    zamba2 = "zamba2"


class ReaderName(str, Enum):
    """What ``--for`` accepts."""

    llama_cpp = "llama.cpp"
    mlx_lm = "mlx-lm"
    vllm = "vllm"
    transformers_4 = "transformers-4"
    transformers_5_20 = "transformers-5.20"
    transformers_5 = "transformers-5"


CONVERT_EXAMPLES = r"""[bold]Examples[/bold]

[cyan]mamba2-hf convert state-spaces/mamba2-130m mamba2-130m --tokenizer EleutherAI/gpt-neox-20b[/cyan]

[cyan]mamba2-hf convert ./Mamba-Codestral-7B-v0.1 ./codestral --dtype bfloat16[/cyan]

[cyan]mamba2-hf convert ./my-mamba2 ./for-mamba-ssm --to mamba_ssm[/cyan]

[cyan]mamba2-hf convert ./my-mamba2 ./to-share --remote-code[/cyan]

[cyan]mamba2-hf convert ibm-granite/granite-4.0-h-1b ./granite[/cyan]   and back, to serve it: [cyan]--for vllm[/cyan]
"""
WHAT, WHERE = "What is written", "Where it comes from"


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint's folder or a Hub id.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make.")],
    to: Annotated[
        Target,
        typer.Option(
            metavar="FORMAT",
            help="mamba2 is transformers' format, mamba_ssm that of the original code; mamba2_hybrid is this package's "
            "for models with attention or MLPs, and bamba, granitemoehybrid, nemotron_h, falcon_h1 and zamba2 are "
            "transformers'. auto takes mamba2 or mamba2_hybrid.",
            rich_help_panel=WHAT,
        ),
    ] = Target.auto,
    reader: Annotated[
        ReaderName | None,
        typer.Option(
            "--for",
            metavar="NAME",
            help="The program that is to read it: llama.cpp, mlx-lm, vllm, transformers-4, transformers-5.20 (to 5.22) "
            "or transformers-5. The config is written as that one wants it, and what it would compute wrongly refused.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    dtype: Annotated[
        DType,
        typer.Option(
            metavar="NAME",
            help="Of the weights: float32, bfloat16 or float16, with A_log, D and dt_bias in float32; auto keeps all.",
            rich_help_panel=WHAT,
        ),
    ] = DType.auto,
    max_shard_size: Annotated[
        str,
        typer.Option(metavar="SIZE", help="Of one file, such as 500MB or 5GB.", rich_help_panel=WHAT),
    ] = "5GB",
    remote_code: Annotated[
        bool,
        typer.Option(
            "--remote-code",
            help="Add the file with which trust_remote_code=True runs the model where this package is not installed.",
            rich_help_panel=WHAT,
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint that is at DST.", rich_help_panel=WHAT)
    ] = False,
    source_format: Annotated[
        Source,
        typer.Option(
            "--from",
            metavar="FORMAT",
            help="One of --to, or codestral, mamba2attn, megatron, megatron_mamba2; auto finds out.",
            rich_help_panel=WHERE,
        ),
    ] = Source.auto,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Take the tokenizer from this folder or Hub id.", rich_help_panel=WHERE),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a Hub id.", rich_help_panel=WHERE)
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="SRC is a PEFT adapter, and this the model it was trained on, in any format.",
            rich_help_panel=WHERE,
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no report.")] = False,
) -> None:
    """Convert a checkpoint, or an adapter of a hybrid, to another format.

    Prints the folder it made. The folder appears when all of it is written; when anything goes wrong, nothing is left.
    """
    if base is not None:
        if reader is not None:
            fail("--for is of models: convert the model with it, and this adapter with --to and that model's format")
        with _errors():
            from ..checkpoints import convert_adapter

            adapter = convert_adapter(
                *(source, destination),
                base=base,
                to=None if to is Target.auto else to.value,
                overwrite=overwrite,
                revision=revision,
            )
        if not quiet:
            err.print(f"{adapter.source} to {adapter.target}: an adapter of {adapter.modules} modules")
        write(f"{adapter.destination}\n")
        return
    with _errors(), _bar(hidden=quiet) as progress:
        import torch

        from ..checkpoints import convert as run

        result = run(
            source,
            destination,
            to=None if to is Target.auto else to.value,
            for_reader=None if reader is None else reader.value,
            source_format=None if source_format is Source.auto else source_format.value,
            dtype=None if dtype is DType.auto else getattr(torch, dtype.value),
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            with_code=remote_code,
            tokenizer=tokenizer,
            revision=revision,
            progress=progress,
        )
    if not quiet:
        kind = str(result.dtype).removeprefix("torch.")
        err.print(
            f"{result.source} to {result.target}: {result.parameters:,} parameters in {kind}, "
            f"{result.nbytes / 1e6:,.1f} MB"
        )
        if result.carried:
            err.print(f"with {', '.join(map(escape, result.carried))}", style="dim")
        if result.left:
            err.print(f"left behind: {', '.join(map(escape, result.left))}", style="dim")
        for remark in result.remarks:
            err.print(f"note: {escape(remark)}", style="yellow")
        for found in result.readers:
            if reader is None or found.reader == reader.value:
                _print_verdict(found)
    write(f"{result.destination}\n")


def _print_verdict(found: Any) -> None:
    """Whether a program reads what was written, and what is left to do."""
    from ..checkpoints import READERS

    title = f"{READERS[found.reader].title} ({READERS[found.reader].version})"
    if found.wrong:
        err.print(f"{title}: no, {escape('; '.join(found.wrong))}", style="dim")
        return
    missing = f", converted with --for {found.reader}, for {', '.join(found.missing)}" if found.missing else ""
    err.print(f"{title}: reads it{escape(missing)}")
    for step in (*found.cautions, *found.steps):
        err.print(f"  {escape(step)}", style="yellow")


VERIFY_EXAMPLES = r"""[bold]Examples[/bold]

[cyan]mamba2-hf verify ./mamba2-130m state-spaces/mamba2-130m[/cyan]

[cyan]mamba2-hf verify ./model ./model-bf16 --tolerance 0.1 && echo same[/cyan]
"""


def verify(
    first: Annotated[str, typer.Argument(metavar="A", help="A checkpoint's folder or a Hub id, of any format.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Length of the random sequence.")] = 64,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the sequence.")] = 0,
    tolerance: Annotated[
        float, typer.Option(metavar="X", min=0.0, help="Largest difference of a logit that passes.")
    ] = 1e-5,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for machines.")] = False,
) -> None:
    """Compare two checkpoints: tensors, logits, and logits token by token.

    Prints the largest difference of a logit. Exits with 1 if the two are not the same model.
    """
    with _errors():
        _quiet_transformers()
        from ..checkpoints import verify as run

        with busy("comparing"):
            result = run(first, second, tokens=tokens, seed=seed, tolerance=tolerance)
    if as_json:
        measured: dict[str, Any] = {**vars(result), "largest": result.largest, "same": result.same}
        out.print(json.dumps(measured, indent=2))
    else:
        for label, value in (
            (f"tensors{f' ({result.tensor})' if result.tensor else ''}", result.tensors),
            ("logits", result.logits),
            ("logits, token by token", result.decoded),
            ("each whole against token by token", result.own),
        ):
            err.print(f"{escape(label)}: {value:.3g}")
        write(f"{result.largest:.6g}\n")
    if not result.same:
        fail(
            f"the largest difference is {result.largest:.3g} (allowed: {tolerance:g}; the largest logit is "
            f"{result.scale:.3g}), and a model differs from its own decoding by up to {result.own:.3g}"
        )


CARD_EXAMPLES = r"""[bold]Examples[/bold]

[cyan]mamba2-hf card ./mamba2-130m --base-model state-spaces/mamba2-130m --write[/cyan]

[cyan]mamba2-hf card ./my-mamba2 --license mit --evals results.json > README.md[/cyan]
"""


def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint's folder.")],
    base_model: Annotated[
        str | None, typer.Option(metavar="ID", help="The published model it was converted from.")
    ] = None,
    license: Annotated[str | None, typer.Option(metavar="NAME", help="By the Hub's name, such as apache-2.0.")] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Of the model; the folder's by default.")] = None,
    repo_id: Annotated[str | None, typer.Option(metavar="ID", help="Where it will be on the Hub.")] = None,
    evals: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Results as lm_eval writes them (--output_path).")
    ] = None,
    save: Annotated[bool, typer.Option("--write", help="Write DIR/README.md in place of stdout.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Also where there is a README.md.")] = False,
) -> None:
    """Render a model card from a checkpoint."""
    with _errors():
        from ..checkpoints import open_checkpoint
        from ..checkpoints.cards import read_evals, render_card
        from ..checkpoints.companions import CARD

        rendered = render_card(
            open_checkpoint(folder.expanduser()),
            name=name,
            repo_id=repo_id,
            base_model=base_model,
            license=license,
            evals=read_evals(evals) if evals else None,
        )
        if not rendered.data.get("license"):
            err.print("note: the card names no license; pass --license or --base-model", style="yellow")
        if not save:
            write(str(rendered))
            return
        path = folder.expanduser() / CARD
        if path.exists() and not overwrite:
            fail(f"{path} exists; pass --overwrite to replace it")
        path.write_text(str(rendered), encoding="utf-8")
    write(f"{path}\n")


PUSH_EXAMPLES = r"""[bold]Examples[/bold]

[cyan]mamba2-hf push ./mamba2-130m me/mamba2-130m[/cyan]   shows what would go

[cyan]mamba2-hf push ./mamba2-130m me/mamba2-130m --yes --private[/cyan]
"""


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint's folder, with its card.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Where to: owner/name on the Hub.")],
    yes: Annotated[bool, typer.Option("--yes", help="Send it. Without this, only show what would go.")] = False,
    private: Annotated[
        bool, typer.Option("--private", help="If the repository has to be made, make it private.")
    ] = False,
    message: Annotated[
        str, typer.Option("--message", "-m", metavar="TEXT", help="Of the commit.")
    ] = "Upload a Mamba-2 checkpoint",
) -> None:
    """Upload a checkpoint to the Hub, or show what would go.

    Prints the files that would go, or the address of the commit.
    """
    with _errors():
        from ..checkpoints.hub import push as run

        with busy("sending" if yes else "reading"):
            upload = run(folder, repository, dry_run=not yes, private=private, message=message)
    if upload.left:
        err.print(f"left behind: {', '.join(map(escape, upload.left))}", style="dim")
    if upload.url is not None:
        write(f"{upload.url}\n")
        return
    for file, size in upload.files.items():
        write(f"{size}\t{file}\n")
    err.print(
        f"{len(upload.files)} files, {sum(upload.files.values()) / 1e6:,.1f} MB would go to {escape(repository)}; "
        "pass --yes to send them"
    )


@contextmanager
def _errors() -> Iterator[None]:
    """Turns what a user can act on into a message and an exit code."""
    from ..errors import Mamba2HFError

    try:
        yield
    except Mamba2HFError as error:
        fail(str(error))
    except KeyboardInterrupt:
        err.print("stopped; nothing was left behind", style="bold red")
        raise typer.Exit(130) from None


@contextmanager
def _bar(*, hidden: bool) -> Iterator[Any]:
    """A progress bar on stderr; its function takes bytes done and bytes in all."""
    columns = (*(TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()),)
    with Progress(*columns, console=err, disable=hidden or not err.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def _quiet_transformers() -> None:
    """Keeps progress bars and warnings of transformers out of what is printed."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
