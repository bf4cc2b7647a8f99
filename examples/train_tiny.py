"""Train a small language model on the source of Python's standard library, from nothing to a model card.

    python examples/train_tiny.py prepare      # files -> tokenizer, tokens, baselines; a few minutes on a CPU
    python examples/train_tiny.py train        # tokens -> model, curves, model card; minutes on a GPU

The models that ship in the package were made by these two commands: a Mamba-2, and with `--kind hybrid` one with
attention in one layer, of the shape of Granite 4, so that whatever serves Granite 4 serves it after `mamba2-hf convert
--to granitemoehybrid`. `--kind attention` trains a Transformer of their size, to compare with, and `--corpus FOLDER`
one that reads more, which `experiments/corpus.py` has built with the tokenizer of `prepare`. To watch every part work
on a CPU within a minute, add `--tiny` to both. Training goes on from where it stopped when it is given `--resume`;
`evaluate` measures a model again and renews its card, with the losses of others beside its own after `--compare`.
Between the two commands only the data folder is needed (20 MB), so they may run on different machines; `prepare` also
needs `pip install sentencepiece protobuf`.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import itertools
import json
import lzma
import math
import platform
import shutil
import string
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import stdlib_corpus as corpus
import torch
import torch.nn.functional as F
import transformers
import typer
from ngram_baseline import ByteNgram
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mamba2_hf import (
    Mamba2Config,
    Mamba2ForCausalLM,
    Mamba2HybridConfig,
    Mamba2HybridForCausalLM,
    parameter_groups,
    spread_layers,
)
from mamba2_hf.training import CapturedStep

console = Console(stderr=True)
transformers.utils.logging.disable_progress_bar()
app = typer.Typer(help=__doc__.partition("\n")[0], no_args_is_help=True, add_completion=False)

FLOAT32 = ("A_log", "D", "dt_bias")  # kept in fp32 whatever the model's dtype is
SAMPLE_TOKENS = 128
RECALL_PAIRS = (4, 16, 64)  # keys and values to be looked up in the context
POSITIONS = (0, 256, 1024, 2048, 4096, 8192, 16384)  # bounds of the places in a text whose losses a card shows
PROMPTS = ("def read_json(path):", "class Stack:\n    def __init__(self", "import os\nimport sys\n\n")

DataOption = Annotated[Path, typer.Option("--data", help="Folder of tokenizer, tokens, manifest and baselines.")]
OutOption = Annotated[Path, typer.Option("--out", help="Folder of the model.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU where there is one by default.")]
DATA = Path("runs/tiny-data")


Kind = Literal["mamba2", "hybrid", "attention"]  # what the layers are made of
NAMES = {
    "mamba2": "mamba2-tiny-python",
    "hybrid": "mamba2-hybrid-tiny-python",
    "attention": "attention-tiny-python",
}


@dataclass
class Recipe:
    """Everything that decides what comes out of training."""

    kind: Kind = "mamba2"
    hidden_size: int = 256
    layers: int = 6
    state_size: int = 128
    head_dim: int = 64
    intermediate_size: int = 0  # of the MLPs: behind each attention, in a hybrid behind each SSD too
    key_value_heads: int | None = None  # as many as heads of queries
    window: int = 2048
    batch: int = 32
    steps: int = 5000
    warmup: int = 200
    learning_rate: float = 4e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.warmup = min(self.warmup, self.steps // 5)


# Alike in the number of parameters: five layers with a narrow MLP in each, or four of attention with a usual one, have
# as many as six of SSD alone. Rows of MLPs are multiples of 32, the block of what llama.cpp quantizes to.
RECIPES = {
    "mamba2": Recipe(),
    "hybrid": Recipe(kind="hybrid", layers=5, intermediate_size=192, key_value_heads=2),
    "attention": Recipe(kind="attention", layers=4, intermediate_size=568),
}


def tiny_recipe(kind: Kind) -> Recipe:
    return Recipe(
        kind, hidden_size=64, layers=2, state_size=16, head_dim=16, window=128, batch=8, steps=60, warmup=10,
        intermediate_size=0 if kind == "mamba2" else 64,
    )  # fmt: skip


# --- prepare: files to tokens ---------------------------------------------------------------------------------------


@app.command()
def prepare(
    stdlib: Annotated[Path | None, typer.Option(help="A standard library; the running Python's by default.")] = None,
    data: DataOption = DATA,
    vocab_size: Annotated[
        int, typer.Option(help="Entries of the tokenizer, bytes and special tokens included.")
    ] = 4096,
    tiny: Annotated[bool, typer.Option("--tiny", help="Only the `email` package and 512 entries: seconds.")] = False,
) -> None:
    """Read the library's files, split them, train the tokenizer, write tokens and measure the baselines."""
    root = stdlib or corpus.stdlib_root()
    if tiny:
        vocab_size = 512
    console.print("reading the standard library")
    files, skipped = corpus.read_corpus(root, "email/*.py" if tiny else "**/*.py")
    splits = {split: [file for file in files if file.split == split] for split in corpus.SPLITS}

    console.print(f"training a tokenizer of {vocab_size} entries on {len(splits['train'])} files")
    tokenizer = corpus.train_tokenizer((file.text for file in splits["train"]), vocab_size)
    data.mkdir(parents=True, exist_ok=True)
    corpus.save_tokenizer(tokenizer, data / "tokenizer")
    counts = {}
    for split, members in splits.items():
        stream = corpus.encode_split(tokenizer, members)
        np.save(data / f"{split}.npy", stream)
        counts[split] = {
            "files": len(members),
            "bytes": sum(file.size for file in members),
            "tokens": len(stream) - 1,  # the first `<|endoftext|>` is never predicted
        }
        console.print(f"{split}: {counts[split]}")

    manifest = corpus.manifest(files)
    (data / "manifest.tsv").write_text(manifest, encoding="utf-8", newline="\n")
    summary = {
        "python": corpus.python_version(),
        "splits": counts,
        "skipped": skipped,
        "vocab_size": len(tokenizer),
        "manifest_sha256": hashlib.sha256(manifest.encode()).hexdigest(),
        "shared_test_lines": corpus.shared_lines(files),
    }
    _write_json(data / "corpus.json", summary)
    console.print("measuring the baselines")
    texts = {split: [file.text.encode() for file in members] for split, members in splits.items()}
    baselines = measure_baselines(texts["train"], texts["test"])
    _write_json(data / "baselines.json", baselines)
    console.print(f"bits per byte on the test files: {baselines}")


def measure_baselines(train: list[bytes], test: list[bytes]) -> dict[str, float]:
    """Bits per byte of the test files under an order-5 n-gram and under `xz -9` without and with the training files."""
    ngram = ByteNgram(train, order=5)
    joined, known = b"".join(test), b"".join(train)
    # The dictionary of `xz -9` holds 64 MiB, so the second archive may copy from all of the training files.
    added = _xz(known + joined) - _xz(known)
    return {
        "ngram": sum(ngram.bits(text) for text in test) / len(joined),
        "xz": 8 * _xz(joined) / len(joined),
        "xz_after_train": 8 * added / len(joined),
    }


def _xz(data: bytes) -> int:
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, preset=9))


# --- the loss -------------------------------------------------------------------------------------------------------


def token_losses(model: torch.nn.Module, tokens: torch.Tensor, end: int) -> torch.Tensor:
    """Loss in nats of each next token, (B, T) from tokens (B, T + 1); documents that share a row stay apart."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]  # (B, T)
    seq_idx = (inputs == end).cumsum(1).to(torch.int32)  # `end` opens a document
    logits = model(input_ids=inputs, seq_idx=seq_idx, use_cache=False).logits  # (B, T, V)
    # Not the model's own loss: the `end` that closes a document opens the next one, and that loss leaves it out.
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


class StepLoss(torch.nn.Module):
    """The mean loss of a step. The casts to bf16 belong to the step that is captured, not around it."""

    def __init__(self, model: torch.nn.Module, end: int, losses: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.model, self.end, self.losses = model, end, losses

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        with in_bf16(tokens.device):
            return {"loss": self.losses(self.model, tokens, self.end).mean()}


def in_bf16(device: torch.device) -> torch.autocast:
    """bf16 matrix products over fp32 weights on a GPU; plain fp32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def windows(document: np.ndarray, window: int) -> Iterator[tuple[np.ndarray, int]]:
    """Windows that overlap by half, each with how many of its targets an earlier one has scored."""
    scored = 0
    for start in range(0, len(document) - 1, window // 2):
        piece = document[start : start + window + 1]
        yield piece, scored - start
        scored = start + len(piece) - 1
        if scored == len(document) - 1:
            return


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, stream: np.ndarray, end: int, window: int, batch: int) -> float:
    """Nats of all tokens of a split: each is scored once, from its document's start or at least half a window back."""
    device = next(model.parameters()).device
    pieces = [piece for document in corpus.documents(stream, end) for piece in windows(document, window)]
    pieces.sort(key=lambda piece: len(piece[0]))  # rows of one batch are about equally long
    nats = 0.0
    for at in range(0, len(pieces), batch):
        rows = pieces[at : at + batch]
        width = max(len(piece) for piece, _ in rows)
        tokens = torch.full((len(rows), width), end)
        counted = torch.zeros(len(rows), width - 1, dtype=torch.bool)
        for i, (piece, seen) in enumerate(rows):
            tokens[i, : len(piece)] = torch.from_numpy(piece.astype(np.int64))
            counted[i, seen : len(piece) - 1] = True
        losses = token_losses(model, tokens.to(device), end)
        nats += losses[counted.to(device)].double().sum().item()
    return nats


# --- train: tokens to a model ---------------------------------------------------------------------------------------


@app.command()
def train(
    kind: Annotated[Kind, typer.Option(help="Mamba-2, attention, or a hybrid of the two.")] = "mamba2",
    data: DataOption = DATA,
    corpus: Annotated[
        Path | None,
        typer.Option(help="Folder that experiments/corpus.py has built with this tokenizer: train on its tokens."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder that becomes the model [default: runs/ and its name].")
    ] = None,
    device: DeviceOption = "auto",
    steps: Annotated[int | None, typer.Option(help=f"Optimizer steps [default: {Recipe.steps}].")] = None,
    warmup: Annotated[int | None, typer.Option(help=f"Steps of warm-up [default: {Recipe.warmup}].")] = None,
    minutes: Annotated[float, typer.Option(help="Take fewer steps if that many would need more time.")] = math.inf,
    batch: Annotated[int | None, typer.Option(help=f"Windows per step [default: {Recipe.batch}].")] = None,
    window: Annotated[int | None, typer.Option(help=f"Tokens per window [default: {Recipe.window}].")] = None,
    learning_rate: Annotated[float | None, typer.Option(help=f"Peak [default: {Recipe.learning_rate}].")] = None,
    weight_decay: Annotated[float | None, typer.Option(help=f"On matrices [default: {Recipe.weight_decay}].")] = None,
    hidden_size: Annotated[int | None, typer.Option(help=f"Width [default: {Recipe.hidden_size}].")] = None,
    layers: Annotated[int | None, typer.Option(help="Depth [default: 6; 5 for a hybrid, 4 for attention].")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Width of the MLPs.")] = None,
    key_value_heads: Annotated[
        int | None, typer.Option(help="Of attention [default: 2 in a hybrid, else all].")
    ] = None,
    state_size: Annotated[int | None, typer.Option(help=f"N [default: {Recipe.state_size}].")] = None,
    head_dim: Annotated[int | None, typer.Option(help=f"P [default: {Recipe.head_dim}].")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights and the order of the windows [default: 0].")] = None,
    evaluate_every: Annotated[int, typer.Option(help="Steps between looks at the validation files.")] = 250,
    compile: Annotated[bool, typer.Option(help="Compile the step, too, which is a CUDA graph on a GPU.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the model's folder.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="A toy model for a first look on a CPU.")] = False,
) -> None:
    """Train on the prepared tokens, keep the weights that are best on the validation files, measure them."""
    chosen = {name: value for name, value in locals().items() if name in Recipe.__annotations__ and value is not None}
    del chosen["kind"]
    if resume and (chosen or tiny):
        raise typer.BadParameter("--resume takes the recipe from the checkpoint: leave out what would change it")
    out = out or Path("runs") / NAMES[kind]
    recipe = saved_recipe(out) if resume else replace(tiny_recipe(kind) if tiny else RECIPES[kind], **chosen)
    shutil.copytree(data / "tokenizer", out, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(out)
    run = Run(recipe, tokenizer, data, out, _device(device), corpus, compile=compile)
    if resume:
        run.load()
        before = json.loads((out / "run.json").read_text()).get("corpus")
        if before != run.read:
            had = "the --corpus that it was begun with" if before else "no --corpus"
            raise typer.BadParameter(f"{out} was trained on other files: --resume it with {had}")
    if corpus is not None:
        shutil.copy(corpus / "manifest.tsv", out / "corpus_manifest.tsv")
    run.train(minutes, evaluate_every)
    plot(out)
    measure(data, out, device)
    console.print(f"the model is in {out}")


@dataclass
class Run:
    """A training run: what a checkpoint holds, and the loop."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerFast
    data: Path
    out: Path
    device: torch.device
    corpus: Path | None = None
    compile: bool = False
    step: int = 0
    seconds: float = 0.0  # all that training took, compilation and validation included
    best: float = math.inf
    log: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.recipe.seed)
        torch.set_float32_matmul_precision("high")
        self.end = self.tokenizer.eos_token_id
        self.model = new_model(self.recipe, self.tokenizer).to(self.device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, self.recipe.weight_decay),
            lr=self.recipe.learning_rate,
            betas=self.recipe.betas,
            fused=self.device.type == "cuda",
        )
        self.read = None if self.corpus is None else corpus_summary(self.corpus, self.data)
        folders = {"train": self.corpus or self.data, "validation": self.data}
        self.streams = {split: np.load(folder / f"{split}.npy") for split, folder in folders.items()}

    def train(self, minutes: float, evaluate_every: int) -> None:
        recipe, model = self.recipe, self.model
        parameters = sum(p.numel() for p in model.parameters())
        console.print(f"{parameters / 1e6:.2f} M parameters, {len(self.streams['train']) / 1e6:.1f} M training tokens")
        stream = torch.from_numpy(self.streams["train"].astype(np.int32)).to(self.device)
        offsets = torch.arange(recipe.window + 1, device=self.device)
        order = window_starts(len(stream), recipe)
        for _ in range(self.step):  # a resumed run goes on with the windows that come next
            next(order)
        losses = torch.compile(token_losses, dynamic=False) if self.compile else token_losses
        step_of = CapturedStep(StepLoss(model, self.end, losses))
        started, before, first = time.monotonic(), self.seconds, self.step
        marks: list[float] = []
        model.train()
        with _progress() as progress:
            bar = progress.add_task(
                "train", total=recipe.steps, completed=self.step, loss=math.nan, validation=self.best
            )
            while self.step < recipe.steps:
                lr = learning_rate_at(self.step, recipe)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                tokens = stream[next(order).to(self.device, non_blocking=True)[:, None] + offsets].long()  # (B, T + 1)
                loss = step_of(tokens=tokens)
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.step += 1

                if math.isfinite(minutes) and self.step - first in (10, 30):
                    loss.item()  # wait for the device
                    marks.append(time.monotonic())
                    if len(marks) == 2:
                        pace = (marks[1] - marks[0]) / 20
                        affordable = self.step + int((60 * minutes - (marks[1] - started)) / pace)
                        recipe.steps = max(self.step + 1, min(recipe.steps, affordable))
                        progress.update(bar, total=recipe.steps)
                look = self.step % evaluate_every == 0 or self.step == recipe.steps
                if self.step % 20 == 0 or look:
                    value = loss.item()
                    if not math.isfinite(value):
                        raise FloatingPointError(f"the loss is {value} at step {self.step}: lower --learning-rate")
                    self.seconds = before + time.monotonic() - started
                    row = {"step": self.step, "learning_rate": lr, "train": value, "seconds": self.seconds}
                    if look:
                        row["validation"] = self.validate()
                        console.print(f"step {self.step}: train {value:.3f}, validation {row['validation']:.3f}")
                        progress.update(bar, validation=self.best)
                    self.log.append(row)
                    if look:
                        self.save()
                    progress.update(bar, completed=self.step, loss=value)

    def validate(self) -> float:
        """Loss on the validation files in nats per token; the best model so far is written out."""
        self.model.eval()
        with in_bf16(self.device):
            nats = held_out_loss(
                self.model, self.streams["validation"], self.end, self.recipe.window, self.recipe.batch
            )
        self.model.train()
        loss = nats / (len(self.streams["validation"]) - 1)
        if loss < self.best:
            self.best = loss
            export(self.model, self.tokenizer, self.out)
        return loss

    def save(self) -> None:
        state = {
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": {"step": self.step, "seconds": self.seconds, "best": self.best, "log": self.log},
        }
        unfinished = self.out / "checkpoint.pt.tmp"
        torch.save(state, unfinished)
        unfinished.replace(self.out / "checkpoint.pt")
        with (self.out / "loss.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["step", "learning_rate", "train", "validation", "seconds"])
            writer.writeheader()
            writer.writerows(self.log)
        best_step = min((row for row in self.log if "validation" in row), key=lambda row: row["validation"])["step"]
        _write_json(
            self.out / "run.json",
            {
                "command": command(self.recipe, self.compile, self.corpus is not None),
                "recipe": asdict(self.recipe),
                "corpus": self.read,
                "best_step": best_step,
                "tokens": self.step * self.recipe.batch * self.recipe.window,
                "seconds": self.seconds,
                "device": _device_name(self.device),
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
            },
        )

    def load(self) -> None:
        state = torch.load(self.out / "checkpoint.pt", map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.best, self.log = (
            state["progress"][k] for k in ("step", "seconds", "best", "log")
        )


def saved_recipe(out: Path) -> Recipe:
    path = out / "checkpoint.pt"
    if not path.exists():
        raise typer.BadParameter(f"there is no checkpoint to resume from at {path}: leave out --resume")
    return Recipe(**torch.load(path, map_location="meta", weights_only=True)["recipe"])


def corpus_summary(folder: Path, data: Path) -> dict[str, Any]:
    """What ``experiments/corpus.py`` says of the training files in ``folder``, and the hash of its list of projects.

    Raises:
        typer.BadParameter: its tokens are not those of the tokenizer in ``data``.
    """
    entries = [json.loads((each / "tokenizer" / "tokenizer.json").read_text())["model"] for each in (folder, data)]
    if entries[0] != entries[1]:
        raise typer.BadParameter(
            f"{folder} has tokens of another tokenizer than {data}: build it with `corpus.py build --tokenizer "
            f"{data / 'tokenizer'}`"
        )
    summary = json.loads((folder / "summary.json").read_text())["train"]
    return {**summary, "manifest_sha256": hashlib.sha256((folder / "manifest.tsv").read_bytes()).hexdigest()}


def command(recipe: Recipe, compile: bool, corpus: bool) -> str:
    """The command line that gives this recipe: folders and time limits left out, the steps really taken put in."""
    usual = RECIPES[recipe.kind]
    changed = {} if recipe.kind == "mamba2" else {"kind": recipe.kind}
    changed |= {"corpus": "FOLDER"} if corpus else {}
    changed |= {name: value for name, value in asdict(recipe).items() if value != getattr(usual, name)}
    if compile:
        changed["compile"] = ""
    options = (f" --{name.replace('_', '-')} {value}".rstrip() for name, value in changed.items())
    return "python examples/train_tiny.py train" + "".join(options)


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.hidden_size,
        "num_hidden_layers": recipe.layers,
        "chunk_size": 64,
        "tie_word_embeddings": True,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    }
    heads = 2 * recipe.hidden_size // recipe.head_dim
    if recipe.kind == "mamba2":
        ssd = {"num_heads": heads, "head_dim": recipe.head_dim, "state_size": recipe.state_size, "n_groups": 1}
        return Mamba2ForCausalLM(Mamba2Config(**ssd, **common))
    hybrid = recipe.kind == "hybrid"
    config = Mamba2HybridConfig(
        layer_blocks=spread_layers(recipe.layers, None if hybrid else recipe.layers, then="mlp"),
        ssm_num_heads=heads,
        ssm_head_dim=recipe.head_dim,
        ssm_state_size=recipe.state_size,
        num_attention_heads=recipe.hidden_size // recipe.head_dim,
        num_key_value_heads=recipe.key_value_heads,
        head_dim=recipe.head_dim,
        # SSD layers tell positions apart, as in Granite 4; attention alone cannot.
        rope_parameters=None if hybrid else {"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=recipe.window,
        intermediate_size=recipe.intermediate_size,
        rescale_prenorm_residual=False,
        **common,
    )
    return Mamba2HybridForCausalLM(config)


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine that ends at zero."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def window_starts(length: int, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Batches of window starts, (B,), without end: each epoch sees every token once, on a grid shifted at random."""
    if (length - recipe.window) // recipe.window <= recipe.batch:
        raise ValueError(f"{length} tokens are too few for {recipe.batch} windows of {recipe.window}: lower --batch")
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        shift = int(torch.randint(recipe.window, (), generator=generator))
        starts = torch.arange(shift, length - recipe.window, recipe.window)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        yield from (chunk for chunk in starts.split(recipe.batch) if len(chunk) == recipe.batch)


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bf16, and how to sample from it."""
    model = copy.deepcopy(model).cpu()
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] not in FLOAT32:
            parameter.data = parameter.data.bfloat16()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, **ids)
    model.save_pretrained(folder)


def plot(out: Path) -> None:
    """Draw the logged losses to loss.png, if matplotlib is there."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        console.print("no loss.png: matplotlib is not installed (pip install 'mamba2-hf[bench]')")
        return
    with (out / "loss.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, style in (("train", {"alpha": 0.5, "linewidth": 1}), ("validation", {"marker": "o", "markersize": 3})):
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(out / "loss.png", dpi=120)
    plt.close(figure)


# --- evaluate: a model to numbers and a card ------------------------------------------------------------------------


@app.command()
def evaluate(
    data: DataOption = DATA,
    out: OutOption = Path("runs") / NAMES["mamba2"],
    compare: Annotated[
        list[Path] | None, typer.Option(help="Folder of another trained model, for the card; as often as you like.")
    ] = None,
    device: DeviceOption = "auto",
    card_only: Annotated[
        bool, typer.Option("--card-only", help="Measure nothing: a new card from what was measured before.")
    ] = False,
) -> None:
    """Measure a trained model on the test files, as it loads from its folder, and write its card."""
    if card_only:
        write_card(data, out, compare or [])
    else:
        measure(data, out, device, compare or [])


def measure(data: Path, out: Path, device: str, compare: Sequence[Path] = ()) -> None:
    summary, baselines, run = (json.loads(p.read_text()) for p in _records(data, out))
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out).to(_device(device)).eval()
    recipe, test = run["recipe"], summary["splits"]["test"]
    stream = np.load(data / "test.npy")
    special = len(tokenizer.all_special_ids)
    nats = held_out_loss(model, stream, tokenizer.eos_token_id, recipe["window"], recipe["batch"])
    metrics = {
        "parameters": model.num_parameters(),
        "nats_per_token": nats / test["tokens"],
        "bits_per_byte": nats / math.log(2) / test["bytes"],
        "baselines": baselines,
        "recall": {pairs: recall(model, pairs, special) for pairs in RECALL_PAIRS},
        "positions": by_position(model, stream),
        "samples": [sample(model, tokenizer, prompt) for prompt in PROMPTS],
    }
    _write_json(out / "metrics.json", metrics)
    shutil.copy(data / "manifest.tsv", out)
    write_card(data, out, compare)
    console.print(
        f"test files: {metrics['nats_per_token']:.3f} nats per token, {metrics['bits_per_byte']:.3f} bits per byte"
    )
    worse = [name for name in ("ngram", "xz") if metrics["bits_per_byte"] >= baselines[name]]
    if worse:
        console.print(f"[yellow]the model does not beat {' and '.join(worse)} yet: train longer")


@torch.no_grad()
def recall(model: PreTrainedModel, pairs: int, first: int, rows: int = 64) -> float:
    """How often the model is right when a key comes again (multi-query associative recall): rows of ``pairs`` keys with
    their values, random tokens from ``first`` on, then all keys in another order, each before its value.
    """
    source = torch.Generator().manual_seed(0)
    tokens = torch.rand(rows, model.config.vocab_size - first, generator=source).topk(2 * pairs).indices + first
    known = tokens.view(rows, pairs, 2)  # key and value
    order = torch.rand(rows, pairs, generator=source).argsort(1)
    asked = known.gather(1, order[..., None].expand(-1, -1, 2))
    ids = torch.cat([known, asked], 1).flatten(1).to(model.device)  # (B, 4 pairs)
    guesses = model(input_ids=ids, use_cache=False).logits[:, 2 * pairs :: 2].argmax(-1)
    return float((guesses == ids[:, 2 * pairs + 1 :: 2]).float().mean())


@torch.no_grad()
def by_position(model: PreTrainedModel, stream: np.ndarray) -> list[float]:
    """Nats per token between each two of ``POSITIONS``, in rows of files one behind the other."""
    length = min(POSITIONS[-1], len(stream))
    rows = torch.from_numpy(stream[: len(stream) // length * length].astype(np.int64)).view(-1, 1, length)
    losses = torch.zeros(length - 1)
    for row in rows.to(model.device):
        logits = model(input_ids=row, use_cache=False).logits[0, :-1]
        losses += F.cross_entropy(logits.float(), row[0, 1:], reduction="none").cpu() / len(rows)
    bounds = [min(place, length - 1) for place in POSITIONS]
    return [float(losses[a:b].mean()) for a, b in itertools.pairwise(bounds) if a < b]


def write_card(data: Path, out: Path, compare: Sequence[Path]) -> None:
    summary, run, metrics = (
        json.loads(path.read_text()) for path in (data / "corpus.json", out / "run.json", out / "metrics.json")
    )
    others = [rival(folder, summary) for folder in compare]
    model = AutoModelForCausalLM.from_pretrained(out)
    (out / "README.md").write_text(card(model, summary, run, metrics, others), encoding="utf-8")


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    torch.manual_seed(0)
    ids = tokenizer(prompt, return_tensors="pt").to(model.device)
    return tokenizer.decode(model.generate(**ids, max_new_tokens=SAMPLE_TOKENS)[0], skip_special_tokens=True)


def rival(folder: Path, summary: dict) -> list[str]:
    """A row of the card on another model: its kind, parameters and losses."""
    for name in ("run.json", "metrics.json", "manifest.tsv"):
        if not (folder / name).exists():
            raise typer.BadParameter(f"{folder / name} is missing: train that model first")
    if hashlib.sha256((folder / "manifest.tsv").read_bytes()).hexdigest() != summary["manifest_sha256"]:
        raise typer.BadParameter(f"{folder} was trained on other files, so that its loss is of another task")
    run, metrics = (json.loads((folder / name).read_text()) for name in ("run.json", "metrics.json"))
    parameters = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).num_parameters()
    return loss_row(run["recipe"].get("kind", "mamba2"), parameters, run, metrics)


def loss_row(kind: Kind, parameters: int, run: dict, metrics: dict) -> list[str]:
    return [
        "Mamba-2" if kind == "mamba2" else kind,
        "the corpus" if run.get("corpus") else "the standard library",
        f"{parameters / 1e6:.2f} million",
        f"{run['tokens'] / 1e6:,.0f} million",
        f"{metrics['nats_per_token']:.3f}",
        f"{metrics['bits_per_byte']:.3f}",
    ]


def comparison(mine: list[str], others: list[list[str]]) -> str:
    """The losses of several models side by side, if there are several."""
    if not others:
        return ""
    rows = [["", "trained on", "parameters", "tokens seen", "nats per token", "bits per byte"], ["---"] * 6]
    rows += sorted([[f"**{mine[0]}** (this one)", *mine[1:]], *others], key=lambda row: float(row[4]))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        "Other models on the same test files, with the same tokenizer, by the same script (`--kind`, `--corpus`). One "
        "run\nof each: what another seed would change was not measured.\n\n" + table + "\n\n"
    )


def card(model: PreTrainedModel, summary: dict, run: dict, metrics: dict, others: list[list[str]]) -> str:
    """The model card, from what was measured."""
    template = Path(__file__).with_name("train_tiny_card.md").read_text(encoding="utf-8")
    recipe, splits, baselines = run["recipe"], summary["splits"], metrics["baselines"]
    kind, sampling, read = recipe.get("kind", "mamba2"), model.generation_config, run.get("corpus")
    parameters = model.num_parameters()
    rows = [
        ("this model", metrics["bits_per_byte"]),
        ("byte n-gram of order 5 (modified Kneser-Ney) on the library's training files", baselines["ngram"]),
        ("`xz -9` of the test files, joined", baselines["xz"]),
        ("what the test files add to `xz -9` of the library's training files", baselines["xz_after_train"]),
    ]
    return string.Template(template).substitute(
        KIND_TEXTS[kind] | DATA_TEXTS["corpus" if read else "library"],
        name=NAMES[kind],
        model_type=model.config.model_type,
        parameters=f"{parameters / 1e6:.2f} million",
        shape=describe(model.config, recipe),
        comparison=comparison(loss_row(kind, parameters, run, metrics), others),
        vocab_size=summary["vocab_size"],
        python=summary["python"],
        splits="\n".join(
            f"| {name} | {c['files']:,} | {c['bytes']:,} | {c['tokens']:,} |" for name, c in splits.items()
        ),
        skipped=", ".join(f"{count} ({reason})" for reason, count in summary["skipped"].items()) or "none",
        manifest=summary["manifest_sha256"],
        shared=f"{summary['shared_test_lines']:.0%}",
        command=run["command"],
        corpus=corpus_text(read),
        context=context_text(metrics),
        steps=f"{recipe['steps']:,}",
        best_step=f"{run['best_step']:,}",
        windows=f"{recipe['batch']} windows of {recipe['window']:,} tokens",
        window=f"{recipe['window']:,}",
        tokens=f"{run['tokens'] / 1e6:,.0f} million",
        epochs=f"{run['tokens'] / (read or splits['train'])['tokens']:.1f}",
        minutes=f"{run['seconds'] / 60:.1f}",
        device=run["device"],
        versions=", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        optimizer=f"AdamW (betas {recipe['betas'][0]}, {recipe['betas'][1]}; weight decay {recipe['weight_decay']} on "
        f"matrices; gradient norm at most {recipe['clip']}), learning rate {recipe['learning_rate']} after "
        f"{recipe['warmup']} steps of warm-up, then a cosine to zero",
        nats=f"{metrics['nats_per_token']:.3f}",
        bits_per_byte=f"{metrics['bits_per_byte']:.3f}",
        table="\n".join(f"| {name} | {bits:.3f} |" for name, bits in rows),
        sampling=f"temperature {sampling.temperature}, top-p {sampling.top_p}, {SAMPLE_TOKENS} tokens",
        samples="\n\n".join(f"```python\n{text}\n```" for text in metrics["samples"]),
    )


DATA_TEXTS = {
    "library": {
        "read": "one thing: the source of Python's standard library. It continues Python\ncode with the look of that "
        "library",
        "license": "license_name: psf-2.0\nlicense_link: https://docs.python.org/3/license.html",
        "files": "The",
        "style": "Python in the style of the standard library only, most of it tests",
    },
    "corpus": {
        "read": "Python only: the standard library and other widely used\nprojects. It continues Python code with "
        "their look",
        "license": "license_name: permissive",
        "files": "Files to validate and test on, and those of the first row to train on, are the",
        "style": "Python only",
    },
}
"""What differs between the cards of models of the standard library and of a corpus."""


def context_text(metrics: dict[str, Any]) -> str:
    """How a model uses what stands before a token, for its card; nothing where that was not measured."""
    if "recall" not in metrics:
        return ""
    recalled = [f"| {pairs} | {share:.0%} |" for pairs, share in metrics["recall"].items()]
    bounds = itertools.pairwise(POSITIONS)
    places = [
        f"| {a:,} to {b - 1:,} | {nats:.3f} |" for (a, b), nats in zip(bounds, metrics["positions"], strict=False)
    ]
    lines = [
        "**Recall.** Random tokens as keys and values, then every key again in another order: how often the value is "
        "guessed.",
        *("", "| pairs | right |", "|---|---|", *recalled, ""),
        "**Length.** The test files one behind the other, in rows: nats per token by place in the row.",
        *("", "| tokens before | nats per token |", "|---|---|", *places, "", ""),
    ]
    return "\n".join(lines)


def corpus_text(corpus: dict[str, Any] | None) -> str:
    """What else a model was trained on, for its card."""
    if corpus is None:
        return ""
    return (
        f"Training files are {corpus['files']:,} of {corpus['projects']:,} projects, {corpus['bytes']:,} bytes and "
        f"{corpus['tokens']:,} tokens.\n`corpus_manifest.tsv` beside this card lists the projects with versions, "
        "licences (MIT, BSD, Apache-2.0, PSF and the like) and\nhashes; its SHA-256 is\n"
        f"`{corpus['manifest_sha256']}`. `experiments/corpus.py` made it.\n\n"
    )


_SHIPS = (
    "It ships inside the package `mamba2-hf` so that everything there has a real model to\nrun with; it is a "
    "demonstration, not an assistant."
)
_FORMAT = "bf16 weights with `A_log`, `D` and `dt_bias` in fp32. On disk it is the `{}` format of {}."
_LONGER = "Longer inputs run, {}."
KIND_TEXTS = {
    "mamba2": {
        "what": "A Mamba-2",
        "purpose": _SHIPS,
        "path": "from mamba2_hf.pretrained import shipped_model_path\n\npath = shipped_model_path()",
        "format": _FORMAT.format("mamba2", "transformers"),
        "longer": _LONGER.format("at constant memory per token"),
    },
    "hybrid": {
        "what": "A hybrid of Mamba-2 and attention",
        "purpose": _SHIPS,
        "path": 'from mamba2_hf.pretrained import shipped_model_path\n\npath = shipped_model_path("hybrid")',
        "format": _FORMAT.format("mamba2_hybrid", "this package")
        + " `mamba2-hf convert --to granitemoehybrid`\nwrites the format of Granite 4, which transformers, vLLM, "
        "llama.cpp and mlx-lm read.",
        "longer": _LONGER.format("with the keys and values of the attention layer as the only memory that grows"),
    },
    "attention": {
        "what": "A Transformer",
        "purpose": "It was trained to be compared with the models that ship inside the package `mamba2-hf`.",
        "path": f'import mamba2_hf\n\npath = "runs/{NAMES["attention"]}"',
        "format": "bf16 weights. On disk it is the `mamba2_hybrid` format of `mamba2-hf`.",
        "longer": _LONGER.format("with memory that grows by keys and values in every layer"),
    },
}
"""What differs between the cards."""


def describe(config: Mamba2Config | Mamba2HybridConfig, recipe: dict) -> str:
    """The layers, for the card."""
    start = f"{recipe['layers']} layers of width {recipe['hidden_size']}"
    ssd = (
        f"{2 * recipe['hidden_size'] // recipe['head_dim']} heads of {recipe['head_dim']}, state {recipe['state_size']}"
    )
    if isinstance(config, Mamba2Config):
        return f"{start}, {ssd}, tied embeddings"
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    attention = (
        f"attention with {heads}{'' if config.rope_parameters is None else ' rotary'} heads of {config.head_dim}"
        + (f", {shared} of keys and values" if shared < heads else "")
    )
    then = f"then a SwiGLU of width {config.intermediate_size}; tied embeddings"
    places = [str(index + 1) for index, kinds in enumerate(config.blocks) if "attention" in kinds]
    if len(places) == len(config.blocks):
        return f"{start}, each {attention}, {then}"
    return f"{start}, each SSD with {ssd}, and in place of it in layer {', '.join(places)}\n{attention}, {then}"


def _records(data: Path, out: Path) -> list[Path]:
    paths = [data / "corpus.json", data / "baselines.json", out / "run.json"]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: run `prepare` and `train` first")
    return paths


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _device(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  best validation {task.fields[validation]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


if __name__ == "__main__":
    app()
