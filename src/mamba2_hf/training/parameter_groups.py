"""Which parameters take weight decay."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ..layers import MLP, Attention, GatedRMSNorm, Mamba2Mixer, MoE, RMSNorm
from ..layers.mixer import FP32_PARAMETERS

_KEPT = {*FP32_PARAMETERS, "bias"}


def no_decay_parameter_names(model: nn.Module) -> set[str]:
    """Names of the parameters of our layers inside ``model`` that weight decay would harm.

    Decay pulls ``A_log`` towards a decay rate of 1, ``D`` towards no skip, and norms towards silence.
    """
    names: set[str] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, Mamba2Mixer):
            kept = _KEPT
        elif isinstance(module, (RMSNorm, GatedRMSNorm)):
            kept = {"weight"}
        elif isinstance(module, (Attention, MLP, MoE)):
            kept = {"bias"}
        else:
            continue
        found = [name for name, _ in module.named_parameters() if _own_name(name) in kept]
        names.update(f"{prefix}.{name}" if prefix else name for name in found)
    return names


def _own_name(name: str) -> str:
    """What the module that has a parameter calls it: what wraps a projection (LoRA) puts it further down, and
    ``torch.nn.utils.parametrize`` elsewhere.
    """
    return re.sub(r"parametrizations\.(\w+)\.original\d*$", r"\1", name).rpartition(".")[2]


def parameter_groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Two groups for a ``torch.optim`` optimizer: parameters with weight decay, and those without it.

    Args:
        model: any module; frozen parameters are left out.
        weight_decay: of the first group.

    Returns:
        ``[{"params": ..., "weight_decay": weight_decay}, {"params": ..., "weight_decay": 0.0}]``.
    """
    kept_off = no_decay_parameter_names(model)
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name in kept_off]["params"].append(parameter)
    return groups
