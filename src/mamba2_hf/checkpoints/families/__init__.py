"""The published hybrid families: for each its configuration and its tensors, as those of ``mamba2_hybrid`` and back."""

from __future__ import annotations
