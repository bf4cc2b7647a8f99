"""States of models and optimizers for ``torch.distributed.checkpoint``: whole tensors, whatever the mesh."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, CheckpointError
from .groups import Group
from .packed import Cut
from .tensor_parallel import every_cut, group_of, unsharded, whole_tensor


def get_state_dict(
    model: nn.Module, optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The states of a model and its optimizers, as ``torch.distributed.checkpoint.state_dict.get_state_dict`` gives
    them for a model that one process has: whole tensors under the usual names, of any mesh.

    The tensors are copies on the CPU, all of them in every process, gathered one at a time. All processes of the model
    call it. ``torch.distributed.checkpoint.save`` writes each tensor once, and ``load`` reads into what this function
    returns; :func:`set_state_dict` is next. Optimizers without a state are given one, of zeros.

    Args:
        model: plain, or with :func:`tensor_parallel`, DDP and FSDP2 over dimensions of a mesh.
        optimizers: whose states have the shapes of the parameters, or none, as those of AdamW and SGD.

    Returns:
        The model's, and the optimizers' (``state`` by the parameters' names, and ``param_groups``).

    Raises:
        ArgumentError: layers are cut for several groups of processes, or have other names than their states.
        CheckpointError: a tensor of an optimizer for a parameter in pieces has another shape than these.
    """
    from torch.distributed.checkpoint import state_dict as states

    model = _unwrapped(model)
    cuts, group = dict(every_cut(model)), group_of(model)
    taken: tuple[Any, Any] = states.get_state_dict(model, optimizers)
    given, of_optimizers = taken
    if unknown := cuts.keys() - given.keys():
        raise ArgumentError(
            f"{min(unknown)} is cut, and the model's state has no such name: call get_state_dict with the model before "
            "checkpoint_wrapper and others have renamed its layers (gradient_checkpointing_enable() renames none)"
        )
    found = dict(of_optimizers)
    if "state" in found:  # whose dictionaries are the optimizer's own
        found["state"] = {
            name: _whole_state(name, state, given.get(name), cuts.get(name), group)
            for name, state in of_optimizers["state"].items()
        }
    return {name: _whole(value, cuts.get(name), group) for name, value in given.items()}, found


def set_state_dict(
    model: nn.Module,
    optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = (),
    *,
    model_state_dict: dict[str, Any],
    optim_state_dict: dict[str, Any] | None = None,
) -> None:
    """Loads what :func:`get_state_dict` gave, on this mesh or another: each process takes its part.

    Args:
        model, optimizers: see :func:`get_state_dict`; they need not be cut or sharded as those that were saved, and
            the optimizers' groups hold parameters of the same names.
        model_state_dict: whole tensors of all that the model has, the same in every process.
        optim_state_dict: the optimizers'; None leaves these alone.

    Raises:
        ArgumentError: layers are cut for several groups of processes.
        CheckpointError: names or shapes are not the model's. Model and optimizers are as they were.
    """
    from torch.distributed.checkpoint import state_dict as states
    from torch.distributed.tensor import DTensor, distribute_tensor

    model = _unwrapped(model)
    cuts, group = dict(every_cut(model)), group_of(model)
    targets: dict[str, Any] = states.get_model_state_dict(model)
    _same_names("the checkpoint", targets, model_state_dict)
    of_parameters: dict[str, Any] = {}
    if optim_state_dict is not None:
        of_parameters = optim_state_dict["state"]
        wanted: Any = states.get_optimizer_state_dict(model, optimizers)["state"]
        frozen = targets.keys() - wanted.keys()  # whose states nobody asks for
        _same_names("the optimizer's state in the checkpoint", wanted, of_parameters.keys() - frozen)
    for name, value in model_state_dict.items():
        _fits(name, value, targets[name], cuts.get(name))
    for name, state in of_parameters.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() and (name in cuts or isinstance(targets[name], DTensor)):
                _fits(f"{key} of {name} in the optimizer's state", value, targets[name], cuts.get(name))

    def part(name: str, value: Any) -> Any:
        """What this process holds of a tensor that is cut and sharded as a parameter is."""
        target = targets[name]
        if not isinstance(value, Tensor) or value.shape != _whole_shape(target, cuts.get(name)):
            return value
        if name in cuts and group is not None:
            value = cuts[name].piece(value, group.rank, group.size)
        if isinstance(target, DTensor):  # the shard of a tensor is a view of all of it
            value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None).clone()
        return value

    states.set_model_state_dict(model, {name: part(name, value) for name, value in model_state_dict.items()})
    if optim_state_dict is not None:
        states.set_optimizer_state_dict(
            model,
            optimizers,
            {
                **optim_state_dict,
                "state": {
                    name: {key: part(name, value) for key, value in state.items()}
                    for name, state in of_parameters.items()
                },
            },
        )


def _unwrapped(model: Any) -> Any:
    """The model without DDP and ``torch.compile`` around it, which the names of a checkpoint leave out."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def _whole(value: Any, cut: Cut | None, group: Group | None) -> Any:
    """All of a tensor of which this process may have a piece, or a shard; a copy on the CPU."""
    if not isinstance(value, Tensor):
        return value
    if cut is not None and group is not None:
        return whole_tensor(value.detach(), cut, group)
    return unsharded(value.detach()).to("cpu", copy=True)


def _whole_state(
    name: str, state: dict[str, Any], parameter: Any, cut: Cut | None, group: Group | None
) -> dict[str, Any]:
    """An optimizer's state for a parameter of this name that is cut so."""
    found = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0:  # the number of steps
            found[key] = copy.deepcopy(value)
            continue
        if cut is not None and value.shape != parameter.shape:
            raise CheckpointError(
                f"{key} of {name} in the optimizer's state has the shape {tuple(value.shape)}, and the process's piece "
                f"of the parameter {tuple(parameter.shape)}: how it is cut is not known; use an optimizer whose states "
                "have the parameters' shapes, as AdamW's"
            )
        found[key] = _whole(value, cut, group)
    return found


def _same_names(what: str, expected: Collection[str], given: Collection[str]) -> None:
    missing, unknown = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if missing or unknown:
        said = [
            f"{verb} {', '.join(names[:4])}{f' and {len(names) - 4} more' if names[4:] else ''}"
            for verb, names in (("lacks", missing), ("has, and the model has not,", unknown))
            if names
        ]
        raise CheckpointError(
            f"{what} {'; it '.join(said)}: load one of a model with the same layers, tied and adapted alike"
        )


def _fits(name: str, value: Any, target: Any, cut: Cut | None) -> None:
    if isinstance(value, Tensor) and value.shape != (shape := _whole_shape(target, cut)):
        raise CheckpointError(
            f"{name} has the shape {tuple(value.shape)}, and the model's whole tensor {tuple(shape)}: load a "
            "checkpoint of a model with the same configuration"
        )


def _whole_shape(tensor: Tensor, cut: Cut | None) -> torch.Size:
    """Of a tensor that this process has a piece of."""
    shape = list(tensor.shape)
    if cut is not None:
        shape[cut.dim] = sum(part.size for part in cut.parts)
    return torch.Size(shape)
