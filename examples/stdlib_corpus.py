"""The standard library's source as training data: files, split, tokenizer and token streams.

`train_tiny.py` is the script to run; this file holds the part of it that knows about source files.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPLITS = ("train", "validation", "test")
END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"

UNKNOWN = "<unk>"  # SentencePiece wants one; with all bytes there, no text needs it
SPACE = "\u2581"  # how SentencePiece writes a space

# What merges may join. A newline stands alone, and so does a run of spaces: runs come first in rank, which keeps an
# indentation apart from the word behind it. So a prompt may end at either without leaving the model at a boundary that
# it never saw in training. Identifiers keep their underscores.
ALONE = rf"{SPACE}{{2,}}|\s"
PIECES = rf"{SPACE}?[\p{{L}}_]+|{SPACE}?\p{{N}}{{1,2}}|{SPACE}?[^\s\p{{L}}\p{{N}}_{SPACE}]+"
RUNS = tuple(SPACE * length for length in range(2, 33))
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
ASCII = tuple(chr(code) for code in range(0x21, 0x7F))
SMALLEST = 3 + len(BYTES) + len(RUNS) + len(ASCII) + 1
"""Entries of a vocabulary without merges."""

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


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A BPE of SentencePiece's kind: a space goes before each text, and what has no entry is spelled in bytes.

    It gives back every text without U+2581 exactly; that character comes back as a space, which it stands for.
    `<|endoftext|>` both starts and ends a document. Runtimes that read `tokenizer.model` split alike.
    """
    pieces = [END_OF_TEXT, PAD, UNKNOWN, *BYTES, *RUNS, *learn_pieces(texts, vocab_size - SMALLEST)]
    known = {piece: index for index, piece in enumerate(pieces)}
    # Any two neighbors that make a piece are joined, not only those from which training made it.
    merges = [
        (piece[:at], piece[at:])
        for piece in pieces[3 + len(BYTES) :]
        for at in range(len(piece) - 1, 0, -1)
        if piece[:at] in known and piece[at:] in known
    ]
    tokenizer = Tokenizer(models.BPE(known, merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def learn_pieces(texts: Iterable[str], merges: int) -> list[str]:
    """The printable characters of ASCII, the space, and what BPE merges of them within words, best first."""
    if merges < 0:
        raise ValueError(f"a vocabulary of {SMALLEST + merges} entries has no room for {SMALLEST} of bytes and spaces")
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", SPACE)
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(ALONE), "removed"), pre_tokenizers.Split(Regex(PIECES), "isolated")]
    )
    alphabet = [*ASCII, SPACE]
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + merges,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    pieces = learner.get_vocab()
    return sorted(pieces, key=pieces.__getitem__)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write it for transformers 4 and 5, and as the `tokenizer.model` that SentencePiece and llama.cpp read."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that both know
    config |= {"add_bos_token": False, "add_eos_token": False}  # llama.cpp would add the first
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    kinds = ModelProto.SentencePiece
    special = {END_OF_TEXT: kinds.CONTROL, PAD: kinds.CONTROL, UNKNOWN: kinds.UNKNOWN}
    special |= dict.fromkeys(BYTES, kinds.BYTE)
    model = ModelProto()
    for piece, index in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        # The higher score is merged first.
        model.pieces.add(piece=piece, score=-float(index), type=special.get(piece, kinds.NORMAL))
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, True, len(model.pieces)
    trainer.unk_piece, trainer.bos_piece, trainer.eos_piece, trainer.pad_piece = UNKNOWN, END_OF_TEXT, END_OF_TEXT, PAD
    trainer.bos_id, trainer.eos_id, trainer.pad_id, trainer.unk_id = 0, 0, 1, 2
    normalizer.name, normalizer.add_dummy_prefix = "identity", True
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


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
