from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import stdlib_corpus as corpus
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

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
    return corpus.train_tokenizer([SOURCE] * 3, vocab_size=corpus.SMALLEST + 60)


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


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=corpus.SPACE)) | st.text(
    "\n\t\r a_1(.=é", max_size=60
)


@given(text=TEXTS)
def test_tokenizer_gives_back_every_text(tokenizer: corpus.PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.fixture(scope="module")
def saved(tokenizer: corpus.PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus.save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def processor(saved: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(saved / "tokenizer.model"))


@given(text=TEXTS | st.lists(st.sampled_from([" ", "=", "-", "a", "de", "\n", "(", "1"])).map("".join))
def test_sentencepiece_splits_alike(
    tokenizer: corpus.PreTrainedTokenizerFast, processor: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    text = text.replace("\0", "")
    ids = processor.encode(text)
    assert ids == tokenizer(text).input_ids
    assert processor.decode(ids) == text


def test_special_tokens_are_the_same_in_both_files(
    saved: Path, processor: sentencepiece.SentencePieceProcessor
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert len(tokenizer) == processor.vocab_size()
    for token in (corpus.END_OF_TEXT, corpus.PAD):
        assert processor.is_control(tokenizer.convert_tokens_to_ids(token))
    assert processor.eos_id() == tokenizer.eos_token_id
    assert processor.pad_id() == tokenizer.pad_token_id
    config = json.loads((saved / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # the name that transformers 4 knows
    assert config["add_bos_token"] is config["add_eos_token"] is False


@pytest.mark.parametrize("length", [2, 3, 4, 5, 8, 12, 31, 32])
def test_an_indentation_is_one_token_apart_from_what_follows(
    tokenizer: corpus.PreTrainedTokenizerFast, length: int
) -> None:
    tokens = tokenizer.tokenize("x\n" + " " * length + "return")
    assert corpus.SPACE * length in tokens
    assert "".join(tokens[tokens.index(corpus.SPACE * length) + 1 :]) == "return"


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="300 entries has no room"):
        corpus.train_tokenizer(["text"], 300)


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
