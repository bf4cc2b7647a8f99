"""Configurations of hybrids: what is built, and what is refused with a remedy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrids import ARCHITECTURES, ROPE, make_config
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from mamba2_hf import (
    Mamba2HybridConfig,
    Mamba2HybridForCausalLM,
    Mamba2HybridForSequenceClassification,
    Mamba2HybridModel,
    spread_layers,
)
from mamba2_hf.errors import ConfigurationError

MOE = {"layer_blocks": ["ssd moe"], "num_experts": 8}
SHARED = ARCHITECTURES["shared"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_hidden_layers": 3}, r"layer_blocks has 2 layers and num_hidden_layers is 3"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 0, "layer_blocks": []}, "num_hidden_layers is 0: a count of at least 1"),
        ({"add_cross_attention": True}, "add_cross_attention=True: these models attend to no encoder"),
        (
            {"layer_blocks": ["ssd", "attn"]},
            r"layer_blocks\[1\] is 'attn': 'attn' is no kind of block; there are ssd, ",
        ),
        ({"layer_blocks": ["ssd", " "]}, r"layer_blocks\[1\] is ' ': a layer has at least one block"),
        ({"layer_blocks": "ssd"}, "layer_blocks is 'ssd': expected"),
        ({"layer_blocks": [["ssd"], ["mlp"]]}, r"layer_blocks is \[\['ssd'\].*expected"),
        ({"num_attention_heads": None}, r"num_attention_heads is None: layer_blocks\[1\] has attention, which needs"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3: it has to divide num_attention_heads=4"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"attention_scale": -1.0}, "attention_scale is -1.0"),
        ({"attention_conv_kernel": 1}, "attention_conv_kernel is 1"),
        ({"attention_dropout": 1.0}, "attention_dropout is 1.0"),
        ({"layer_blocks": ["ssd", "sliding_attention"]}, "sliding_window is None"),
        ({"layer_blocks": ["ssd", "sliding_attention"], "sliding_window": 0}, "sliding_window is 0"),
        (
            {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.5}},
            "rope_parameters is .* partial_rotary_factor has",
        ),
        (
            {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.0}},
            "partial_rotary_factor has to be a share above 0",
        ),
        ({"rope_parameters": {**ROPE, "partial_rotary_factor": 0.3}}, "rotates an even number of channels"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "its rope_type has to be one of default, "),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "its rope_theta has to be a number above 0"),
        ({"ssm_n_groups": 4}, "ssm_n_groups is 4: it has to divide ssm_num_heads=6"),
        ({"ssm_num_heads": 0}, "ssm_num_heads is 0"),
        ({"ssm_norm": "gate"}, "ssm_norm is 'gate': one of 'gate_first', 'norm_first', 'none'"),
        ({"ssm_norm_group_size": 5}, "ssm_norm_group_size is 5: it has to divide the inner width .* = 48"),
        ({"ssm_multipliers": [1.0]}, r"ssm_multipliers is \[1.0\]: 5 finite factors"),
        ({"mlp_multipliers": [1.0, math.nan]}, "mlp_multipliers is .*: 2 finite factors"),
        ({"embedding_multiplier": 0.0}, "embedding_multiplier is 0.0"),
        ({"key_multiplier": math.inf}, "key_multiplier is inf"),
        ({"logits_scaling": 0.0}, "logits_scaling is 0.0"),
        ({"logits_scaling": 2.0, "lm_head_multiplier": 0.5}, "lm_head_multiplier is 0.5: it multiplies the logits"),
        ({"mlp_type": "silu"}, "mlp_type is 'silu': one of 'swiglu', 'geglu', 'gelu', 'relu2'"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({**MOE, "num_experts": 0}, "num_experts is 0"),
        ({**MOE, "num_experts_per_tok": 9}, "num_experts_per_tok is 9: a count from 1 to num_experts=8"),
        ({**MOE, "moe_router": "dense"}, "moe_router is 'dense': one of 'softmax', 'sigmoid'"),
        ({**MOE, "n_group": 3}, "n_group is 3: it has to divide num_experts=8"),
        ({**MOE, "n_group": 8}, "n_group is 8"),
        ({**MOE, "n_group": 4, "topk_group": 5}, "topk_group is 5"),
        ({**MOE, "n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "topk_group is 1"),
        ({**MOE, "shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size is -1"),
        (
            {"num_shared_blocks": 2},
            "num_shared_blocks is 2: no layer of layer_blocks is 'shared>ssd', so that nobody uses",
        ),
        ({"shared_adapter_rank": 2}, "shared_adapter_rank is 2: .* nobody uses it"),
        (
            {**SHARED, "num_shared_blocks": 4},
            "num_shared_blocks is 4: 3 layers are 'shared>ssd', so that nobody uses 1",
        ),
        ({**SHARED, "shared_adapter_rank": 0}, "shared_attention_adapters is True: it needs a shared_adapter_rank"),
        ({**SHARED, "mlp_type": "relu2"}, "mlp_type is 'relu2': the MLP of 'shared>ssd' layers is gated"),
        ({"time_step_limit": (1.0, 0.5)}, "time_step_limit is"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon is 0.0"),
        ({"ssm_norm_epsilon": 0.0}, "ssm_norm_epsilon is 0.0"),
        ({"hidden_size": "32"}, "hidden_size is '32': expected int"),
        ({"num_atention_heads": 4}, "num_atention_heads=4 is no field .* did you mean 'num_attention_heads'"),
    ],
)
def test_what_no_model_can_be_built_from(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        make_config(**changes)


def test_no_layers_are_refused_where_none_are_named() -> None:
    with pytest.raises(ConfigurationError, match="num_hidden_layers is 0: a count of at least 1"):
        Mamba2HybridConfig(num_hidden_layers=0)


def test_fields_assigned_later_are_judged_when_a_model_is_made() -> None:
    config = make_config()
    config.num_key_value_heads = 3
    with pytest.raises(ConfigurationError, match="num_key_value_heads is 3"):
        Mamba2HybridModel(config)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_file_gives_back_what_was_saved(name: str, tmp_path: Path) -> None:
    config = make_config(name, time_step_limit=(0.0, math.inf))
    config.save_pretrained(tmp_path)
    assert Mamba2HybridConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), Mamba2HybridConfig)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "something_else": 3}))
    assert Mamba2HybridConfig.from_pretrained(tmp_path).something_else == 3


def test_another_model_s_file_is_translated_or_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bamba", "num_hidden_layers": 3}))
    assert Mamba2HybridConfig.from_pretrained(tmp_path).layer_blocks == ["ssd mlp"] * 3
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigurationError, match="model_type is 'llama': the configuration of another model"):
        Mamba2HybridConfig.from_pretrained(tmp_path)


def test_none_is_no_rotary_embedding() -> None:
    config = make_config(rope_parameters=None)
    assert config.rope_parameters is None
    rope = {"rope_theta": 5e5}
    assert make_config(rope_parameters=rope).rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    assert rope == {"rope_theta": 5e5}


def test_layers_in_transformers_words() -> None:
    kinds = ["ssd mlp", "attention mlp", "sliding_attention", "ssd+attention", "shared>ssd", "mlp", "mlp moe"]
    config = make_config("plain", layer_blocks=kinds, sliding_window=3, num_experts=4)
    words = ["linear_attention", "full_attention", "sliding_attention", "hybrid", "hybrid", "mlp", "moe"]
    assert config.layer_types == words
    assert config.mixer_kinds == ["ssd", "attention", "sliding_attention", "ssd", "attention", "attention", "ssd"]


def test_auto_classes_build_ours() -> None:
    config = make_config(num_labels=2)
    for auto, cls in (
        (AutoModel, Mamba2HybridModel),
        (AutoModelForCausalLM, Mamba2HybridForCausalLM),
        (AutoModelForSequenceClassification, Mamba2HybridForSequenceClassification),
    ):
        assert type(auto.from_config(config)) is cls


class TestPresets:
    @pytest.mark.parametrize(("count", "attention"), [(64, 6), (48, None), (10, 1), (7, 3), (4, 4), (5, 0), (24, 2)])
    def test_attention_is_spread(self, count: int, attention: int | None) -> None:
        layers = spread_layers(count, attention, then="mlp")
        places = [index for index, kinds in enumerate(layers) if kinds == "attention mlp"]
        assert len(layers) == count
        assert len(places) == (round(count / 10) if attention is None else attention)
        if 0 < len(places) < count / 3:
            assert places[0] > 0
            assert places[-1] < count - 1
            gaps = torch.tensor([-1, *places, count]).diff()
            assert gaps.max() - gaps.min() <= 1 + count // 20

    def test_more_attention_than_layers(self) -> None:
        with pytest.raises(ConfigurationError, match="attention is 5: a number of layers from 0 to count=4"):
            spread_layers(4, 5)
        with pytest.raises(ConfigurationError, match="'mpl' is no kind of block"):
            spread_layers(4, then="mpl")

    @pytest.mark.parametrize(
        ("name", "parameters"), [("130m", 129e6), ("370m", 370e6), ("780m", 780e6), ("1.3b", 1.34e9), ("2.7b", 2.7e9)]
    )
    def test_sizes(self, name: str, parameters: float) -> None:
        """Attention in place of SSD makes it a few percent smaller."""
        with torch.device("meta"):
            model = Mamba2HybridForCausalLM(Mamba2HybridConfig.preset(name))
        assert 0.94 * parameters < model.num_parameters() < parameters
        attention = model.config.layer_types.count("full_attention")
        assert attention == pytest.approx(model.config.num_hidden_layers / 10, abs=1)

    def test_changes(self) -> None:
        config = Mamba2HybridConfig.preset("130m", mlp=True, attention=4, vocab_size=100, num_hidden_layers=12)
        assert (config.vocab_size, len(config.layer_blocks)) == (100, 12)
        assert config.layer_blocks.count("attention mlp") == 4
        with pytest.raises(ConfigurationError, match="preset is '3b': there are 130m, "):
            Mamba2HybridConfig.preset("3b")
