"""Helpers for training loops."""

from __future__ import annotations

from .parameter_groups import no_decay_parameter_names, parameter_groups
from .sharding import fully_shard_model

__all__ = ["fully_shard_model", "no_decay_parameter_names", "parameter_groups"]
