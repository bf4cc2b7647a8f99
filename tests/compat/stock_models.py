"""Tiny random models of transformers' own classes, one of each family that the drop-in serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hybrid_families import CASES, stock
from transformers.models.mamba2 import Mamba2Config, Mamba2ForCausalLM


def mamba2() -> Any:
    """transformers' own Mamba-2."""
    config = Mamba2Config(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        head_dim=8,
        num_heads=8,
        n_groups=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith(("conv1d.bias", "dt_bias")):
                tensor.normal_(0, 0.5)
            elif name.endswith("A_log"):
                tensor.normal_(0.7, 0.5)
            elif tensor.dim() > 1:
                tensor.normal_(0, 0.8 * tensor.shape[-1] ** -0.5)
    return model.eval()


MODELS: dict[str, Callable[[], Any]] = {
    "mamba2": mamba2,
    "bamba": lambda: stock(CASES["bamba-biases"]),
    "granite": lambda: stock(CASES["granite-experts"]),
    "nemotron": lambda: stock(CASES["nemotron-experts"]),
    "falcon": lambda: stock(CASES["falcon"]),
    "falcon-no-norm": lambda: stock(CASES["falcon-no-norm"]),
    "zamba": lambda: stock(CASES["zamba"]),
}
