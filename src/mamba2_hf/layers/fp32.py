"""Parameters that stay in fp32 whatever happens to the module around them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import ArgumentError


class KeepsFp32(nn.Module):
    """A module whose ``fp32_parameters`` no cast reaches.

    ``.to(dtype)``, ``.half()`` and ``.bfloat16()`` leave them and their gradients in fp32 (fp64 is kept too). FSDP2
    (``fully_shard``) gathers them as they are stored, whatever ``MixedPrecisionPolicy.param_dtype`` says; only their
    gradients are rounded to ``param_dtype``, like those of all parameters that are reduced together. FSDP2 offers no
    such choice together with a number as ``reshard_after_forward`` (NotImplementedError): pass True or False.
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ()
    gathered_grad_dtype: torch.dtype | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept: set[int] = set()
        for name in self.fp32_parameters:
            parameter = getattr(self, name)
            kept.update((id(parameter), id(parameter.grad)))

        def keep(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if id(tensor) in kept and out.dtype in (torch.float16, torch.bfloat16):
                out = tensor.to(out.device, torch.float32)
            return out

        super()._apply(keep, recurse)
        for name in self.fp32_parameters:
            _gather_as_stored(getattr(self, name))
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 registers the sharded parameter here, and the gathered one for as long as the module runs.
        if name in self.fp32_parameters:
            if _gather_as_stored(value):
                self._refuse_mixed_group(name, value)
            elif self.gathered_grad_dtype is not None:
                value.grad_dtype = self.gathered_grad_dtype
        super().__setattr__(name, value)

    def _refuse_mixed_group(self, name: str, parameter: Tensor) -> None:
        """FSDP2 would refuse trainable parameters of several dtypes too, but only in the first forward."""
        from torch.distributed.fsdp import FSDPModule  # there is a sharded parameter, so there is torch.distributed

        together = (child for child in self.children() if not isinstance(child, FSDPModule))
        for other in (other for child in together for other in child.parameters()):
            if parameter.requires_grad and other.requires_grad and other.dtype != parameter.dtype:
                raise ArgumentError(
                    f"fully_shard got {name} in {parameter.dtype} together with weights in {other.dtype}, and FSDP2 "
                    "trains one dtype per group: load the model with dtype=torch.float32 and have it gathered in "
                    f"{other.dtype} by MixedPrecisionPolicy(param_dtype={other.dtype}), or shard it with "
                    "mamba2_hf.training.fully_shard_model, which makes groups of their own"
                )


def without_casts(policy: Any) -> Any:
    """A ``MixedPrecisionPolicy`` of FSDP2 that leaves what modules get and return as it is. With casts to the dtype of
    the weights, which is its default for inputs, the fp32 residual stream is rounded before every layer.
    """
    return dataclasses.replace(policy, cast_forward_inputs=False, output_dtype=None)


def stop_casts(model: nn.Module) -> None:
    """Replaces the policies of FSDP2's modules by those :func:`without_casts`, where others have sharded ``model``."""
    from torch.distributed.fsdp import FSDPModule  # not in every build of PyTorch

    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            state._mp_policy = without_casts(state._mp_policy)


class _StoredShard(Tensor):
    """The local part of a sharded parameter that knows how FSDP2 is to gather it: in the dtype it is stored in.

    FSDP2 asks the local tensor itself, by the two ``fsdp_*`` methods. It pads and moves that tensor, which has to keep
    them; the result of any other operation is a plain tensor.
    """

    _KEEPING = frozenset({Tensor.narrow, Tensor.new_zeros, Tensor.to, Tensor.cpu, Tensor.pin_memory})

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                if func in cls._KEEPING:
                    return out.as_subclass(cls)
                if isinstance(out, cls):
                    return out.as_subclass(Tensor)
            return out

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: tuple[int, ...], module: KeepsFp32, mp_policy: Any
    ) -> tuple[tuple[Tensor], None]:
        """What this process sends: the local part, padded to the size that all have."""
        module.gathered_grad_dtype = mp_policy.param_dtype
        local = self.as_subclass(Tensor)
        size = -(-outer_size[0] // mesh.size())
        if local.shape[0] < size:
            local = torch.cat([local, local.new_zeros(size - local.shape[0])])
        return (local,), None

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor], metadata: None, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[()]] | None:
        """The whole parameter (cut to its size by FSDP2, and written in place from the second time on)."""
        return (gathered[0], ()) if out is None else None


def _gather_as_stored(parameter: Tensor) -> bool:
    """Marks the local part of a sharded parameter; False if the parameter is not sharded."""
    local = getattr(parameter, "_local_tensor", None)  # that of a DTensor
    if local is None:
        return False
    if not isinstance(local, _StoredShard):
        parameter._local_tensor = local.as_subclass(_StoredShard)  # type: ignore[attr-defined]
    return True
