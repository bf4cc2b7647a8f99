"""FSDP2 and FSDP 1 for models in half precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..layers import Mamba2Mixer
from ..layers.fp32 import KeepsFp32
from ..models.modeling_mamba2 import Mamba2Block
from ..models.modeling_mamba2_hybrid import Mamba2HybridLayer, SharedBlock

if TYPE_CHECKING:
    from torch.distributed.fsdp.wrap import CustomPolicy

LAYERS = (Mamba2Block, Mamba2HybridLayer, SharedBlock)


def fully_shard_model(model: nn.Module, **options: Any) -> nn.Module:
    """Applies ``torch.distributed.fsdp.fully_shard`` to every block and to the model, in place.

    It is needed for models that train in half precision without fp32 master weights: FSDP2 trains one dtype per group,
    and ``A_log``, ``D`` and ``dt_bias`` are fp32, so the other weights of a block become a group of their own. A model
    loaded in fp32 can be sharded in any way, with ``MixedPrecisionPolicy(param_dtype=torch.bfloat16)`` or without; the
    three are fp32 inside the forward all the same.

    Args:
        model: holds :class:`Mamba2Block`s, or :class:`Mamba2HybridLayer`s and what they share.
        options: of ``fully_shard``: ``mesh``, ``mp_policy``, ``reshard_after_forward``, ``offload_policy``, ...

    Returns:
        ``model``.
    """
    from torch.distributed.fsdp import fully_shard  # not in every build of PyTorch

    for block in [module for module in model.modules() if isinstance(module, LAYERS)]:
        if len({parameter.dtype for parameter in block.parameters() if parameter.requires_grad}) > 1:
            fully_shard(_around_mixers(block), **options)
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def fsdp1_wrap_policy(model: nn.Module) -> CustomPolicy:
    """The ``auto_wrap_policy`` for ``torch.distributed.fsdp.FullyShardedDataParallel`` (FSDP 1).

    FSDP 1 flattens the parameters of a unit into one of one dtype. So beside the layers, every module with parameters
    that stay in fp32 is a unit, as are the modules inside it: bf16 weights can be wrapped, and whatever
    ``MixedPrecision`` says of the others, these parameters are fp32 inside the forward.

    Args:
        model: to be wrapped, or what holds it; not wrapped yet.
    """
    from torch.distributed.fsdp.wrap import CustomPolicy  # not in every build of PyTorch

    units: dict[nn.Module, bool | dict[str, Any]] = {}
    for module in model.modules():
        if isinstance(module, KeepsFp32):
            units[module] = {"mixed_precision": None}
            units.update(dict.fromkeys(module.children(), True))
        elif isinstance(module, LAYERS):
            units[module] = True
    return CustomPolicy(lambda module: units.get(module, False))


def _around_mixers(module: nn.Module) -> list[nn.Module]:
    """What is in a module but for the parameters of its mixers' own, as few modules as there can be."""
    if isinstance(module, Mamba2Mixer):
        return list(module.children())
    if any(isinstance(inner, Mamba2Mixer) for inner in module.modules()):
        return [part for child in module.children() for part in _around_mixers(child)]
    return [module]
