"""Helpers for training loops."""

from __future__ import annotations

from .parameter_groups import no_decay_parameter_names, parameter_groups

__all__ = ["no_decay_parameter_names", "parameter_groups"]
