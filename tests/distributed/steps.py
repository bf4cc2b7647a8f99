"""Tokens one by one, as workers take them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mamba2_hf import Mamba2Cache


def ops_serve(patch: pytest.MonkeyPatch) -> None:
    """Steps of layers are ops wherever they are on a GPU."""

    def serves(stream: Tensor, rows: int = 1) -> bool:
        return stream.shape[1] == 1 and len(stream) <= rows and not torch.is_grad_enabled()

    patch.setattr("mamba2_hf.layers.attention.attention_step_serves", lambda stream, _: serves(stream, 64))
    patch.setattr("mamba2_hf.layers.mlp.step_serves", serves)
    patch.setattr("mamba2_hf.layers.moe.step_serves", serves)


def token_by_token(model: Any, ids: Tensor, count: int) -> Tensor:
    """Logits of a prompt's last token and of each that is written then, ``(B, 1 + count, vocab)``."""
    cache = Mamba2Cache(model.config, static=True, max_length=ids.shape[1] + count)
    found = [model(ids, past_key_values=cache, logits_to_keep=1).logits]
    for _ in range(count):
        found.append(model(found[-1].argmax(-1), past_key_values=cache).logits)
    return torch.cat(found, 1)
