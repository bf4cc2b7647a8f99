"""The examples that train on text of one's own: as scripts, on every kind of text, and again from a checkpoint."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import finetune_lora
import pretrain
import pytest
import text_data
import torch
import typer
from forks import forks
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from mamba2_hf import Mamba2HybridForCausalLM
from mamba2_hf.pretrained import shipped_model_path

pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
]
EXAMPLES = Path(pretrain.__file__).parent
SENTENCES = ["one two three four five six seven eight nine ten " * 12, "a b c d e f g h " * 20]


def invoke(app: typer.Typer, *arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": SENTENCES[i % 2]}) + "\n" for i in range(24)) + "\n")
    return path


def losses(out: Path, name: str) -> list[float]:
    with (out / "loss.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.fixture(scope="module")
def run_script() -> Iterator[Callable[..., None]]:
    """Runs an example as Python does that is given its file; what takes long to import has been imported once."""
    with forks("peft, transformers.trainer, torch._dynamo", environment={**os.environ, "COLUMNS": "200"}) as run:

        def script(name: str, *arguments: str) -> None:
            command = [str(EXAMPLES / name), *arguments]
            run(
                f"import runpy, sys; sys.argv = {command}; sys.path[0] = {str(EXAMPLES)!r}\n"
                "runpy.run_path(sys.argv[0], run_name='__main__')"
            )

        yield script


@pytest.mark.slow
@pytest.mark.parametrize("script", ["pretrain.py", "finetune_lora.py"])
def test_runs_as_it_stands(script: str, run_script: Callable[..., None], tmp_path: Path) -> None:
    run_script(script, "--tiny", "--out", str(tmp_path))
    held_out = losses(tmp_path, "held_out")
    assert held_out[-1] < held_out[0]
    assert (tmp_path / "loss.png").stat().st_size > 1000


class TestText:
    def test_of_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "inner").mkdir()
        for name, content in (("b.txt", "second"), ("a.md", "first"), ("inner/c.py", "third"), ("d.bin", "no text")):
            (tmp_path / name).write_text(content)
        assert list(text_data.texts(tmp_path)) == ["first", "second", "third"]

    def test_packed_rows_are_the_documents_one_after_the_other(self, jsonl: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(shipped_model_path())
        rows = list(text_data.packed_rows(jsonl, tokenizer, 50, held_out=False))
        kept = [text for index, text in enumerate(text_data.texts(jsonl)) if not text_data.is_held_out(index)]
        expected = [token for text in kept for token in text_data.encode(text, tokenizer)]
        assert [token for row in rows for token in row["input_ids"]] == expected[: 50 * len(rows)]
        assert len(expected) - 50 * len(rows) < 50
        documents = [document for row in rows for document in row["seq_idx"]]
        starts = [True, *(a != b for a, b in pairwise(documents))]
        ends = [token == tokenizer.eos_token_id for row in rows for token in row["input_ids"]]
        assert starts[1:] == ends[:-1]

    def test_without_any_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(typer.BadParameter, match="0 documents"):
            text_data.read_texts(tmp_path, AutoTokenizer.from_pretrained(shipped_model_path()))
        with pytest.raises(typer.BadParameter, match="neither a folder nor"):
            list(text_data.texts(tmp_path / "none.txt"))


class TestPretraining:
    def run(self, out: Path, *more: object) -> str:
        arguments = ("--preset", "tiny", "--steps", 4, "--batch", 2, "--length", 32, "--out", out)
        result = invoke(pretrain.app, *arguments, *more)
        assert result.exit_code == 0, result.output
        return result.output

    def test_goes_on_from_a_checkpoint(self, jsonl: Path, tmp_path: Path) -> None:
        whole, resumed = tmp_path / "whole", tmp_path / "resumed"
        self.run(whole, "--text", jsonl)
        shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
        self.run(resumed, "--text", jsonl, "--resume")
        assert losses(resumed, "train") == pytest.approx(losses(whole, "train"), rel=1e-5)
        one, other = (load_file(out / "model" / "model.safetensors") for out in (whole, resumed))
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor)

    def test_first_loss_is_that_of_chance(self, jsonl: Path, tmp_path: Path) -> None:
        self.run(tmp_path / "out", "--text", jsonl, "--checkpointing")
        assert losses(tmp_path / "out", "train")[0] == pytest.approx(math.log(4096), rel=0.05)

    def test_of_a_hybrid(self, jsonl: Path, tmp_path: Path) -> None:
        self.run(tmp_path / "out", "--text", jsonl, "--hybrid")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
        assert type(model) is Mamba2HybridForCausalLM

    @pytest.mark.parametrize(("preset", "parameters"), [("130m", 128_989_632), ("780m", 780_161_280)])
    def test_presets_are_the_published_sizes(self, preset: str, parameters: int) -> None:
        tokenizer = AutoTokenizer.from_pretrained(shipped_model_path())
        with torch.device("meta"):
            model = pretrain.new_model(preset, False, tokenizer)
        width = model.config.hidden_size
        assert sum(p.numel() for p in model.parameters()) == parameters - (50288 - model.config.vocab_size) * width

    def test_an_unknown_preset_is_refused(self) -> None:
        result = invoke(pretrain.app, "--preset", "7b")
        assert result.exit_code == 2
        assert "'7b'" in result.output

    @pytest.mark.parametrize("processes", ["1", "4"])
    def test_layers_are_shared_by_all_processes_or_none(self, processes: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", processes)
        with pytest.raises(typer.BadParameter, match=f"--tensor 2 of {processes} processes, with --shard 1"):
            pretrain.parallelism(shard=1, context=1, tensor=2)
        with pytest.raises(typer.BadParameter, match="with --shard 2 and --context 1"):
            pretrain.parallelism(shard=2, context=1, tensor=int(processes) + 1)


class TestFineTuning:
    def run(self, out: Path, *more: object) -> Any:
        return invoke(
            finetune_lora.app, *("--steps", 2, "--batch", 2, "--length", 64, "--rank", 4, "--out", out), *more
        )

    @pytest.mark.parametrize("kind", ["", "--dora", "--rslora"])
    def test_the_merged_model_is_the_adapted_one(self, kind: str, jsonl: Path, tmp_path: Path) -> None:
        result = self.run(tmp_path / "out", "--text", jsonl, *([kind] if kind else []))
        assert result.exit_code == 0, result.output
        assert "logits equal the adapter's" in result.output.replace("\n", " ")
        config = PeftConfig.from_pretrained(tmp_path / "out" / "adapter")
        assert (config.use_dora, config.use_rslora) == (kind == "--dora", kind == "--rslora")

    def test_of_a_hybrid_goes_on_from_a_checkpoint(self, jsonl: Path, tmp_path: Path) -> None:
        base, out = tmp_path / "base", tmp_path / "out"
        invoke(
            pretrain.app, *("--preset", "tiny", "--steps", 1, "--batch", 1, "--length", 32, "--hybrid"), "--out", base
        )
        given = ("--text", jsonl, "--model", base / "model")
        assert self.run(out, *given).exit_code == 0
        first = losses(out, "train")
        shutil.rmtree(out / "checkpoint-2")
        assert self.run(out, *given, "--resume").exit_code == 0
        assert losses(out, "train") == pytest.approx(first, rel=1e-5)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
    def test_four_bits_without_a_gpu_are_refused(self, jsonl: Path, tmp_path: Path) -> None:
        result = self.run(tmp_path / "out", "--text", jsonl, "--qlora")
        assert result.exit_code == 2
        assert "GPU" in result.output

    def test_four_bits_without_bitsandbytes_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(typer.BadParameter, match="pip install bitsandbytes"):
            finetune_lora.load("", qlora=True)
