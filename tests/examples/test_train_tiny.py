from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train_tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteMoeHybridForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from mamba2_hf import Mamba2ForCausalLM, Mamba2HybridForCausalLM
from mamba2_hf.checkpoints import convert

SCRIPT = Path(train_tiny.__file__)
END = 0


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(train_tiny.app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return f"{result.exit_code} {result.output}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder that `prepare --tiny` writes, run as a person runs it."""
    folder = tmp_path_factory.mktemp("tiny") / "data"
    command = [sys.executable, str(SCRIPT), "prepare", "--tiny", "--data", str(folder)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "COLUMNS": "200"})
    return folder


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    """The folder of a model trained for 20 steps."""
    out = data.parent / "model"
    printed = invoke(
        "train", "--tiny", "--steps", 20, "--evaluate-every", 10, "--data", data, "--out", out, "--device", "cpu"
    )
    assert printed.startswith("0 ")
    return out


@pytest.fixture(scope="module")
def others(data: Path) -> list[Path]:
    """Folders of a hybrid and a Transformer, trained for two steps."""
    for kind in ("hybrid", "attention"):
        options = ("--steps", 2, "--data", data, "--out", data.parent / kind, "--device", "cpu")
        assert invoke("train", "--kind", kind, "--tiny", *options).startswith("0 ")
    return [data.parent / "hybrid", data.parent / "attention"]


@pytest.fixture(scope="module", params=train_tiny.NAMES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    recipe = train_tiny.Recipe(request.param, hidden_size=16, layers=2, state_size=8, head_dim=8, intermediate_size=24)
    tokenizer = train_tiny.corpus.train_tokenizer(["text"], train_tiny.corpus.SMALLEST)
    return train_tiny.new_model(recipe, tokenizer).eval()


def streams(*lengths: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    documents = [np.array([END, *rng.integers(2, 258, length)], dtype=np.uint16) for length in lengths]
    return np.concatenate([*documents, np.array([END], dtype=np.uint16)])


# --- data ---


def test_prepare_writes_a_corpus_that_adds_up(data: Path) -> None:
    summary = json.loads((data / "corpus.json").read_text())
    rows = list(csv.DictReader((data / "manifest.tsv").read_text().splitlines(), delimiter="\t"))
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    for split, counts in summary["splits"].items():
        mine = [row for row in rows if row["split"] == split]
        stream = np.load(data / f"{split}.npy")
        assert counts == {
            "files": len(mine),
            "bytes": sum(int(row["bytes"]) for row in mine),
            "tokens": len(stream) - 1,
        }
        documents = train_tiny.corpus.documents(stream, tokenizer.eos_token_id)
        texts = [tokenizer.decode(document[1:-1].tolist()) for document in documents]
        assert sum(len(text.encode()) for text in texts) == counts["bytes"]


def test_baselines_are_in_the_order_that_their_knowledge_gives(data: Path) -> None:
    baselines = json.loads((data / "baselines.json").read_text())
    assert 0 < baselines["xz_after_train"] < baselines["xz"] < 8
    assert 0 < baselines["ngram"] < 8


@pytest.mark.parametrize("length", [2, 3, 8, 9, 10, 12, 13, 40, 41])
def test_windows_score_every_token_once_with_enough_context(length: int) -> None:
    document, window = np.arange(length), 8
    scored = []
    for piece, seen in train_tiny.windows(document, window):
        assert len(piece) <= window + 1
        assert piece[0] == 0 or seen == window // 2
        scored += piece[1 + seen :].tolist()
    assert scored == list(range(1, length))


def test_an_epoch_sees_every_window_once_and_the_next_one_other_windows() -> None:
    recipe = train_tiny.Recipe(window=10, batch=4)
    order = train_tiny.window_starts(1000, recipe)
    epoch = torch.cat([next(order) for _ in range(24)])
    assert len(epoch.unique()) == len(epoch) == 96
    assert (epoch.sort().values.diff() % 10 == 0).all()
    assert epoch.max() + 10 < 1000
    later = torch.cat([next(order) for _ in range(24)])
    assert (later % 10 != epoch[0] % 10).all()


def test_too_few_tokens_for_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="lower --batch"):
        next(train_tiny.window_starts(1000, train_tiny.Recipe(window=100, batch=32)))


# --- loss ---


def test_documents_in_one_window_do_not_see_each_other(model: PreTrainedModel) -> None:
    stream = torch.from_numpy(streams(9, 14, 5).astype(np.int64))
    with torch.no_grad():
        packed = train_tiny.token_losses(model, stream[None], END)[0]
        apart = [
            train_tiny.token_losses(model, torch.from_numpy(d.astype(np.int64))[None], END)[0]
            for d in train_tiny.corpus.documents(stream.numpy(), END)
        ]
    torch.testing.assert_close(packed, torch.cat(apart), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_held_out_loss_is_the_documents_own_loss(model: PreTrainedModel, batch: int) -> None:
    stream = streams(9, 30, 5, 1, 17)
    with torch.no_grad():
        expected = sum(
            train_tiny.token_losses(model, torch.from_numpy(d.astype(np.int64))[None], END).sum().item()
            for d in train_tiny.corpus.documents(stream, END)
        )
    assert math.isclose(train_tiny.held_out_loss(model, stream, END, 64, batch), expected, rel_tol=1e-5)
    # With windows shorter than the documents the context shrinks, and nothing else changes.
    short = train_tiny.held_out_loss(model, stream, END, 8, batch)
    assert math.isclose(short, expected, rel_tol=0.02)
    assert short != expected


# --- kinds ---


def test_kinds_have_the_same_number_of_parameters() -> None:
    tokenizer = train_tiny.corpus.train_tokenizer(["text"], train_tiny.corpus.SMALLEST)
    with torch.device("meta"):
        counts = [train_tiny.new_model(recipe, tokenizer).num_parameters() for recipe in train_tiny.RECIPES.values()]
    assert max(counts) < 1.002 * min(counts)


def test_a_hybrid_is_mostly_ssd_and_attention_alone_has_none() -> None:
    tokenizer = train_tiny.corpus.train_tokenizer(["text"], train_tiny.corpus.SMALLEST)
    kinds = {
        kind: train_tiny.new_model(train_tiny.RECIPES[kind], tokenizer).config.layer_blocks
        for kind in ("hybrid", "attention")
    }
    assert sorted(kinds["hybrid"]) == ["attention mlp", *["ssd mlp"] * 4]
    assert kinds["hybrid"][0] == kinds["hybrid"][-1] == "ssd mlp"
    assert set(kinds["attention"]) == {"attention mlp"}


def test_a_hybrid_is_of_a_published_shape(others: list[Path], tmp_path: Path) -> None:
    """So that the programs that serve Granite 4 serve it: the same logits from transformers' own class."""
    convert(others[0], tmp_path / "granite", to="granitemoehybrid")
    stock = GraniteMoeHybridForCausalLM.from_pretrained(tmp_path / "granite", dtype=torch.float32).eval()
    ours = AutoModelForCausalLM.from_pretrained(others[0], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "granite")
    ids = tokenizer("def parse(self):\n    return", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, ours(ids).logits, atol=1e-4, rtol=1e-4)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "granite" / name).read_bytes() == (others[0] / name).read_bytes()


def test_cards_show_the_losses_of_all_kinds(trained: Path, others: list[Path], data: Path) -> None:
    hybrid, attention = others
    compare = ("--compare", trained, "--compare", attention)
    assert invoke("evaluate", "--data", data, "--out", hybrid, "--device", "cpu", *compare).startswith("0 ")
    card = (hybrid / "README.md").read_text()
    for folder, name in ((trained, "Mamba-2"), (hybrid, "**hybrid** (this one)"), (attention, "attention")):
        metrics = json.loads((folder / "metrics.json").read_text())
        row = next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
        assert f"| {metrics['nats_per_token']:.3f} | {metrics['bits_per_byte']:.3f} |" in row
    assert "# mamba2-hybrid-tiny-python" in card
    assert "train --kind hybrid" in card
    assert "$" not in re.sub(r"```.*?```", "", card, flags=re.DOTALL)
    assert type(AutoModelForCausalLM.from_pretrained(hybrid)) is Mamba2HybridForCausalLM


def test_a_loss_on_other_files_is_not_compared(trained: Path, others: list[Path], data: Path, tmp_path: Path) -> None:
    for folder, message in ((data, "train that model first"), (tmp_path / "other", "trained on other files")):
        if folder != data:
            shutil.copytree(others[1], folder)
            (folder / "manifest.tsv").write_text("another\n")
        printed = invoke("evaluate", "--data", data, "--out", trained, "--compare", folder)
        assert printed.startswith("2 ")
        assert message in re.sub(r"[\s│]+", " ", printed)


# --- schedule ---


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    recipe = train_tiny.Recipe(steps=100, warmup=10, learning_rate=1.0)
    rates = [train_tiny.learning_rate_at(step, recipe) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0)


def test_a_short_run_warms_up_for_a_fifth_of_it() -> None:
    assert train_tiny.Recipe(steps=20).warmup == 4


# --- the whole run ---


def test_training_learns_and_logs(trained: Path) -> None:
    rows = list(csv.DictReader((trained / "loss.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [10, 20]
    losses = [float(row["validation"]) for row in rows]
    assert losses[1] < losses[0] < math.log(512)
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_result_is_a_bf16_model_that_loads_by_its_folder(trained: Path) -> None:
    weights = load_file(trained / "model.safetensors")
    for name, tensor in weights.items():
        kept = name.rpartition(".")[2] in ("A_log", "D", "dt_bias")
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
    assert "lm_head.weight" not in weights
    config = json.loads((trained / "config.json").read_text())
    assert config["model_type"] == "mamba2"
    assert config["rescale_prenorm_residual"] is False
    tokenizer, model = AutoTokenizer.from_pretrained(trained), AutoModelForCausalLM.from_pretrained(trained)
    assert type(model) is Mamba2ForCausalLM
    ids = tokenizer("def parse(self):\n    ", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=5).shape[1] > ids.input_ids.shape[1]


def test_the_card_states_what_was_measured_and_no_path_of_the_machine(trained: Path, data: Path) -> None:
    card = (trained / "README.md").read_text()
    metrics, baselines = (json.loads(p.read_text()) for p in (trained / "metrics.json", data / "baselines.json"))
    for bits in (metrics["bits_per_byte"], *baselines.values()):
        assert f"| {bits:.3f} |" in card
    assert f"{metrics['nats_per_token']:.3f} nats per token" in card
    assert json.loads((data / "corpus.json").read_text())["manifest_sha256"] in card
    command = re.search(r"python examples/train_tiny.py train .*", card)
    assert command is not None
    assert "--steps 20" in command[0]
    assert "$" not in re.sub(r"```.*?```", "", card, flags=re.DOTALL)
    for path in trained.iterdir():
        assert str(data.parent).encode() not in path.read_bytes(), path.name


def test_more_to_read(data: Path, trained: Path, tmp_path: Path) -> None:
    """A folder of `experiments/corpus.py` in the place of the training files: the card says so, other tokens are
    refused, and so is going on without it.
    """
    corpus, out = tmp_path / "corpus", tmp_path / "model"
    shutil.copytree(data / "tokenizer", corpus / "tokenizer")
    np.save(corpus / "train.npy", np.load(data / "train.npy")[:50_000])
    counts = {"projects": 7, "files": 70, "bytes": 700_700, "tokens": 49_999}
    (corpus / "summary.json").write_text(json.dumps({"train": counts}))
    (corpus / "manifest.tsv").write_text("project\tversion\n")
    options = ["--data", data, "--out", out, "--device", "cpu", "--tiny", "--steps", 2]
    assert invoke("train", *options, "--corpus", corpus).startswith("0 ")
    card = (out / "README.md").read_text()
    assert "70 of 7 projects, 700,700 bytes and 49,999 tokens" in card
    assert "--corpus FOLDER" in card
    assert (out / "corpus_manifest.tsv").read_text() == "project\tversion\n"
    result = invoke("train", "--data", data, "--out", out, "--device", "cpu", "--resume")
    assert "the --corpus that it was begun with" in result
    result = invoke("train", "--data", data, "--out", trained, "--device", "cpu", "--resume", "--corpus", corpus)
    assert "with no --corpus" in result
    assert not (trained / "corpus_manifest.tsv").exists()
    assert invoke("evaluate", "--data", data, "--out", out, "--device", "cpu", "--card-only", "--compare", trained)
    card = (out / "README.md").read_text()
    assert "| Mamba-2 | the standard library |" in card
    assert "| **Mamba-2** (this one) | the corpus |" in card
    (corpus / "tokenizer" / "tokenizer.json").write_text('{"model": {}}')
    assert "of another tokenizer" in invoke("train", *options, "--corpus", corpus)


def test_a_model_measured_before_contexts_were_gets_a_card(trained: Path, data: Path, tmp_path: Path) -> None:
    assert "**Recall.**" in (trained / "README.md").read_text()
    shutil.copytree(trained, tmp_path / "old")
    metrics = json.loads((trained / "metrics.json").read_text())
    for name in ("recall", "positions"):
        del metrics[name]
    (tmp_path / "old" / "metrics.json").write_text(json.dumps(metrics))
    assert invoke("evaluate", "--data", data, "--out", tmp_path / "old", "--card-only").startswith("0 ")
    card = (tmp_path / "old" / "README.md").read_text()
    assert "**Recall.**" not in card
    assert "## Data" in card


def test_evaluating_again_gives_the_same_numbers(trained: Path, data: Path) -> None:
    before = (trained / "metrics.json").read_text(), (trained / "README.md").read_text()
    assert invoke("evaluate", "--data", data, "--out", trained, "--device", "cpu").startswith("0 ")
    assert ((trained / "metrics.json").read_text(), (trained / "README.md").read_text()) == before


def test_an_interrupted_run_resumes_to_the_same_weights(
    trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--data", data, "--out", tmp_path / "model", "--device", "cpu", "--evaluate-every", 10)
    save = train_tiny.Run.save

    def save_and_stop(self: train_tiny.Run) -> None:
        save(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_tiny.Run, "save", save_and_stop)
        assert not invoke("train", "--tiny", "--steps", 20, *options).startswith("0 ")
    assert invoke("train", "--resume", *options).startswith("0 ")
    resumed, straight = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", trained))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--steps", "5"], "leave out what would change it"), ([], "no checkpoint to resume from")],
)
def test_a_resume_that_cannot_be_honored_is_refused(
    data: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    printed = invoke("train", "--resume", *options, "--data", data, "--out", tmp_path / "nothing")
    assert printed.startswith("2 ")
    assert message in re.sub(r"[\s│]+", " ", printed)


def test_a_time_limit_shortens_the_schedule(data: Path, tmp_path: Path) -> None:
    options = ("--data", data, "--out", tmp_path / "model", "--device", "cpu")
    invoke("train", "--tiny", "--steps", 100_000, "--minutes", 1e-9, *options)
    recipe = json.loads((tmp_path / "model" / "run.json").read_text())["recipe"]
    assert recipe["steps"] == 31
