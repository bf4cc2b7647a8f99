"""Which tokens a model pays for: what a text repeats, and what it does not, for several models side by side.

    python experiments/where.py                                              # the two models that ship
    python experiments/where.py --model runs/a --model runs/b --tokens 100000
    python experiments/where.py --data ~/.cache/mamba2-hf/corpus/4k          # and files of other projects

A token is a repeat if it and the two tokens before it stood together earlier in the window: whoever can look up what
followed last time need not know it. Repeats are split by how far back the last such place is. All models have to share
a tokenizer. Files are those of the standard library that the models were trained on, and those that were held out.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
import stdlib_corpus
import torch
import torch.nn.functional as F
import trainer
import typer
from trainer import console
from transformers import AutoModelForCausalLM, AutoTokenizer

import mamba2_hf  # noqa: F401 - registers the models
from mamba2_hf.pretrained import shipped_model_path

FAR = (64, 512)
KINDS = ("new", f"repeat, up to {FAR[0]} back", f"repeat, up to {FAR[1]} back", "repeat, farther back")


def kinds(window: np.ndarray) -> np.ndarray:
    """For each token of a window but the first, ``(T - 1,)``, its place in ``KINDS``."""
    found = np.zeros(len(window) - 1, dtype=np.int64)
    seen: dict[tuple[int, ...], int] = {}
    for place in range(2, len(window)):
        three = tuple(window[place - 2 : place + 1].tolist())
        if three in seen:
            found[place - 1] = 1 + sum(place - seen[three] > limit for limit in FAR)
        seen[three] = place
    return found


def windows(documents: Iterable[np.ndarray], length: int, tokens: int) -> list[np.ndarray]:
    """Pieces of documents, at most ``length`` and in all about ``tokens`` long, from documents spread over them all."""
    pieces, left = [], tokens
    for document in documents:
        for start in range(0, len(document) - 8, length):
            if left <= 0:
                return pieces
            pieces.append(document[start : start + length + 1])
            left -= len(pieces[-1])
    return pieces


@torch.no_grad()
def measure(model: torch.nn.Module, pieces: list[np.ndarray], batch: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Sum of losses in nats, and number of tokens, for each kind."""
    nats, counts = np.zeros(len(KINDS)), np.zeros(len(KINDS), dtype=np.int64)
    device = next(model.parameters()).device
    pieces = sorted(pieces, key=len)
    for start in range(0, len(pieces), batch):
        rows = pieces[start : start + batch]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, piece in zip(ids, rows, strict=True):
            row[: len(piece)] = torch.from_numpy(piece.astype(np.int64))
        logits = model(input_ids=ids[:, :-1].to(device), use_cache=False).logits
        losses = F.cross_entropy(logits.float().mT, ids[:, 1:].to(device), reduction="none").cpu().double().numpy()
        for row, piece in zip(losses, rows, strict=True):
            kind = kinds(piece)
            nats += np.bincount(kind, row[: len(kind)], len(KINDS))
            counts += np.bincount(kind, minlength=len(KINDS))
    return nats, counts


def main(
    model: Annotated[list[Path] | None, typer.Option(help="A model's folder; the shipped ones by default.")] = None,
    stdlib: Annotated[Path | None, typer.Option(help="A standard library; the running Python's by default.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A corpus with the models' tokenizer, for its held-out files.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Of each set of files.")] = 200_000,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    results: Annotated[Path, typer.Option(help="Folder of tables and plots.")] = trainer.HERE / "results",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    folders = model or [shipped_model_path(), shipped_model_path("hybrid")]
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    files, _ = stdlib_corpus.read_corpus(stdlib or stdlib_corpus.stdlib_root())
    sets: dict[str, list[np.ndarray]] = {}
    for name, split in (("trained on", "train"), ("held out", "test")):
        members = [file for file in files if file.split == split]
        step = max(1, sum(file.size for file in members) // (4 * tokens))  # a token has three to four bytes
        stream = stdlib_corpus.encode_split(tokenizer, members[::step])
        sets[name] = windows(stdlib_corpus.documents(stream, tokenizer.eos_token_id), length, tokens)
    if data is not None:
        stream = np.load(data / "test.npy")
        sets["other projects"] = windows(np.split(stream, np.flatnonzero(stream == 0)[2::2]), length, tokens)
    rows = []
    for folder in folders:
        reader = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        for name, pieces in sets.items():
            nats, counts = measure(reader, pieces)
            for kind, total, count in zip(KINDS, nats, counts, strict=True):
                share, loss = count / counts.sum(), total / max(1, count)
                rows.append({"model": folder.name, "files": name, "tokens": kind, "count": int(count)})
                rows[-1] |= {"share": round(share, 4), "nats_per_token": round(loss, 4)}
            rows.append({"model": folder.name, "files": name, "tokens": "all", "count": int(counts.sum())})
            rows[-1] |= {"share": 1.0, "nats_per_token": round(nats.sum() / counts.sum(), 4)}
            console.print(f"{folder.name}, {name}: {nats.sum() / counts.sum():.4f} nats per token")
    trainer.write_csv(results / "where.csv", rows)
    draw(rows, results / "where.png")


def draw(rows: list[dict], path: Path) -> None:
    """Bars of loss by kind of token, for the held-out files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    names = list(dict.fromkeys(row["model"] for row in rows))
    for index, name in enumerate(names):
        mine = [row for row in rows if row["model"] == name and row["files"] == "held out"]
        places = [place + index * 0.8 / len(names) for place in range(len(mine))]
        axes.bar(places, [row["nats_per_token"] for row in mine], 0.8 / len(names), label=name, align="edge")
    axes.set_xticks([place + 0.4 for place in range(len(KINDS) + 1)], [*KINDS, "all"], fontsize="x-small")
    axes.set(ylabel="nats per token, held-out files")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
