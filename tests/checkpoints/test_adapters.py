"""PEFT's adapters follow a model to another format and back, and adapt it in the same way there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
from hybrid_families import CASES, stock
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from mamba2_hf import Mamba2HybridForCausalLM
from mamba2_hf.checkpoints import convert, convert_adapter
from mamba2_hf.cli import app
from mamba2_hf.errors import CheckpointError, ConfigurationError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT reads it
FP32 = {"rtol": 0, "atol": 1e-4}
IDS = torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(1))
THEIRS = {
    "bamba": ["in_proj", "out_proj", "q_proj", "o_proj", "gate_proj", "down_proj"],
    "granite": ["in_proj", "q_proj", "v_proj", "input_linear", "output_linear"],
    "granite-experts": ["in_proj", "k_proj", "input_linear"],
    "nemotron-experts": ["in_proj", "q_proj", "up_proj", "down_proj", "fc1_latent_proj"],
    "falcon": ["in_proj", "k_proj", "up_proj", "down_proj"],
    "zamba": ["in_proj", "out_proj", "linear"],
}


def adapt(model: Any, folder: Path, **options: Any) -> Tensor:
    """An adapter with random weights in both halves, saved; and the adapted logits."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **options}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
        adapted.save_pretrained(folder)
        return adapted.eval()(IDS, use_cache=False).logits


@torch.no_grad()
def adapted_logits(base: Any, folder: Path) -> Tensor:
    return peft.PeftModel.from_pretrained(base, folder).eval()(IDS, use_cache=False).logits


@pytest.mark.parametrize("name", THEIRS)
def test_from_theirs_to_ours_and_back(name: str, tmp_path: Path) -> None:
    model = stock(CASES[name])
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        plain = model(IDS, use_cache=False).logits
    whole = {"modules_to_save": ["lm_head"]} if name == "bamba" else {}
    expected = adapt(model, tmp_path / "theirs", target_modules=THEIRS[name], **whole)
    assert (expected - plain).abs().max() > 0.01
    convert(tmp_path / "base", tmp_path / "converted")
    for base in ("base", "converted"):  # either tells the sizes
        result = convert_adapter(tmp_path / "theirs", tmp_path / f"ours-{base}", base=tmp_path / base)
        assert (result.source, result.target) == (CASES[name].family, "mamba2_hybrid")
    assert (
        layouts.contents(tmp_path / "ours-base")["adapter_model.safetensors"]
        == (layouts.contents(tmp_path / "ours-converted")["adapter_model.safetensors"])
    )
    ours = Mamba2HybridForCausalLM.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(adapted_logits(ours, tmp_path / "ours-base"), expected, **FP32)
    convert_adapter(tmp_path / "ours-base", tmp_path / "back", base=tmp_path / "base", to=CASES[name].family)
    tensors = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("theirs", "back")]
    assert layouts.same(*tensors)
    torch.testing.assert_close(adapted_logits(stock(CASES[name]), tmp_path / "back"), expected, **FP32)


UNLIKE = {"rank_pattern": {"gate_proj": 2}, "alpha_pattern": {"up_proj": 9}}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, UNLIKE], ids=["alike", "rslora", "unlike"])
def test_two_adapters_of_what_is_one_projection_there(options: dict[str, Any], tmp_path: Path) -> None:
    """Granite joins gate and up projection: the ranks of both add up."""
    stock(CASES["granite"]).save_pretrained(tmp_path / "base")
    ours = Mamba2HybridForCausalLM.from_pretrained(tmp_path / "base")
    targets = ["gate_proj", "up_proj", "in_proj"]
    expected = adapt(ours, tmp_path / "ours", target_modules=targets, **options)
    convert_adapter(tmp_path / "ours", tmp_path / "theirs", base=tmp_path / "base", to="granitemoehybrid")
    torch.testing.assert_close(adapted_logits(stock(CASES["granite"]), tmp_path / "theirs"), expected, **FP32)
    joined = load_file(tmp_path / "theirs/adapter_model.safetensors")
    name = "base_model.model.model.layers.0.shared_mlp.input_linear.lora_A.weight"
    assert joined[name].shape == ((5 if "rank_pattern" in options else 6), 32)


def test_an_adapter_of_one_half(tmp_path: Path) -> None:
    stock(CASES["granite"]).save_pretrained(tmp_path / "base")
    ours = Mamba2HybridForCausalLM.from_pretrained(tmp_path / "base")
    expected = adapt(ours, tmp_path / "ours", target_modules=["up_proj"])
    convert_adapter(tmp_path / "ours", tmp_path / "theirs", base=tmp_path / "base", to="granitemoehybrid")
    torch.testing.assert_close(adapted_logits(stock(CASES["granite"]), tmp_path / "theirs"), expected, **FP32)


def test_dora(tmp_path: Path) -> None:
    stock(CASES["bamba"]).save_pretrained(tmp_path / "base")
    options = {"target_modules": ["q_proj", "gate_proj"], "use_dora": True}
    expected = adapt(stock(CASES["bamba"]), tmp_path / "theirs", **options)
    convert_adapter(tmp_path / "theirs", tmp_path / "ours", base=tmp_path / "base")
    ours = Mamba2HybridForCausalLM.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(adapted_logits(ours, tmp_path / "ours"), expected, **FP32)
    stock(CASES["granite"]).save_pretrained(tmp_path / "granite")
    model = Mamba2HybridForCausalLM.from_pretrained(tmp_path / "granite")
    adapt(model, tmp_path / "halves", target_modules=["up_proj"], use_dora=True)
    with pytest.raises(ConfigurationError, match="DoRA adapters are of projections that are one there"):
        convert_adapter(tmp_path / "halves", tmp_path / "out", base=tmp_path / "granite", to="granitemoehybrid")


class TestRefused:
    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        stock(CASES["bamba"]).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    def test_shared_blocks(self, tmp_path: Path) -> None:
        stock(CASES["zamba"]).save_pretrained(tmp_path / "base")
        adapt(stock(CASES["zamba"]), tmp_path / "theirs", target_modules=["q_proj"])
        with pytest.raises(ConfigurationError, match="is in a block that layers share"):
            convert_adapter(tmp_path / "theirs", tmp_path / "out", base=tmp_path / "base")
        ours = Mamba2HybridForCausalLM.from_pretrained(tmp_path / "base")
        adapt(ours, tmp_path / "ours", target_modules=["q_proj"])
        with pytest.raises(ConfigurationError, match=r"shared_blocks.* is in a block that layers share"):
            convert_adapter(tmp_path / "ours", tmp_path / "out", base=tmp_path / "base", to="zamba2")
        assert not (tmp_path / "out").exists()

    def test_other_models_modules_and_kinds(self, base: Path, tmp_path: Path) -> None:
        adapt(stock(CASES["bamba"]), tmp_path / "theirs", target_modules=["q_proj"])
        with pytest.raises(ConfigurationError, match="a layer of nemotron_h is one of"):
            convert_adapter(tmp_path / "theirs", tmp_path / "out", base=base, to="nemotron_h")
        with pytest.raises(ConfigurationError, match="mamba2: adapters are converted between formats of hybrids"):
            convert_adapter(tmp_path / "theirs", tmp_path / "out", base=base, to="mamba2")
        adapt(stock(CASES["falcon"]), tmp_path / "falcon", target_modules=["q_proj"])
        with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj is no module of the base"):
            convert_adapter(tmp_path / "falcon", tmp_path / "out", base=base)
        config = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
        layouts.write_json(tmp_path / "theirs/adapter_config.json", {**config, "peft_type": "LOHA"})
        with pytest.raises(CheckpointError, match="peft_type is 'LOHA', only LORA is known here"):
            convert_adapter(tmp_path / "theirs", tmp_path / "out", base=base)


def test_from_the_command_line(tmp_path: Path) -> None:
    stock(CASES["bamba"]).save_pretrained(tmp_path / "base")
    adapt(stock(CASES["bamba"]), tmp_path / "theirs", target_modules=["q_proj"])
    arguments = ["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--base", str(tmp_path / "base")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'ours'}\n"
    assert "bamba to mamba2_hybrid: an adapter of 1 modules" in result.stderr
