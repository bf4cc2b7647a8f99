"""mamba2-hf: Mamba-2 models, and hybrids of Mamba-2 with attention, for transformers.

Importing the package registers its models with transformers' Auto classes (see ``registration.py`` for all that it
does), so that ``AutoModelForCausalLM.from_pretrained`` builds them for every ``mamba2`` and ``mamba2_hybrid``
checkpoint.
"""

from __future__ import annotations

from . import compat, errors, ops
from .compat import use_with_transformers
from .models import (
    Completion,
    ContinuousBatch,
    Mamba2Cache,
    Mamba2Config,
    Mamba2ForCausalLM,
    Mamba2ForSequenceClassification,
    Mamba2HybridConfig,
    Mamba2HybridForCausalLM,
    Mamba2HybridForSequenceClassification,
    Mamba2HybridModel,
    Mamba2HybridPreTrainedModel,
    Mamba2Model,
    Mamba2PreTrainedModel,
    PrefixCache,
    PrefixCacheStats,
    Request,
    export_onnx,
    generate_batch,
    spread_layers,
)
from .ops import batch_invariant
from .registration import register
from .training import parameter_groups

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
    "batch_invariant",
    "compat",
    "errors",
    "export_onnx",
    "generate_batch",
    "ops",
    "parameter_groups",
    "register",
    "spread_layers",
    "use_with_transformers",
]

__version__ = "0.2.0"

register()
