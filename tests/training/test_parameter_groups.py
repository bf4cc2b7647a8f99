"""Which parameters take weight decay."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize

import mamba2_hf
from mamba2_hf.layers import GatedRMSNorm, Mamba2Mixer, RMSNorm
from mamba2_hf.training import no_decay_parameter_names


@pytest.fixture
def model() -> mamba2_hf.Mamba2ForCausalLM:
    return mamba2_hf.Mamba2ForCausalLM(
        mamba2_hf.Mamba2Config(
            vocab_size=13,
            hidden_size=8,
            num_hidden_layers=2,
            num_heads=2,
            head_dim=8,
            n_groups=1,
            state_size=4,
            use_bias=True,
        )
    )


def names_of(model: nn.Module, group: dict) -> set[str]:
    members = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in members}


def test_matrices_and_convolutions_decay_and_the_rest_does_not(model: nn.Module) -> None:
    decayed, kept = mamba2_hf.parameter_groups(model, weight_decay=0.3)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    weights = {f"layers.{i}.mixer.{name}.weight" for i in range(2) for name in ("in_proj", "conv1d", "out_proj")}
    assert names_of(model, decayed) == {f"backbone.{name}" for name in weights} | {
        "backbone.embeddings.weight",
        "lm_head.weight",
    }
    assert names_of(model, decayed) | names_of(model, kept) == {name for name, _ in model.named_parameters()}
    assert not names_of(model, decayed) & names_of(model, kept)


def test_frozen_parameters_are_left_out(model: nn.Module) -> None:
    model.requires_grad_(False)
    model.backbone.layers[0].mixer.A_log.requires_grad_()
    decayed, kept = mamba2_hf.parameter_groups(model)
    assert decayed["params"] == []
    assert names_of(model, kept) == {"backbone.layers.0.mixer.A_log"}


def test_tied_weights_are_listed_once() -> None:
    config = mamba2_hf.Mamba2Config(
        vocab_size=13,
        hidden_size=8,
        num_hidden_layers=1,
        num_heads=2,
        head_dim=8,
        n_groups=1,
        state_size=4,
        tie_word_embeddings=True,
    )
    groups = mamba2_hf.parameter_groups(mamba2_hf.Mamba2ForCausalLM(config))
    parameters = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(parameters) == len(set(parameters))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT reads it
def test_biases_inside_adapters_are_biases(model: nn.Module) -> None:
    adapted = get_peft_model(model, LoraConfig(r=2, bias="all"))
    decayed, kept = mamba2_hf.parameter_groups(adapted)
    assert {name.rpartition("mixer.")[2].partition(".default")[0] for name in names_of(adapted, decayed)} == {
        f"{projection}.lora_{matrix}" for projection in ("in_proj", "out_proj") for matrix in "AB"
    }
    assert all(name.endswith("bias") for name in names_of(adapted, kept))
    assert len(kept["params"]) == 2 * 3  # in_proj, conv1d and out_proj of each layer


def test_feed_an_optimizer(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(mamba2_hf.parameter_groups(model, weight_decay=0.5), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = no_decay_parameter_names(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] if name in kept else before[name] * 0.95), name


def parametrized_mixer() -> Mamba2Mixer:
    mixer = Mamba2Mixer(8, num_heads=2, head_dim=8, n_groups=1, state_size=4)
    for name in ("weight", "bias"):
        parametrize.register_parametrization(mixer.conv1d, name, nn.Identity())
    return mixer


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (RMSNorm(4), {"weight"}),
        (GatedRMSNorm(4, 2), {"weight"}),
        (nn.Sequential(RMSNorm(4)), {"0.weight"}),
        (nn.Linear(2, 2), set()),
        (
            Mamba2Mixer(8, num_heads=2, head_dim=8, n_groups=1, state_size=4),
            {"A_log", "D", "dt_bias", "conv1d.bias", "norm.weight"},
        ),
        (
            parametrize.register_parametrization(RMSNorm(4), "weight", nn.Identity()),
            {"parametrizations.weight.original"},
        ),
        (
            parametrized_mixer(),
            {"A_log", "D", "dt_bias", "conv1d.parametrizations.bias.original", "norm.weight"},
        ),
    ],
    ids=["norm", "gated norm", "inside a container", "foreign", "mixer", "parametrized norm", "parametrized mixer"],
)
def test_names_of_single_modules(module: nn.Module, names: set[str]) -> None:
    assert no_decay_parameter_names(module) == names
