"""The models, to the contract of transformers."""

from __future__ import annotations

from .cache import Mamba2Cache
from .configuration_mamba2 import Mamba2Config
from .modeling_mamba2 import (
    Mamba2ForCausalLM,
    Mamba2ForSequenceClassification,
    Mamba2Model,
    Mamba2PreTrainedModel,
)

__all__ = [
    "Mamba2Cache",
    "Mamba2Config",
    "Mamba2ForCausalLM",
    "Mamba2ForSequenceClassification",
    "Mamba2Model",
    "Mamba2PreTrainedModel",
]
