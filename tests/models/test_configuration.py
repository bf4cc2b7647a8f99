"""The configuration: nonsense is refused by name, files are read as they are, and stock transformers agrees."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config as StockConfig

from mamba2_hf import Mamba2Config, Mamba2ForSequenceClassification
from mamba2_hf.errors import ConfigurationError, Mamba2HFError

Make = Callable[..., Mamba2Config]
NAN, INF = math.nan, math.inf

NONSENSE: list[tuple[str, Any, str]] = [
    *(
        (name, value, "at least 1")
        for name in ("num_heads", "head_dim", "vocab_size", "hidden_size")
        for value in (0, -8)
    ),
    *((name, value, "at least 1") for name in ("state_size", "n_groups", "chunk_size") for value in (0, -1)),
    *(("num_hidden_layers", value, "at least 1") for value in (0, -1)),
    ("n_groups", 3, "divide num_heads=8"),
    ("conv_kernel", 1, "2 or more"),
    ("conv_kernel", 0, "2 or more"),
    *(("expand", value, "above 0") for value in (0, -2, NAN, INF)),
    *((name, v, "above 0") for name in ("layer_norm_epsilon", "initializer_range") for v in (0.0, -1e-5, NAN, INF)),
    ("hidden_act", "relu", "silu"),
    *(("time_step_min", value, "above 0") for value in (0.0, -1.0, NAN, INF)),
    *(("time_step_max", value, "time_step_min=0.001") for value in (1e-4, -1.0, NAN, INF)),
    *(("time_step_floor", value, "above 0") for value in (0.0, -1.0, NAN, INF)),
    *(
        ("time_step_limit", value, "0 <= low < high")
        for value in ((1.0, 0.1), (0.5, 0.5), (-1.0, 1.0), (NAN, 1.0), (0.0, NAN), (0.1,), (0.0, 1.0, 2.0), ())
    ),
    ("time_step_rank", 0, "at least 1"),
    ("time_step_rank", "automatic", "'auto'"),
    ("pad_token_id", -5, "token id"),
    ("bos_token_id", -2, "token id"),
    ("eos_token_id", [1, -3], "token id"),
    ("eos_token_id", [], "or None"),
    ("num_labels", 0, "at least 1"),
    ("num_labels", -1, "at least 1"),
    ("num_labels", "two", "at least 1"),
    ("problem_type", "clustering", "single_label_classification"),
    ("dtype", "float31", "bfloat16"),
]
WRONG_TYPES: list[tuple[str, Any, str]] = [
    ("hidden_size", "32", "int"),
    ("hidden_size", 32.0, "int"),
    ("hidden_size", None, "int"),
    ("num_heads", True, "int"),
    ("layer_norm_epsilon", "1e-5", "float"),
    ("expand", "2", "float"),
    ("use_bias", "no", "bool"),
    ("use_conv_bias", 1, "bool"),
    ("tie_word_embeddings", "yes", "bool"),
    ("residual_in_fp32", None, "bool"),
    ("hidden_act", None, "str"),
    ("time_step_limit", 3.0, "list"),
    ("time_step_limit", None, "list"),
    ("time_step_limit", ("a", "b"), "float"),
    ("time_step_limit", (0.0, "Infinity"), "float"),
    ("pad_token_id", "<pad>", "int | None"),
    ("eos_token_id", "</s>", r"list\[int\]"),
]


@pytest.mark.parametrize(("name", "value", "remedy"), NONSENSE + WRONG_TYPES)
def test_nonsense_is_refused_by_field_value_and_remedy(tiny_config: Make, name: str, value: Any, remedy: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name} is .*{remedy}") as caught:
        tiny_config(**{name: value})
    assert repr(value) in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, Mamba2HFError)


def test_sizes_that_do_not_fit_name_the_ones_that_would(tiny_config: Make) -> None:
    with pytest.raises(ConfigurationError, match=r"num_heads is 4: .* = 32 .* = 64; set num_heads=8 or head_dim=16"):
        tiny_config(num_heads=4)
    with pytest.raises(ConfigurationError, match="num_heads is 128"):  # the format's default, when it is left out
        Mamba2Config(hidden_size=32, head_dim=8)


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("num_head", "'num_heads'"),
        ("hiden_size", "'hidden_size'"),
        ("n_group", "'n_groups'"),
        ("d_model", "fields are"),
    ],
)
def test_a_misspelt_field_suggests_the_nearest(tiny_config: Make, key: str, remedy: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{key}=8 is no field of Mamba2Config: .*{remedy}"):
        tiny_config(**{key: 8})


def test_later_assignments_are_checked(tiny_config: Make, tmp_path: Path) -> None:
    config = tiny_config()
    with pytest.raises(ConfigurationError, match="hidden_size is '32': expected int"):
        config.hidden_size = "32"
    config.n_groups = 3  # needs the other fields to be judged, so it is judged on save and by a model
    with pytest.raises(ConfigurationError, match="n_groups is 3"):
        config.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="n_groups is 3"):
        Mamba2ForSequenceClassification(config)
    config.n_groups = 2
    config.num_labels = -1
    with pytest.raises(ConfigurationError, match="num_labels"):
        config.validate()


def test_defaults_are_the_formats_but_for_the_initialization() -> None:
    ours, stock = Mamba2Config().to_dict(), StockConfig().to_dict()
    different = {name for name in ours.keys() | stock.keys() if ours.get(name) != stock.get(name)}
    assert different == {"initializer_range", "rescale_prenorm_residual"}
    assert (ours["initializer_range"], ours["rescale_prenorm_residual"]) == (0.02, True)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"n_groups": 4, "use_bias": False, "use_conv_bias": False, "tie_word_embeddings": True, "hidden_act": "swish"},
    {"time_step_limit": (0.01, 0.5), "layer_norm_epsilon": 1e-6, "residual_in_fp32": False, "use_cache": False},
    {"time_step_limit": [0, 1], "layer_norm_epsilon": 1, "expand": 2.0, "time_step_max": 1},  # whole numbers
    {"eos_token_id": [2, 3], "pad_token_id": None, "time_step_rank": 7, "chunk_size": 17},
    {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}, "dtype": "bfloat16"},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_files_are_stocks_both_ways(tiny_config: Make, tmp_path: Path, changes: dict[str, Any]) -> None:
    ours = tiny_config(**changes)
    ours.save_pretrained(tmp_path / "ours")
    stock = StockConfig.from_pretrained(tmp_path / "ours")
    assert json.loads(stock.to_json_string(use_diff=False)) == json.loads(ours.to_json_string(use_diff=False))
    stock.save_pretrained(tmp_path / "stock")
    assert (tmp_path / "stock/config.json").read_text() == (tmp_path / "ours/config.json").read_text()
    assert Mamba2Config.from_pretrained(tmp_path / "stock").to_dict() == ours.to_dict()


@pytest.mark.parametrize("changes", VARIANTS)
def test_equal_after_save_and_load(tiny_config: Make, tmp_path: Path, changes: dict[str, Any]) -> None:
    tiny_config(**changes).save_pretrained(tmp_path)
    once = Mamba2Config.from_pretrained(tmp_path)
    once.save_pretrained(tmp_path)
    assert once == Mamba2Config.from_pretrained(tmp_path)
    assert once.to_dict() == tiny_config(**changes).to_dict()
    assert once.to_dict() == Mamba2Config.from_json_file(tmp_path / "config.json").to_dict()


def test_infinity_is_saved_as_a_number_that_every_reader_takes(tiny_config: Make, tmp_path: Path) -> None:
    """JSON has no infinity, transformers 4 no object in place of one, and float16 no number above 65504."""
    tiny_config().save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["time_step_limit"] == [0.0, 65504.0]
    assert torch.tensor(65504.0).half().clamp(*StockConfig.from_pretrained(tmp_path).time_step_limit) == 65504.0
    for spelled in ("65504.0", '{"__float__": "Infinity"}', "Infinity", "1e300"):
        (tmp_path / "config.json").write_text(text.replace("65504.0", spelled))
        assert Mamba2Config.from_pretrained(tmp_path).time_step_limit == (0.0, INF)


CODESTRAL = {
    **{"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "torch_dtype": "bfloat16"},
    **{"hidden_size": 4096, "num_heads": 128, "head_dim": 64, "num_hidden_layers": 64, "vocab_size": 32768},
    **{"time_step_limit": [0.0, INF], "transformers_version": "4.43.0", "pad_token_id": 0},
    **{"norm_before_gate": True, "rms_norm": True, "intermediate_size": 8192, "time_step_scale": 1.0},
}
INERT = ("norm_before_gate", "rms_norm", "intermediate_size", "time_step_scale")


def test_unknown_keys_of_a_file_are_kept_without_effect(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CODESTRAL))
    config = Mamba2Config.from_pretrained(tmp_path)
    assert config.dtype == torch.bfloat16
    assert {name: getattr(config, name) for name in INERT} == {name: CODESTRAL[name] for name in INERT}
    config.save_pretrained(tmp_path / "again")
    assert Mamba2Config.from_pretrained(tmp_path / "again") == Mamba2Config.from_dict(config.to_dict())
    saved = json.loads((tmp_path / "again/config.json").read_text())
    assert {name: saved[name] for name in INERT} == {name: CODESTRAL[name] for name in INERT}
    again = StockConfig.from_pretrained(tmp_path / "again").to_json_string(use_diff=False)
    assert json.loads(again) == json.loads(config.to_json_string(use_diff=False))
    with pytest.raises(ConfigurationError, match="norm_before_gate=True is no field"):
        Mamba2Config(norm_before_gate=True)


def test_keys_that_the_class_defines_itself_are_not_overridden(tiny_config: Make) -> None:
    config = Mamba2Config.from_dict({**tiny_config().to_dict(), "layer_types": ["full_attention"], "validate": 3})
    assert config.layer_types == ["linear_attention"] * 2
    config.validate()


def test_a_file_with_nonsense_is_refused(tiny_config: Make, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**tiny_config().to_dict(), "time_step_limit": [1.0, 0.1]}))
    with pytest.raises(ConfigurationError, match=r"time_step_limit is \(1.0, 0.1\)"):
        AutoConfig.from_pretrained(tmp_path)


def test_auto_config_builds_ours(tiny_config: Make, tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is Mamba2Config
    assert type(AutoConfig.for_model("mamba2")) is Mamba2Config
    changed, unused = AutoConfig.from_pretrained(tmp_path, chunk_size=32, color="red", return_unused_kwargs=True)
    assert (changed.chunk_size, unused) == (32, {"color": "red"})


def test_labels(tiny_config: Make, tmp_path: Path) -> None:
    assert tiny_config().num_labels == 2
    config = tiny_config(num_labels=3)
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    named = tiny_config(id2label={0: "spam", 1: "ham"}, label2id={"spam": 0, "ham": 1})
    named.save_pretrained(tmp_path)
    again = Mamba2Config.from_pretrained(tmp_path)
    assert (again.num_labels, again.id2label, again.label2id) == (2, {0: "spam", 1: "ham"}, {"spam": 0, "ham": 1})
    assert Mamba2Config.from_pretrained(tmp_path, num_labels=5).num_labels == 5


def test_copies(tiny_config: Make) -> None:
    config = tiny_config(chunk_size=32)
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert Mamba2Config(**config.to_dict()).to_dict() == config.to_dict()


def test_layer_types_follow_the_vocabulary(tiny_config: Make) -> None:
    assert tiny_config(num_hidden_layers=3).layer_types == ["linear_attention"] * 3


STATE_SPACES: dict[str, Any] = {
    **{"d_model": 768, "d_intermediate": 0, "n_layer": 24, "vocab_size": 50277, "rms_norm": True},
    **{"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16, "tie_embeddings": True},
    **{"ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "attn_cfg": {}},
}


def test_reads_mamba_ssm() -> None:
    """The published 130m: everything left out is mamba_ssm's default and not this format's."""
    config = Mamba2Config.from_dict(STATE_SPACES)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (768, 24, 50288)
    assert (config.num_heads, config.head_dim, config.n_groups, config.state_size) == (24, 64, 1, 128)
    assert (config.conv_kernel, config.expand, config.chunk_size) == (4, 2, 256)
    assert config.tie_word_embeddings
    assert (config.use_bias, config.use_conv_bias, config.residual_in_fp32) == (False, True, True)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 0)


def test_reads_every_option_that_the_format_can_express() -> None:
    ssm = {
        **{"layer": "Mamba2", "d_state": 64, "d_conv": 3, "expand": 4, "headdim": 32, "ngroups": 8, "chunk_size": 64},
        **{"bias": True, "conv_bias": False, "dt_limit": [0.001, 0.1]},
    }
    config = Mamba2Config.from_dict({**STATE_SPACES, "ssm_cfg": ssm, "tie_embeddings": False, "rms_norm": True})
    assert (config.state_size, config.conv_kernel, config.expand, config.head_dim) == (64, 3, 4, 32)
    assert (config.num_heads, config.n_groups, config.chunk_size) == (96, 8, 64)
    assert (config.use_bias, config.use_conv_bias, config.time_step_limit) == (True, False, (0.001, 0.1))
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"ssm_cfg": {}}, "Mamba1.*MambaForCausalLM"),
        ({"ssm_cfg": {"layer": "Mamba1"}}, "Mamba1"),
        ({"attn_layer_idx": [9, 18]}, r"attn_layer_idx is \[9, 18\].*hybrid"),
        ({"d_intermediate": 512}, "d_intermediate 512.*hybrid"),
        ({"rms_norm": False}, "rms_norm is False"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate"),
        ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "rmsnorm"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 512}}, "d_ssm"),
        ({"ssm_cfg": {"layer": "Mamba2", "activation": "relu"}}, "relu"),
        ({"ssm_cfg": {"layer": "Mamba2", "sparse": True}}, "ssm_cfg.sparse"),
    ],
)
def test_refuses_what_the_format_cannot_express(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        Mamba2Config.from_dict({**STATE_SPACES, **changes})
