"""What the training examples share: text from files, a progress bar and curves for Trainer."""

from __future__ import annotations

import csv
import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import stdlib_corpus
import torch
import typer
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, Trainer, TrainerCallback

SUFFIXES = {".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".js", ".ts", ".rs", ".go", ".java", ".tex", ".html"}
HELD_OUT = 20  # of so many documents, one is not trained on


def texts(source: Path | None) -> Iterator[str]:
    """Documents: the text files of a folder, the "text" of each line of a .jsonl, or Python's `email` package."""
    if source is None:
        files, _ = stdlib_corpus.read_corpus(stdlib_corpus.stdlib_root(), "email/*.py")
        yield from (file.text for file in files)
    elif source.suffix == ".jsonl":
        with source.open(encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines if line.strip())
    elif not source.is_dir():
        raise typer.BadParameter(f"{source} is neither a folder nor a .jsonl file")
    else:
        for path in sorted(source.rglob("*")):
            if path.suffix in SUFFIXES and path.is_file():
                yield path.read_text(encoding="utf-8", errors="replace")


def encode(text: str, tokenizer: Any) -> list[int]:
    """Tokens of a document and the token that ends it."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def is_held_out(index: int) -> bool:
    """Whether a document is not trained on: the second, and one in twenty from there on."""
    return index % HELD_OUT == 1


def read_texts(source: Path | None, tokenizer: Any) -> tuple[Dataset, Dataset]:
    """Tokenized documents to train on, and those held out."""
    splits: tuple[list[Any], list[Any]] = ([], [])
    for index, text in enumerate(texts(source)):
        splits[is_held_out(index)].append({"input_ids": encode(text, tokenizer)})
    if not splits[1]:
        raise typer.BadParameter(f"{source} holds {len(splits[0])} documents of text: at least 2 are needed")
    return Dataset.from_list(splits[0]), Dataset.from_list(splits[1])


def packed_rows(source: Path | None, tokenizer: Any, length: int, held_out: bool) -> Iterator[dict[str, list[int]]]:
    """Rows of ``length`` tokens, document after document, and the number of the document that each token is of. A GPU
    reads those by itself, where positions are looked through by the CPU.

    What is left at the end fills no row and is left out.
    """
    ids: list[int] = []
    documents: list[int] = []
    for index, text in enumerate(texts(source)):
        if is_held_out(index) != held_out:
            continue
        document = encode(text, tokenizer)
        ids += document
        documents += [index] * len(document)
        while len(ids) >= length:
            yield {"input_ids": ids[:length], "seq_idx": documents[:length], "labels": ids[:length]}
            ids, documents = ids[length:], documents[length:]


def shared_arguments(out: Path, steps: int, batch: int, learning_rate: float) -> dict[str, Any]:
    """Arguments of any Trainer: a cosine with a warm-up, ten looks at the held-out text and as many checkpoints."""
    gpu = torch.cuda.is_available()
    tenth = max(1, steps // 10)
    return {
        "output_dir": str(out),
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        "max_steps": steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 20,
        "logging_steps": max(1, steps // 100),
        "eval_strategy": "steps",
        "eval_steps": tenth,
        "save_strategy": "steps",
        "save_steps": tenth,
        "save_total_limit": 2,
        "bf16": gpu,
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        "report_to": "none",
        "disable_tqdm": True,  # the bar below shows the loss too
    }


def leave_the_collector_out(trainer: Trainer) -> None:
    """Has Python's garbage collector no longer look through all that the imports and the model have made: it would stop
    a process in the middle of a step for a quarter of a second, and with it all that wait for its gradients.
    """
    trainer.add_callback(_Freeze())


class _Freeze(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if gc.get_freeze_count() == 0:
            gc.collect()
            gc.freeze()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        gc.unfreeze()


def show_progress(trainer: Trainer, console: Console) -> None:
    """A bar with the last losses in the place of Trainer's lines."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Bar(console))


class _Bar(TrainerCallback):
    def __init__(self, console: Console) -> None:
        self.bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  held out {task.fields[held_out]:.3f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.bar.add_task("train", total=None, loss=math.nan, held_out=math.nan)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        names = {"loss": "loss", "eval_loss": "held_out"}
        self.bar.update(self.task, **{names[name]: value for name, value in (logs or {}).items() if name in names})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.stop()


def plot_losses(history: list[dict[str, float]], out: Path, console: Console) -> None:
    """Write what Trainer logged to loss.csv, and draw it to loss.png, if matplotlib is there."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [{"step": e["step"], "train": e.get("loss"), "held_out": e.get("eval_loss")} for e in history]
    rows = [row for row in rows if row["train"] is not None or row["held_out"] is not None]
    with (out / "loss.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "train", "held_out"])
        writer.writeheader()
        writer.writerows(rows)
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        console.print("no loss.png: matplotlib is not installed (pip install 'mamba2-hf[bench]')")
        return
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, style in (("train", {"alpha": 0.6}), ("held_out", {"marker": "o", "markersize": 3})):
        points = [(row["step"], row[name]) for row in rows if row[name] is not None]
        axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), **style)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "loss.png", dpi=120)
    plt.close(figure)
