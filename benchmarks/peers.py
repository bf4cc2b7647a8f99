"""The models that benchmarks run beside ours, with the same weights."""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config as StockConfig
from transformers.models.mamba2.modeling_mamba2 import Mamba2ForCausalLM as StockModel

from mamba2_hf import Mamba2ForCausalLM
from mamba2_hf.checkpoints.mapping import MAMBA_SSM_KEYS, write_mamba_ssm

OURS, STOCK, ORIGINAL = "mamba2_hf", "transformers", "mamba_ssm"
KERNELS = ("mamba_ssm", "causal_conv1d")
"""The packages whose kernels peers use."""


def installed() -> list[str]:
    """Those of ``KERNELS`` that can be imported."""
    return [name for name in KERNELS if importlib.util.find_spec(name)]


def versions() -> str:
    """Of these, to go on a list."""
    return "".join(f", {name} {importlib.import_module(name).__version__}" for name in installed())


def peers() -> list[str]:
    """Those that can run here: mamba_ssm's own model where causal_conv1d, which it needs, is installed too."""
    return [STOCK, ORIGINAL] if len(installed()) == 2 else [STOCK]


def peer(impl: str, model: Mamba2ForCausalLM) -> Any:
    """The model of a peer, which shares ``model``'s weights."""
    return stock_model(model) if impl == STOCK else OriginalModel(model)


def stock_model(model: Mamba2ForCausalLM) -> StockModel:
    """transformers' own class."""
    values = {k: v for k, v in model.config.to_dict().items() if k not in ("transformers_version", "architectures")}
    with torch.device("meta"):
        stock = StockModel(StockConfig(**values))
    stock.load_state_dict(dict(model.state_dict()), assign=True)
    stock.tie_weights()
    return stock


class OriginalModel(nn.Module):
    """mamba_ssm's own model, called as the others are; the loss is what transformers makes of its logits."""

    def __init__(self, model: Mamba2ForCausalLM) -> None:
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

        super().__init__()
        with torch.device("meta"):
            self.model = MambaLMHeadModel(MambaConfig(**write_mamba_ssm(model.config)))
        weights = {MAMBA_SSM_KEYS.theirs(name): value for name, value in model.state_dict().items()}
        self.model.load_state_dict(weights, assign=True)
        self.model.tie_weights()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        """``input_ids (B, T)`` to logits and, with labels, the loss."""
        from mamba_ssm.utils.generation import InferenceParams

        batch, length = input_ids.shape
        cache = InferenceParams(length + 1, batch) if use_cache else None
        logits = self.model(input_ids, inference_params=cache, num_last_tokens=logits_to_keep).logits
        if labels is None:
            return SimpleNamespace(logits=logits, loss=None)
        return SimpleNamespace(loss=F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()))

    def generate(self, input_ids: Tensor, max_new_tokens: int, **_: Any) -> Tensor:
        """Greedy, its steps captured in a CUDA graph."""
        return self.model.generate(input_ids, max_length=input_ids.shape[1] + max_new_tokens, cg=True)
