"""Checkpoints of other formats, straight into a model, without a conversion on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..errors import CheckpointError
from .checkpoint import open_checkpoint
from .formats import FORMATS, HYBRID
from .hub import local_folder


def read_foreign_config(raw: dict[str, Any]) -> dict[str, Any] | None:
    """A ``config.json`` of another hybrid's format as fields of ``mamba2_hybrid``; None if it is of none.

    Raises:
        ConfigurationError: it cannot be expressed there.
    """
    for entry in FORMATS.values():
        if entry.family is HYBRID and entry.equations is not None and entry.recognizes(raw):
            return entry.read_config(raw)
    return None


def read_foreign(
    source: str | Path, dtype: str | torch.dtype | None, revision: str | None
) -> tuple[Any, dict[str, Tensor], torch.dtype] | None:
    """Configuration, tensors and dtype of a checkpoint that another program wrote; None if it is our own.

    All tensors are in memory at once, and the model is made of them: as many bytes as the weights have in ``dtype``.

    Args:
        source: a folder, or a Hub id.
        dtype: to read the weights in; None or "auto" for the one that most of them have.
        revision: of a Hub id.

    Raises:
        CheckpointError: it is broken, or a pure Mamba-2; see ``open_checkpoint``.
        ConfigurationError: it cannot be expressed as one of our models.
    """
    try:
        raw, _ = PreTrainedConfig.get_config_dict(source, **({} if revision is None else {"revision": revision}))
    except (OSError, ValueError):
        return None  # transformers will say it better
    if not raw or raw.get("model_type") == HYBRID.name:
        return None
    checkpoint = open_checkpoint(local_folder(source, revision))
    if checkpoint.format.family is not HYBRID:
        direct = checkpoint.format.name in ("mamba2", "mamba_ssm")
        remedy = "load it with Mamba2ForCausalLM" if direct else "convert it first: mamba2-hf convert"
        raise CheckpointError(f"{source}: a {checkpoint.format.family.title}, and no hybrid; {remedy}")
    kind = checkpoint.dtype if dtype in (None, "auto") else dtype
    kind = getattr(torch, kind) if isinstance(kind, str) else kind
    assert isinstance(kind, torch.dtype)
    return checkpoint.config, checkpoint.state_dict(kind), kind
