"""The one place that decides whether a child's weight may be read instead of calling the child."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .norm import GatedRMSNorm, RMSNorm

_PLAIN_TYPES = (nn.Linear, nn.Conv1d, RMSNorm, GatedRMSNorm)
_PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)  # torch.export traces with fake tensors
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling ``module`` runs the ``forward`` of its class, and nothing before or after it."""
    if hasattr(module, "_hf_hook") or "forward" in module.__dict__:
        return False
    return not any(getattr(module, hooks) for hooks in _HOOKS)


def plain_weight(module: nn.Module) -> Tensor | None:
    """The weight of ``module`` if reading it amounts to calling the module, else None.

    None means that the module has to be called: it is wrapped (LoRA), quantized, parametrized, hooked (offload), its
    weight is sharded or on the meta device. Reading such a weight skips what the wrapper adds, or returns garbage.
    """
    if type(module) not in _PLAIN_TYPES or not is_unhooked(module):
        return None
    weight: Any = module.weight
    if type(weight) not in _PLAIN_TENSORS or weight.is_meta:
        return None
    return weight
