"""The maps of names and sizes are pure, and inverse to each other."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import configurations

from mamba2_hf import Mamba2Config, Mamba2ForCausalLM
from mamba2_hf.checkpoints import FORMATS, mapping
from mamba2_hf.checkpoints.mapping import KeyMap
from mamba2_hf.models.mamba_ssm_config import as_mamba_ssm_config, translate_mamba_ssm_config

# Every tensor of each format, by their names.
THEIRS = {
    "mamba2": {"embedding": "backbone.embeddings.weight", "prefix": ""},
    "mamba_ssm": {"embedding": "backbone.embedding.weight", "prefix": ""},
    "codestral": {"embedding": "backbone.embedding.weight", "prefix": "model."},
}
PARTS = (
    *("norm.weight", "mixer.A_log", "mixer.D", "mixer.dt_bias", "mixer.in_proj.weight", "mixer.in_proj.bias"),
    *("mixer.conv1d.weight", "mixer.conv1d.bias", "mixer.norm.weight", "mixer.out_proj.weight", "mixer.out_proj.bias"),
)


@pytest.mark.parametrize("name", THEIRS)
def test_names_of_every_tensor(name: str) -> None:
    keys, theirs = FORMATS[name].keys, THEIRS[name]
    layers = [f"backbone.layers.{layer}.{part}" for layer in (0, 1, 63) for part in PARTS]
    table = {theirs["prefix"] + own: own for own in (*layers, "backbone.norm_f.weight", "lm_head.weight")}
    table[theirs["prefix"] + theirs["embedding"]] = "backbone.embeddings.weight"
    assert {their: keys.ours(their) for their in table} == table
    assert {keys.theirs(own) for own in table.values()} == set(table)


def test_early_names_are_read_and_not_written() -> None:
    assert mapping.MAMBA2_KEYS.ours("backbone.embedding.weight") == "backbone.embeddings.weight"
    assert mapping.MAMBA2_KEYS.theirs("backbone.embeddings.weight") == "backbone.embeddings.weight"


@given(st.text(st.sampled_from("ab.0_19"), max_size=30))
def test_a_name_outside_of_the_format_comes_back_as_it_is(name: str) -> None:
    keys = KeyMap({"layers.{}.b": "a.{}.b"})
    assert keys.theirs(keys.ours(name)) == name or name.startswith("a.")


def test_numbers_of_layers_are_kept() -> None:
    keys = KeyMap({"decoder.{}.sub.{}.w": "layers.{}.part.{}.weight"}, prefix="model.")
    assert keys.ours("model.decoder.12.sub.3.w") == "layers.12.part.3.weight"
    assert keys.theirs("layers.12.part.3.weight") == "model.decoder.12.sub.3.w"


@given(configurations())
def test_expected_shapes_are_those_of_the_model(fields: dict[str, Any]) -> None:
    config = Mamba2Config(**fields)
    state = Mamba2ForCausalLM(config).state_dict()
    assert mapping.expected_shapes(config) == {name: tuple(tensor.shape) for name, tensor in state.items()}


class TestMambaSSM:
    PUBLISHED = {
        "mamba2-130m": (768, 24),
        "mamba2-370m": (1024, 48),
        "mamba2-780m": (1536, 48),
        "mamba2-1.3b": (2048, 48),
        "mamba2-2.7b": (2560, 64),
    }

    @pytest.mark.parametrize("sizes", PUBLISHED.values(), ids=PUBLISHED.keys())
    def test_published_sizes(self, sizes: tuple[int, int]) -> None:
        width, layers = sizes
        published = {
            **{"d_model": width, "d_intermediate": 0, "n_layer": layers, "vocab_size": 50277, "rms_norm": True},
            **{"ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "attn_cfg": {}, "tie_embeddings": True},
            **{"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16},
        }
        config = mapping.mamba2_config(mapping.read_mamba_ssm(published), layers)
        assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (50288, width, layers)
        assert (config.num_heads, config.head_dim, config.n_groups) == (width // 32, 64, 1)
        assert (config.state_size, config.conv_kernel, config.expand, config.chunk_size) == (128, 4, 2, 256)
        assert config.tie_word_embeddings
        assert mapping.write_mamba_ssm(config) == published

    @given(configurations())
    def test_fields_there_and_back(self, fields: dict[str, Any]) -> None:
        config = Mamba2Config(**fields)
        theirs = json.loads(json.dumps(as_mamba_ssm_config(config.to_dict())))
        back = mapping.mamba2_config(translate_mamba_ssm_config(theirs), 2)
        without = {"bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "architectures", "hidden_act"}
        without |= {"rescale_prenorm_residual", "pad_vocab_size_multiple"}
        kept = [{k: v for k, v in one.to_dict().items() if k not in without} for one in (back, config)]
        assert kept[0] == kept[1]
        assert as_mamba_ssm_config(back.to_dict()) == theirs


def test_codestral_as_published() -> None:
    published = {
        **{"dim": 4096, "n_layers": 64, "vocab_size": 32768, "n_groups": 8, "rms_norm": True, "tie_embeddings": False},
        **{"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 1, "model_type": "mamba"},
    }
    config = mapping.mamba2_config(mapping.read_codestral({**published, "norm_before_gate": True, "other": 3}), 64)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size, config.n_groups) == (4096, 64, 32768, 8)
    assert (config.num_heads, config.head_dim, config.state_size) == (128, 64, 128)
    assert not config.tie_word_embeddings
    assert config.residual_in_fp32


class TestForOtherReaders:
    @pytest.mark.parametrize(("vocabulary", "said"), [(64, None), (50288, None), (61, 1), (40, 1)])
    def test_a_vocabulary_that_llama_cpp_would_round_up_says_that_it_is_not_to(
        self, vocabulary: int, said: int | None
    ) -> None:
        config = mapping.mamba2_config({"model_type": "mamba2", "vocab_size": vocabulary}, 64)
        assert mapping.write_own(config).get("pad_vocab_size_multiple") == said
