"""Tiny random models that the model tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mamba2_hf import Mamba2Config, Mamba2ForCausalLM

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 8,
    "n_groups": 2,
    "state_size": 8,
    "conv_kernel": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_config(**changes: Any) -> Mamba2Config:
    """A configuration in which no two sizes agree by accident; biases on, so that padding would show."""
    return Mamba2Config(**{**TINY, "use_bias": True, **changes})


def make_model(cls: type[Any] = Mamba2ForCausalLM, *, seed: int = 0, **changes: Any) -> Any:
    """A model in eval mode whose parameters are all far from zero, biases included."""
    torch.manual_seed(seed)
    model = cls(make_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "embeddings.weight", "lm_head.weight")):
                parameter.normal_(std=0.5)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Mamba2Config]:
    """``make_config``: keyword arguments change single fields."""
    return make_config


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """``make_model``: a class, a seed, and changes to the configuration."""
    return make_model
