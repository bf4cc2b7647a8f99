"""mamba2-hf: Mamba-2 models for transformers.

Importing the package registers its models with transformers' Auto classes (see ``registration.py`` for all that it
does), so that ``AutoModelForCausalLM.from_pretrained`` builds them for every ``mamba2`` checkpoint.
"""

from __future__ import annotations

from . import errors, ops
from .models import (
    Mamba2Cache,
    Mamba2Config,
    Mamba2ForCausalLM,
    Mamba2ForSequenceClassification,
    Mamba2Model,
    Mamba2PreTrainedModel,
)
from .registration import register
from .training import parameter_groups

__all__ = [
    "Mamba2Cache",
    "Mamba2Config",
    "Mamba2ForCausalLM",
    "Mamba2ForSequenceClassification",
    "Mamba2Model",
    "Mamba2PreTrainedModel",
    "errors",
    "ops",
    "parameter_groups",
    "register",
]

__version__ = "0.1.0"

register()
