"""What every pretrained model here has in common: initialization, dtype policy, and what loading refuses."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from ..distributed.groups import Group
from ..distributed.tensor_parallel import tensor_parallel, whole_state_dict
from ..errors import ArgumentError, CheckpointError
from ..layers import GatedRMSNorm, Mamba2Mixer, RMSNorm
from ..layers.fp32 import stop_casts
from ..layers.mixer import FP32_PARAMETERS


class SSDPreTrainedModel(PreTrainedModel):
    """Initialization, dtype policy and the flags by which transformers knows what the models can do."""

    base_model_prefix = "backbone"
    _input_embed_layer = "embeddings"
    main_input_name = "input_ids"
    _keep_in_fp32_modules_strict = list(FP32_PARAMETERS)
    _skip_keys_device_placement = ["past_key_values", "cache_params", "cache"]
    _can_compile_fullgraph = True
    _is_stateful = False  # to transformers: states cannot be taken back. Those of a Mamba2Cache can.
    supports_gradient_checkpointing = True
    old_names: ClassVar[dict[str, str]] = {}
    """Patterns of names that checkpoints may have for tensors, and the names now."""
    other_names: ClassVar[dict[str, str]] = {}
    """Names by which code for any model reaches for a part, and those by which the part is kept and saved. To read by
    the former, a class has properties.
    """

    tensor_group: Group | None = None
    """Processes that share the layers; see :func:`mamba2_hf.distributed.tensor_parallel`."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(self.other_names.get(name, name), value)  # a module would be added beside a property

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        config.validate()  # fields that were assigned one by one have not been judged together yet
        super().__init__(config, *args, **kwargs)

    @classmethod
    def prepare_distribute_model(cls, distributed_config: Any, device_map: Any = None) -> Any:
        """As in transformers, except for what these models cannot do, which is refused before processes meet.

        Raises:
            ArgumentError: pipeline, expert or sequence parallelism is asked for.
        """

        def asked(name: str) -> Any:
            config = distributed_config
            return config.get(name) if isinstance(config, dict) else getattr(config, name, None)

        if (asked("pp_size") or 1) > 1:
            raise ArgumentError(
                f"pp_size={asked('pp_size')}: {cls.__name__} has no pipeline parallelism. To spread its weights over "
                'GPUs use tp_size or fsdp_size of the DistributedConfig, or device_map="auto" in one process'
            )
        if (asked("ep_size") or 1) > 1 or asked("enable_expert_parallel"):
            given = f"ep_size={asked('ep_size')}" if asked("ep_size") else "enable_expert_parallel=True"
            raise ArgumentError(
                f"{given}: {cls.__name__} does not deal out whole experts. Use tp_size alone: every "
                "process then has some of the inner channels of every expert"
            )
        if asked("enable_sequence_parallel"):
            raise ArgumentError(
                f"enable_sequence_parallel=True: norms of {cls.__name__} see all tokens in every process. Leave it "
                "out; to spread long sequences, use mamba2_hf.distributed.context_parallel"
            )
        return super().prepare_distribute_model(distributed_config, device_map)

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """As in transformers, with the residual stream in fp32 under ``fsdp_mixed_precision``."""
        model = super().maybe_distribute_model(model, distributed_config, mesh_manager)
        if mesh_manager is not None and distributed_config.fsdp_mixed_precision:
            stop_casts(model)
        return model

    @property
    def device(self) -> torch.device:
        """Where inputs belong: the device of the first parameter or, if accelerate brings it from elsewhere for every
        call, the one that it is brought to.
        """
        device: torch.device = super().device
        if device.type != "meta":
            return device
        brought = (getattr(hook, "execution_device", None) for module in self.modules() for hook in _hooks(module))
        return next((torch.device(each) for each in brought if each is not None), device)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The original's initialization; every write goes through ``transformers.initialization``, which leaves loaded
        weights alone.
        """
        if isinstance(module, Mamba2Mixer):
            self._init_mixer(module)
        elif isinstance(module, (RMSNorm, GatedRMSNorm)):
            init.ones_(module.weight)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Linear):
            self._init_linear(module, scale=1.0)
        else:
            super()._init_weights(module)

    def _init_mixer(self, mixer: Mamba2Mixer) -> None:
        config = self.config
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = torch.exp(torch.empty_like(mixer.dt_bias).uniform_(low, high)).clamp(min=config.time_step_floor)
        init.copy_(mixer.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        init.copy_(mixer.A_log, torch.log(torch.empty_like(mixer.A_log).uniform_(1, 16)))
        init.ones_(mixer.D)
        self._init_conv(mixer.conv1d, mixer.conv_kernel)
        self._init_residual(mixer.out_proj)

    @staticmethod
    def _init_conv(conv1d: nn.Module, taps: int) -> None:
        init.kaiming_uniform_(conv1d.weight, a=math.sqrt(5))
        if conv1d.bias is not None:
            bound = 1 / math.sqrt(taps)
            init.uniform_(conv1d.bias, -bound, bound)

    def _init_residual(self, linear: nn.Module) -> None:
        """New weights that write to the residual stream."""
        if self.config.rescale_prenorm_residual and isinstance(linear, nn.Linear):
            # Drawn anew rather than multiplied, so that however often this runs, the scale is there once.
            self._init_linear(linear, scale=self._residual_scale)

    @property
    def _residual_scale(self) -> float:
        """What keeps the residual stream from growing with the number of branches that are added to it."""
        return 1 / math.sqrt(self.config.num_hidden_layers)

    @staticmethod
    def _init_linear(linear: nn.Linear, scale: float) -> None:
        """Kaiming uniform as in ``nn.Linear`` itself, times ``scale``."""
        bound = scale / math.sqrt(linear.in_features)
        init.uniform_(linear.weight, -bound, bound)
        if linear.bias is not None:
            init.zeros_(linear.bias)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        key_mapping: dict[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; also reads old names of tensors, and refuses what cannot be such a model.

        With ``distributed_config=DistributedConfig(tp_size=N)``, or ``tp_plan="auto"``, every process reads the whole
        model into its host's memory, and keeps and moves its part (:func:`~mamba2_hf.distributed.tensor_parallel`).

        Raises:
            ArgumentError: the layers cannot be shared by so many processes.
            ProcessError: another process cannot load or share the model.
            CheckpointError: the backbone lacks a weight, a weight has another shape (unless
                ``ignore_mismatched_sizes=True``, which makes up new values for both), or a decay rate, skip or step
                bias is not finite.
        """
        placed = _tensor_parallel_alone(cls, kwargs)
        if placed is not None:
            config, mesh, device = placed
            with Group.of(mesh, "tp").together():
                loaded = cls.from_pretrained(
                    pretrained_model_name_or_path,
                    *args,
                    key_mapping=key_mapping,
                    ignore_mismatched_sizes=ignore_mismatched_sizes,
                    output_loading_info=output_loading_info,
                    **kwargs,
                )
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model.config.distributed_config = config
            tensor_parallel(model, mesh).to(device)
            return loaded
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            key_mapping={**cls.old_names, **(key_mapping or {})},
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
            **kwargs,
        )
        source = pretrained_model_name_or_path or "the state dict"
        if not ignore_mismatched_sizes:
            _refuse_made_up(model, info, source)
        _refuse_infinite(model, source)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, always under the names of the models themselves. The saved config says
        ``rescale_prenorm_residual: false``: the weights are scaled already, and stock transformers would scale them
        again at every load.
        """
        kwargs.setdefault("save_original_format", False)
        rescale = self.config.rescale_prenorm_residual
        self.config.rescale_prenorm_residual = False
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.config.rescale_prenorm_residual = rescale

    def share(self, group: Group, mesh: Any) -> None:
        """Notes that a group of processes shares the layers, for Trainer and accelerate as transformers does.

        Args:
            group: that each has its part of the layers for.
            mesh: of the group, as it was given; None if it was not.
        """
        from transformers.distributed import DistributedConfig

        self.tensor_group = group
        self._tp_size, self._device_mesh, self._is_distributed_loading_by_transformers = group.size, mesh, True
        if getattr(self.config, "distributed_config", None) is None:
            self.config.distributed_config = DistributedConfig(tp_size=group.size)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, of a model that one process has.

        Raises:
            ArgumentError: processes share the vocabulary's rows.
        """
        if self.tensor_group is not None and args[:1] != (None,):
            raise ArgumentError(
                f"{self.tensor_group.size} processes share the model: resize_token_embeddings and save it where one "
                "process has the whole model, then load it with tp_size"
            )
        return super().resize_token_embeddings(*args, **kwargs)

    def save_distributed_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, which writes sharded tensors.

        Raises:
            ArgumentError: processes share the layers: their tensors are parts that no loader could join.
        """
        if self.tensor_group is not None:
            raise ArgumentError(
                f"distributed_checkpoint=True of a model that {self.tensor_group.size} processes share: leave it out, "
                "save_pretrained writes the whole checkpoint; torch.distributed.checkpoint saves what "
                "mamba2_hf.distributed.get_state_dict(model, optimizer) gives"
            )
        super().save_distributed_checkpoint(*args, **kwargs)

    def gather_sharded_state_dict_for_save(
        self, model: nn.Module, state_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers, of parts of tensors too. All processes of the group call it, the first of them saves."""
        if self.tensor_group is not None:
            return whole_state_dict(model, self.tensor_group, state_dict)
        found: dict[str, Any] = super().gather_sharded_state_dict_for_save(model, state_dict, *args, **kwargs)
        return found


def _tensor_parallel_alone(cls: type[SSDPreTrainedModel], kwargs: dict[str, Any]) -> tuple[Any, Any, Any] | None:
    """Takes from arguments of ``cls.from_pretrained`` what asks for tensor parallelism and nothing else; returns the
    ``DistributedConfig``, the mesh's dimension and the device. None if transformers is to spread the model, or nobody.
    """
    from transformers.distributed import DistributedConfig

    config, plan, size = (kwargs.get(name) for name in ("distributed_config", "tp_plan", "tp_size"))
    mesh = kwargs.get("device_mesh")
    if config is None and plan is None and size is None:
        return None
    if config is not None and (plan is not None or size is not None):
        raise ArgumentError("pass either distributed_config or tp_plan and tp_size, not both")
    if isinstance(config, dict):
        config = DistributedConfig.from_dict(config)
    if config is None:
        if mesh is not None and size is None:
            size = (mesh["tp"] if mesh.ndim > 1 else mesh).size()
        config = DistributedConfig(tp_plan=plan, tp_size=size)
    sizes = (config.fsdp_size, config.dp_replicate_size, config.pp_size, config.ep_size)
    if config.tp_size in (None, 1) or config.tp_plan not in (None, "auto") or set(sizes) - {None, 1}:
        return None
    for name in ("distributed_config", "tp_plan", "tp_size", "device_mesh"):
        kwargs.pop(name, None)
    if mesh is None:
        config, device, manager = cls.prepare_distribute_model(config, kwargs.pop("device_map", None))
        mesh = manager.get_mesh("tp")
    else:
        device = torch.device(mesh.device_type)
    return config, mesh, device


def _refuse_made_up(model: SSDPreTrainedModel, info: dict[str, Any], source: Any) -> None:
    """A new task's head may start anew; a backbone with random weights in it is never what was asked for, nor are heads
    that predict further tokens.
    """
    prefix = model.base_model_prefix
    needed = (f"{prefix}.", "mtp.") if hasattr(model, prefix) else ""
    problems = [f"{name} is missing" for name in sorted(info["missing_keys"]) if name.startswith(needed)]
    problems += [
        f"{name} has shape {tuple(found)}, the model expects {tuple(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{source}: {'; '.join(problems[:3])}{more}. Get the complete checkpoint and its own config.json, or pass "
            "ignore_mismatched_sizes=True to start these weights anew"
        )


def _refuse_infinite(model: SSDPreTrainedModel, source: Any) -> None:
    """One NaN in a decay rate turns every state, and so every logit, into NaN."""
    for prefix, module in model.named_modules():
        for name in FP32_PARAMETERS if isinstance(module, Mamba2Mixer) else ():
            value = stored_value(model, f"{prefix}.{name}")
            if value is not None and not bool(torch.isfinite(value).all()):
                raise CheckpointError(
                    f"{source}: {prefix}.{name} holds NaN or Inf. The file is damaged or was saved after training "
                    "diverged: get it again, or load an earlier checkpoint"
                )


def stored_value(model: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer by its full name, also where accelerate keeps its value on the CPU or on disk; None on the
    meta device alone.
    """
    path = name.split(".")
    modules = list(accumulate(path[:-1], getattr, initial=model))
    tensor: Tensor = getattr(modules[-1], path[-1])
    if not tensor.is_meta:
        return tensor
    for depth, module in enumerate(modules):  # a module may bring the weights of all that is in it
        rest = ".".join(path[depth:])
        for hook in _hooks(module):
            values = getattr(hook, "weights_map", None)
            if values is not None and rest in values:
                return values[rest]
    return None


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """Those of accelerate."""
    hook = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", (hook,)))
