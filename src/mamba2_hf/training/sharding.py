"""FSDP2 and FSDP 1 for models in half precision."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ArgumentError
from ..layers import Mamba2Mixer
from ..layers.fp32 import KeepsFp32
from ..models.modeling_mamba2 import Mamba2Block
from ..models.modeling_mamba2_hybrid import Mamba2HybridLayer, SharedBlock

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp.wrap import CustomPolicy

LAYERS = (Mamba2Block, Mamba2HybridLayer, SharedBlock)
GROUP_PARAMETERS = 30_000_000
"""A group of blocks has at least so many parameters: what FSDP2 does in Python for it takes less than the GPU then."""
KEPT_FRACTION = 1 / 8
"""Gathered weights of at most this part of a GPU's memory are kept between forward and backward."""


def fully_shard_model(
    model: nn.Module,
    *,
    mesh: DeviceMesh | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    group_size: int | None = None,
    reshard_after_forward: bool | int | None = None,
    **options: Any,
) -> nn.Module:
    """Applies ``torch.distributed.fsdp.fully_shard`` to groups of consecutive blocks and to the model, in place.

    Groups are what makes FSDP2 fast for small blocks, whose step otherwise waits for Python; gradients are those of
    blocks alone. The function is needed for models that train in half precision without fp32 master weights: FSDP2
    trains one dtype per group, and ``A_log``, ``D`` and ``dt_bias`` are fp32, so the other weights become groups of
    their own. A model loaded in fp32 can be sharded in any way; the three are fp32 inside the forward all the same.

    For fp32 master weights that are gathered in bf16, pass ``MixedPrecisionPolicy(torch.bfloat16, torch.float32,
    cast_forward_inputs=False)``.

    Args:
        model: holds :class:`Mamba2Block`s, or :class:`Mamba2HybridLayer`s and what they share.
        mesh: one dimension to shard over, or two to replicate and shard over; by default all processes.
        mp_policy: of ``fully_shard``; by default parameters are gathered in the dtype they are stored in.
        group_size: consecutive blocks of a group; by default as many as make ``GROUP_PARAMETERS``.
        reshard_after_forward: whether blocks drop gathered weights between forward and backward; by default where all
            weights would take more than ``KEPT_FRACTION`` of a GPU's memory.
        options: more of ``fully_shard``: ``offload_policy``, ``ignored_params``, ...

    Returns:
        ``model``.

    Raises:
        ArgumentError: ``group_size`` is no positive number.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # not in every build of PyTorch

    if group_size is not None and group_size < 1:
        raise ArgumentError(f"group_size is {group_size}, expected at least 1: the number of blocks in a group")
    policy = MixedPrecisionPolicy() if mp_policy is None else mp_policy
    casts = (policy.param_dtype if policy.cast_forward_inputs else None, policy.output_dtype)
    for dtype in dict.fromkeys(casts):
        if dtype in (torch.bfloat16, torch.float16):
            warnings.warn(
                f"mp_policy casts the fp32 residual stream to {dtype} at every block, which rounds it and takes up to "
                "5 % of a step: MixedPrecisionPolicy(..., cast_forward_inputs=False, output_dtype=None) leaves it",
                stacklevel=2,
            )
    options = {**options, "mesh": mesh, "mp_policy": policy}
    of_model = {**options, "reshard_after_forward": reshard_after_forward}  # None: its backward needs them at once
    if reshard_after_forward is None:
        reshard_after_forward = _gathered_bytes(model, policy.param_dtype) > KEPT_FRACTION * _device_memory()
    options["reshard_after_forward"] = reshard_after_forward
    for blocks in _groups(model, group_size):
        if len({p.dtype for block in blocks for p in block.parameters() if p.requires_grad}) > 1:
            parts = [part for block in blocks for part in _around_mixers(block)]
            fully_shard(parts, **options)
            blocks = [block for block in blocks if block not in parts]
        if blocks:
            fully_shard(blocks if len(blocks) > 1 else blocks[0], **options)
    fully_shard(model, **of_model)
    return model


def _groups(model: nn.Module, size: int | None) -> Iterator[list[nn.Module]]:
    """Consecutive blocks, each block once; a block that several layers share is a group of its own."""
    group: list[nn.Module] = []
    held = 0
    for block in (module for module in model.modules() if isinstance(module, LAYERS)):
        if isinstance(block, SharedBlock):
            yield [block]
            continue
        group.append(block)
        held += sum(parameter.numel() for parameter in block.parameters())
        if len(group) == size or (size is None and held >= GROUP_PARAMETERS):
            yield group
            group, held = [], 0
    if group:
        yield group


def _gathered_bytes(model: nn.Module, dtype: torch.dtype | None) -> int:
    """Size of all parameters as they are gathered."""
    return sum(p.numel() * (p.dtype if dtype is None else dtype).itemsize for p in model.parameters())


def _device_memory() -> int:
    """Bytes of this process's GPU; 0 without one."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0


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
