"""A corpus of Python source, from projects with permissive licences: what language experiments are trained on.

    python experiments/corpus.py download experiments/projects.txt      # archives, through pip as it is set up
    python experiments/corpus.py build --installed                      # these and what is installed here, to tokens
    python experiments/corpus.py build --vocab-size 16384 --name 16k    # the same files with another tokenizer
    python experiments/corpus.py build --installed --repositories experiments/repositories.txt      # and git's files

Everything goes to a cache folder outside of the repository (`--cache`). Archives are wheels: they hold a project's
Python files and its metadata, and reading one runs no code of it. `projects.txt` names project and version, one a line;
any list of that form will do, and with `--installed` the projects of the running environment are added. The standard
library of the running Python is one more project.

With `--repositories` the cache's git directories are read as well, `repositories/OWNER/NAME`, those of a list that says
each one's licence. Of a repository that is the Python of its newest commit, less what others wrote, what states another
licence at its head, and what a program wrote.

`build` writes, in a folder of its own, `manifest.tsv` (each project's version, licence, hash, split, files, bytes),
`files.tsv` (each file's hash), `summary.json`, `tokenizer/` and the token streams `train.npy`, `validation.npy` and
`test.npy`: uint16, each document between two `<|endoftext|>` of its own, in an order drawn by seed 0. Projects are
either trained on or held out, by the hash of their name; of the standard library each file is, as for the models that
ship.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import random
import re
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import stdlib_corpus
import typer
from rich.console import Console
from transformers import AutoTokenizer

console = Console(stderr=True)
app = typer.Typer(help=__doc__.partition("\n")[0], no_args_is_help=True, add_completion=False)
CACHE = Path.home() / ".cache" / "mamba2-hf" / "corpus"
CacheOption = Annotated[Path, typer.Option(help="Folder of archives and of what is built from them.")]

PERMISSIVE = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|PSF|PSFL|Python-2\.0|Python Software Foundation|CNRI-Python|ISC|ISCL|Zlib|HPND|Unlicense|"
    r"CC0|BSL-1\.0|Public Domain|NCSA)\b",
    re.IGNORECASE,
)
OTHER = re.compile(r"\b(A?L?GPL(v?\d|-)?|MPL|EPL|SSPL|BUSL|proprietary|commercial|nvidia)", re.IGNORECASE)
LARGEST = 400_000  # bytes of a file; what is longer was written by a program
LONGEST_LINE = 1_000
BORROWED = re.compile(
    r"(^|/)(third[-_]?party|3rd[-_]?party|_?vendor(ed)?|extern(al)?s?|external-deps|node_modules|site-packages)/",
    re.IGNORECASE,
)  # folders of a repository for what others wrote
WRITTEN = re.compile(r"(_pb2(_grpc)?|_expected)\.py$")  # files of a repository that programs wrote
HEAD = 4_000  # bytes at the start of a file, where its licence stands if it has one of its own
STATED = re.compile(
    rb"GNU\s+(\w+\s+)?General\s+Public\s+Licen[cs]e|\bA?L?GPL|Mozilla\s+Public|proprietary\s+(rights|and)|NonCommercial|"
    rb"LicenseRef-",
    re.IGNORECASE,
)
SIGNIFICANT = 20  # characters of a line that tells files apart
COPIED = 0.6  # share of its significant lines that makes a file a copy
SAMPLE = 80_000_000  # bytes that a tokenizer is trained on


class Project(NamedTuple):
    """A project's version, licence and files; ``sha256`` is that of its archive, or of the list of installed hashes."""

    name: str
    version: str
    licence: str
    sha256: str
    files: dict[str, bytes]


@dataclass(frozen=True)
class Document:
    """A file that is kept."""

    project: str
    path: str
    text: str
    sha256: str
    split: str


def licence_of(metadata: Any) -> str:
    """The licence that a package's metadata state: an expression, else the classifiers, else the first line of text."""
    expression = metadata.get("License-Expression")
    if expression:
        return str(expression)
    classified = [
        str(c).split("::")[-1].strip() for c in metadata.get_all("Classifier") or [] if c.startswith("License")
    ]
    named = [name for name in classified if name != "OSI Approved"]
    return "; ".join(named) or str(metadata.get("License") or "").strip().partition("\n")[0][:80]


def is_permissive(licence: str) -> bool:
    """Whether a licence is of the permissive kind in each of its parts; what is not known is not."""
    return bool(PERMISSIVE.search(licence)) and not OTHER.search(licence)


def split_of(project: str) -> str:
    """The split of a project, from the hash of its name: 6% test, 4% validation, the rest train."""
    share = int.from_bytes(hashlib.sha256(project.lower().encode()).digest()[8:16], "big") / 2**64
    if share < 0.06:
        return "test"
    return "validation" if share < 0.1 else "train"


def read_archive(path: Path) -> Project:
    """The Python files of a wheel."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        described = next(name for name in names if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        metadata: Message = Parser().parsestr(archive.read(described).decode("utf-8", "replace"), headersonly=True)
        files = {name: archive.read(name) for name in names if name.endswith(".py")}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Project(str(metadata["Name"]).lower(), str(metadata["Version"]), licence_of(metadata), digest, files)


def read_repository(path: Path, name: str, licence: str) -> Project:
    """The Python files of a git directory's newest commit; its version is the commit, its hash that of its files' own.

    Files of a snapshot that are listed but absent are left out.
    """
    git = ["git", "-C", str(path)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    listing = subprocess.run([*git, "ls-tree", "-r", "-z", commit], check=True, capture_output=True).stdout
    blobs: dict[str, bytes] = {}
    for entry in filter(None, listing.decode("utf-8", "replace").split("\0")):
        (mode, _, blob), file = entry.partition("\t")[0].split(), entry.partition("\t")[2]
        regular = mode.startswith("100") and file.endswith(".py")
        if regular and not BORROWED.search(file) and not WRITTEN.search(file):
            blobs[file] = blob.encode()
    command = [*git, "cat-file", "--batch"]
    read = subprocess.run(command, input=b"\n".join([*blobs.values(), b""]), check=True, capture_output=True).stdout
    files, at = {}, 0
    for file in blobs:
        start = read.index(b"\n", at) + 1
        stated = read[at : start - 1].split()
        at = start
        if stated[-1] != b"missing":
            data = read[start : start + int(stated[-1])]
            at += len(data) + 1
            if not STATED.search(data[:HEAD]):
                files[file] = data
    digest = hashlib.sha256(b"".join(file.encode() + b"\0" + blobs[file] + b"\n" for file in files)).hexdigest()
    return Project(name.lower(), commit, licence, digest, files)


def read_repositories(projects: Path, folder: Path) -> Iterator[Project]:
    """The repositories of a list, one a line with its licence behind its name, from git directories in ``folder``."""
    for line in projects.read_text(encoding="utf-8").splitlines():
        name, _, licence = line.partition("#")[0].strip().partition(" ")
        if name:
            yield read_repository(folder / name, name, licence.strip())


def read_installed(paths: list[str] | None = None) -> Iterator[Project]:
    """The projects of this environment, or of the folders in ``paths``."""
    found = importlib.metadata.distributions() if paths is None else importlib.metadata.distributions(path=paths)
    for distribution in sorted(found, key=lambda d: str(d.metadata["Name"]).lower()):
        record = distribution.read_text("RECORD") or ""
        places = {str(file): Path(str(file.locate())) for file in distribution.files or [] if file.suffix == ".py"}
        files = {name: place.read_bytes() for name, place in places.items() if place.is_file() and ".." not in name}
        name, digest = str(distribution.metadata["Name"]).lower(), hashlib.sha256(record.encode()).hexdigest()
        yield Project(name, distribution.version, licence_of(distribution.metadata), digest, files)


def why_not(data: bytes) -> str | None:
    """Why a file is left out whatever else there is; None if it is text that somebody may have written."""
    if len(data) > LARGEST:
        return "longer than anybody writes"
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    if len(text.strip()) < SIGNIFICANT:
        return "empty"
    if max(map(len, text.splitlines())) > LONGEST_LINE:
        return "data in long lines"
    special = (stdlib_corpus.END_OF_TEXT, stdlib_corpus.PAD, stdlib_corpus.SPACE, "\0")
    return "contains a special token" if any(token in text for token in special) else None


class Copies:
    """Tells files whose text has been seen, whole or in most of its lines."""

    def __init__(self) -> None:
        self._texts: set[str] = set()
        self._lines: set[int] = set()

    def add(self, text: str, digest: str) -> bool:
        """Whether a text is a copy of earlier ones; if it is none, later copies of it are."""
        lines = {hash(line) for line in map(str.strip, text.splitlines()) if len(line) >= SIGNIFICANT}
        known = len(lines & self._lines)
        if digest in self._texts or known >= max(3, COPIED * len(lines)):
            return True
        self._texts.add(digest)
        self._lines |= lines
        return False


def collect(
    projects: Iterable[Project], stdlib: Path | None
) -> tuple[list[Document], list[dict[str, Any]], Counter[str]]:
    """The documents that are kept, a row of the manifest for each project, and how many files were left out for what.

    Files that are held out come first, so that a copy of one among the files to train on is the one that goes.
    """
    candidates: list[tuple[int, str, str, bytes, str]] = []  # order, project, path, data, split
    skipped: Counter[str] = Counter()
    rows: dict[str, dict[str, Any]] = {}
    order = {"test": 0, "validation": 1, "train": 2}
    if stdlib is not None:
        files, left_out = stdlib_corpus.read_corpus(stdlib)
        skipped.update(left_out)
        digest = hashlib.sha256(stdlib_corpus.manifest(files).encode()).hexdigest()
        version = stdlib_corpus.python_version()
        rows["python"] = {"version": version, "licence": "PSF-2.0", "sha256": digest, "split": "by file"}
        candidates += [(order[f.split], "python", f.path, f.text.encode(), f.split) for f in files]
    for project in projects:
        if project.name in rows:
            continue
        if not is_permissive(project.licence):
            skipped["of a licence that is not known as permissive"] += len(project.files)
            continue
        split = split_of(project.name)
        rows[project.name] = {
            "version": project.version,
            "licence": project.licence,
            "sha256": project.sha256,
            "split": split,
        }
        candidates += [(order[split], project.name, path, data, split) for path, data in project.files.items()]

    candidates.sort(key=lambda c: (c[0], c[1] != "python", c[1], c[2]))
    copies, documents = Copies(), []
    for _, name, path, data, split in candidates:
        reason = why_not(data)
        if reason is None:
            text, digest = data.decode(), hashlib.sha256(data).hexdigest()
            # The held-out files of the standard library are those that other models were measured on: all stay.
            if not copies.add(text, digest) or (name == "python" and split != "train"):
                documents.append(Document(name, path, text, digest, split))
                continue
            reason = "a copy of another file"
        skipped[reason] += 1
    kept = Counter(d.project for d in documents)
    size = Counter[str]()
    for document in documents:
        size[document.project] += len(document.text.encode())
    manifest = [
        {"project": name, **row, "files": kept[name], "bytes": size[name]} for name, row in rows.items() if kept[name]
    ]
    return documents, manifest, skipped


def encode(tokenizer: Any, documents: Iterable[Document], at_once: int = 128) -> Iterator[np.ndarray]:
    """The tokens of each document between two ends of text, uint16."""
    end = tokenizer.convert_tokens_to_ids(stdlib_corpus.END_OF_TEXT)
    waiting: list[str] = []

    def flush() -> Iterator[np.ndarray]:
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(waiting, add_special_tokens=False):
            yield np.array([end, *encoding.ids, end], dtype=np.uint16)
        waiting.clear()

    for document in documents:
        waiting.append(document.text)
        if len(waiting) == at_once:
            yield from flush()
    yield from flush()


@app.command()
def download(projects: Path, cache: CacheOption = CACHE) -> None:
    """Get the archives of a list of projects, those that are not there yet; a project without a wheel is left out."""
    archives = cache / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    for line in projects.read_text(encoding="utf-8").splitlines():
        requirement = line.partition("#")[0].strip()
        if not requirement:
            continue
        name, _, version = requirement.partition("==")
        stem = re.sub(r"[-_.]+", "_", name).lower()
        if any(path.name.lower().startswith(f"{stem}-{version}-") for path in archives.glob("*.whl")):
            continue
        console.print(requirement)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--ignore-requires-python", "--dest", str(archives), requirement]
        if subprocess.run(command, check=False).returncode:
            console.print(f"[yellow]{requirement} has no wheel for this Python, and is left out")


@app.command()
def build(
    cache: CacheOption = CACHE,
    name: Annotated[str, typer.Option(help="Folder in the cache.")] = "8k",
    installed: Annotated[bool, typer.Option("--installed", help="Add the projects of this environment.")] = False,
    stdlib: Annotated[Path | None, typer.Option(help="A standard library; the running Python's by default.")] = None,
    vocab_size: Annotated[int, typer.Option(help="Entries of the tokenizer.")] = 8192,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of one that is there, in place of a new one.")] = None,
    repositories: Annotated[Path | None, typer.Option(help="A list of git directories in the cache to add.")] = None,
) -> None:
    """Read archives, leave out copies, split, train the tokenizer, write tokens."""
    archives = (read_archive(path) for path in sorted((cache / "archives").glob("*.whl")))
    cloned = read_repositories(repositories, cache / "repositories") if repositories else ()
    documents, manifest, skipped = collect(
        chain(archives, read_installed() if installed else (), cloned), stdlib or stdlib_corpus.stdlib_root()
    )
    write(cache / name, documents, manifest, skipped, vocab_size, tokenizer)


def write(
    out: Path,
    documents: list[Document],
    manifest: list[dict[str, Any]],
    skipped: Counter[str],
    vocab_size: int,
    tokenizer: Path | None,
) -> None:
    """The folder of a corpus."""
    out.mkdir(parents=True, exist_ok=True)
    columns = list(manifest[0])
    rows = ("\t".join(str(row[column]) for column in columns) for row in manifest)
    (out / "manifest.tsv").write_text("\n".join(["\t".join(columns), *rows, ""]), encoding="utf-8")
    rows = (f"{d.split}\t{d.project}\t{d.path}\t{d.sha256}" for d in documents)
    (out / "files.tsv").write_text("\n".join(["split\tproject\tpath\tsha256", *rows, ""]), encoding="utf-8")

    documents = documents.copy()
    random.Random(0).shuffle(documents)
    if tokenizer is None:
        console.print(f"training a tokenizer of {vocab_size} entries")
        words = stdlib_corpus.train_tokenizer(_sample(documents), vocab_size)
        stdlib_corpus.save_tokenizer(words, out / "tokenizer")
    else:
        words = AutoTokenizer.from_pretrained(tokenizer)
        words.save_pretrained(out / "tokenizer")
    summary: dict[str, Any] = {"vocab_size": len(words), "skipped": dict(sorted(skipped.items()))}
    for split in stdlib_corpus.SPLITS:
        members = [document for document in documents if document.split == split]
        stream = np.concatenate([*encode(words, members), np.empty(0, np.uint16)])
        np.save(out / f"{split}.npy", stream)
        size = sum(len(document.text.encode()) for document in members)
        projects = len({document.project for document in members})
        summary[split] = {"projects": projects, "files": len(members), "bytes": size, "tokens": len(stream)}
        console.print(f"{split}: {summary[split]}")
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console.print(f"the corpus is in {out}")


def _sample(documents: Iterable[Document]) -> Iterator[str]:
    size = 0
    for document in documents:
        if document.split == "train":
            yield document.text
            size += len(document.text)
            if size > SAMPLE:
                return


if __name__ == "__main__":
    app()
