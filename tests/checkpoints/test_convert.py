"""Every published layout becomes a checkpoint that loads anywhere, and goes back to what it was."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import IDS, configurations, contents, logits, same, stored
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers import Mamba2ForCausalLM as Stock

from mamba2_hf import Mamba2Config, Mamba2ForCausalLM
from mamba2_hf.checkpoints import convert, open_checkpoint, verify
from mamba2_hf.checkpoints.checkpoint import SIDECAR
from mamba2_hf.errors import CheckpointError, ConfigurationError

Source = Callable[[Path], Any]
SOURCES: dict[str, tuple[str, Source]] = {
    "state_spaces": ("mamba_ssm", layouts.state_spaces),
    "codestral": ("codestral", layouts.codestral),
    "stock": ("mamba2", layouts.stock),
    "stock_tied": ("mamba2", lambda folder: layouts.stock(folder, tie_word_embeddings=True)),
    "stock_shards": ("mamba2", lambda folder: layouts.stock(folder, shards=True)),
    "stock_biases": ("mamba2", lambda folder: layouts.stock(folder, use_bias=True, use_conv_bias=False)),
    "legacy": ("mamba2", layouts.legacy),
}


@pytest.fixture(params=SOURCES, name="source")
def _source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, Any]:
    name, write = SOURCES[request.param]
    return tmp_path / "source", name, write(tmp_path / "source")


class TestToMamba2:
    def test_loads_here_and_in_stock_with_the_same_logits(self, source: tuple[Path, str, Any], tmp_path: Path) -> None:
        folder, name, model = source
        result = convert(folder, tmp_path / "out")
        assert result.source == name
        assert result.parameters == model.num_parameters()
        ours, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert type(ours) is Mamba2ForCausalLM
        assert not any(info.values())
        assert torch.equal(logits(ours, IDS), logits(model, IDS))
        stock, info = Stock.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
        assert not any(info.values())
        torch.testing.assert_close(logits(stock, IDS), logits(model.float(), IDS), rtol=0, atol=2e-5)

    def test_tensors_are_those_of_save_pretrained_to_the_bit(
        self, source: tuple[Path, str, Any], tmp_path: Path
    ) -> None:
        folder, _, model = source
        convert(folder, tmp_path / "out")
        model.save_pretrained(tmp_path / "saved")
        assert same(stored(tmp_path / "out"), stored(tmp_path / "saved"))

    def test_the_source_is_left_as_it_was(self, source: tuple[Path, str, Any], tmp_path: Path) -> None:
        before = contents(source[0])
        convert(source[0], tmp_path / "out")
        assert contents(source[0]) == before

    def test_verify_finds_no_difference(self, source: tuple[Path, str, Any], tmp_path: Path) -> None:
        convert(source[0], tmp_path / "out")
        result = verify(source[0], tmp_path / "out", tokens=24)
        assert (result.tensors, result.logits, result.decoded) == (0, 0, 0)
        assert result.same
        assert 0 < result.own < 1e-4

    def test_a_folder_that_holds_two_formats_is_read_as_transformers_reads_it(self, tmp_path: Path) -> None:
        layouts.codestral(tmp_path / "both")
        layouts.stock(tmp_path / "both")
        assert convert(tmp_path / "both", tmp_path / "first").source == "mamba2"
        assert convert(tmp_path / "both", tmp_path / "other", source_format="codestral").source == "codestral"
        for file in tmp_path.glob("both/model.safetensors"):
            file.unlink()
        assert convert(tmp_path / "both", tmp_path / "third").source == "codestral"


class TestToMambaSSM:
    def test_is_what_state_spaces_publishes(self, tmp_path: Path) -> None:
        layouts.state_spaces(tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "ours")
        convert(tmp_path / "ours", tmp_path / "back", to="mamba_ssm")
        assert same(stored(tmp_path / "back"), stored(tmp_path / "source"))
        assert json.loads((tmp_path / "back/config.json").read_text()) == layouts.STATE_SPACES

    def test_fields_are_those_of_its_constructor(self, tmp_path: Path) -> None:
        """``MambaConfig`` and ``Mamba2`` of mamba_ssm take these arguments and no other."""
        layouts.stock(tmp_path / "source", time_step_limit=(0.01, 0.2), chunk_size=64, use_bias=True, conv_kernel=3)
        convert(tmp_path / "source", tmp_path / "out", to="mamba_ssm")
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert set(config) == set(layouts.STATE_SPACES)
        arguments = {
            *("d_state", "d_conv", "conv_init", "expand", "headdim", "d_ssm", "ngroups", "A_init_range", "D_has_hdim"),
            *("rmsnorm", "norm_before_gate", "dt_min", "dt_max", "dt_init_floor", "dt_limit", "bias", "conv_bias"),
            *("chunk_size", "use_mem_eff_path", "layer"),
        }
        assert set(config["ssm_cfg"]) <= arguments
        assert config["ssm_cfg"]["dt_limit"] == [0.01, 0.2]
        assert set(stored(tmp_path / "out")) == {
            name.replace("embeddings", "embedding") for name in layouts.make_model(use_bias=True).state_dict()
        }

    def test_a_tied_head_is_there_and_stored_once(self, tmp_path: Path) -> None:
        layouts.stock(tmp_path / "source", tie_word_embeddings=True)
        convert(tmp_path / "source", tmp_path / "out", to="mamba_ssm")
        tensors = torch.load(tmp_path / "out/pytorch_model.bin", weights_only=True)
        assert tensors["lm_head.weight"].data_ptr() == tensors["backbone.embedding.weight"].data_ptr()

    @pytest.mark.parametrize(
        ("changes", "match"),
        [({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"), ({"expand": 1.5, "num_heads": 6}, "expand")],
    )
    def test_what_it_cannot_say_is_refused(self, tmp_path: Path, changes: dict[str, Any], match: str) -> None:
        layouts.stock(tmp_path / "source", **changes)
        with pytest.raises(ConfigurationError, match=match):
            convert(tmp_path / "source", tmp_path / "out", to="mamba_ssm")
        assert not (tmp_path / "out").exists()


class TestThereAndBack:
    @given(
        configurations(),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        st.sampled_from([1, 500, "5GB"]),
    )
    @settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
    def test_is_the_identity(
        self, tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any], dtype: torch.dtype, size: int | str
    ) -> None:
        tmp_path = tmp_path_factory.mktemp("identity")
        model = Mamba2ForCausalLM(Mamba2Config(**fields, dtype=dtype)).to(dtype)
        model.save_pretrained(tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "first", max_shard_size=size)
        convert(tmp_path / "first", tmp_path / "other", to="mamba_ssm")
        convert(tmp_path / "other", tmp_path / "back", max_shard_size=size)
        assert contents(tmp_path / "back") == contents(tmp_path / "first")
        assert same(stored(tmp_path / "back"), stored(tmp_path / "source"))
        was, now = (Mamba2Config.from_pretrained(tmp_path / name).to_dict() for name in ("source", "back"))
        assert now == was

    def test_without_the_sidecar_the_model_is_still_the_same(self, tmp_path: Path) -> None:
        layouts.stock(tmp_path / "source", tie_word_embeddings=True)
        convert(tmp_path / "source", tmp_path / "other", to="mamba_ssm")
        (tmp_path / "other" / SIDECAR).unlink()
        convert(tmp_path / "other", tmp_path / "back")
        assert verify(tmp_path / "source", tmp_path / "back", tokens=8).same

    def test_a_sidecar_that_says_otherwise_is_refused(self, tmp_path: Path) -> None:
        layouts.stock(tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "other", to="mamba_ssm")
        config = json.loads((tmp_path / "other/config.json").read_text())
        layouts.write_json(tmp_path / "other/config.json", {**config, "residual_in_fp32": False})
        with pytest.raises(CheckpointError, match=f"{SIDECAR}: says otherwise than config.json"):
            convert(tmp_path / "other", tmp_path / "back")


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_all_but_the_fragile_three_are_cast(self, tmp_path: Path, dtype: torch.dtype) -> None:
        model = layouts.stock(tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "out", dtype=dtype)
        model.to(dtype).save_pretrained(tmp_path / "saved")
        assert same(stored(tmp_path / "out"), stored(tmp_path / "saved"))
        assert open_checkpoint(tmp_path / "out").config.dtype == dtype

    def test_a_value_that_does_not_fit_is_named(self, tmp_path: Path) -> None:
        tensors = layouts.stock(tmp_path / "source").state_dict()
        tensors["backbone.norm_f.weight"][3] = 1e6
        layouts.write_safetensors(tmp_path / "source/model.safetensors", tensors)
        with pytest.raises(CheckpointError, match=r"backbone\.norm_f\.weight: a value is too large for float16"):
            convert(tmp_path / "source", tmp_path / "out", dtype=torch.float16)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]

    def test_verify_says_how_far_a_cast_is_off(self, tmp_path: Path) -> None:
        layouts.stock(tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "out", dtype=torch.bfloat16)
        result = verify(tmp_path / "source", tmp_path / "out", tokens=8)
        assert not result.same
        assert 1e-4 < result.largest < 0.5
        assert result.tensors > 0
        assert result.tensor
        assert verify(tmp_path / "source", tmp_path / "out", tokens=8, tolerance=0.5).same


class TestCompanions:
    def test_tokenizer_template_generation_config_and_license_travel(
        self, source: tuple[Path, str, Any], tmp_path: Path
    ) -> None:
        tokenizer = layouts.add_companions(source[0])
        (source[0] / "README.md").write_text("# The source's card")
        result = convert(source[0], tmp_path / "out")
        assert "README.md" in result.left
        loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert loaded("Hello").input_ids == tokenizer("Hello").input_ids
        assert loaded.chat_template == tokenizer.chat_template
        assert GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.5
        for name in ("LICENSE", "tokenizer.json", "generation_config.json"):
            assert (tmp_path / "out" / name).read_bytes() == (source[0] / name).read_bytes()
        convert(tmp_path / "out", tmp_path / "other", to="mamba_ssm")
        assert set(result.carried) <= set(contents(tmp_path / "other"))

    def test_a_tokenizer_can_be_taken_from_elsewhere(self, tmp_path: Path) -> None:
        layouts.state_spaces(tmp_path / "source")
        result = convert(tmp_path / "source", tmp_path / "without")
        assert any("no tokenizer" in remark for remark in result.remarks)
        (tmp_path / "tokenizer").mkdir()
        layouts.add_companions(tmp_path / "tokenizer")
        result = convert(tmp_path / "source", tmp_path / "with", tokenizer=tmp_path / "tokenizer")
        assert AutoTokenizer.from_pretrained(tmp_path / "with").eos_token == "</s>"
        assert "LICENSE" not in result.carried
        with pytest.raises(CheckpointError, match="holds no tokenizer"):
            convert(tmp_path / "source", tmp_path / "again", tokenizer=tmp_path / "source")

    def test_a_link_out_of_the_folder_is_not_followed(self, tmp_path: Path) -> None:
        layouts.stock(tmp_path / "source")
        (tmp_path / "secret").write_text("{}")
        (tmp_path / "source/tokenizer.json").symlink_to(tmp_path / "secret")
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: is a link out of its folder"):
            convert(tmp_path / "source", tmp_path / "out")

    def test_the_links_of_the_hub_cache_are(self, tmp_path: Path) -> None:
        snapshot = tmp_path / "models--a--b/snapshots/0123"
        layouts.stock(snapshot)
        layouts.add_companions(snapshot)
        blobs = tmp_path / "models--a--b/blobs"
        blobs.mkdir()
        for number, path in enumerate(sorted(snapshot.iterdir())):
            path.rename(blobs / str(number))
            path.symlink_to(blobs / str(number))
        convert(snapshot, tmp_path / "out")
        assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "</s>"


class TestConfig:
    def test_inert_keys_stay_and_stay_inert(self, tmp_path: Path) -> None:
        layouts.legacy(tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "out")
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert (config["norm_before_gate"], config["rms_norm"], config["time_step_scale"]) == (True, True, 1.0)
        assert config["intermediate_size"] == 64

    def test_keys_that_would_mislead_other_readers_go(self, tmp_path: Path) -> None:
        layouts.stock(tmp_path / "source")
        config = json.loads((tmp_path / "source/config.json").read_text())
        wrong = {
            "intermediate_size": 128,
            "mamba_d_head": 4,
            "n_layers": 5,
            "d_inner": 64,
            "auto_map": {"AutoConfig": "theirs.Config"},
        }
        layouts.write_json(tmp_path / "source/config.json", {**config, **wrong})
        convert(tmp_path / "source", tmp_path / "out")
        written = json.loads((tmp_path / "out/config.json").read_text())
        assert wrong.keys() & written.keys() == {"d_inner", "intermediate_size"}
        assert written["d_inner"] == written["intermediate_size"] == 64

    def test_how_to_run_it_is_not_for_a_file_to_say(self, tmp_path: Path) -> None:
        layouts.stock(tmp_path / "source")
        config = json.loads((tmp_path / "source/config.json").read_text())
        running = {"attn_implementation": "somebody/code", "text_config": {"num_hidden_layers": 9}}
        layouts.write_json(tmp_path / "source/config.json", {**config, **running, "return_dict": False})
        convert(tmp_path / "source", tmp_path / "out")
        assert not running.keys() & json.loads((tmp_path / "out/config.json").read_text()).keys()
        assert verify(tmp_path / "source", tmp_path / "out", tokens=4).same

    def test_the_original_stays_readable(self, tmp_path: Path) -> None:
        layouts.state_spaces(tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "out")
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert config["vocab_size"] == 64
        assert config["mamba_ssm_config"]["vocab_size"] == 61  # what the padding hides

    def test_a_change_made_meanwhile_is_not_undone_by_the_original(self, tmp_path: Path) -> None:
        layouts.state_spaces(tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "ours")
        model = Mamba2ForCausalLM.from_pretrained(tmp_path / "ours")
        model.resize_token_embeddings(72)
        model.save_pretrained(tmp_path / "changed")
        convert(tmp_path / "changed", tmp_path / "back", to="mamba_ssm")
        config = json.loads((tmp_path / "back/config.json").read_text())
        assert (config["vocab_size"], config["pad_vocab_size_multiple"]) == (72, 1)
        assert len(stored(tmp_path / "back")["lm_head.weight"]) == 72


@pytest.mark.parametrize(
    ("script", "write", "options"),
    [
        ("from_state_spaces", layouts.state_spaces, ["--tokenizer", ""]),
        ("from_codestral", layouts.codestral, []),
        ("from_transformers", layouts.legacy, []),
        ("from_transformers", layouts.stock, ["--to", "mamba_ssm"]),
    ],
)
def test_scripts(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, write: Source, options: list[str]
) -> None:
    model = write(tmp_path / "source")
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path / "source"), str(tmp_path / "out"), *options])
    runpy.run_path(str(repository / "conversion" / f"{script}.py"), run_name="__main__")
    assert torch.equal(logits(open_checkpoint(tmp_path / "out").model(), IDS), logits(model, IDS))


def test_only_what_can_be_written_is(tmp_path: Path) -> None:
    layouts.stock(tmp_path / "source")
    with pytest.raises(CheckpointError, match="codestral: this format is only read"):
        convert(tmp_path / "source", tmp_path / "out", to="codestral")
    with pytest.raises(CheckpointError, match="'gguf' is no format known here"):
        convert(tmp_path / "source", tmp_path / "out", to="gguf")
    with pytest.raises(CheckpointError, match="max_shard_size is '5 apples'"):
        convert(tmp_path / "source", tmp_path / "out", max_shard_size="5 apples")
    with pytest.raises(CheckpointError, match="remote code is read by transformers"):
        convert(tmp_path / "source", tmp_path / "out", to="mamba_ssm", with_code=True)


def test_progress_ends_at_all_of_it(tmp_path: Path) -> None:
    layouts.stock(tmp_path / "source")
    seen: list[tuple[int, int]] = []
    result = convert(tmp_path / "source", tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (result.nbytes, result.nbytes)
