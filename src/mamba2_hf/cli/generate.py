"""``mamba2-hf generate``: continue a text."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from .console import DType, err, fail, out, write
from .models import DEVICE_HELP, DTYPE_HELP, MODEL_HELP, find_device, load_model

# torch, transformers and the ops are imported by the commands that need them, so that --help answers at once.
if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class Backend(str, Enum):
    """What ``--backend`` accepts."""

    auto = "auto"
    torch = "torch"
    triton = "triton"


WHAT, HOW, SHOWN = "What runs", "How it writes", "What is printed"


GENERATE_EXAMPLES = r"""[bold]Examples[/bold]

[cyan]mamba2-hf generate "def read_json(path):"[/cyan]

[cyan]mamba2-hf generate "class Stack:" --temperature 0 -n 80[/cyan]

[cyan]mamba2-hf generate "class Stack:" --model hybrid[/cyan]

[cyan]head -n 20 module.py | mamba2-hf generate - --no-echo > rest.py[/cyan]

[cyan]mamba2-hf generate "Once upon a time" --model ./my-mamba2 --device cuda[/cyan]

[cyan]mamba2-hf generate - -n 0 --save-state book.state < book.txt[/cyan]

[cyan]mamba2-hf generate "Who is the narrator?" --state book.state[/cyan]
"""


def generate(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The text to continue; [cyan]-[/cyan] reads it from stdin.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="PATH",
            help=f"{MODEL_HELP} mamba2 (the default) or hybrid.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=DEVICE_HELP,
            rich_help_panel=WHAT,
        ),
    ] = "auto",
    dtype: Annotated[
        DType,
        typer.Option(
            metavar="NAME",
            help=DTYPE_HELP,
            rich_help_panel=WHAT,
        ),
    ] = DType.auto,
    backend: Annotated[
        Backend,
        typer.Option(
            metavar="NAME",
            help="Of the Mamba-2 ops: torch or triton; auto is the fastest that can serve (see mamba2-hf env).",
            rich_help_panel=WHAT,
        ),
    ] = Backend.auto,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens",
            "-n",
            metavar="N",
            min=0,
            help="Stop after this many tokens, or at the end of the text; 0 only reads, for --save-state.",
            rich_help_panel=HOW,
        ),
    ] = 200,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            "-t",
            metavar="T",
            min=0.0,
            help="0 is greedy: always the likeliest token. Above 0 samples, the higher the wilder. Without it: what "
            "the model's generation_config.json says, or greedy.",
            rich_help_panel=HOW,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            metavar="P",
            min=0.0,
            max=1.0,
            help="Samples from the likeliest tokens that together reach this probability.",
            rich_help_panel=HOW,
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            min=0.01,
            help="Above 1 makes what is already written less likely: 1.15 keeps a tiny model from repeating itself.",
            rich_help_panel=HOW,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N", help="Of the sampling: the same seed gives the same text again.", rich_help_panel=HOW
        ),
    ] = 0,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Go on behind the text whose state is in this file, without reading it again; PROMPT is what follows.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    save_state: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the state after the prompt to this file, before anything is generated.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    stream: Annotated[
        bool, typer.Option(help="Print each token as it comes, or all at the end.", rich_help_panel=SHOWN)
    ] = True,
    echo: Annotated[bool, typer.Option(help="Print the prompt before its continuation.", rich_help_panel=SHOWN)] = True,
) -> None:
    """Continue a text.

    The text goes to stdout, bare when it is piped; what was run and how fast goes to stderr.
    """
    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt:
        raise typer.BadParameter("the prompt is empty; give at least one character to continue", param_hint="PROMPT")
    if top_p == 0.0:
        raise typer.BadParameter("no token reaches a probability of 0; use --temperature 0", param_hint="--top-p")
    if temperature == 0.0 and top_p is not None:
        raise typer.BadParameter(
            "--temperature 0 is greedy and --top-p samples; give one of them", param_hint="--top-p"
        )

    if max_new_tokens == 0 and save_state is None:
        raise typer.BadParameter("0 tokens make sense with --save-state FILE only", param_hint="--max-new-tokens")

    import torch

    from ..errors import Mamba2HFError
    from ..ops import use_backend

    where = find_device(device)
    net, tokenizer = load_model(model, where, dtype)
    assert tokenizer is not None  # it was asked for
    if state is not None or save_state is not None:
        _check_keeps_states(net)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=state is None).to(where)
    prompt_tokens = inputs["input_ids"].shape[1]
    sampling = _sampling(temperature, top_p)
    if repetition_penalty is not None:
        sampling["repetition_penalty"] = repetition_penalty
    torch.manual_seed(seed)
    echo = echo and max_new_tokens > 0
    if echo:
        out.print(Text(prompt, style="bold"), end="")
    printer = _Printer(tokenizer, write if stream else None)
    start = time.perf_counter()
    try:
        with use_backend(backend.value):
            if state is not None or save_state is not None:
                _read(net, inputs, state, save_state)
            if max_new_tokens:
                net.generate(**inputs, **sampling, max_new_tokens=max_new_tokens, streamer=printer)
    except (Mamba2HFError, OSError) as error:
        write("\n" if echo else "")
        fail(str(error))
    seconds = time.perf_counter() - start
    if max_new_tokens:
        write("\n" if stream else printer.text + "\n")
        tokens, done = printer.tokens, ""
    else:
        tokens, done = prompt_tokens, " read"
    kind = str(next(net.parameters()).dtype).removeprefix("torch.")
    err.print(
        f"{tokens} tokens{done} in {seconds:.1f} s ({tokens / seconds:.0f} a second), {kind} on {where}",
        style="dim",
    )


def _check_keeps_states(net: Any) -> None:
    if not hasattr(net, "read"):
        fail(f"a {type(net).__name__} keeps no states in files: --state and --save-state are for this package's models")


def _read(net: Any, inputs: Any, state: Path | None, save_state: Path | None) -> None:
    """Lets ``inputs`` continue the state in a file, and writes the one after them; all but the last token is read."""
    from ..models import Mamba2Cache
    from ..models.outputs import CACHE

    ids = inputs["input_ids"]
    cache = Mamba2Cache(net.config) if state is None else Mamba2Cache.load(state, net)
    inputs["attention_mask"] = ids.new_ones(1, cache.seen_tokens + ids.shape[1])
    inputs[CACHE] = cache
    if save_state is not None:
        net.read(ids[:, :-1], past_key_values=cache)
        after = copy.deepcopy(cache)
        net.read(ids[:, -1:], past_key_values=after)
        after.save(save_state, net, ids if state is None or cache.token_hashes is not None else None)
        if state is not None:
            inputs["input_ids"] = ids[:, -1:]


class _Printer:
    """Receives the tokens of ``generate`` and hands their text on as soon as it is final.

    Tokens are decoded together with those before them: a character may span tokens, and some tokenizers drop the space
    before a token that is decoded alone.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None] | None) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._ids: list[int] = []
        self._context = 0  # decoding starts here ...
        self._done = 0  # ... and text up to here has been handed on
        self.text = ""
        self.tokens = 0

    def put(self, value: torch.Tensor) -> None:
        ids = value.flatten().tolist()
        if not self._ids:  # the first call brings the prompt
            self._ids, self._done = ids, len(ids)
            self._context = max(0, self._done - 8)
            return
        self._ids += ids
        self.tokens += len(ids)
        self._flush(incomplete=False)

    def end(self) -> None:
        self._flush(incomplete=True)

    def _flush(self, *, incomplete: bool) -> None:
        before = self._decode(self._ids[self._context : self._done])
        now = self._decode(self._ids[self._context :])
        if now.endswith("\N{REPLACEMENT CHARACTER}") and not incomplete:
            return
        new = now[len(before) :]
        self._context, self._done = self._done, len(self._ids)
        self.text += new
        if self._write is not None:
            self._write(new)

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text


def _sampling(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """The arguments of ``generate`` for what the user asked for; nothing asked leaves the model's own settings."""
    if temperature == 0.0:
        # A generation config that samples also carries values that greedy decoding would warn about.
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    asked = {"temperature": temperature, "top_p": top_p}
    asked = {name: value for name, value in asked.items() if value is not None}
    return {"do_sample": True, **asked} if asked else {}
