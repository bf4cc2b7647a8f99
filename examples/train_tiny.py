"""Train a small Mamba-2 on the source of Python's standard library, from nothing to a model card.

    python examples/train_tiny.py prepare      # files -> tokenizer, tokens, baselines; a few minutes on a CPU
    python examples/train_tiny.py train        # tokens -> model, curves, model card; minutes on a GPU

The model that ships in the package was made by these two commands. To watch every part work on a CPU within a minute,
add `--tiny` to both. Training goes on from where it stopped when it is given `--resume`; `evaluate` measures a model
again and renews its card. Between the two commands only the data folder is needed (20 MB), so they may run on
different machines.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import lzma
import math
import platform
import shutil
import string
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import stdlib_corpus as corpus
import torch
import torch.nn.functional as F
import transformers
import typer
from ngram_baseline import ByteNgram
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from mamba2_hf import Mamba2Config, Mamba2ForCausalLM, parameter_groups

console = Console(stderr=True)
transformers.utils.logging.disable_progress_bar()
app = typer.Typer(help=__doc__.partition("\n")[0], no_args_is_help=True, add_completion=False)

FLOAT32 = ("A_log", "D", "dt_bias")  # kept in fp32 whatever the model's dtype is
PROMPTS = ("def read_json(path):", "class Stack:\n    def __init__(self", "import os\nimport sys\n\n")

DataOption = Annotated[Path, typer.Option("--data", help="Folder of tokenizer, tokens, manifest and baselines.")]
OutOption = Annotated[Path, typer.Option("--out", help="Folder that becomes the model.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU where there is one by default.")]
DATA, OUT = Path("runs/tiny-data"), Path("runs/mamba2-tiny-python")


@dataclass
class Recipe:
    """Everything that decides what comes out of training."""

    hidden_size: int = 256
    layers: int = 6
    state_size: int = 128
    head_dim: int = 64
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


TINY = Recipe(hidden_size=64, layers=2, state_size=16, head_dim=16, window=128, batch=8, steps=60, warmup=10)


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
    tokenizer.save_pretrained(data / "tokenizer")
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
    data: DataOption = DATA,
    out: OutOption = OUT,
    device: DeviceOption = "auto",
    steps: Annotated[int | None, typer.Option(help=f"Optimizer steps [default: {Recipe.steps}].")] = None,
    warmup: Annotated[int | None, typer.Option(help=f"Steps of warm-up [default: {Recipe.warmup}].")] = None,
    minutes: Annotated[float, typer.Option(help="Take fewer steps if that many would need more time.")] = math.inf,
    batch: Annotated[int | None, typer.Option(help=f"Windows per step [default: {Recipe.batch}].")] = None,
    window: Annotated[int | None, typer.Option(help=f"Tokens per window [default: {Recipe.window}].")] = None,
    learning_rate: Annotated[float | None, typer.Option(help=f"Peak [default: {Recipe.learning_rate}].")] = None,
    weight_decay: Annotated[float | None, typer.Option(help=f"On matrices [default: {Recipe.weight_decay}].")] = None,
    hidden_size: Annotated[int | None, typer.Option(help=f"Width [default: {Recipe.hidden_size}].")] = None,
    layers: Annotated[int | None, typer.Option(help=f"Depth [default: {Recipe.layers}].")] = None,
    state_size: Annotated[int | None, typer.Option(help=f"N [default: {Recipe.state_size}].")] = None,
    head_dim: Annotated[int | None, typer.Option(help=f"P [default: {Recipe.head_dim}].")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights and the order of the windows [default: 0].")] = None,
    evaluate_every: Annotated[int, typer.Option(help="Steps between looks at the validation files.")] = 250,
    compile: Annotated[
        bool, typer.Option(help="Compile the step: a minute at first, then about twice the speed.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the model's folder.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="A toy model for a first look on a CPU.")] = False,
) -> None:
    """Train on the prepared tokens, keep the weights that are best on the validation files, measure them."""
    chosen = {name: value for name, value in locals().items() if name in Recipe.__annotations__ and value is not None}
    if resume and (chosen or tiny):
        raise typer.BadParameter("--resume takes the recipe from the checkpoint: leave out what would change it")
    recipe = saved_recipe(out) if resume else replace(TINY if tiny else Recipe(), **chosen)
    shutil.copytree(data / "tokenizer", out, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(out)
    run = Run(recipe, tokenizer, data, out, _device(device), compile=compile)
    if resume:
        run.load()
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
        self.streams = {split: np.load(self.data / f"{split}.npy") for split in ("train", "validation")}

    def autocast(self) -> torch.autocast:
        """bf16 matrix products over fp32 weights on a GPU; plain fp32 elsewhere."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

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
                with self.autocast():
                    loss = losses(model, tokens, self.end).mean()
                loss.backward()
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
        with self.autocast():
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
                "command": command(self.recipe, self.compile),
                "recipe": asdict(self.recipe),
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


def command(recipe: Recipe, compile: bool) -> str:
    """The command line that gives this recipe: folders and time limits left out, the steps really taken put in."""
    changed = {name: value for name, value in asdict(recipe).items() if value != getattr(Recipe(), name)}
    if compile:
        changed["compile"] = ""
    options = (f" --{name.replace('_', '-')} {value}".rstrip() for name, value in changed.items())
    return "python examples/train_tiny.py train" + "".join(options)


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Mamba2ForCausalLM:
    config = Mamba2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_heads=2 * recipe.hidden_size // recipe.head_dim,
        head_dim=recipe.head_dim,
        state_size=recipe.state_size,
        n_groups=1,
        chunk_size=64,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Mamba2ForCausalLM(config)


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


def export(model: Mamba2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bf16, and how to sample from it."""
    model = copy.deepcopy(model).cpu()
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] not in FLOAT32:
            parameter.data = parameter.data.bfloat16()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.15, max_new_tokens=128, **ids
    )
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
def evaluate(data: DataOption = DATA, out: OutOption = OUT, device: DeviceOption = "auto") -> None:
    """Measure a trained model on the test files, as it loads from its folder, and write its card."""
    measure(data, out, device)


def measure(data: Path, out: Path, device: str) -> None:
    summary, baselines, run = (json.loads(p.read_text()) for p in _records(data, out))
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out).to(_device(device)).eval()
    recipe, test = run["recipe"], summary["splits"]["test"]
    stream = np.load(data / "test.npy")
    nats = held_out_loss(model, stream, tokenizer.eos_token_id, recipe["window"], recipe["batch"])
    metrics = {
        "nats_per_token": nats / test["tokens"],
        "bits_per_byte": nats / math.log(2) / test["bytes"],
        "baselines": baselines,
        "samples": [sample(model, tokenizer, prompt) for prompt in PROMPTS],
    }
    _write_json(out / "metrics.json", metrics)
    shutil.copy(data / "manifest.tsv", out)
    (out / "README.md").write_text(card(model, summary, run, metrics), encoding="utf-8")
    console.print(
        f"test files: {metrics['nats_per_token']:.3f} nats per token, {metrics['bits_per_byte']:.3f} bits per byte"
    )
    worse = [name for name in ("ngram", "xz") if metrics["bits_per_byte"] >= baselines[name]]
    if worse:
        console.print(f"[yellow]the model does not beat {' and '.join(worse)} yet: train longer")


def sample(model: Mamba2ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    torch.manual_seed(0)
    ids = tokenizer(prompt, return_tensors="pt").to(model.device)
    return tokenizer.decode(model.generate(**ids)[0], skip_special_tokens=True)


def card(model: Mamba2ForCausalLM, summary: dict, run: dict, metrics: dict) -> str:
    """The model card, from what was measured."""
    template = Path(__file__).with_name("train_tiny_card.md").read_text(encoding="utf-8")
    recipe, splits, baselines = run["recipe"], summary["splits"], metrics["baselines"]
    rows = [
        ("this model", metrics["bits_per_byte"]),
        ("byte n-gram of order 5 (modified Kneser-Ney) on the same training files", baselines["ngram"]),
        ("`xz -9` of the test files, joined", baselines["xz"]),
        ("what the test files add to `xz -9` of the training files", baselines["xz_after_train"]),
    ]
    return string.Template(template).substitute(
        parameters=f"{model.num_parameters() / 1e6:.2f} million",
        shape=f"{recipe['layers']} layers of width {recipe['hidden_size']}, {model.config.num_heads} heads of "
        f"{recipe['head_dim']}, state {recipe['state_size']}, tied embeddings",
        vocab_size=summary["vocab_size"],
        python=summary["python"],
        splits="\n".join(
            f"| {name} | {c['files']:,} | {c['bytes']:,} | {c['tokens']:,} |" for name, c in splits.items()
        ),
        skipped=", ".join(f"{count} ({reason})" for reason, count in summary["skipped"].items()) or "none",
        manifest=summary["manifest_sha256"],
        shared=f"{summary['shared_test_lines']:.0%}",
        command=run["command"],
        steps=f"{recipe['steps']:,}",
        best_step=f"{run['best_step']:,}",
        windows=f"{recipe['batch']} windows of {recipe['window']:,} tokens",
        window=f"{recipe['window']:,}",
        tokens=f"{run['tokens'] / 1e6:,.0f} million",
        epochs=f"{run['tokens'] / splits['train']['tokens']:.1f}",
        minutes=f"{run['seconds'] / 60:.1f}",
        device=run["device"],
        versions=", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        optimizer=f"AdamW (betas {recipe['betas'][0]}, {recipe['betas'][1]}; weight decay {recipe['weight_decay']} on "
        f"matrices; gradient norm at most {recipe['clip']}), learning rate {recipe['learning_rate']} after "
        f"{recipe['warmup']} steps of warm-up, then a cosine to zero",
        nats=f"{metrics['nats_per_token']:.3f}",
        bits_per_byte=f"{metrics['bits_per_byte']:.3f}",
        table="\n".join(f"| {name} | {bits:.3f} |" for name, bits in rows),
        samples="\n\n".join(f"```python\n{text}\n```" for text in metrics["samples"]),
    )


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
