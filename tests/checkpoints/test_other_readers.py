"""What is written here is what other programs read.

Stock transformers loads it for real, in ``test_convert.py``, ``test_hybrid_conversion.py`` and in
``models/test_loading.py``. The sources of the others were read, and what they look up is the table in
``mamba2_hf.checkpoints.readers``.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import pytest
import sentencepiece
import torch
from hybrid_families import CASES, stock
from hybrids import ROPE, make_hybrid
from layouts import stored
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mamba2_hf import Mamba2HybridForCausalLM
from mamba2_hf.checkpoints import FORMATS, READERS, convert, open_checkpoint
from mamba2_hf.checkpoints.readers import REQUIRED, TENSORS
from mamba2_hf.errors import CheckpointError, ConfigurationError
from mamba2_hf.pretrained import SHIPPED, shipped_model_path

INF = math.inf
TRAINED_HERE: dict[str, Any] = {
    **{"vocab_size": 64, "ssm_num_heads": 8, "ssm_n_groups": 1, "ssm_state_size": 32, "head_dim": 8},
    **{"ssm_use_bias": False, "attention_bias": False, "mlp_bias": False},
}
# What each family can express and most readers compute, as configurations of our own.
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba": ("bamba", {"layer_blocks": ["ssd mlp", "attention mlp"], "rope_parameters": {**ROPE, "rope_theta": 5e3}}),
    "granite": (
        "granitemoehybrid",
        {"layer_blocks": ["ssd mlp", "attention mlp"], "attention_scale": 0.2, "residual_multiplier": 0.5},
    ),
    "granite-experts": (
        "granitemoehybrid",
        {
            **{"layer_blocks": ["ssd moe", "attention moe"], "num_experts": 4, "moe_intermediate_size": 8},
            **{"shared_expert_intermediate_size": 12, "embedding_multiplier": 2.0, "logits_scaling": 4.0},
        },
    ),
    "nemotron": ("nemotron_h", {"layer_blocks": ["ssd", "mlp", "attention"], "mlp_type": "relu2", "head_dim": 12}),
    "nemotron-experts": (
        "nemotron_h",
        {
            **{"layer_blocks": ["ssd", "moe", "attention", "moe"], "mlp_type": "relu2", "num_experts": 4},
            **{"moe_router": "sigmoid", "shared_expert_intermediate_size": 12, "moe_intermediate_size": 8},
        },
    ),
    "falcon": (
        "falcon_h1",
        {
            **{"layer_blocks": ["ssd+attention mlp"] * 2, "head_dim": 12, "rope_parameters": {**ROPE}},
            **{"ssm_out_multiplier": 0.9, "lm_head_multiplier": 0.5, "tie_word_embeddings": False},
        },
    ),
    "zamba": (
        "zamba2",
        {
            **{"layer_blocks": ["ssd", "shared>ssd", "shared>ssd"], "shared_adapter_rank": 3, "mlp_type": "geglu"},
            **{"num_key_value_heads": 4, "head_dim": 16, "attention_scale": 8**-0.5},
            "rope_parameters": {**ROPE, "rope_theta": 5e3},
        },
    ),
}
# Nobody looks these up: transformers saves them of every configuration.
OF_NOBODY = {
    *("_name_or_path", "id2label", "label2id", "problem_type", "return_dict", "output_attentions", "chunk_size_feed"),
    *("output_hidden_states", "is_encoder_decoder", "transformers_version", "dtype", "rope_parameters"),
}


def by_conversion(write: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write(folder / "source")
        convert(folder / "source", folder / "out")
        return folder / "out"

    return make


def by_saving(**changes: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        layouts.stock(folder / "out", **changes)
        return folder / "out"

    return make


def own_hybrid(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        family, fields = OWN[name]
        make_hybrid("plain", **{**TRAINED_HERE, **fields}).save_pretrained(folder / "source")
        convert(folder / "source", folder / "out", to=family)
        return folder / "out"

    return make


def from_stock(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        stock(CASES[name]).save_pretrained(folder / "source")
        convert(folder / "source", folder / "out", to=CASES[name].family)
        return folder / "out"

    return make


PURE: dict[str, Callable[[Path], Path]] = {
    "shipped": by_conversion(lambda folder: shutil.copytree(shipped_model_path(), folder)),
    "saved": by_saving(),
    "saved_with_8_groups": by_saving(n_groups=8),
    "saved_with_an_odd_vocabulary": by_saving(vocab_size=61),
    "from_state_spaces": by_conversion(layouts.state_spaces),
    "from_codestral": by_conversion(layouts.codestral),
    "from_legacy": by_conversion(layouts.legacy),
    "odd_vocabulary": by_conversion(lambda folder: layouts.stock(folder, vocab_size=61)),
}
HYBRIDS = {name: own_hybrid(name) for name in OWN} | {f"stock-{name}": from_stock(name) for name in CASES}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(), parse_constant=pytest.fail)


class TestTheTable:
    @pytest.mark.parametrize("name", [*PURE, *HYBRIDS])
    def test_every_writer_gives_every_reader_what_it_looks_up(self, name: str, tmp_path: Path) -> None:
        folder = {**PURE, **HYBRIDS}[name](tmp_path)
        config = config_of(folder)
        family = config["model_type"]
        for reader in READERS.values():
            reading = reader.families.get(family)
            for key, default in reading.keys.items() if reading else ():
                found = [config[alias] for alias in key.split("|") if alias in config]
                assert found or default != REQUIRED, (reader.title, key)
                for values in found if key in (reading.takes if reading else ()) else ():
                    for value in values if isinstance(values, list) else [values]:
                        assert value in reading.takes[key], (reader.title, key, value)
        for tensor in stored(folder):
            assert any(re.fullmatch(pattern, tensor) for pattern in TENSORS[family]), tensor
        tied = config["tie_word_embeddings"] and family != "nemotron_h"
        assert ("lm_head.weight" in stored(folder)) == (not tied)

    @pytest.mark.parametrize("name", OWN)
    def test_a_new_file_has_nothing_that_nobody_looks_up(self, name: str, tmp_path: Path) -> None:
        # Of Bamba, transformers 5 takes another share than a half from inside of that key alone.
        needed = {"rope_parameters"} if name == "bamba" else set()
        assert OF_NOBODY & config_of(own_hybrid(name)(tmp_path)).keys() == needed

    @pytest.mark.parametrize("name", [*PURE, *HYBRIDS])
    def test_no_reader_takes_another_value_than_the_models(self, name: str, tmp_path: Path) -> None:
        """What the converter of llama.cpp and the classes of the others would build, against the stored tensors."""
        folder = {**PURE, **HYBRIDS}[name](tmp_path)
        config, tensors = config_of(folder), stored(folder)
        sizes = SIZES[config["model_type"]](config)
        for pattern, shape in sizes.items():
            names = [tensor for tensor in tensors if re.search(pattern, tensor)]
            for tensor in names:
                assert tuple(tensors[tensor].shape) == shape, tensor

    def test_every_cell_says_where_it_was_read(self) -> None:
        for reader in READERS.values():
            assert reader.version
            for family, reading in reader.families.items():
                assert reading.place
                assert FORMATS[family].write_config is not None
                assert set(reading.takes) <= {name for key in reading.keys for name in key.split("|")}
            for family, reason in reader.lacking.items():
                assert reason
                assert family not in reader.families


def _pure_sizes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    inner = config["intermediate_size"]
    bc = 2 * config["n_groups"] * config["state_size"]
    multiple = config.get("pad_vocab_size_multiple", 16)
    assert inner == config["num_heads"] * config["head_dim"] == config["expand"] * config["hidden_size"]
    return {
        r"mixer\.norm": (inner,),
        r"in_proj\.weight": (2 * inner + bc + inner // config["head_dim"], config["hidden_size"]),
        r"conv1d\.weight": (inner + bc, 1, config["conv_kernel"]),
        r"embeddings": (-(-config["vocab_size"] // multiple) * multiple, config["hidden_size"]),
    }


def _mixer_sizes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    inner = config.get("mamba_d_ssm") or config["mamba_expand"] * config["hidden_size"]
    bc = 2 * config["mamba_n_groups"] * config["mamba_d_state"]
    assert inner == config["mamba_n_heads"] * config["mamba_d_head"]
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return {
        r"in_proj\.weight": (2 * inner + bc + config["mamba_n_heads"], config["hidden_size"]),
        r"conv1d\.weight": (inner + bc, 1, config["mamba_d_conv"]),
        r"q_proj\.weight": (config["num_attention_heads"] * head_dim, config["hidden_size"]),
        r"k_proj\.weight": (config["num_key_value_heads"] * head_dim, config["hidden_size"]),
        r"feed_forward\.gate_proj\.weight": (config["intermediate_size"], config["hidden_size"]),
        r"shared_mlp\.input_linear": (2 * config.get("shared_intermediate_size", 0), config["hidden_size"]),
        r"sparse_moe\.input_linear": (
            config.get("num_local_experts"),
            2 * config["intermediate_size"],
            config["hidden_size"],
        ),
    }


def _granite_sizes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    assert config["num_local_experts"] or config["intermediate_size"] == config["shared_intermediate_size"]
    assert bool(config["num_local_experts"]) == bool(config["num_experts_per_tok"])
    return _mixer_sizes(config)


def _nemotron_sizes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    inner = config["mamba_num_heads"] * config["mamba_head_dim"]
    bc = 2 * config["n_groups"] * config["ssm_state_size"]
    pattern = config["hybrid_override_pattern"]
    assert len(pattern) == config["num_hidden_layers"]
    assert ("E" in pattern) == ("num_experts_per_tok" in config) == ("n_routed_experts" in config)
    return {
        r"in_proj\.weight": (2 * inner + bc + config["mamba_num_heads"], config["hidden_size"]),
        r"q_proj\.weight": (config["num_attention_heads"] * config["head_dim"], config["hidden_size"]),
        **{
            rf"layers\.{layer}\.mixer\.up_proj\.weight": (config["intermediate_size"], config["hidden_size"])
            for layer, kind in enumerate(pattern)
            if kind == "-"
        },
    }


def _zamba_sizes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    inner = config["mamba_expand"] * config["hidden_size"]
    bc = 2 * config["mamba_ngroups"] * config["mamba_d_state"]
    assert config["hybrid_layer_ids"] == [
        layer for layer, kind in enumerate(config["layers_block_type"]) if kind == "hybrid"
    ]
    return {
        r"in_proj\.weight": (2 * inner + bc + config["n_mamba_heads"], config["hidden_size"]),
        r"feed_forward\.gate_up_proj\.weight": (2 * config["intermediate_size"], config["hidden_size"]),
    }


SIZES: dict[str, Callable[[dict[str, Any]], dict[str, tuple[int, ...]]]] = {
    "mamba2": _pure_sizes,
    "bamba": _mixer_sizes,
    "granitemoehybrid": _granite_sizes,
    "falcon_h1": _mixer_sizes,
    "nemotron_h": _nemotron_sizes,
    "zamba2": _zamba_sizes,
}


class TestSpelling:
    """What transformers 5 alone reads of its own files, under the names that published ones have."""

    def test_falcon_names_its_head_dim_and_rope_theta(self, tmp_path: Path) -> None:
        config = config_of(from_stock("falcon")(tmp_path))
        assert (config["head_dim"], config["rope_theta"]) == (8, 1e4)

    @pytest.mark.parametrize("name", ["bamba", "zamba"])
    def test_rope_theta_stands_outside_too(self, name: str, tmp_path: Path) -> None:
        assert config_of(own_hybrid(name)(tmp_path))["rope_theta"] == 5e3

    def test_granite_with_positions(self, tmp_path: Path) -> None:
        source = make_hybrid(
            "plain", **{**TRAINED_HERE, **OWN["granite"][1], "rope_parameters": {**ROPE, "rope_theta": 7e3}}
        )
        source.save_pretrained(tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "out", to="granitemoehybrid")
        config = config_of(tmp_path / "out")
        assert (config["rope_theta"], config["position_embedding_type"]) == (7e3, "rope")

    @pytest.mark.parametrize(("share", "rotated"), [(0.5, 4), (1.0, 8), (0.25, 2)])
    def test_bamba_says_what_share_of_a_head_it_rotates(self, share: float, rotated: int, tmp_path: Path) -> None:
        rope = {**ROPE, "partial_rotary_factor": share}
        make_hybrid("plain", **{**TRAINED_HERE, **OWN["bamba"][1], "rope_parameters": rope}).save_pretrained(
            tmp_path / "source"
        )
        convert(tmp_path / "source", tmp_path / "out", to="bamba")
        config = config_of(tmp_path / "out")
        assert (config["partial_rotary_factor"], config["attn_rotary_emb"]) == (share, rotated)
        same_logits(tmp_path / "source", tmp_path / "out")

    def test_scaled_positions_stand_in_rope_scaling(self, tmp_path: Path) -> None:
        rope = {
            **{"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0, "original_max_position_embeddings": 32},
            "partial_rotary_factor": 0.25,
        }
        make_hybrid("plain", **{**TRAINED_HERE, **OWN["bamba"][1], "rope_parameters": rope}).save_pretrained(
            tmp_path / "source"
        )
        convert(tmp_path / "source", tmp_path / "out", to="bamba")
        config = config_of(tmp_path / "out")
        assert config["rope_scaling"] == {key: value for key, value in rope.items() if key != "rope_theta"}
        same_logits(tmp_path / "source", tmp_path / "out")

    def test_granite_names_its_layers_as_published(self, tmp_path: Path) -> None:
        assert config_of(from_stock("granite")(tmp_path))["layer_types"] == ["mamba", "attention", "mamba"]

    @pytest.mark.parametrize("name", ["stock-granite", "granite"])
    def test_granite_without_experts_chooses_none(self, name: str, tmp_path: Path) -> None:
        config = config_of(HYBRIDS[name](tmp_path))
        assert (config["num_local_experts"], config["num_experts_per_tok"]) == (0, 0)
        assert config["position_embedding_type"] == "nope"

    def test_granite_clamps_no_steps_in_mlx_lm(self, tmp_path: Path) -> None:
        """mlx-lm takes (0.001, 100) where there is no ``time_step_limit``."""
        assert config_of(own_hybrid("granite")(tmp_path))["time_step_limit"] == [0.0, 65504.0]

    @pytest.mark.parametrize(
        ("name", "pattern"), [("stock-nemotron", "M-*M-"), ("nemotron", "M-*"), ("nemotron-experts", "ME*E")]
    )
    def test_nemotron_has_a_pattern_and_a_count(self, name: str, pattern: str, tmp_path: Path) -> None:
        config = config_of(HYBRIDS[name](tmp_path))
        assert (config["hybrid_override_pattern"], config["num_hidden_layers"]) == (pattern, len(pattern))
        assert ("num_experts_per_tok" in config) == ("E" in pattern)

    def test_pure_models_name_their_inner_width(self, tmp_path: Path) -> None:
        layouts.stock(tmp_path)
        assert config_of(tmp_path)["intermediate_size"] == 64

    def test_a_finite_limit_stays(self, tmp_path: Path) -> None:
        assert config_of(from_stock("bamba-limits")(tmp_path))["time_step_limit"] == [0.3, 0.6]

    def test_the_tokenizer_names_a_class_that_transformers_4_has(self, tmp_path: Path) -> None:
        from transformers import AutoTokenizer

        layouts.stock(tmp_path / "source")
        layouts.add_companions(tmp_path / "source")
        path = tmp_path / "source/tokenizer_config.json"
        written = json.loads(path.read_text())
        assert written["tokenizer_class"] == "TokenizersBackend"
        layouts.write_json(path, {**written, "extra_special_tokens": ["!"]})
        convert(tmp_path / "source", tmp_path / "out")
        config = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert (config["additional_special_tokens"], config.get("extra_special_tokens")) == (["!"], None)
        before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("source", "out"))
        assert before.encode("so it is!") == after.encode("so it is!")
        assert after.all_special_tokens == before.all_special_tokens


IDS = torch.randint(3, 61, (1, 40), generator=torch.Generator().manual_seed(1))


def same_logits(ours: Path, theirs: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = Mamba2HybridForCausalLM.from_pretrained(ours).eval()
    other = AutoModelForCausalLM.from_pretrained(theirs).eval()
    assert type(other).__module__.startswith("transformers.models.")
    with torch.no_grad():
        torch.testing.assert_close(other(IDS, use_cache=False).logits, model(IDS).logits, rtol=0, atol=1e-4)


_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_MODEL = {**_TOKENS, "vocab_size": 64, "hidden_size": 32, "initializer_range": 0.02, "use_cache": True}
_WRITTEN = {"torch_dtype": "float32", "transformers_version": "4.52.0"}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": False, "attention_dropout": 0.0}
_MIXER = {
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 32, "mamba_d_conv": 4},
    **{"mamba_expand": 2, "mamba_conv_bias": True, "mamba_proj_bias": False, "mamba_chunk_size": 256},
}
_SHARED = {**_MODEL, **_WRITTEN, **_HEADS, **_MIXER, "hidden_act": "silu", "rms_norm_eps": 1e-5}
# Configurations with the keys of published ones, and small sizes.
PUBLISHED: dict[str, dict[str, Any]] = {
    "mamba2": {
        **{**_MODEL, **_WRITTEN, "architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2"},
        **{"num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 32, "expand": 2},
        **{"conv_kernel": 4, "chunk_size": 256, "hidden_act": "silu", "layer_norm_epsilon": 1e-5, "rms_norm": True},
        **{"norm_before_gate": True, "rescale_prenorm_residual": False, "residual_in_fp32": True, "use_bias": False},
        **{"tie_word_embeddings": False, "time_step_floor": 1e-4, "time_step_max": 0.1, "time_step_min": 0.001},
        **{"time_step_limit": [0.0, INF], "time_step_rank": 2, "time_step_scale": 1.0, "use_conv_bias": True},
        **{"time_step_init_scheme": "random", "intermediate_size": 64},
    },
    "bamba": {
        **{**_SHARED, "architectures": ["BambaForCausalLM"], "model_type": "bamba", "attn_layer_indices": [1]},
        **{"attn_rotary_emb": 4, "intermediate_size": 48, "max_position_embeddings": 4096, "mlp_bias": False},
        **{"num_hidden_layers": 3, "num_logits_to_keep": 1, "rope_scaling": None, "rope_theta": 5e3},
        **{"tie_word_embeddings": False},
    },
    "granitemoehybrid": {
        **{**_SHARED, "architectures": ["GraniteMoeHybridForCausalLM"], "model_type": "granitemoehybrid"},
        **{"attention_multiplier": 0.25, "embedding_multiplier": 12, "init_method": "mup", "intermediate_size": 48},
        **{"layer_types": ["mamba", "attention", "mamba"], "logits_scaling": 3, "max_position_embeddings": 4096},
        **{"normalization_function": "rmsnorm", "num_experts_per_tok": 0, "num_hidden_layers": 3},
        **{"num_local_experts": 0, "output_router_logits": False, "position_embedding_type": "nope"},
        **{"residual_multiplier": 0.22, "rope_scaling": None, "rope_theta": 10000, "router_aux_loss_coef": 0.01},
        **{"shared_intermediate_size": 48, "tie_word_embeddings": True},
    },
    "nemotron_h": {
        **{**_MODEL, **_WRITTEN, **_HEADS, "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h"},
        **{"chunk_size": 128, "conv_kernel": 4, "expand": 2, "head_dim": 16, "hidden_dropout": 0.0, "n_groups": 2},
        **{"hybrid_override_pattern": "M-*M-", "num_hidden_layers": 5, "intermediate_size": 48},
        **{"layer_norm_epsilon": 1e-5, "mamba_head_dim": 8, "mamba_hidden_act": "silu", "mamba_num_heads": 8},
        **{"mamba_proj_bias": False, "max_position_embeddings": 8192, "mlp_bias": False, "mlp_hidden_act": "relu2"},
        **{"num_logits_to_keep": 1, "rescale_prenorm_residual": True, "residual_in_fp32": False, "rms_norm_eps": 1e-5},
        **{"sliding_window": None, "ssm_state_size": 32, "tie_word_embeddings": False, "time_step_floor": 1e-4},
        **{"time_step_limit": [0.0, INF], "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 256},
        **{"use_bias": False, "use_conv_bias": True, "use_mamba_kernels": True},
    },
    "falcon_h1": {
        **{**_SHARED, "architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1", "head_dim": 16},
        **{"attention_in_multiplier": 1.0, "attention_out_multiplier": 0.9375, "attn_layer_indices": None},
        **{"embedding_multiplier": 5.65, "intermediate_size": 48, "key_multiplier": 0.39, "lm_head_multiplier": 0.03},
        **{"mamba_n_heads": 6, "mamba_d_ssm": 48, "mamba_norm_before_gate": False, "mamba_rms_norm": False},
        **{"mamba_use_mlp": True, "max_position_embeddings": 16384, "mlp_bias": False, "mlp_expansion_factor": 8},
        **{"mlp_multipliers": [0.88, 0.58], "num_hidden_layers": 2, "num_logits_to_keep": 1, "projectors_bias": False},
        **{"rope_scaling": None, "rope_theta": 1e11, "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.23},
        **{"ssm_multipliers": [0.35, 0.25, 0.35, 0.5, 0.35], "tie_word_embeddings": False},
    },
    "zamba2": {
        **{**_MODEL, **_WRITTEN, "architectures": ["Zamba2ForCausalLM"], "model_type": "zamba2"},
        **{"adapter_rank": 4, "add_bias_linear": False, "attention_dropout": 0.0, "attention_head_dim": 16},
        **{"attention_hidden_size": 64, "chunk_size": 256, "ffn_hidden_size": 128, "hidden_act": "gelu"},
        **{"hybrid_layer_ids": [1, 2], "intermediate_size": 128, "kv_channels": 8, "mamba_d_conv": 4},
        **{"layers_block_type": ["mamba", "hybrid", "hybrid"], "mamba_d_state": 32, "mamba_expand": 2},
        **{"mamba_headdim": 8, "mamba_ngroups": 1, "max_position_embeddings": 4096, "n_mamba_heads": 8},
        **{"num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 4, "num_logits_to_keep": 1},
        **{"num_mem_blocks": 2, "num_query_groups": 4, "rms_norm_eps": 1e-5, "rope_theta": 5e3},
        **{"tie_word_embeddings": True, "time_step_floor": 1e-4, "time_step_limit": None, "time_step_max": 0.1},
        **{"time_step_min": 0.001, "use_conv_bias": True, "use_long_context": False, "use_mamba_kernels": True},
        **{"use_mem_rope": True, "use_shared_attention_adapter": False},
    },
}
PUBLISHED["granite with experts"] = {
    **{**PUBLISHED["granitemoehybrid"], "num_local_experts": 4, "num_experts_per_tok": 2},
    "shared_intermediate_size": 40,
}
PUBLISHED["nemotron with experts"] = {
    **{**PUBLISHED["nemotron_h"], "hybrid_override_pattern": "ME*ME", "n_routed_experts": 4, "n_shared_experts": 1},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 24},
    **{"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
}


def publish(name: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """A checkpoint of a family with the ``config.json`` of a published one, and that file's content."""
    published = {**PUBLISHED[name], **changes}
    entry = FORMATS[published["model_type"]]
    config = entry.family.config(entry.read_config(published), 100)
    torch.manual_seed(0)
    entry.family.model(config).save_pretrained(folder / "random")
    convert(folder / "random", folder / "theirs", to=published["model_type"])
    (folder / "theirs/mamba2_config.json").unlink(missing_ok=True)
    (folder / "theirs/config.json").write_text(json.dumps(published))
    return published


def as_json(published: dict[str, Any]) -> dict[str, Any]:
    """A published file as strict JSON: no infinity."""
    limit = published.get("time_step_limit")
    return {**published, **({"time_step_limit": [0.0, 65504.0]} if limit == [0.0, INF] else {})}


class TestKeyForKey:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_there_and_back_only_the_change_is_another(self, name: str, tmp_path: Path) -> None:
        published = publish(name, tmp_path)
        family = published["model_type"]
        convert(tmp_path / "theirs", tmp_path / "ours")
        model = open_checkpoint(tmp_path / "ours").format.family.model.from_pretrained(tmp_path / "ours")
        model.config.eos_token_id = 7
        if family != "mamba2":  # a pure model's own file is the published one
            model.save_pretrained(tmp_path / "changed")
        else:
            path = tmp_path / "ours/config.json"
            layouts.write_json(path, {**json.loads(path.read_text()), "eos_token_id": 7})
            shutil.copytree(tmp_path / "ours", tmp_path / "changed")
        convert(tmp_path / "changed", tmp_path / "back", to=family)
        assert config_of(tmp_path / "back") == {**as_json(published), "eos_token_id": 7}

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_a_published_file_is_right_for_whom_it_was_published(self, name: str, tmp_path: Path) -> None:
        published = publish(name, tmp_path)
        result = convert(tmp_path / "theirs", tmp_path / "again", to=published["model_type"])
        assert config_of(tmp_path / "again") == as_json(published)
        found = {verdict.reader: verdict for verdict in result.readers}
        assert found["transformers-5"].takes

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_what_transformers_5_saved_gets_the_published_spelling(self, name: str, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        published = publish(name, tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
        model.save_pretrained(tmp_path / "stock")
        convert(tmp_path / "stock", tmp_path / "out", to=published["model_type"])
        config = config_of(tmp_path / "out")
        for key, value in as_json(published).items():
            if key in config and key not in ("transformers_version", "torch_dtype"):
                assert config[key] == value, key
        for reader in READERS.values():
            reading = reader.families.get(published["model_type"])
            for key, default in reading.keys.items() if reading else ():
                assert default != REQUIRED or any(alias in config for alias in key.split("|")), (reader.title, key)

    def test_another_rotation_is_not_hidden_behind_the_old_one(self, tmp_path: Path) -> None:
        publish("bamba", tmp_path)
        convert(tmp_path / "theirs", tmp_path / "ours")
        model = Mamba2HybridForCausalLM.from_pretrained(tmp_path / "ours")
        model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 9e3}
        model.save_pretrained(tmp_path / "changed")
        convert(tmp_path / "changed", tmp_path / "back", to="bamba")
        assert config_of(tmp_path / "back")["rope_theta"] == 9e3

    def test_mamba_ssm(self, tmp_path: Path) -> None:
        layouts.state_spaces(tmp_path / "theirs")
        convert(tmp_path / "theirs", tmp_path / "ours")
        convert(tmp_path / "ours", tmp_path / "back", to="mamba_ssm")
        assert config_of(tmp_path / "back") == layouts.STATE_SPACES

    def test_mamba_ssm_after_a_change(self, tmp_path: Path) -> None:
        layouts.state_spaces(tmp_path / "theirs")
        convert(tmp_path / "theirs", tmp_path / "ours")
        path = tmp_path / "ours/config.json"
        layouts.write_json(path, {**json.loads(path.read_text()), "time_step_limit": [0.001, 65504.0]})
        convert(tmp_path / "ours", tmp_path / "back", to="mamba_ssm")
        changed = {**layouts.STATE_SPACES["ssm_cfg"], "dt_limit": [0.001, 65504.0]}
        assert config_of(tmp_path / "back") == {**layouts.STATE_SPACES, "ssm_cfg": changed}
        assert open_checkpoint(tmp_path / "back").config.time_step_limit == (0.001, INF)

    def test_weights_for_further_tokens_that_are_not_there_are_not_promised(self, tmp_path: Path) -> None:
        heads = {"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["attention", "moe"]}
        published = publish("nemotron with experts", tmp_path, **heads)
        path = tmp_path / "theirs/model.safetensors"
        tensors = load_file(path)
        convert(tmp_path / "theirs", tmp_path / "with", to="nemotron_h")
        assert config_of(tmp_path / "with") == as_json(published)
        layouts.write_safetensors(path, {name: value for name, value in tensors.items() if name[:4] != "mtp."})
        convert(tmp_path / "theirs", tmp_path / "out", to="nemotron_h")
        assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 0

    def test_code_of_a_file_is_not_taken_along(self, tmp_path: Path) -> None:
        publish("nemotron_h", tmp_path, auto_map={"AutoConfig": "configuration_nemotron_h.NemotronHConfig"})
        convert(tmp_path / "theirs", tmp_path / "out", to="nemotron_h")
        assert "auto_map" not in config_of(tmp_path / "out")

    def test_falcons_heads_may_have_any_width(self, tmp_path: Path) -> None:
        """As in Falcon-H1-1.5B-Deep: 6 heads of 128 in a stream of 1280."""
        published = publish("falcon_h1", tmp_path, num_attention_heads=6, num_key_value_heads=2)
        convert(tmp_path / "theirs", tmp_path / "ours")
        convert(tmp_path / "ours", tmp_path / "back", to="falcon_h1")
        assert config_of(tmp_path / "back") == published
        assert load_file(tmp_path / "back/model.safetensors")["model.layers.0.self_attn.q_proj.weight"].shape == (
            96,
            32,
        )


# Every cell of family and reader: None where it is right, else a part of the reason with which it is refused.
CELLS: dict[str, dict[str, str | None]] = {
    "mamba2": dict.fromkeys(READERS),
    "bamba": {
        **dict.fromkeys(READERS),
        **{"llama.cpp": "partial_rotary_factor is 0.5", "mlx-lm": "does not read bamba", "vllm": "none since 0.23"},
    },
    "granitemoehybrid": dict.fromkeys(READERS),
    "granite with experts": dict.fromkeys(READERS),
    "nemotron_h": {**dict.fromkeys(READERS), "transformers-4": "it has no class for it"},
    "nemotron with experts": {**dict.fromkeys(READERS), "transformers-4": "it has no class for it"},
    "falcon_h1": {**dict.fromkeys(READERS), "mlx-lm": "key_multiplier is 0.39"},
    "zamba2": {
        **dict.fromkeys(READERS),
        **{"llama.cpp": "does not read zamba2", "mlx-lm": "does not read zamba2"},
        "transformers-4": "mixes up the states of chunks",
    },
}


class TestFor:
    @pytest.mark.parametrize("reader", READERS)
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_every_cell_is_right_or_refused(self, name: str, reader: str, tmp_path: Path) -> None:
        published = publish(name, tmp_path)
        reason = CELLS[name][reader]
        if reason is not None:
            with pytest.raises(ConfigurationError, match=reason):
                convert(tmp_path / "theirs", tmp_path / "out", to=published["model_type"], for_reader=reader)
            assert not (tmp_path / "out").exists()
            return
        result = convert(tmp_path / "theirs", tmp_path / "out", for_reader=reader)
        assert result.target == published["model_type"]
        (found,) = [verdict for verdict in result.readers if verdict.reader == reader]
        assert found.takes
        assert layouts.same(stored(tmp_path / "out"), stored(tmp_path / "theirs"))

    def test_a_key_that_one_reader_needs_is_written_for_it_alone(self, tmp_path: Path) -> None:
        publish("granitemoehybrid", tmp_path)
        plain = convert(tmp_path / "theirs", tmp_path / "plain", to="granitemoehybrid")
        (found,) = [verdict for verdict in plain.readers if verdict.reader == "mlx-lm"]
        assert (found.takes, found.missing) == (False, ["time_step_limit"])
        convert(tmp_path / "theirs", tmp_path / "out", for_reader="mlx-lm")
        before, after = (config_of(tmp_path / name) for name in ("plain", "out"))
        assert after == {**before, "time_step_limit": [0.0, 65504.0]}

    def test_published_steps_of_nemotron_are_clamped_in_mlx_lm_as_in_transformers(self, tmp_path: Path) -> None:
        publish("nemotron_h", tmp_path)
        convert(tmp_path / "theirs", tmp_path / "out", for_reader="mlx-lm")
        assert config_of(tmp_path / "out")["time_step_limit"] == [0.001, 65504.0]
        result = convert(tmp_path / "theirs", tmp_path / "gguf", for_reader="llama.cpp")
        (found,) = [verdict for verdict in result.readers if verdict.reader == "llama.cpp"]
        assert "does not raise steps to time_step_limit[0]=0.001" in found.cautions[0]

    @pytest.mark.parametrize(
        ("family", "reader", "changes", "match"),
        [
            ("mamba2", "llama.cpp", {"use_bias": True}, "have biases, which it has no place for"),
            ("mamba2", "llama.cpp", {"use_conv_bias": False}, "use_conv_bias is False"),
            ("mamba2", "llama.cpp", {"time_step_limit": [0.1, 2.0]}, "it does not clamp the step size"),
            ("mamba2", "vllm", {"time_step_limit": [0.1, 2.0]}, "it does not clamp the step size"),
            ("mamba2", "vllm", {"expand": 1.5, "num_heads": 6}, "expand is 1.5: its configuration takes whole"),
            ("mamba2", "transformers-5", {"expand": 1.5, "num_heads": 6}, "expand is 1.5: its configuration takes"),
            ("mamba2", "transformers-5", {"time_step_limit": [0.1, 2.0]}, "its cached decoding does not clamp to"),
            ("mamba2", "mlx-lm", {"n_groups": 2}, "n_groups is 2: it norms all channels"),
            ("mamba2", "mlx-lm", {"expand": 1.5, "num_heads": 6}, "expand is 1.5: its configuration takes whole"),
            ("mamba2", "mlx-lm", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
            ("mamba2", "mlx-lm", {"state_size": 16}, "state_size is 16: its Metal kernel"),
            ("mamba2", "transformers-4", {"n_groups": 2}, "it norms all channels"),
            ("mamba2", "transformers-5.20", {"n_groups": 2}, "it norms all channels"),
            ("bamba", "transformers-5.20", {"mamba_n_groups": 2}, "it norms all channels"),
            ("granitemoehybrid", "transformers-5.20", {"mamba_n_groups": 2}, "it norms all channels"),
            ("bamba", "transformers-4", {"time_step_limit": [0.1, 2.0]}, "it clamps nothing"),
            ("granitemoehybrid", "llama.cpp", {"position_embedding_type": "rope"}, "gives positions to attention in"),
            ("granitemoehybrid", "llama.cpp", {"vocab_size": 61}, "vocab_size is 61, which it rounds up"),
            ("granitemoehybrid", "llama.cpp", {"mamba_expand": 1, "mamba_d_head": 4}, "the inner width is 32"),
            ("granitemoehybrid", "mlx-lm", {"mamba_n_groups": 2}, "it norms all channels"),
            ("nemotron_h", "transformers-5.20", {"time_step_min": 0.1}, "its cached decoding does not clamp to"),
            ("nemotron_h", "llama.cpp", {"mlp_hidden_act": "gelu"}, "mlp_type is 'gelu'"),
            ("nemotron_h", "vllm", {"mlp_hidden_act": "gelu"}, "mlp_type is 'gelu'"),
            ("nemotron_h", "mlx-lm", {"hybrid_override_pattern": "M-M-M"}, "no layer has attention"),
            ("nemotron with experts", "llama.cpp", {"hybrid_override_pattern": "ME*M-"}, "some layers are an MLP and"),
            (
                "nemotron with experts",
                "llama.cpp",
                {"num_nextn_predict_layers": 2},
                "num_mtp_layers is 2 and mtp_layer",
            ),
            ("nemotron with experts", "vllm", {"mlp_bias": True}, "mlp_bias is True"),
            ("falcon_h1", "llama.cpp", {"tie_word_embeddings": True}, "the head shares the embedding"),
            (
                "falcon_h1",
                "llama.cpp",
                {"mamba_rms_norm": True, "mamba_norm_before_gate": True},
                "gate is always first",
            ),
            ("falcon_h1", "vllm", {"attention_bias": True}, "attention_bias is True"),
            ("zamba2", "vllm", {"num_key_value_heads": 2}, "num_key_value_heads is 2"),
            ("zamba2", "vllm", {"rms_norm_eps": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ],
    )
    def test_what_a_reader_would_compute_wrongly_is_refused(
        self, family: str, reader: str, changes: dict[str, Any], match: str, tmp_path: Path
    ) -> None:
        published = publish(family, tmp_path, **changes)
        with pytest.raises(ConfigurationError, match=match):
            convert(tmp_path / "theirs", tmp_path / "out", to=published["model_type"], for_reader=reader)
        assert not (tmp_path / "out").exists()

    def test_a_format_is_found_that_the_reader_has(self, tmp_path: Path) -> None:
        make_hybrid("plain", **{**TRAINED_HERE, **OWN["granite"][1]}).save_pretrained(tmp_path / "ours")
        assert convert(tmp_path / "ours", tmp_path / "out", for_reader="llama.cpp").target == "granitemoehybrid"
        layouts.state_spaces(tmp_path / "pure")
        assert convert(tmp_path / "pure", tmp_path / "pure-out", for_reader="llama.cpp").target == "mamba2"

    def test_where_there_is_none_every_reason_is_named(self, tmp_path: Path) -> None:
        make_hybrid("rotary").save_pretrained(tmp_path / "ours")
        with pytest.raises(
            ConfigurationError, match=r"no format that llama\.cpp reads .* bamba: .* granitemoehybrid: "
        ):
            convert(tmp_path / "ours", tmp_path / "out", for_reader="llama.cpp")
        assert not (tmp_path / "out").exists()

    def test_a_format_or_a_reader_that_is_not_known(self, tmp_path: Path) -> None:
        layouts.stock(tmp_path / "pure")
        with pytest.raises(ConfigurationError, match=r"llama\.cpp .* does not read mamba_ssm"):
            convert(tmp_path / "pure", tmp_path / "out", to="mamba_ssm", for_reader="llama.cpp")
        with pytest.raises(CheckpointError, match=r"'ollama' is no reader known here; there are llama\.cpp, mlx-lm"):
            convert(tmp_path / "pure", tmp_path / "out", for_reader="ollama")

    @pytest.mark.parametrize(
        ("files", "step"),
        [
            ({}, "without one it takes that of GPT-NeoX"),
            ({"tokenizer.model.v3": ""}, "rename tokenizer.model.v3 to tokenizer.model"),
            ({"tokenizer.json": '{"decoder": {"type": "Metaspace"}}'}, "put the SentencePiece tokenizer.model beside"),
            ({"tokenizer.json": '{"model": {"type": "BPE"}}'}, "name the one that splits alike in get_vocab_base_pre"),
            ({"tokenizer.json": "{}", "tokenizer.model": ""}, None),
        ],
    )
    def test_what_is_left_to_do_for_llama_cpps_tokenizers(
        self, files: dict[str, str], step: str | None, tmp_path: Path
    ) -> None:
        layouts.stock(tmp_path / "pure")
        for name, content in files.items():
            (tmp_path / "pure" / name).write_text(content)
        result = convert(tmp_path / "pure", tmp_path / "out")
        steps = {verdict.reader: verdict.steps for verdict in result.readers}
        assert len(steps["llama.cpp"]) == (step is not None)
        assert step is None or step in steps["llama.cpp"][0]
        assert steps["vllm"] == []


@pytest.mark.parametrize("name", SHIPPED)
def test_llama_cpp_finds_the_shipped_tokenizer_and_reads_it_as_we_do(name: str) -> None:
    """Of the pre-tokenizers in a tokenizer.json it knows those of published models only; of a tokenizer.model, all. Its
    runtime puts a space before each text then (llama.cpp's src/llama-vocab.cpp).
    """
    folder = shipped_model_path(name)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = Path(__file__).read_text(encoding="utf-8") + "é 日\t\r\n"
    assert tokenizer.tokenize("def")[0] == "\u2581def"
    assert processor.encode(text) == tokenizer(text).input_ids
    assert json.loads((folder / "tokenizer_config.json").read_text())["add_bos_token"] is False
