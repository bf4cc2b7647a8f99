"""The models, to the contract of transformers."""

from __future__ import annotations

from .batching import Completion, ContinuousBatch, Request, generate_batch
from .cache import Mamba2Cache
from .causal_lm import SSDForCausalLM
from .configuration_mamba2 import Mamba2Config
from .configuration_mamba2_hybrid import Mamba2HybridConfig, spread_layers
from .export import export_onnx
from .modeling_mamba2 import (
    Mamba2ForCausalLM,
    Mamba2ForSequenceClassification,
    Mamba2Model,
    Mamba2PreTrainedModel,
)
from .modeling_mamba2_hybrid import (
    Mamba2HybridForCausalLM,
    Mamba2HybridForSequenceClassification,
    Mamba2HybridModel,
    Mamba2HybridPreTrainedModel,
)
from .prefix_cache import PrefixCache, PrefixCacheStats
from .pretrained import SSDPreTrainedModel

__all__ = [
    "Completion",
    "ContinuousBatch",
    "Mamba2Cache",
    "Mamba2Config",
    "Mamba2ForCausalLM",
    "Mamba2ForSequenceClassification",
    "Mamba2HybridConfig",
    "Mamba2HybridForCausalLM",
    "Mamba2HybridForSequenceClassification",
    "Mamba2HybridModel",
    "Mamba2HybridPreTrainedModel",
    "Mamba2Model",
    "Mamba2PreTrainedModel",
    "PrefixCache",
    "PrefixCacheStats",
    "Request",
    "SSDForCausalLM",
    "SSDPreTrainedModel",
    "export_onnx",
    "generate_batch",
    "spread_layers",
]
