from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import stdlib_corpus as corpus
from hypothesis import given
from hypothesis import strategies as st

SOURCE = '''def read(path, mode="r"):
    """Read a file."""
    with open(path, mode) as file:
        return file.read()


class Reader:
\tdef __init__(self, n_bytes=1024):
\t\tself.n_bytes = n_bytes  # naïve
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library of 200 small modules, and of everything that is to be left out."""
    root = tmp_path / "lib"
    for i in range(200):
        path = root / f"package{i % 10}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# module {i}\n{SOURCE}")
    for name, data in {
        "copy.py": (root / "package0/module0.py").read_bytes(),
        "empty.py": b"\n",
        "latin.py": "# caf\xe9".encode("latin-1"),
        "marked.py": b"END = '<|endoftext|>'\n",
        "_sysconfigdata_linux.py": b"build_time_vars = {}\n",
        "site-packages/foreign/__init__.py": b"import foreign\n",
        "notes.txt": b"not Python\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture(scope="module")
def tokenizer() -> corpus.PreTrainedTokenizerFast:
    return corpus.train_tokenizer(iter([SOURCE] * 3), vocab_size=300)


def test_reads_source_and_counts_what_it_leaves_out(library: Path) -> None:
    files, skipped = corpus.read_corpus(library)
    # `copy.py` comes first by path, so it is the module of the same content that is the copy.
    assert {file.path for file in files} == {"copy.py"} | {f"package{i % 10}/module{i}.py" for i in range(1, 200)}
    assert skipped == {
        "a copy of another file": 1,
        "contains a special token": 1,
        "empty": 1,
        "generated": 1,
        "not UTF-8": 1,
    }


def test_a_file_keeps_its_split_whatever_else_is_there(library: Path) -> None:
    files, _ = corpus.read_corpus(library)
    assert {file.split for file in files} == set(corpus.SPLITS)
    (library / "package0" / "another.py").write_text("pass\n")
    more, _ = corpus.read_corpus(library)
    assert {f.path: f.split for f in files}.items() <= {f.path: f.split for f in more}.items()


def test_a_tree_too_small_to_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text("pass\n")
    with pytest.raises(ValueError, match="give a larger tree"):
        corpus.read_corpus(tmp_path)


def test_manifest_lists_every_file_once(library: Path) -> None:
    files, _ = corpus.read_corpus(library)
    header, *rows = corpus.manifest(files).splitlines()
    assert header.split("\t") == ["split", "bytes", "sha256", "path"]
    assert [row.split("\t")[3] for row in rows] == [file.path for file in files]
    assert str(library) not in corpus.manifest(files)


@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.text("\n\t\r a_1(.é", max_size=60))
def test_tokenizer_gives_back_every_text(tokenizer: corpus.PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokens_end_where_a_prompt_may_end(tokenizer: corpus.PreTrainedTokenizerFast) -> None:
    whole = tokenizer(SOURCE).input_ids
    for prompt in (SOURCE[: SOURCE.index(":") + 1], SOURCE[: SOURCE.index("\n") + 1], SOURCE[: SOURCE.index('"""')]):
        ids = tokenizer(prompt).input_ids
        assert ids == whole[: len(ids)]


def test_stream_keeps_documents_whole(library: Path, tokenizer: corpus.PreTrainedTokenizerFast) -> None:
    files, _ = corpus.read_corpus(library)
    stream = corpus.encode_split(tokenizer, files[:5])
    assert stream.dtype == np.uint16
    found = list(corpus.documents(stream, tokenizer.eos_token_id))
    assert all(document[0] == document[-1] == tokenizer.eos_token_id for document in found)
    assert [tokenizer.decode(document[1:-1].tolist()) for document in found] == [file.text for file in files[:5]]
    assert sum(len(document) - 1 for document in found) == len(stream) - 1
