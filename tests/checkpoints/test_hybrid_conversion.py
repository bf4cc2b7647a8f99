"""Hybrids of every format: read, written back, refused."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import layouts
import oracles
import pytest
import torch
import torch.nn.functional as F
from hybrid_families import CASES, stock
from hybrids import ROPE, make_config
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from mamba2_hf import Mamba2ForCausalLM, Mamba2HybridForCausalLM
from mamba2_hf.checkpoints import FORMATS, convert, detect, open_checkpoint, verify
from mamba2_hf.checkpoints.cards import render_card
from mamba2_hf.checkpoints.equations import Equation, Rows, cut, parts_of
from mamba2_hf.errors import CheckpointError, ConfigurationError

FP32 = {"rtol": 0, "atol": 1e-4}
IDS = torch.randint(3, 61, (1, 14), generator=torch.Generator().manual_seed(1))
every = pytest.mark.parametrize("name", CASES)


class TestThereAndBack:
    @every
    def test_gives_every_bit_back(self, name: str, tmp_path: Path) -> None:
        case = CASES[name]
        model = stock(case)
        model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
        assert detect(tmp_path / "theirs").name == case.family
        result = convert(tmp_path / "theirs", tmp_path / "ours")
        assert (result.source, result.target) == (case.family, "mamba2_hybrid")
        assert result.parameters == sum(tensor.numel() for tensor in layouts.stored(tmp_path / "ours").values())
        convert(tmp_path / "ours", tmp_path / "back", to=case.family)
        assert layouts.same(layouts.stored(tmp_path / "back"), layouts.stored(tmp_path / "theirs"))
        convert(tmp_path / "back", tmp_path / "again")
        assert layouts.contents(tmp_path / "again") == layouts.contents(tmp_path / "ours")
        loaded = type(model).from_pretrained(tmp_path / "back")
        with torch.no_grad():
            assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        config = json.loads((tmp_path / "back/config.json").read_text())
        assert config["architectures"] == [type(model).__name__]

    def test_in_bf16_what_has_to_stays_in_fp32(self, tmp_path: Path) -> None:
        stock(CASES["nemotron-experts"]).save_pretrained(tmp_path / "theirs")
        convert(tmp_path / "theirs", tmp_path / "ours", dtype=torch.bfloat16)
        convert(tmp_path / "ours", tmp_path / "back", to="nemotron_h")
        for folder in ("ours", "back"):
            kinds = {name.rpartition(".")[2]: t.dtype for name, t in layouts.stored(tmp_path / folder).items()}
            exact = {name for name, dtype in kinds.items() if dtype == torch.float32}
            assert exact == {"A_log", "D", "dt_bias", "e_score_correction_bias"}
        assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"

    def test_verify_and_card(self, tmp_path: Path) -> None:
        stock(CASES["granite-experts"]).save_pretrained(tmp_path / "theirs")
        convert(tmp_path / "theirs", tmp_path / "ours")
        result = verify(tmp_path / "theirs", tmp_path / "ours")
        assert result.same
        assert result.largest == 0
        card = str(render_card(open_checkpoint(tmp_path / "ours"), name="mine", license="mit"))
        assert "A hybrid of Mamba-2 and attention" in card
        assert "| layers | 3: 2 ssd moe, 1 attention moe |" in card
        assert "| experts | 4, 2 per token |" in card
        assert "import mamba2_hf  # the model's classes" in card

    def test_a_shared_block_may_be_stored_with_every_layer_that_uses_it(self, tmp_path: Path) -> None:
        stock(CASES["zamba"]).save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        once = load_file(path)
        copies = {
            name.replace("layers.1.", "layers.4."): tensor.clone()
            for name, tensor in once.items()
            if name.startswith("model.layers.1.shared_transformer.")
        }
        assert copies
        layouts.write_safetensors(path, {**once, **copies})
        twice = open_checkpoint(tmp_path).model()
        layouts.write_safetensors(path, once)
        with torch.no_grad():
            assert torch.equal(twice(IDS).logits, open_checkpoint(tmp_path).model()(IDS).logits)
        layouts.write_safetensors(path, {**once, **{name: tensor + 1 for name, tensor in copies.items()}})
        with pytest.raises(CheckpointError, match=r"layers\.1\.shared_.* and .*layers\.4\.shared_.* two names of one"):
            open_checkpoint(tmp_path)

    def test_names_that_transformers_has_in_memory_are_read_too(self, tmp_path: Path) -> None:
        for name in ("granite-experts", "nemotron"):
            model = stock(CASES[name])
            folder = tmp_path / name
            model.save_pretrained(folder, save_original_format=False)
            with torch.no_grad():
                ours = open_checkpoint(folder).model()
                torch.testing.assert_close(ours(IDS).logits, model(IDS).logits, **FP32)

    def test_heads_that_no_config_speaks_of_are_left_behind(self, tmp_path: Path) -> None:
        stock(CASES["nemotron"]).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        layouts.write_safetensors(
            tmp_path / "model.safetensors", {**tensors, "mtp.layers.0.norm.weight": torch.ones(3)}
        )
        assert open_checkpoint(tmp_path).config.num_mtp_layers == 0


class TestHeads:
    """That predict further tokens, as Nemotron 3 has them."""

    @pytest.mark.parametrize(("heads", "pattern"), [(1, "*E"), (2, "M-E")])
    def test_gives_every_bit_back(self, heads: int, pattern: str, tmp_path: Path) -> None:
        layouts.nemotron_3(tmp_path / "theirs", heads, pattern)
        convert(tmp_path / "theirs", tmp_path / "ours")
        convert(tmp_path / "ours", tmp_path / "back", to="nemotron_h")
        assert layouts.same(layouts.stored(tmp_path / "back"), layouts.stored(tmp_path / "theirs"))
        config = json.loads((tmp_path / "back/config.json").read_text())
        assert (config["num_nextn_predict_layers"], config["mtp_hybrid_override_pattern"]) == (heads, pattern)
        model = Mamba2HybridForCausalLM.from_pretrained(tmp_path / "theirs")
        assert len(model.mtp_heads) == heads
        model.save_pretrained(tmp_path / "saved")
        assert layouts.same(layouts.stored(tmp_path / "saved"), layouts.stored(tmp_path / "ours"))
        again = Mamba2HybridForCausalLM.from_pretrained(tmp_path / "saved")
        options = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": None}
        expected = model.generate(IDS, **options)
        assert torch.equal(again.generate(IDS, use_mtp=True, **options), expected)

    def test_other_programs_get_the_model_without_them(self, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        layouts.nemotron_3(tmp_path / "theirs")
        model = open_checkpoint(tmp_path / "theirs").model()
        model.save_pretrained(tmp_path / "ours")
        convert(tmp_path / "ours", tmp_path / "back", to="nemotron_h")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
        with torch.no_grad():
            torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, **FP32)
        theirs.save_pretrained(tmp_path / "tuned")  # its config speaks of heads as before
        tuned = open_checkpoint(tmp_path / "tuned").model()
        assert tuned.mtp_heads == ()
        with torch.no_grad():
            assert torch.equal(tuned(IDS).logits, model(IDS).logits)
        convert(tmp_path / "tuned", tmp_path / "out", to="nemotron_h")
        assert json.loads((tmp_path / "out/config.json").read_text())["num_nextn_predict_layers"] == 0

    def test_may_be_left_out(self, tmp_path: Path) -> None:
        layouts.nemotron_3(tmp_path / "theirs")
        Mamba2HybridForCausalLM.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
        for folder in ("theirs", "ours"):
            model = Mamba2HybridForCausalLM.from_pretrained(tmp_path / folder, num_mtp_layers=0)
            assert not [name for name in model.state_dict() if "mtp" in name]

    def test_missing_parts_are_named(self, tmp_path: Path) -> None:
        layouts.nemotron_3(tmp_path / "theirs")
        Mamba2HybridForCausalLM.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
        for folder, name in (("theirs", "mtp.layers.1.final_layernorm.weight"), ("ours", "mtp.0.eh_proj.weight")):
            path = tmp_path / folder / "model.safetensors"
            layouts.write_safetensors(path, {key: value for key, value in load_file(path).items() if key != name})
            with pytest.raises(CheckpointError, match=rf"{name} is missing"):
                Mamba2HybridForCausalLM.from_pretrained(tmp_path / folder)

    def test_as_many_as_there_can_be(self, tmp_path: Path) -> None:
        layouts.nemotron_3(tmp_path)
        path = tmp_path / "config.json"
        layouts.write_json(path, {**json.loads(path.read_text()), "num_nextn_predict_layers": 10**9})
        with pytest.raises(ConfigurationError, match="num_mtp_layers is 1000000000, more than the"):
            open_checkpoint(tmp_path)


# What each family can express, as configurations of our own.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {
        **{"layer_blocks": ["ssd mlp", "attention mlp"], "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
        **{"ssm_num_heads": 8, "head_dim": 8, "attention_bias": True, "mlp_bias": True, "time_step_limit": (0.1, 2.0)},
    },
    "granitemoehybrid": {
        **{"layer_blocks": ["ssd moe", "attention moe"], "num_experts": 4, "shared_expert_intermediate_size": 12},
        **{"moe_intermediate_size": 8, "ssm_num_heads": 8, "head_dim": 8, "attention_scale": 0.2, "mlp_bias": False},
        **{"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "lm_head_multiplier": 0.25},
    },
    "nemotron_h": {
        **{"layer_blocks": ["ssd", "mlp", "attention", "moe"], "mlp_type": "relu2", "ssm_num_heads": 8},
        **{"num_experts": 4, "moe_router": "sigmoid", "shared_expert_intermediate_size": 12, "attention_bias": False},
        **{"tie_word_embeddings": True, "num_mtp_layers": 2, "mtp_layer_blocks": ["attention", "moe"]},
    },
    "falcon_h1": {
        **{"layer_blocks": ["ssd+attention mlp"] * 2, "head_dim": 8, "rope_parameters": ROPE, "logits_scaling": 2.0},
        **{"ssm_norm": "norm_first", "key_multiplier": 0.5, "ssm_out_bias": False},
    },
    "zamba2": {
        **{"layer_blocks": ["ssd", "shared>ssd", "shared>ssd"], "num_shared_blocks": 2, "shared_adapter_rank": 3},
        **{"ssm_num_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "attention_scale": 8**-0.5},
        **{"mlp_type": "geglu", "attention_bias": False, "rope_parameters": ROPE},
    },
}


@pytest.mark.parametrize("family", OWN)
def test_a_new_hybrid_becomes_one_of_theirs(family: str, tmp_path: Path) -> None:
    """Trained here, served there: transformers' own class gives the same logits, and the way back every bit."""
    from hybrids import make_hybrid
    from transformers import AutoModelForCausalLM

    model = make_hybrid("plain", **OWN[family])
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to=family)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert type(theirs).__module__.startswith("transformers.models.")
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS, use_cache=False).logits, model(IDS).logits, **FP32)
    convert(tmp_path / "theirs", tmp_path / "back")
    assert layouts.same(layouts.stored(tmp_path / "back"), layouts.stored(tmp_path / "ours"))
    kept = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("ours", "back")]
    assert kept[1].pop("dtype") == "float32"
    assert {**kept[0], "dtype": None} == {**kept[1], "dtype": None}


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("bamba", {"layer_blocks": ["ssd", "attention"]}, r"layer_blocks\[0\] is 'ssd': a layer of bamba is one of"),
        ("bamba", {"num_mtp_layers": 1, "mtp_layer_blocks": ["mlp"]}, "num_mtp_layers is 1: bamba has no heads"),
        ("bamba", {"rope_parameters": None}, "rope_parameters is None: attention of bamba always"),
        ("bamba", {"embedding_multiplier": 2.0}, "embedding_multiplier is 2.0: bamba has no such multiplier"),
        ("bamba", {"ssm_norm": "none"}, "ssm_norm is 'none': bamba knows only 'gate_first'"),
        ("bamba", {"ssm_num_heads": 6}, "ssm_num_heads . ssm_head_dim is 48: bamba knows only multiples"),
        ("bamba", {"head_dim": 16}, "head_dim is 16: bamba makes it hidden_size / num_attention_heads = 8"),
        ("bamba", {"attention_out_bias": False}, "attention_out_bias is False and attention_bias True"),
        ("bamba", {"ssm_norm_epsilon": 0.1}, "ssm_norm_epsilon is 0.1: bamba has one for all norms"),
        ("bamba", {"ssm_norm_group_size": 16}, "ssm_norm_group_size is 16: bamba norms"),
        ("bamba", {"attention_conv_kernel": 4}, "attention_conv_kernel is 4: bamba knows only None"),
        ("granitemoehybrid", {"moe_router": "sigmoid"}, "moe_router is 'sigmoid'"),
        ("granitemoehybrid", {"shared_expert_intermediate_size": 0}, "always has an MLP beside its experts"),
        (
            "granitemoehybrid",
            {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
            "rope_parameters is .*: granitemoehybrid rotates whole heads",
        ),
        ("nemotron_h", {"mlp_type": "swiglu"}, "mlp_type is 'swiglu': the MLPs of nemotron_h have no gate"),
        ("nemotron_h", {"rope_parameters": ROPE}, "rope_parameters is .*: nemotron_h knows only None"),
        ("nemotron_h", {"time_step_limit": (0.0, 1.0)}, "time_step_limit is .*: nemotron_h has no upper limit"),
        ("falcon_h1", {"layer_blocks": ["ssd mlp"] * 2}, "a layer of falcon_h1 is one of 'ssd.attention mlp'"),
        ("falcon_h1", {"residual_multiplier": 0.5}, "residual_multiplier is 0.5: falcon_h1 knows only 1.0"),
        (
            "zamba2",
            {"layer_blocks": ["ssd"] * 3, "num_shared_blocks": 1, "shared_adapter_rank": 0},
            "without shared blocks this is no zamba2",
        ),
        ("zamba2", {"shared_adapter_rank": 0}, "shared_adapter_rank is 0: zamba2 always has adapters"),
        ("zamba2", {"attention_scale": 0.1}, "attention_scale is 0.1: zamba2 makes it"),
        ("zamba2", {"layer_norm_epsilon": 1e-6}, "ssm_norm_epsilon is 1e-06: it is a constant of zamba2"),
        ("zamba2", {"mlp_bias": False}, "mlp_bias is False and ssm_use_bias True"),
    ],
)
def test_what_a_family_cannot_express_is_refused(
    family: str, changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    config = make_config("plain", **{**OWN[family], **changes})
    with pytest.raises(ConfigurationError, match=match):
        FORMATS[family].write_config(config)


class TestScripts:
    @pytest.mark.parametrize("family", OWN)
    def test_there_and_back(
        self, family: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name = next(name for name, case in CASES.items() if case.family == family)
        stock(CASES[name]).save_pretrained(tmp_path / "theirs")
        run_script(repository, monkeypatch, family, tmp_path / "theirs", tmp_path / "ours")
        run_script(repository, monkeypatch, family, "--back", tmp_path / "ours", tmp_path / "back")
        assert layouts.same(layouts.stored(tmp_path / "back"), layouts.stored(tmp_path / "theirs"))

    def test_what_is_only_read(self, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        TestStateSpaces().folder(tmp_path / "mamba2attn")
        TestMegatron().folder(tmp_path / "megatron")
        TestMegatron().folder(tmp_path / "pure", hybrid_override_pattern="MM", num_layers=2)
        for script, source, options, kind in (
            ("mamba2attn", "mamba2attn", ["--tokenizer", ""], "mamba2_hybrid"),
            ("megatron", "megatron", [], "mamba2_hybrid"),
            ("megatron", "pure", ["--pure"], "mamba2"),
        ):
            out = tmp_path / f"{source}-converted"
            run_script(repository, monkeypatch, script, tmp_path / source, out, *options)
            assert verify(tmp_path / source, out).largest == 0
            assert detect(out).name == kind


def run_script(repository: Path, monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(repository / "conversion" / f"from_{name}.py"), run_name="__main__")


class TestOtherFamilies:
    def test_a_pure_model_is_no_hybrid_and_the_other_way_around(self, tmp_path: Path) -> None:
        layouts.stock(tmp_path / "pure")
        stock(CASES["bamba"]).save_pretrained(tmp_path / "hybrid")
        with pytest.raises(ConfigurationError, match="is a Mamba-2 and bamba a format of hybrid models: use"):
            convert(tmp_path / "pure", tmp_path / "out", to="bamba")
        with pytest.raises(ConfigurationError, match="is a hybrid and mamba_ssm a format of Mamba-2 models: use"):
            convert(tmp_path / "hybrid", tmp_path / "out", to="mamba_ssm")
        with pytest.raises(CheckpointError, match=r"is a Mamba-2 and .* a hybrid: two different models"):
            verify(tmp_path / "pure", tmp_path / "hybrid")
        with pytest.raises(CheckpointError, match="mamba2attn: this format is only read"):
            convert(tmp_path / "hybrid", tmp_path / "out", to="mamba2attn")
        with pytest.raises(CheckpointError, match="there is remote code for pure Mamba-2 models only"):
            convert(tmp_path / "hybrid", tmp_path / "out", with_code=True)
        assert not (tmp_path / "out").exists()

    def test_two_lists_of_layers_have_to_agree(self, tmp_path: Path) -> None:
        stock(CASES["nemotron"]).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        layouts.write_json(tmp_path / "config.json", {**config, "hybrid_override_pattern": "M-*M-"})
        open_checkpoint(tmp_path)
        layouts.write_json(tmp_path / "config.json", {**config, "hybrid_override_pattern": "M-*MM"})
        with pytest.raises(ConfigurationError, match=r"hybrid_override_pattern is 'M-.MM' and layers_block"):
            open_checkpoint(tmp_path)

    def test_a_part_that_is_missing_or_too_many_is_named(self, tmp_path: Path) -> None:
        stock(CASES["nemotron-experts"]).save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        tensors = load_file(path)
        expert = "backbone.layers.1.mixer.experts.3.up_proj.weight"
        layouts.write_safetensors(path, {name: tensor for name, tensor in tensors.items() if name != expert})
        with pytest.raises(CheckpointError, match=r"layers\.1\.mixer\.experts\.3\.up_proj\.weight is missing; get"):
            open_checkpoint(tmp_path)
        layouts.write_safetensors(path, {**tensors, expert: tensors[expert][:-1]})
        with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj\.weight has shape \(15, 16\), and config.json"):
            open_checkpoint(tmp_path)
        layouts.write_safetensors(path, {**tensors, expert.replace("3", "8"): tensors[expert]})
        with pytest.raises(CheckpointError, match=r"experts\.8\.up_proj\.weight is no tensor of a model with"):
            open_checkpoint(tmp_path)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"quantization_config": {"bits": 4}}, "quantization_config says that the weights are quantized"),
            ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, more than"),
            ({"hidden_size": "32"}, "no bamba can be made of it"),
            ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
            ({"mamba_n_heads": 7}, "no bamba can be made of it"),
            ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ],
    )
    def test_a_hostile_configuration_is_refused(self, changes: dict[str, Any], match: str, tmp_path: Path) -> None:
        stock(CASES["bamba"]).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        layouts.write_json(tmp_path / "config.json", {**config, **changes})
        with pytest.raises(ConfigurationError, match=rf"config\.json: .*{match}"):
            open_checkpoint(tmp_path)


def randoms(seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, std: float = 0.3, mean: float = 0.0) -> Tensor:
        return mean + std * torch.randn(shape, generator=generator)

    return random


def mixer_tensors(random: Any, prefix: str, *, width: int, heads: int, head_dim: int, groups: int, states: int) -> Any:
    inner, bc = heads * head_dim, groups * states
    return {
        f"{prefix}.in_proj.weight": random(2 * inner + 2 * bc + heads, width),
        f"{prefix}.conv1d.weight": random(inner + 2 * bc, 1, 4),
        f"{prefix}.conv1d.bias": random(inner + 2 * bc),
        f"{prefix}.A_log": random(heads),
        f"{prefix}.D": random(heads),
        f"{prefix}.dt_bias": random(heads),
        f"{prefix}.norm.weight": random(inner, mean=1.0),
        f"{prefix}.out_proj.weight": random(width, inner),
    }


class TestStateSpaces:
    """mamba_ssm's hybrids: attention with a convolution of its own, and MLPs whose gate comes second."""

    CONFIG: dict[str, Any] = {
        **{
            "d_model": 32,
            "d_intermediate": 100,
            "n_layer": 3,
            "vocab_size": 61,
            "rms_norm": True,
            "tie_embeddings": True,
        },
        "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 8},
        **{"attn_layer_idx": [1], "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16},
        "tie_embeddings": True,
        "attn_cfg": {
            **{"causal": True, "d_conv": 4, "head_dim": 12, "num_heads": 4, "num_heads_kv": 2, "rotary_emb_dim": 6},
            **{"out_proj_bias": False, "qkv_proj_bias": True},
        },
    }

    def folder(self, folder: Path, **changes: Any) -> dict[str, Tensor]:
        folder.mkdir(exist_ok=True)
        config, random = {**self.CONFIG, **changes}, randoms()
        tensors = {"backbone.embedding.weight": random(64, 32), "backbone.norm_f.weight": random(32, mean=1.0)}
        for layer in range(3):
            outside = f"backbone.layers.{layer}"
            tensors[f"{outside}.norm.weight"] = random(32, mean=1.0)
            if layer in config["attn_layer_idx"]:
                tensors |= {
                    f"{outside}.mixer.in_proj.weight": random(96, 32),
                    f"{outside}.mixer.in_proj.bias": random(96),
                    f"{outside}.mixer.conv1d.weight": random(96, 1, 4),
                    f"{outside}.mixer.conv1d.bias": random(96),
                    f"{outside}.mixer.out_proj.weight": random(32, 48),
                }
            else:
                sizes = {"width": 32, "heads": 8, "head_dim": 8, "groups": 1, "states": 8}
                tensors |= mixer_tensors(random, f"{outside}.mixer", **sizes)
            if config["d_intermediate"]:
                tensors[f"{outside}.norm2.weight"] = random(32, mean=1.0)
                tensors[f"{outside}.mlp.fc1.weight"] = random(256, 32)
                tensors[f"{outside}.mlp.fc2.weight"] = random(32, 128)
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
        torch.save(tensors, folder / "pytorch_model.bin")
        layouts.write_json(folder / "config.json", config)
        return {name: tensor.double() for name, tensor in tensors.items()}

    def oracle(self, state: dict[str, Tensor], *, mlp: bool) -> Tensor:
        x = state["backbone.embedding.weight"][IDS[0]]
        for layer in range(3):
            outside = f"backbone.layers.{layer}"
            normed = oracles.rms_norm(x, state[f"{outside}.norm.weight"])
            if layer == 1:
                qkv = normed @ state[f"{outside}.mixer.in_proj.weight"].T + state[f"{outside}.mixer.in_proj.bias"]
                qkv = oracles.convolve(
                    qkv, state[f"{outside}.mixer.conv1d.weight"], state[f"{outside}.mixer.conv1d.bias"]
                )
                q, k, v = (part.unflatten(-1, (-1, 12)) for part in qkv.split([48, 24, 24], -1))
                attended = oracles.attend(oracles.rotate(q, 6), oracles.rotate(k, 6), v)
                x = x + attended @ state[f"{outside}.mixer.out_proj.weight"].T
            else:
                x = x + oracles.mamba2(normed, state, f"{outside}.mixer", head_dim=8, groups=1, states=8)
            if mlp:
                both = oracles.rms_norm(x, state[f"{outside}.norm2.weight"]) @ state[f"{outside}.mlp.fc1.weight"].T
                up, gate = both.chunk(2, -1)
                x = x + (up * F.silu(gate)) @ state[f"{outside}.mlp.fc2.weight"].T
        return oracles.rms_norm(x, state["backbone.norm_f.weight"]) @ state["backbone.embedding.weight"].T

    @pytest.mark.parametrize("width", [0, 100])
    @torch.no_grad()
    def test_against_a_plain_oracle(self, tmp_path: Path, width: int) -> None:
        state = self.folder(tmp_path / "theirs", d_intermediate=width)
        expected = self.oracle(state, mlp=width > 0).float()
        convert(tmp_path / "theirs", tmp_path / "ours")
        for model in (
            Mamba2HybridForCausalLM.from_pretrained(tmp_path / "theirs"),
            Mamba2HybridForCausalLM.from_pretrained(tmp_path / "ours"),
        ):
            torch.testing.assert_close(model(IDS).logits[0], expected, **FP32)
            cache, decoded = None, []
            for column in range(IDS.shape[1]):
                out = model(IDS[:, [column]], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                decoded.append(out.logits[0])
            torch.testing.assert_close(torch.cat(decoded), expected, **FP32)

    def test_as_published(self, tmp_path: Path) -> None:
        """mamba2attn-2.7b: 64 layers, six of them attention."""
        published = {
            **{"d_model": 2560, "d_intermediate": 0, "n_layer": 64, "vocab_size": 50277, "rms_norm": True},
            **{"ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [9, 18, 27, 36, 45, 56]},
            "attn_cfg": {
                **{"causal": True, "d_conv": 4, "head_dim": 128, "num_heads": 30, "out_proj_bias": False},
                **{"qkv_proj_bias": False, "rotary_emb_dim": 64},
            },
            **{"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16, "tie_embeddings": True},
        }
        entry = FORMATS["mamba2attn"]
        assert entry.recognizes(published)
        assert not FORMATS["mamba_ssm"].recognizes(published)
        config = entry.family.config(entry.read_config(published), 1000)
        assert [i for i, kind in enumerate(config.layer_blocks) if kind == "attention"] == [9, 18, 27, 36, 45, 56]
        assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (30, 30, 128)
        assert config.rope_parameters["partial_rotary_factor"] == 0.5
        with torch.device("meta"):
            model = Mamba2HybridForCausalLM(config)
        assert model.num_parameters() == pytest.approx(2.7e9, rel=0.01)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"attn_layer_idx": [3]}, r"attn_layer_idx is \[3\]: expected numbers of layers below n_layer=3"),
            ({"attn_cfg": {}}, "attn_cfg.causal is not true"),
            ({"attn_cfg": {"causal": False}}, "attn_cfg.causal is False"),
            ({"attn_cfg": {"causal": True}}, "attn_cfg.num_heads is None"),
            ({"attn_cfg": {"causal": True, "num_heads": 4, "mlp_dim": 8}}, "attn_cfg.mlp_dim is 8: only 0"),
            ({"attn_cfg": {"causal": True, "num_heads": 4, "alibi": True}}, "attn_cfg.alibi is True: not an option"),
            ({"d_intermediate": -1}, "d_intermediate is -1"),
            ({"ssm_cfg": {}}, "ssm_cfg.layer is 'Mamba1'"),
        ],
    )
    def test_what_is_refused(self, tmp_path: Path, changes: dict[str, Any], match: str) -> None:
        self.folder(tmp_path)
        layouts.write_json(tmp_path / "config.json", {**self.CONFIG, **changes})
        with pytest.raises(ConfigurationError, match=match):
            open_checkpoint(tmp_path)

    def test_the_pure_class_names_what_it_is(self, tmp_path: Path) -> None:
        self.folder(tmp_path)
        with pytest.raises(ConfigurationError, match="a model with attention or MLP layers is a hybrid"):
            Mamba2ForCausalLM.from_pretrained(tmp_path)


class TestMegatron:
    """Megatron's names, its groups of queries, keys and values, and a distributed checkpoint's split tensors."""

    CONFIG: dict[str, Any] = {
        **{"hidden_size": 32, "num_layers": 4, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 6},
        **{"ffn_hidden_size": 40, "hybrid_override_pattern": "M-*M", "mamba_state_dim": 8, "mamba_head_dim": 8},
        **{"mamba_num_groups": 2, "padded_vocab_size": 64, "untie_embeddings_and_output_weights": True},
        **{"add_bias_linear": False, "normalization": "RMSNorm", "position_embedding_type": "none"},
    }
    SIZES = {"head_dim": 8, "groups": 2, "states": 8}

    def folder(
        self, folder: Path, *, fused_norms: bool = True, split: bool = False, **changes: Any
    ) -> dict[str, Tensor]:
        folder.mkdir(exist_ok=True)
        config, random = {**self.CONFIG, **changes}, randoms()
        pattern = config["hybrid_override_pattern"]
        norms = {"M": "mixer.in_proj.", "-": "mlp.linear_fc1.", "*": "self_attention.linear_qkv."}
        tensors = {
            "embedding.word_embeddings.weight": random(64, 32),
            "decoder.final_norm.weight": random(32, mean=1.0),
        }
        tensors["output_layer.weight"] = random(64, 32)
        fc1 = 80 if config.get("swiglu") else 40
        for layer, kind in enumerate(pattern):
            outside = f"decoder.layers.{layer}"
            norm = f"{norms[kind]}layer_norm_weight" if fused_norms else "norm.weight"
            tensors[f"{outside}.{norm}"] = random(32, mean=1.0)
            if kind == "M":
                tensors |= mixer_tensors(random, f"{outside}.mixer", width=32, heads=8, **self.SIZES)
            elif kind == "-":
                tensors[f"{outside}.mlp.linear_fc1.weight"] = random(fc1, 32)
                tensors[f"{outside}.mlp.linear_fc2.weight"] = random(32, 40)
            else:
                tensors[f"{outside}.self_attention.linear_qkv.weight"] = random(2 * (2 + 2) * 6, 32)
                tensors[f"{outside}.self_attention.linear_proj.weight"] = random(32, 24)
        stored = dict(tensors)
        if split:
            for name in list(stored):
                part = name.split(".mixer.")[-1]
                if part.startswith(("in_proj.weight", "conv1d.")):
                    pieces = {"z": 64, "x": 64, "B": 16, "C": 16, "dt": 8}
                    if part.startswith("conv1d"):
                        pieces = {key: pieces[key] for key in ("x", "B", "C")}
                    cuts = stored.pop(name).split(list(pieces.values()))
                    stored |= {f"{name}.{key}": piece for key, piece in zip(pieces, cuts, strict=True)}
        layouts.write_safetensors(folder / "model.safetensors", stored)
        layouts.write_json(folder / "config.json", config)
        state = {name: tensor.double() for name, tensor in tensors.items()}
        return {
            name.replace("mixer.in_proj.layer_norm_weight", "norm.weight")
            .replace("mlp.linear_fc1.layer_norm_weight", "norm.weight")
            .replace("self_attention.linear_qkv.layer_norm_weight", "norm.weight"): tensor
            for name, tensor in state.items()
        }

    def oracle(self, state: dict[str, Tensor], pattern: str, activation: str) -> Tensor:
        x = state["embedding.word_embeddings.weight"][IDS[0]]
        for layer, kind in enumerate(pattern):
            outside = f"decoder.layers.{layer}"
            normed = oracles.rms_norm(x, state[f"{outside}.norm.weight"])
            if kind == "M":
                x = x + oracles.mamba2(normed, state, f"{outside}.mixer", **self.SIZES)
            elif kind == "-":
                inner = normed @ state[f"{outside}.mlp.linear_fc1.weight"].T
                if activation == "swiglu":
                    gate, up = inner.chunk(2, -1)
                    inner = F.silu(gate) * up
                else:
                    inner = F.gelu(inner) if activation == "gelu" else F.relu(inner).square()
                x = x + inner @ state[f"{outside}.mlp.linear_fc2.weight"].T
            else:
                groups = (normed @ state[f"{outside}.self_attention.linear_qkv.weight"].T).unflatten(-1, (2, 4, 6))
                attended = oracles.attend(groups[:, :, :2].flatten(1, 2), groups[:, :, 2], groups[:, :, 3])
                x = x + attended @ state[f"{outside}.self_attention.linear_proj.weight"].T
        return oracles.rms_norm(x, state["decoder.final_norm.weight"]) @ state["output_layer.weight"].T

    @pytest.mark.parametrize(
        ("options", "activation"),
        [
            ({}, "gelu"),
            ({"fused_norms": False, "squared_relu": True}, "relu2"),
            ({"split": True, "swiglu": True}, "swiglu"),
        ],
        ids=["fused", "apart", "split"],
    )
    @torch.no_grad()
    def test_hybrid_against_a_plain_oracle(self, tmp_path: Path, options: dict[str, Any], activation: str) -> None:
        state = self.folder(tmp_path / "theirs", **options)
        expected = self.oracle(state, "M-*M", activation).float()
        assert detect(tmp_path / "theirs").name == "megatron"
        convert(tmp_path / "theirs", tmp_path / "ours")
        model = Mamba2HybridForCausalLM.from_pretrained(tmp_path / "ours")
        torch.testing.assert_close(model(IDS).logits[0], expected, **FP32)

    @pytest.mark.parametrize("split", [False, True])
    @torch.no_grad()
    def test_pure_against_a_plain_oracle(self, tmp_path: Path, split: bool) -> None:
        changes = {"hybrid_override_pattern": "MMM", "num_layers": 3}
        state = self.folder(tmp_path / "theirs", split=split, **changes)
        assert detect(tmp_path / "theirs").name == "megatron_mamba2"
        with pytest.raises(CheckpointError, match="a Mamba-2, and no hybrid; convert it first: mamba2-hf convert"):
            Mamba2HybridForCausalLM.from_pretrained(tmp_path / "theirs")
        convert(tmp_path / "theirs", tmp_path / "ours")
        model = Mamba2ForCausalLM.from_pretrained(tmp_path / "ours")
        torch.testing.assert_close(model(IDS).logits[0], self.oracle(state, "MMM", "").float(), **FP32)

    def test_as_published(self) -> None:
        """mamba2-hybrid-8b: 24 mixers, 28 MLPs, 4 attention layers."""
        published = {
            "hybrid_layer_pattern": "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-",
            **{"hidden_size": 4096, "num_attention_heads": 32, "num_query_groups": 8, "padded_vocab_size": 256000},
            **{"untie_embeddings_and_output_weights": True, "position_embedding_type": "none"},
        }
        entry = FORMATS["megatron"]
        config = entry.family.config(entry.read_config(published), 1000)
        counts = [config.layer_blocks.count(kind) for kind in ("ssd", "mlp", "attention")]
        assert (config.num_hidden_layers, *counts) == (56, 24, 28, 4)
        assert (config.ssm_num_heads, config.ssm_n_groups, config.ssm_state_size) == (128, 8, 128)
        assert (config.intermediate_size, config.mlp_type) == (16384, "gelu")
        with torch.device("meta"):
            assert Mamba2HybridForCausalLM(config).num_parameters() == pytest.approx(8.66e9, rel=0.01)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"hybrid_override_pattern": "M-*E"}, "the pattern of layers holds 'E'"),
            ({"num_layers": 5}, "num_layers is 5 and the pattern of layers has 4"),
            ({"add_bias_linear": True}, "add_bias_linear is True: only False is known here"),
            ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm'"),
            ({"position_embedding_type": "learned_absolute"}, "position_embedding_type is 'learned_absolute'"),
            ({"padded_vocab_size": None}, "padded_vocab_size is None"),
        ],
    )
    def test_what_is_refused(self, tmp_path: Path, changes: dict[str, Any], match: str) -> None:
        self.folder(tmp_path)
        layouts.write_json(tmp_path / "config.json", {**self.CONFIG, **changes})
        with pytest.raises(ConfigurationError, match=match):
            open_checkpoint(tmp_path)


SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=5)


@given(sizes=SIZES, others=SIZES, width=st.integers(1, 3), start=st.integers(0, 12), length=st.integers(1, 12))
def test_either_side_of_an_equation_is_made_of_the_other(
    sizes: list[int], others: list[int], width: int, start: int, length: int
) -> None:
    """Joined, split and cut anywhere: the values stay in order, and each is used once."""
    rows = sum(sizes)
    while sum(others) > rows:
        others.pop()
    others = [size for size in [*others, rows - sum(others)] if size]
    theirs = tuple(Rows(f"t{number}", (size, width)) for number, size in enumerate(sizes))
    ours = tuple(Rows(f"o{number}", (size, width)) for number, size in enumerate(others))
    values = torch.arange(rows * width)
    named = dict(zip([r.name for r in theirs], values.split([size * width for size in sizes]), strict=True))
    made = {}
    for name, parts in parts_of([Equation(theirs, ours)], of_ours=True).items():
        made[name] = torch.cat([named[part.name][part.start : part.stop] for part in parts])
        stop = min(start + length, len(made[name]))
        pieces = [named[part.name][part.start : part.stop] for part in cut(parts, min(start, stop), stop)]
        assert torch.equal(torch.cat([values[:0], *pieces]), made[name][start:stop])
    assert torch.equal(torch.cat([made[r.name] for r in ours]), values)
    back = parts_of([Equation(theirs, ours)], of_ours=False)
    for name, expected in named.items():
        assert torch.equal(torch.cat([made[p.name][p.start : p.stop] for p in back[name]]), expected)
