from __future__ import annotations

import ast
import csv
import hashlib
import json
import lzma
import math
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GraniteMoeHybridForCausalLM,
    PreTrainedTokenizerBase,
)

import mamba2_hf
from mamba2_hf import Mamba2ForCausalLM, Mamba2HybridForCausalLM
from mamba2_hf.checkpoints import convert
from mamba2_hf.pretrained import SHIPPED, shipped_model_path


@pytest.fixture(scope="module", params=SHIPPED)
def folder(request: pytest.FixtureRequest) -> Path:
    return shipped_model_path(request.param)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Mamba2ForCausalLM | Mamba2HybridForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def manifest(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "manifest.tsv").read_text().splitlines(), delimiter="\t"))


@pytest.mark.parametrize(("name", "cls"), [("mamba2", Mamba2ForCausalLM), ("hybrid", Mamba2HybridForCausalLM)])
def test_one_call_gives_a_folder_that_the_auto_classes_load(name: str, cls: type) -> None:
    model = AutoModelForCausalLM.from_pretrained(shipped_model_path(name))
    assert type(model) is cls
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert shipped_model_path(SHIPPED[name]) == shipped_model_path(name)


def test_the_default_is_the_pure_one_and_the_hybrid_has_attention_in_one_layer() -> None:
    assert shipped_model_path() == shipped_model_path("mamba2")
    config = AutoConfig.from_pretrained(shipped_model_path("hybrid"))
    assert config.mixer_kinds.count("attention") == 1
    assert config.mixer_kinds.count("ssd") == 4


def test_another_name_is_refused_with_those_that_ship() -> None:
    with pytest.raises(ValueError, match=r"no model named .mamba2-huge.*mamba2-tiny-python.*hybrid-tiny-python"):
        shipped_model_path("mamba2-huge")


def test_both_saw_the_same_files_as_the_same_tokens() -> None:
    for name in ("manifest.tsv", "corpus_manifest.tsv", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        assert len({(shipped_model_path(model) / name).read_bytes() for model in SHIPPED}) == 1
    runs = [json.loads((shipped_model_path(model) / "run.json").read_text()) for model in SHIPPED]
    assert runs[0]["tokens"] == runs[1]["tokens"]
    assert all(runs[0]["recipe"][name] == runs[1]["recipe"][name] for name in ("window", "batch", "steps", "seed"))


def test_weights_are_small_and_in_bf16_but_for_the_recurrence(folder: Path) -> None:
    path = folder / "model.safetensors"
    assert path.stat().st_size <= 8_000_000
    for name, tensor in load_file(path).items():
        kept = name.rpartition(".")[2] in ("A_log", "D", "dt_bias")
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert tensor.isfinite().all(), name


def test_tokenizer_gives_back_source_exactly(tokenizer: PreTrainedTokenizerBase) -> None:
    for path in Path(mamba2_hf.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    for text in ("", "\n", "    ", "\t\tx  \r\n", "naïve 🐍 '日本'", "a  b\n\n\n  c "):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_agree(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    for owner in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(owner, name) == getattr(tokenizer, name)
    assert len(tokenizer) == model.config.vocab_size


def test_generation_is_left_to_the_caller_but_for_sampling(folder: Path) -> None:
    """Nothing that would outlast `max_length`, or change what `do_sample=False` gives."""
    config = json.loads((folder / "generation_config.json").read_text())
    tokens = {f"{name}_token_id" for name in ("bos", "eos", "pad")}
    assert config.keys() - {"transformers_version"} == {"do_sample", "temperature", "top_p", *tokens}


def test_the_hybrid_converts_to_what_others_serve(tmp_path: Path) -> None:
    convert(shipped_model_path("hybrid"), tmp_path / "granite", to="granitemoehybrid")
    stock = GraniteMoeHybridForCausalLM.from_pretrained(tmp_path / "granite", dtype=torch.float32).eval()
    ours = AutoModelForCausalLM.from_pretrained(shipped_model_path("hybrid"), dtype=torch.float32).eval()
    ids = torch.arange(3, 90).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, ours(ids).logits, atol=1e-4, rtol=1e-4)


def test_card_states_what_was_measured_and_it_beats_the_baselines(folder: Path) -> None:
    card, metrics = (folder / "README.md").read_text(), json.loads((folder / "metrics.json").read_text())
    baselines = metrics["baselines"]
    assert metrics["bits_per_byte"] < min(baselines["ngram"], baselines["xz"])
    for bits in (metrics["bits_per_byte"], *baselines.values()):
        assert f"| {bits:.3f} |" in card
    assert hashlib.sha256((folder / "manifest.tsv").read_bytes()).hexdigest() in card
    assert (folder / "loss.png").exists()
    rows = [[cell.strip("* ") for cell in line.split("|")[1:-1]] for line in card.splitlines() if "million" in line]
    losses = {(row[0].removesuffix("** (this one)"), row[1]): row[4:] for row in rows if len(row) == 6}
    for model, kind in (("mamba2", "Mamba-2"), ("hybrid", "hybrid")):
        measured = json.loads((shipped_model_path(model) / "metrics.json").read_text())
        expected = [f"{measured['nats_per_token']:.3f}", f"{measured['bits_per_byte']:.3f}"]
        assert losses[kind, "the corpus"] == expected
        assert float(expected[0]) < float(losses[kind, "the standard library"][0])  # what shipped before
    assert "license_name: permissive" in card


def test_card_names_the_projects_that_the_model_has_read(folder: Path) -> None:
    card, run = (folder / "README.md").read_text(), json.loads((folder / "run.json").read_text())
    read = folder / "corpus_manifest.tsv"
    assert hashlib.sha256(read.read_bytes()).hexdigest() == run["corpus"]["manifest_sha256"]
    assert run["corpus"]["manifest_sha256"] in card
    projects = list(csv.DictReader(read.read_text().splitlines(), delimiter="\t"))
    assert sum(project["split"] in ("train", "by file") for project in projects) == run["corpus"]["projects"]
    assert all(project["licence"] and project["version"] for project in projects)


def test_compresses_held_out_source_as_the_card_says(
    folder: Path, tokenizer: PreTrainedTokenizerBase, model: Any
) -> None:
    """On held-out modules of the running Python, whichever version that is."""
    library = Path(sysconfig.get_paths()["stdlib"])
    held_out = {row["path"] for row in manifest(folder) if row["split"] == "test"}
    texts = [(library / name).read_text(encoding="utf-8") for name in ("sched.py", "copyreg.py") if name in held_out]
    assert texts
    bits = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0]
        bits += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item() / math.log(2)
    data = "".join(texts).encode()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert bits / len(data) < metrics["baselines"]["xz"]
    assert bits < 8 * len(lzma.compress(data, preset=9))


def test_the_generation_config_leaves_length_and_greedy_decoding_alone(
    tokenizer: PreTrainedTokenizerBase, model: Any
) -> None:
    ids = tokenizer("def read_json(path):", return_tensors="pt").input_ids
    assert model.generate(ids, max_length=31).shape[1] == 31
    assert model.generate(ids, GenerationConfig(max_length=29)).shape[1] == 29
    greedy = model.generate(ids, do_sample=False, max_new_tokens=40)
    with torch.no_grad():
        likeliest = model(greedy).logits[:, ids.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(greedy[:, ids.shape[1] :], likeliest)


def test_most_continuations_are_code_that_parses(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """As `generate` samples by default; the last lines may be cut off inside a string or a bracket."""
    torch.manual_seed(0)
    ids = tokenizer("class Stack:\n    def __init__(self", return_tensors="pt")
    outputs = model.generate(**ids, max_new_tokens=96, num_return_sequences=8)

    def parses(lines: list[str]) -> bool:
        try:
            ast.parse("\n".join(lines))
        except SyntaxError:
            return False
        return True

    texts = [text.splitlines() for text in tokenizer.batch_decode(outputs, skip_special_tokens=True)]
    good = [any(parses(lines[:count]) for count in range(4, len(lines) + 1)) for lines in texts]
    assert sum(good) > 4, texts
