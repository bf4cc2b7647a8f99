"""The command line as scripts and people use it: what lands on stdout, and which exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging
from typer.testing import CliRunner, Result

from mamba2_hf.cli import app
from mamba2_hf.cli.generate import _Printer
from mamba2_hf.pretrained import shipped_model_path

PROMPT = "def read_json(path):"


@pytest.fixture(autouse=True)
def _logging_as_before():
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def run(*arguments: str, stdin: str | None = None, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin, env={"COLUMNS": "200", "NO_COLOR": "1", **(env or {})})


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that most characters outside ASCII span several tokens."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer, as ``save_pretrained`` leaves them."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mamba2",
        **{"hidden_size": 32, "num_hidden_layers": 2, "state_size": 16, "head_dim": 16, "num_heads": 4, "n_groups": 1},
        **{"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None},
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def continuation(checkpoint: Path, tokens: int, **options: float) -> str:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = model.generate(**tokenizer(PROMPT, return_tensors="pt"), do_sample=False, max_new_tokens=tokens, **options)
    return tokenizer.decode(ids[0], skip_special_tokens=True).removeprefix(PROMPT)


class TestGenerate:
    def test_stdout_is_the_text_and_nothing_else(self, checkpoint):
        result = run("generate", PROMPT, "--model", str(checkpoint), "-n", "24", "--temperature", "0")
        assert result.exit_code == 0, result.output
        assert result.stdout == PROMPT + continuation(checkpoint, 24) + "\n"
        assert "24 tokens in" in result.stderr
        assert "float32 on cpu" in result.stderr

    def test_streaming_changes_when_and_not_what(self, checkpoint):
        arguments = ["generate", PROMPT, "--model", str(checkpoint), "-n", "24"]
        assert run(*arguments, "--no-stream").stdout == run(*arguments).stdout

    def test_the_prompt_can_be_left_out_and_come_from_stdin(self, checkpoint):
        result = run("generate", "-", "--no-echo", "--model", str(checkpoint), "-n", "8", "-t", "0", stdin=PROMPT)
        assert result.stdout == continuation(checkpoint, 8) + "\n"

    def test_a_repetition_penalty_is_for_the_user_to_give(self, checkpoint):
        arguments = ["generate", PROMPT, "--model", str(checkpoint), "-n", "24", "-t", "0"]
        penalized = run(*arguments, "--repetition-penalty", "5").stdout
        assert penalized == PROMPT + continuation(checkpoint, 24, repetition_penalty=5.0) + "\n"
        assert penalized != run(*arguments).stdout

    def test_sampling_follows_the_seed(self, checkpoint):
        arguments = ["generate", PROMPT, "--model", str(checkpoint), "-n", "24", "--temperature", "1.5"]
        first, again, other = (run(*arguments, "--seed", seed).stdout for seed in ("1", "1", "2"))
        assert first == again
        assert first != other

    def test_top_p_alone_samples(self, checkpoint):
        arguments = ["generate", PROMPT, "--model", str(checkpoint), "-n", "24", "--top-p", "0.99"]
        assert run(*arguments, "--seed", "1").stdout != run(*arguments, "--seed", "2").stdout

    def test_dtype_is_the_models(self, checkpoint):
        result = run("generate", PROMPT, "--model", str(checkpoint), "-n", "2", "--dtype", "bfloat16")
        assert result.exit_code == 0, result.output
        assert "bfloat16 on cpu" in result.stderr

    def test_a_text_is_read_once_and_continued_many_times(self, checkpoint, tmp_path):
        """From its state, and from the state after a second text; only the new text is printed."""
        options = ["--model", str(checkpoint), "-t", "0", "-n", "8"]
        first, second = str(tmp_path / "first"), str(tmp_path / "second")
        whole = run("generate", PROMPT + " # and", *options, "--no-echo").stdout
        result = run("generate", PROMPT, "--model", str(checkpoint), "-n", "0", "--save-state", first)
        assert (result.exit_code, result.stdout) == (0, "")
        assert f"{len(PROMPT)} tokens read in" in result.stderr
        assert run("generate", " # and", *options, "--state", first).stdout == " # and" + whole
        result = run("generate", " #", *options, "--no-echo", "--state", first, "--save-state", second)
        assert result.stdout == run("generate", PROMPT + " #", *options, "--no-echo").stdout
        assert run("generate", " and", *options, "--no-echo", "--state", second).stdout == whole
        result = run("generate", PROMPT, *options, "--save-state", second)
        assert result.stdout == run("generate", PROMPT, *options).stdout
        assert run("generate", " # and", *options, "--no-echo", "--state", second).stdout == whole

    def test_a_state_that_does_not_fit_exits_with_1(self, checkpoint, tmp_path):
        result = run("generate", "x", "--model", str(checkpoint), "--state", str(tmp_path / "none"))
        assert result.exit_code == 1
        assert "no such file" in result.stderr
        run("generate", PROMPT, "--model", str(checkpoint), "-n", "0", "--save-state", str(tmp_path / "state"))
        result = run("generate", "x", "--state", str(tmp_path / "state"))
        assert result.exit_code == 1
        assert "the state of another model" in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([""], "the prompt is empty"),
            (["x", "--top-p", "0"], "--temperature 0"),
            (["x", "--temperature", "0", "--top-p", "0.9"], "give one of them"),
            (["x", "--temperature", "-1"], "--temperature"),
            (["x", "--max-new-tokens", "0"], "--max-new-tokens"),
            (["x", "--dtype", "float8"], "bfloat16"),
            (["x", "--backend", "cuda"], "triton"),
            (["x", "--device", "gpu"], "is no PyTorch device"),
            ([], "PROMPT"),
        ],
    )
    def test_a_wrong_call_exits_with_2(self, arguments, message):
        result = run("generate", *arguments)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert message in result.stderr

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("./nowhere", "no such directory: nowhere"),
            ("/nowhere/at/all", "no such directory: /nowhere/at/all"),
            (__file__, "give the directory that holds it"),
        ],
    )
    def test_a_path_that_is_no_model_exits_with_1(self, name, message):
        result = run("generate", "x", "--model", name)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert message in result.stderr

    def test_a_directory_without_a_model_exits_with_1(self, tmp_path):
        result = run("generate", "x", "--model", str(tmp_path))
        assert result.exit_code == 1
        assert f"no config.json in {tmp_path}" in result.stderr

    def test_a_truncated_checkpoint_exits_with_1(self, checkpoint, tmp_path):
        broken = shutil.copytree(checkpoint, tmp_path / "broken")
        weights = broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        result = run("generate", "x", "--model", str(broken))
        assert result.exit_code == 1
        assert str(broken) in result.stderr
        assert "check that the directory is complete" in result.stderr

    def test_a_hub_id_that_cannot_be_fetched_exits_with_1(self):
        result = run("generate", "x", "--model", "nobody/no-such-model")
        assert result.exit_code == 1
        assert "nobody/no-such-model" in result.stderr
        assert "check the id and the connection" in result.stderr
        assert "Retrying" not in result.stderr

    @pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
    def test_a_missing_gpu_exits_with_1(self, checkpoint):
        result = run("generate", "x", "--model", str(checkpoint), "--device", "cuda")
        assert result.exit_code == 1
        assert "device cuda cannot be used here" in result.stderr

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_a_backend_that_cannot_serve_exits_with_1(self, checkpoint):
        result = run("generate", "x", "--model", str(checkpoint), "--backend", "triton", "--no-echo")
        assert result.exit_code == 1
        assert result.stdout.strip() == ""
        assert "triton" in result.stderr


@pytest.fixture(scope="module")
def shipped(repository: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from mamba2_hf.cli import main; main()", "generate", PROMPT, "-n", "48", "-t", "0"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=repository / "tests",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        check=False,
    )


class TestShippedModel:
    """The first README command, as a process of its own."""

    def test_it_continues_the_prompt_without_a_network(self, shipped):
        assert shipped.returncode == 0, shipped.stderr
        assert shipped.stdout.startswith(PROMPT)
        assert len(shipped.stdout) > len(PROMPT) + 48
        assert "\x1b" not in shipped.stdout

    def test_it_says_nothing_but_the_status(self, shipped):
        assert len(shipped.stderr.splitlines()) == 1, shipped.stderr
        assert " tokens in " in shipped.stderr


class TestShippedByName:
    def test_a_short_name_finds_it(self):
        result = run("generate", PROMPT, "--model", "hybrid", "-n", "24", "-t", "0")
        assert result.exit_code == 0, result.output
        assert result.stdout == PROMPT + continuation(shipped_model_path("hybrid"), 24) + "\n"

    def test_a_directory_of_that_name_comes_first(self, checkpoint, tmp_path, monkeypatch):
        shutil.copytree(checkpoint, tmp_path / "hybrid")
        monkeypatch.chdir(tmp_path)
        result = run("generate", PROMPT, "--model", "hybrid", "-n", "4", "-t", "0")
        assert result.stdout == PROMPT + continuation(checkpoint, 4) + "\n"


class TestLook:
    def test_it_writes_one_page_and_prints_its_name(self, checkpoint, tmp_path):
        page = tmp_path / "page.html"
        result = run("look", str(checkpoint), PROMPT, "--out", str(page))
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{page}\n"
        assert f"{len(PROMPT)} tokens, 8 heads, " in result.stderr
        assert f'"tokens":{json.dumps(list(PROMPT), separators=(",", ":"))}' in page.read_text(encoding="utf-8")

    def test_text_comes_from_stdin_and_is_cut(self, checkpoint, tmp_path):
        result = run(
            *("look", str(checkpoint), "-", "--out", str(tmp_path / "page.html"), "--max-tokens", "8"), stdin=PROMPT
        )
        assert result.exit_code == 0, result.output
        assert f"{len(PROMPT) - 8} tokens left out (--max-tokens)" in result.stderr

    def test_ids_need_no_tokenizer(self, checkpoint, tmp_path):
        bare, page = shutil.copytree(checkpoint, tmp_path / "bare"), tmp_path / "page.html"
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (bare / name).unlink()
        result = run("look", str(bare), "[3, 1, 4]", "--ids", "--out", str(page))
        assert result.exit_code == 0, result.output
        assert '"tokens":["3","1","4"]' in page.read_text(encoding="utf-8")
        assert run("look", str(bare), "text", "--out", str(page)).exit_code == 1

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["x", " "], 2, "the text is empty"),
            (["x", "3 x", "--ids"], 2, "--ids takes numbers"),
            (["hybrid", "3 9999", "--ids"], 1, "the model knows those from 0 to 4095"),
            (["hybrid", "x", "--out", "nowhere/page.html"], 1, "no such directory"),
            (["./nowhere", "x"], 1, "no such directory: nowhere"),
        ],
    )
    def test_a_wrong_call_says_what_to_change(self, arguments, code, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        result = run("look", *arguments)
        assert result.exit_code == code
        assert message in result.stderr
        assert not list(tmp_path.iterdir())


class TestPrinter:
    @given(st.text(min_size=1), st.integers(0, 12))
    @example("naïve “quoted” 漢字 👩‍🔬", 3)
    def test_pieces_join_to_the_text(self, text, prompt_length):
        tokenizer = byte_tokenizer()
        prompt, rest = "x" + text[:prompt_length], text[prompt_length:]
        pieces: list[str] = []
        printer = _Printer(tokenizer, pieces.append)
        printer.put(torch.tensor([tokenizer(prompt).input_ids]))
        for token in tokenizer(rest).input_ids if rest else []:
            printer.put(torch.tensor([token]))
        printer.end()
        assert "".join(pieces) == printer.text == rest
        assert all("\N{REPLACEMENT CHARACTER}" not in piece or "\N{REPLACEMENT CHARACTER}" in text for piece in pieces)

    def test_text_is_printed_as_soon_as_it_is_final(self):
        tokenizer = byte_tokenizer()
        pieces: list[str] = []
        printer = _Printer(tokenizer, pieces.append)
        printer.put(torch.tensor([tokenizer("x").input_ids]))
        for token in tokenizer("a é").input_ids:
            printer.put(torch.tensor([token]))
        assert pieces == ["a", " ", "é"]


class TestEnv:
    def test_json_names_every_op_with_its_backend_and_reason(self):
        result = run("env", "--json")
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert report["versions"]["mamba2-hf"] == metadata.version("mamba2-hf")
        assert report["versions"]["torch"] == torch.__version__
        assert {status["name"] for status in report["backends"]} == {"torch", "triton"}
        assert all(status["reason"] for status in report["backends"])
        served = {op["op"]: op for op in report["ops"] if op["device"] == "cpu"}
        assert {"ssd_chunk_scan", "ssd_state_update", "causal_conv1d", "gated_rms_norm"} <= set(served)
        assert all(op["backend"] == "torch" and op["reason"] for op in served.values())

    def test_the_environment_variable_is_reported_with_its_effect(self):
        report = json.loads(run("env", "--json", env={"MAMBA2_HF_BACKEND": "torch"}).stdout)
        assert report["environment"] == {"MAMBA2_HF_BACKEND": "torch"}
        assert all("MAMBA2_HF_BACKEND" in op["reason"] for op in report["ops"])

    def test_a_backend_that_cannot_serve_is_reported_and_not_raised(self):
        result = run("env", "--json", env={"MAMBA2_HF_BACKEND": "tritn"})
        assert result.exit_code == 0
        assert all(op["backend"] is None and "tritn" in op["reason"] for op in json.loads(result.stdout)["ops"])

    def test_a_gpu_is_served_by_triton_within_limits(self, monkeypatch):
        from mamba2_hf.ops import dispatch

        answers = {"is_available": True, "device_count": 1, "current_device": 0}
        answers |= {"get_device_name": "Chip", "get_device_capability": (9, 0)}
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        dispatch._usable_gpu.cache_clear()
        report = json.loads(run("env", "--json").stdout)
        dispatch._usable_gpu.cache_clear()
        assert {"name": "triton", "available": True, "reason": "GPU Chip"} in report["backends"]
        served = {op["op"]: op for op in report["ops"] if op["device"] == "cuda"}
        assert set(served) == set(dispatch.OPS)
        assert all(op["backend"] == "triton" for op in served.values())
        assert "head_dim and state size up to 256" in served["mamba2_inner"]["reason"]

    def test_the_table_shows_the_same(self):
        result = run("env")
        assert result.exit_code == 0
        for text in ("transformers", "ssd_chunk_scan", "PyTorch serves every call", "MAMBA2_HF_BACKEND"):
            assert text in result.stdout


class TestRoot:
    def test_version(self):
        assert run("--version").stdout == metadata.version("mamba2-hf") + "\n"

    def test_help_shows_commands_and_examples(self):
        assert {"generate", "env"} <= set(run("--help").stdout.split())
        help_text = run("generate", "--help").stdout
        assert 'mamba2-hf generate "def read_json(path):"' in help_text
        for option in ("--model", "--temperature", "--top-p", "--seed", "--backend", "--no-stream"):
            assert option in help_text

    def test_an_unknown_command_exits_with_2(self):
        assert run("generat").exit_code == 2
