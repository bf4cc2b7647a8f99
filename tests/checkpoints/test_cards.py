"""Model cards: valid metadata, the checkpoint's own numbers, and what was published."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import layouts
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hybrid_families import CASES, stock
from hybrids import make_hybrid

from mamba2_hf.checkpoints import FORMATS, convert, open_checkpoint
from mamba2_hf.checkpoints.cards import families, family_of, read_evals, render_card
from mamba2_hf.errors import CheckpointError

RESULTS = {
    "results": {"lambada": {"alias": " - lambada", "acc,none": 0.51, "acc_stderr,none": 0.01, "perplexity,none": 9}}
}


def test_numbers_are_the_checkpoints(tmp_path: Path) -> None:
    model = layouts.stock(tmp_path / "tiny", tie_word_embeddings=True)
    card = render_card(open_checkpoint(tmp_path / "tiny"), license="mit")
    assert f"| parameters | {model.num_parameters():,} |" in card.content
    assert "| heads | 8 of 8, 2 groups |" in card.content
    assert "| vocabulary | 64, tied to the head |" in card.content
    assert "AutoTokenizer" not in card.content
    assert "trust_remote_code" not in card.content
    assert "Measured" not in card.content


def test_metadata_is_what_the_hub_reads(tmp_path: Path) -> None:
    layouts.state_spaces(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", with_code=True)
    layouts.add_companions(tmp_path / "out")
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    card = render_card(
        open_checkpoint(tmp_path / "out"),
        name="mine",
        repo_id="me/mine",
        base_model="state-spaces/mamba2-130m",
        evals=read_evals(tmp_path / "results.json"),
    )
    data = yaml.safe_load(str(card).split("---")[1])
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == "state-spaces/mamba2-130m"
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert {"mamba2", "arxiv:2405.21060"} <= set(data["tags"])
    results = data["model-index"][0]["results"]
    assert {(result["dataset"]["name"], *metric.values()) for result in results for metric in result["metrics"]} == {
        ("lambada", "acc", 0.51),
        ("lambada", "perplexity", 9),
    }
    assert "| lambada | acc | 0.51 |" in card.content
    assert 'from_pretrained("me/mine"' in card.content
    assert "mamba2-hf convert state-spaces/mamba2-130m mine --tokenizer EleutherAI/gpt-neox-20b" in card.content
    assert "trust_remote_code" in card.content
    again = ModelCard(str(card))
    assert again.data.eval_results == card.data.eval_results


def bamba(folder: Path) -> None:
    stock(CASES["bamba"]).save_pretrained(folder)


def hybrid(folder: Path) -> None:
    make_hybrid("rotary").save_pretrained(folder)


@pytest.mark.parametrize("write", [layouts.stock, layouts.state_spaces, bamba, hybrid])
def test_its_code_runs(write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "tiny")
    layouts.add_companions(tmp_path / "tiny")
    card = render_card(open_checkpoint(tmp_path / "tiny"))
    code = card.content.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code.replace("Once upon a time", "AB"), {})


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({}, "has no object 'results'"),
        ({"results": {"a": 3}}, "has no object 'results'"),
        ({"results": {"a": {"alias": "a"}}}, "holds no metric"),
        ({"results": {"a": {"acc,none": "high"}}}, r"results\.a\.acc,none is 'high'"),
        ({"results": {"a": {"acc,none": float("nan")}}}, r"results\.a\.acc,none is nan"),
    ],
)
def test_results_of_another_kind_are_refused(tmp_path: Path, content: object, match: str) -> None:
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=match):
        read_evals(tmp_path / "results.json")


class TestFamilies:
    def test_published_models_are_there(self) -> None:
        ids = {model["id"] for family in families().values() for model in family.models}
        sizes = ("130m", "370m", "780m", "1.3b", "2.7b")
        hybrids = {"state-spaces/mamba2attn-2.7b", "ibm-fms/Bamba-9B", "nvidia/Nemotron-H-8B-Base-8K"}
        pure = {*(f"state-spaces/mamba2-{size}" for size in sizes), "mistralai/Mamba-Codestral-7B-v0.1"}
        assert ids == pure | hybrids
        assert family_of("state-spaces/mamba2-1.3b") is families()["state-spaces-mamba2"]
        assert family_of("nobody/nothing") is None

    @pytest.mark.parametrize("name", families())
    def test_parameters_follow_from_the_sizes(self, name: str) -> None:
        family = families()[name]
        for entry in family.models:
            sizes = {key: value for key, value in entry.items() if key not in ("id", "parameters")}
            if family.format == "mamba2":
                sizes["num_heads"] = 2 * entry["hidden_size"] // 64
            layout = FORMATS[family.format]
            fields = layout.read_config({"model_type": family.format, **family.config, **sizes})
            with torch.device("meta"):
                model = layout.family.model(layout.family.config(fields, 1000))
            assert model.num_parameters() == entry["parameters"]

    def test_commands_are_those_of_the_command_line(self) -> None:
        for family in families().values():
            command = family.command.format(id=family.models[0]["id"], name="here")
            assert command.startswith(f"mamba2-hf convert {family.models[0]['id']} here")

    def test_the_script_renders_what_is_converted(
        self, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        layouts.stock(tmp_path / "mamba2-130m")
        script = str(repository / "model_cards/render.py")
        monkeypatch.setattr(sys, "argv", ["render.py", str(tmp_path)])
        runpy.run_path(script, run_name="__main__")
        assert capsys.readouterr().out.split() == [str(tmp_path / "mamba2-130m/README.md")]
        assert "base_model: state-spaces/mamba2-130m" in (tmp_path / "mamba2-130m/README.md").read_text()
        monkeypatch.setattr(sys, "argv", ["render.py", "--list"])
        runpy.run_path(script, run_name="__main__")
        assert len(capsys.readouterr().out.splitlines()) == 9
