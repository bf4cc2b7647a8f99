"""The one place that decides whether a child's weight may be read instead of calling the child."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from ..ops import Linear, LowRank
from .causal_conv1d import PLAIN_TENSORS, CausalConv1d
from .head import Head
from .norm import GatedRMSNorm, RMSNorm

_PLAIN_TYPES = (nn.Linear, Head, nn.Conv1d, CausalConv1d, RMSNorm, GatedRMSNorm)
_SHAPELESS = (__name__.partition(".")[0] + ".", "torch.nn.modules.", "peft.tuners.", "bitsandbytes.nn.")
_FSDP2 = "torch.distributed.fsdp._fully_shard."
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling ``module`` runs the ``forward`` of its class, and nothing before or after it."""
    if hasattr(module, "_hf_hook") or "forward" in module.__dict__ or all_hooked():
        return False
    return not any(getattr(module, hooks) for hooks in HOOKS)


def hooked_by_fsdp2(module: nn.Module) -> bool:
    """Whether ``module`` is sharded by ``fully_shard`` and nothing else is around its ``forward``: to call it gathers
    its weight, and nobody looks at what it returns.
    """
    if hasattr(module, "_hf_hook") or "forward" in module.__dict__ or all_hooked():
        return False
    hooks = [hook for kind in HOOKS for hook in getattr(module, kind).values()]
    return bool(hooks) and all(str(getattr(hook, "__module__", "")).startswith(_FSDP2) for hook in hooks)


def all_hooked() -> bool:
    """Whether a hook is registered for all modules, as by ``torch.nn.modules.module.register_module_forward_hook``."""
    return bool(  # looked at several times per layer and step, so without a loop
        every_module._global_forward_hooks
        or every_module._global_forward_pre_hooks
        or every_module._global_backward_hooks
        or every_module._global_backward_pre_hooks
    )


def plain_weight(module: nn.Module, part: bool = False) -> Tensor | None:
    """The weight of ``module`` if reading it amounts to calling the module, else None.

    None means that the module has to be called: it is wrapped (LoRA), quantized, parametrized, hooked (offload), its
    weight is sharded or on the meta device. Reading such a weight skips what the wrapper adds, or returns garbage.

    Args:
        module: to be read.
        part: whether the reader does what the other processes have to be told, of a module that they share; to them
            it says that gradients of copies are the reader's too.
    """
    shared = part and is_part(module)
    known = shared or type(module) in _PLAIN_TYPES or getattr(module, "has_plain_weight", False)
    if not known or not is_unhooked(module):
        return None
    weight: Any = module._parameters["weight"] if shared else module.weight
    if type(weight) not in PLAIN_TENSORS or weight.is_meta:
        return None
    return weight


def plain_linear(module: nn.Module, part: bool = False) -> Linear | None:
    """The tensors of a linear layer if reading them amounts to calling it, else None; ``part`` as for
    :func:`plain_weight`.

    A LoRA layer of PEFT can be read while one adapter of the plain kind is active, with no dropout: A and B are factors
    of a :class:`LowRank`. DoRA and other kinds, several adapters, and merged or disabled ones are called.
    """
    weight = plain_weight(module, part)
    if weight is not None:
        return Linear(weight, module._parameters["bias"] if part and is_part(module) else module.bias)  # type: ignore[arg-type]
    if torch.compiler.is_compiling():
        return None
    peft = sys.modules.get("peft.tuners.lora.layer")  # it cannot be a LoRA layer if nobody has imported them
    if peft is None or type(module) is not peft.Linear or not is_unhooked(module):
        return None
    lora: Any = module
    if lora.disable_adapters or lora.merged or len(lora.active_adapters) != 1:
        return None
    name = lora.active_adapters[0]
    base = plain_linear(lora.base_layer, part)
    if base is None or base.lora is not None:
        return None
    if name not in lora.lora_A:
        return base
    if name in lora.lora_variant or lora.fan_in_fan_out or lora.lora_B[name].bias is not None:
        return None
    dropout, down, up = lora.lora_dropout[name], *(plain_weight(f[name], part) for f in (lora.lora_A, lora.lora_B))
    if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or (dropout.p and dropout.training)):
        return None
    if down is None or up is None:
        return None
    return base.adapted(LowRank(down, up, lora.scaling[name]))


def is_part(module: nn.Module) -> bool:
    """Whether processes share ``module``, and nothing else is around its ``forward``."""
    return getattr(module, "is_part", False) and is_unhooked(module)


def plain_parameters(module: nn.Module, kind: type[nn.Module], *names: str) -> list[Tensor] | None:
    """Parameters of a module of ``kind`` that has no children, if reading them amounts to calling it, else None."""
    if not isinstance(module, kind) or not type(module).__module__.startswith(_SHAPELESS[0]):
        return None
    found: list[Tensor] = [getattr(module, name) for name in names]
    plain = is_unhooked(module) and all(type(tensor) in PLAIN_TENSORS and not tensor.is_meta for tensor in found)
    return found if plain else None


def is_unobserved(*modules: nn.Module) -> bool:
    """Whether nothing in these modules can tell if it is called on a batch or on one row of the tokens that count: all
    is this package's, or works on each token alone, and nothing is hooked.
    """
    return all(
        type(module).__module__.startswith(_SHAPELESS) and is_unhooked(module)
        for root in modules
        for module in root.modules()
    )
