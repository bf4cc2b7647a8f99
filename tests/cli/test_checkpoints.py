"""convert, verify, card and push as scripts and people use them: stdout, stderr, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import layouts
import pytest
from huggingface_hub import ModelCard
from hybrid_families import CASES, stock
from transformers.utils import logging
from typer.testing import CliRunner, Result

from mamba2_hf.checkpoints import FORMATS, READERS, hub
from mamba2_hf.cli import app
from mamba2_hf.cli.checkpoints import ReaderName, Source, Target


@pytest.fixture(autouse=True)
def _logging_as_before() -> Any:
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "300", "NO_COLOR": "1"})


@pytest.fixture(name="source")
def _source(tmp_path: Path) -> Path:
    layouts.stock(tmp_path / "source")
    layouts.add_companions(tmp_path / "source")
    return tmp_path / "source"


class TestConvert:
    def test_stdout_is_the_folder(self, source: Path, tmp_path: Path) -> None:
        result = run("convert", source, tmp_path / "out")
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{tmp_path / 'out'}\n"
        assert "mamba2 to mamba2: " in result.stderr
        assert "tokenizer.json" in result.stderr
        assert (tmp_path / "out/model.safetensors").exists()

    def test_quiet_says_nothing_more(self, source: Path, tmp_path: Path) -> None:
        result = run("convert", source, tmp_path / "out", "--quiet")
        assert result.stderr == ""
        assert result.stdout == f"{tmp_path / 'out'}\n"

    def test_says_which_programs_read_it_and_what_is_left_to_do(self, source: Path, tmp_path: Path) -> None:
        said = run("convert", source, tmp_path / "out").stderr
        assert "transformers (5.23 and 5.24): reads it\n" in said
        assert "mlx-lm (0.32.2): no, n_groups is 2: it norms all channels" in said
        assert (
            "llama.cpp (of October 2026): reads it\n  its converter knows the splitting of a BPE tokenizer by" in said
        )

    def test_for_one_program(self, source: Path, tmp_path: Path) -> None:
        result = run("convert", source, tmp_path / "out", "--for", "vllm")
        assert result.exit_code == 0, result.output
        assert "vLLM (0.33.0): reads it" in result.stderr
        assert "llama.cpp" not in result.stderr
        result = run("convert", source, tmp_path / "refused", "--for", "mlx-lm")
        assert result.exit_code == 1
        assert "mlx-lm (0.32.2) does not compute it: n_groups is 2: it norms all channels" in result.stderr
        assert not (tmp_path / "refused").exists()
        assert "--for is of models" in run("convert", source, tmp_path / "a", "--for", "vllm", "--base", source).stderr

    def test_options(self, source: Path, tmp_path: Path) -> None:
        options = ["--dtype", "bfloat16", "--max-shard-size", "20KB", "--remote-code", "--from", "mamba2"]
        assert run("convert", source, tmp_path / "out", *options).exit_code == 0
        assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
        assert (tmp_path / "out/model.safetensors.index.json").exists()
        assert (tmp_path / "out/modeling_mamba2_hf.py").exists()
        assert run("convert", tmp_path / "out", tmp_path / "back", "--to", "mamba_ssm").exit_code == 0
        assert (tmp_path / "back/pytorch_model.bin").exists()

    def test_what_cannot_be_done_exits_with_1(self, source: Path, tmp_path: Path) -> None:
        assert run("convert", source, tmp_path / "out").exit_code == 0
        for arguments, message in (
            ((source, tmp_path / "out"), "exists"),
            ((tmp_path / "nowhere", tmp_path / "new"), "no such folder"),
            ((source, tmp_path / "new", "--max-shard-size", "much"), "max_shard_size is 'much'"),
            ((source, tmp_path / "new", "--from", "codestral"), "params.json"),
        ):
            result = run("convert", *arguments)
            assert result.exit_code == 1
            assert result.stdout == ""
            assert result.stderr.startswith("error: ")
            assert message in result.stderr
        assert not (tmp_path / "new").exists()
        assert run("convert", source, tmp_path / "out", "--overwrite").exit_code == 0

    def test_a_hybrid_there_and_back_and_what_stands_in_the_way(self, tmp_path: Path) -> None:
        stock(CASES["bamba"]).save_pretrained(tmp_path / "theirs")
        result = run("convert", tmp_path / "theirs", tmp_path / "ours")
        assert result.exit_code == 0, result.output
        assert "bamba to mamba2_hybrid: " in result.stderr
        assert run("convert", tmp_path / "ours", tmp_path / "back", "--to", "bamba").exit_code == 0
        assert run("verify", tmp_path / "theirs", tmp_path / "back").stdout == "0\n"
        refused = run("convert", tmp_path / "ours", tmp_path / "other", "--to", "nemotron_h")
        assert refused.exit_code == 1
        assert "layer_blocks[0] is 'ssd mlp': a layer of nemotron_h is one of" in refused.stderr
        assert not (tmp_path / "other").exists()

    def test_a_wrong_call_exits_with_2(self, source: Path, tmp_path: Path) -> None:
        for arguments in (
            (source,),
            (source, tmp_path / "out", "--to", "codestral"),
            (source, tmp_path / "x", "--dtype", "int8"),
        ):
            result = run("convert", *arguments)
            assert result.exit_code == 2
            assert result.stdout == ""


class TestVerify:
    def test_the_same_model(self, source: Path, tmp_path: Path) -> None:
        assert run("convert", source, tmp_path / "out", "--to", "mamba_ssm").exit_code == 0
        result = run("verify", source, tmp_path / "out")
        assert result.exit_code == 0, result.output
        assert result.stdout == "0\n"
        assert "logits, token by token: 0" in result.stderr

    def test_another_model_exits_with_1(self, source: Path, tmp_path: Path) -> None:
        assert run("convert", source, tmp_path / "out", "--dtype", "bfloat16").exit_code == 0
        result = run("verify", source, tmp_path / "out", "--json")
        assert result.exit_code == 1
        measured = json.loads(result.stdout)
        assert measured["same"] is False
        assert measured["largest"] == max(measured["logits"], measured["decoded"]) > 1e-5
        assert "the largest difference is" in result.stderr
        assert run("verify", source, tmp_path / "out", "--tolerance", "1").exit_code == 0

    def test_other_sizes_are_named(self, source: Path, tmp_path: Path) -> None:
        layouts.stock(tmp_path / "other", num_hidden_layers=1)
        result = run("verify", source, tmp_path / "other")
        assert result.exit_code == 1
        assert "num_hidden_layers is 2" in result.stderr


class TestCard:
    def test_to_stdout_and_to_the_folder(self, source: Path) -> None:
        result = run("card", source, "--license", "mit")
        assert result.exit_code == 0, result.output
        assert ModelCard(result.stdout).data.license == "mit"
        written = run("card", source, "--license", "mit", "--write")
        assert written.stdout == f"{source / 'README.md'}\n"
        assert (source / "README.md").read_text() == result.stdout
        again = run("card", source, "--write")
        assert again.exit_code == 1
        assert "pass --overwrite" in again.stderr
        assert run("card", source, "--write", "--overwrite").exit_code == 0

    def test_a_card_without_a_license_is_remarked_on(self, source: Path) -> None:
        assert "names no license" in run("card", source).stderr
        assert run("card", source, "--base-model", "state-spaces/mamba2-130m").stderr == ""


class TestPush:
    def test_shows_by_default_and_sends_when_told(self, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sent: list[Any] = []
        monkeypatch.setattr(hub.HfApi, "create_repo", lambda *_, **__: None)
        monkeypatch.setattr(hub.HfApi, "upload_folder", lambda *_, **options: sent.append(options) or "https://x")
        assert run("push", source, "me/mine").exit_code == 1  # no card yet
        run("card", source, "--license", "mit", "--write")
        result = run("push", source, "me/mine")
        assert result.exit_code == 0, result.output
        assert not sent
        files = dict(line.split("\t")[::-1] for line in result.stdout.splitlines())
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
        assert "pass --yes" in result.stderr
        assert run("push", source, "me/mine", "--yes").stdout == "https://x\n"
        assert sent[0]["allow_patterns"] == list(files)


def test_help_has_examples() -> None:
    for command in ("convert", "verify", "card", "push"):
        text = run(command, "--help").stdout
        assert f"mamba2-hf {command} " in text
        assert "Examples" in text


def test_every_format_can_be_named() -> None:
    assert {entry.value for entry in Source} == {"auto", *FORMATS}
    writable = {name for name, entry in FORMATS.items() if entry.write_config}
    writable = {name for name, entry in FORMATS.items() if entry.write_config}
    assert {entry.value for entry in Target} == {"auto", *writable}
    assert {entry.value for entry in ReaderName} == READERS.keys()
