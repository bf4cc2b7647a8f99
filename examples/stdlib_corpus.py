"""The standard library's source as training data: files, split, tokenizer and token streams.

`train_tiny.py` is the script to run; this file holds the part of it that knows about source files.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPLITS = ("train", "validation", "test")
END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"

# A newline is always its own token and indentation is one run that stops before the first word, so a prompt may end at
# either without leaving the model at a boundary it never saw in training. Identifiers keep their underscores.
PIECES = r"\n| ?[\p{L}_]+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}_]+| +(?=\S)|[^\S\n]+"

# Nobody wrote these by hand: records of how the interpreter was built, and its manual as one string of 750 KB.
GENERATED = ("_sysconfigdata", "config-", "pydoc_data/")
INSTALLED = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class SourceFile:
    path: str  # relative to the library, with forward slashes
    text: str
    sha256: str
    split: str

    @property
    def size(self) -> int:
        return len(self.text.encode())


def stdlib_root() -> Path:
    """Where the running interpreter keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def split_of(path: str) -> str:
    """The split of a file, from the hash of its relative path: 3% test, 2% validation, the rest train."""
    share = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64
    if share < 0.03:
        return "test"
    return "validation" if share < 0.05 else "train"


def read_corpus(root: Path, pattern: str = "**/*.py") -> tuple[list[SourceFile], dict[str, int]]:
    """Every usable file of `root` that fits the pattern, by path, and how many were left out for which reason."""
    files: list[SourceFile] = []
    skipped: Counter[str] = Counter()
    seen: set[str] = set()
    for path in sorted(root.glob(pattern), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root).as_posix()
        if relative.split("/")[0] in INSTALLED:
            continue
        if relative.startswith(GENERATED):
            skipped["generated"] += 1
            continue
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        try:
            text = data.decode()
        except UnicodeDecodeError:
            skipped["not UTF-8"] += 1
            continue
        if not text.strip():
            skipped["empty"] += 1
        elif digest in seen:
            skipped["a copy of another file"] += 1
        elif any(token in text for token in (END_OF_TEXT, PAD, "\0")):
            skipped["contains a special token"] += 1
        else:
            seen.add(digest)
            files.append(SourceFile(relative, text, digest, split_of(relative)))
    missing = [split for split in SPLITS if not any(file.split == split for file in files)]
    if missing:
        raise ValueError(
            f"{root} has {len(files)} usable .py files and none for {', '.join(missing)}: give a larger tree"
        )
    return files, dict(sorted(skipped.items()))


def manifest(files: Iterable[SourceFile]) -> str:
    """The files as tab-separated lines: split, bytes, SHA-256, path."""
    rows = (f"{file.split}\t{file.size}\t{file.sha256}\t{file.path}\n" for file in files)
    return "split\tbytes\tsha256\tpath\n" + "".join(rows)


def shared_lines(files: list[SourceFile]) -> float:
    """Share of the test files' distinct lines of 20 characters or more that some training file has too."""

    def lines(split: str) -> set[str]:
        stripped = (line.strip() for file in files if file.split == split for line in file.text.splitlines())
        return {line for line in stripped if len(line) >= 20}

    held_out = lines("test")
    return len(held_out & lines("train")) / max(1, len(held_out))


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that gives back every text exactly; `<|endoftext|>` both starts and ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def encode_split(tokenizer: PreTrainedTokenizerFast, files: Iterable[SourceFile]) -> np.ndarray:
    """Token stream of the files: `<|endoftext|>` before each of them and after the last, as uint16."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    stream: list[np.ndarray] = []
    files = list(files)
    for file, encoding in zip(files, tokenizer.backend_tokenizer.encode_batch([f.text for f in files]), strict=True):
        if tokenizer.backend_tokenizer.decode(encoding.ids) != file.text:
            raise ValueError(f"the tokenizer does not give {file.path} back exactly")
        stream.append(np.array([end, *encoding.ids], dtype=np.uint16))
    return np.concatenate([*stream, np.array([end], dtype=np.uint16)])


def documents(stream: np.ndarray, end: int) -> Iterator[np.ndarray]:
    """The documents of a token stream, each with the `<|endoftext|>` before and after it."""
    bounds = np.flatnonzero(stream == end)
    for start, stop in pairwise(bounds):
        yield stream[start : stop + 1]


def python_version() -> str:
    return f"{platform.python_implementation()} {platform.python_version()}"
