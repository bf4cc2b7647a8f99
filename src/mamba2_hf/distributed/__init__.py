"""Models on several devices at once: what processes send each other, and who holds what.

``torch.distributed`` is imported where it is used: not every build of PyTorch has it.
"""

from __future__ import annotations

from .context_parallel import Context, context_parallel
from .groups import Group
from .state_dict import get_state_dict, set_state_dict
from .tensor_parallel import clip_grad_norm_, tensor_parallel, whole_state_dict

__all__ = [
    "Context",
    "Group",
    "clip_grad_norm_",
    "context_parallel",
    "get_state_dict",
    "set_state_dict",
    "tensor_parallel",
    "whole_state_dict",
]
