"""Helpers for training loops."""

from __future__ import annotations

from .captured import CapturedStep, capture_training
from .parameter_groups import no_decay_parameter_names, parameter_groups
from .sharding import fsdp1_wrap_policy, fully_shard_model

__all__ = [
    "CapturedStep",
    "capture_training",
    "fsdp1_wrap_policy",
    "fully_shard_model",
    "no_decay_parameter_names",
    "parameter_groups",
]
