"""What ``import mamba2_hf`` does to transformers and PEFT, in one place.

* Auto classes build our models for ``model_type: mamba2`` and ``mamba2_hybrid``; the stock classes stay reachable by
  their own names.
* transformers' tables of model types and class names list the hybrids, so that Trainer shifts labels for label
  smoothing, and evaluation, serving and model cards know them as language models.
* Where TRL's trainers, pipelines and ``transformers serve`` look a class up by the ``architectures`` of a config of
  ours, they find our class, as the Auto classes do.
* A model that holds one of ours, such as a LLaVA, ties its head to the embedding by the name that it is kept and
  offloaded under, and its ``generate`` makes a cache with places for states.
* ``Mamba2HybridForCausalLM.from_pretrained`` reads the formats of other hybrids.
* Trainer keeps weight decay off ``A_log``, ``D``, ``dt_bias`` and the norms of our models.
* accelerate's ``ParallelismConfig(cp_size=...)``, alone or through Trainer, spreads sequences over processes by
  :func:`~mamba2_hf.distributed.context_parallel` where the model is one of ours. It then gets whole batches.
* TRL's SFTTrainer gets logits in training, in those of its versions that read them for their metrics.
* accelerate's FSDP2 leaves the fp32 residual stream of our models as it is between layers.
* PEFT may put LoRA on every linear of our models, ``out_proj`` included, and knows the default targets. Adapters that
  are made of cached keys and values are refused when they are added.

Libraries that are not imported yet are not imported here; they are met when they come.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.abc
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from .distributed import Group, context_parallel, whole_state_dict
from .distributed import clip_grad_norm_ as clip_shared
from .distributed.tensor_parallel import cut_adapters
from .errors import ArgumentError
from .layers.fp32 import without_casts
from .models import (
    Mamba2Config,
    Mamba2ForCausalLM,
    Mamba2ForSequenceClassification,
    Mamba2HybridConfig,
    Mamba2HybridForCausalLM,
    Mamba2HybridForSequenceClassification,
    Mamba2HybridModel,
    Mamba2HybridPreTrainedModel,
    Mamba2Model,
    SSDForCausalLM,
    SSDPreTrainedModel,
)
from .models.base_config import SSDConfig
from .models.cache import as_mamba2_cache
from .training import no_decay_parameter_names

_MARK = "_mamba2_hf"
# Configuration, backbone, language model, classifier.
_PURE = (Mamba2Config, Mamba2Model, Mamba2ForCausalLM, Mamba2ForSequenceClassification)
_HYBRID = (Mamba2HybridConfig, Mamba2HybridModel, Mamba2HybridForCausalLM, Mamba2HybridForSequenceClassification)
_BY_NAME = {cls.__name__: cls for cls in (*_PURE[1:], *_HYBRID[1:])}
_OF_MIXERS = ["in_proj", "out_proj"]
_OF_ATTENTION, _OF_MLPS = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
LORA_TARGETS = {"mamba2": _OF_MIXERS, "mamba2_hybrid": [*_OF_MIXERS, *_OF_ATTENTION, *_OF_MLPS]}


def register() -> None:
    """Makes every change of this module; calling it again changes nothing."""
    for config, model, causal_lm, classifier in (_PURE, _HYBRID):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
        AutoModelForPreTraining.register(config, causal_lm, exist_ok=True)
        AutoModelForSequenceClassification.register(config, classifier, exist_ok=True)
    _list_hybrids()
    _wrap(PreTrainedModel, "get_expanded_tied_weights_keys", _with_kept_names)
    _wrap(GenerationMixin, "_prepare_cache_for_generation", _with_our_cache)
    Mamba2HybridConfig.foreign_reader = staticmethod(_read_foreign_config)
    Mamba2HybridPreTrainedModel.foreign_reader = staticmethod(_read_foreign)
    when_imported("transformers.trainer", _keep_decay_off)
    when_imported("transformers.trainer", _leave_batches_whole)
    when_imported("accelerate.accelerator", _spread_sequences)
    for module in ("accelerate.utils.fsdp_utils", "accelerate.utils", "accelerate.accelerator"):  # each has the name
        when_imported(module, _keep_stream_in_fp32)
    when_imported("transformers.trainer", _leave_parts_alone)
    when_imported("trl.trainer.sft_trainer", _return_logits_to_sft)
    when_imported("trl.trainer.utils", _find_ours_by_name)
    when_imported("transformers.cli.serving.model_manager", _find_ours_by_name)
    when_imported("transformers.pipelines.base", _load_ours_in_pipelines)
    when_imported("transformers.pipelines", _load_ours_in_pipelines)
    when_imported("peft.utils.constants", _name_lora_targets)
    when_imported("peft.tuners.tuners_utils", _allow_lora_everywhere)
    when_imported("peft.peft_model", _refuse_cached_prompts)
    when_imported("peft.tuners.lora.layer", _cut_new_adapters)
    for module in ("peft.utils.save_and_load", "peft.peft_model"):
        when_imported(module, _save_whole_adapters)
    when_imported("accelerate.accelerator", _clip_shared_gradients)


def _list_hybrids() -> None:
    """Adds the hybrids to tables in which registered classes are missing, and which other code reads directly.

    The pure models are there, as stock ones have the same names. transformers builds nothing by these entries: it does
    so for model types that it has a configuration of.
    """
    tables = (
        MODEL_MAPPING_NAMES,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_PRETRAINING_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )
    config, model, causal_lm, classifier = _HYBRID
    for table, cls in zip(tables, (model, causal_lm, causal_lm, classifier), strict=True):
        table[config.model_type] = cls.__name__


def _read_foreign_config(raw: dict[str, Any]) -> Any:
    from .checkpoints.loading import read_foreign_config

    return read_foreign_config(raw)


def _read_foreign(*args: Any) -> Any:
    from .checkpoints.loading import read_foreign

    return read_foreign(*args)


def when_imported(name: str, then: Callable[[Any], None]) -> None:
    """Calls ``then(module)`` whenever the module has been executed: now if it is imported already, and on every later
    import or reload. Several calls for one module each count, once.
    """
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    callbacks = _finder.then.setdefault(name, [])
    if then not in callbacks:
        callbacks.append(then)
    if (module := sys.modules.get(name)) is not None:
        then(module)


class _CallbackFinder(importlib.abc.MetaPathFinder):
    """Lets modules be found as usual, and has their loaders call back after they were executed."""

    def __init__(self) -> None:
        self.then: dict[str, list[Callable[[Any], None]]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if (then := self.then.get(fullname)) is None:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    self._call_back(spec.loader, fullname, then)
                return spec
        return None

    @staticmethod
    def _call_back(loader: Any, fullname: str, then: list[Callable[[Any], None]]) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if module.__name__ == fullname:  # a loader may serve several modules
                for each in then:
                    each(module)

        loader.exec_module = exec_module


_finder = _CallbackFinder()


def _wrap(owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> bool:
    """Puts ``around(function)`` in the function's place, once; False if there is no such function."""
    function = getattr(owner, name, None)
    if function is not None and not hasattr(function, _MARK):
        wrapped = functools.wraps(function)(around(function))
        setattr(wrapped, _MARK, True)
        setattr(owner, name, wrapped)
    return function is not None


def _with_kept_names(original: Callable[..., Any]) -> Callable[..., Any]:
    """A ``get_expanded_tied_weights_keys`` that names weights of our models as checkpoints and device maps do."""

    def kept(model: nn.Module, name: str) -> str:
        *path, weight = name.split(".")
        for place, part in enumerate(path):
            if isinstance(model, SSDPreTrainedModel):
                path[place] = model.other_names.get(part, part)
            model = getattr(model, path[place])
        return ".".join([*path, weight])

    def get_expanded_tied_weights_keys(self: Any, *args: Any, **kwargs: Any) -> dict[str, str]:
        tied: dict[str, str] = original(self, *args, **kwargs)
        if not tied or not any(isinstance(module, SSDPreTrainedModel) for module in self.modules()):
            return tied
        return {kept(self, target): kept(self, source) for target, source in tied.items()}

    return get_expanded_tied_weights_keys


def _with_our_cache(original: Callable[..., Any]) -> Callable[..., Any]:
    """A ``_prepare_cache_for_generation`` whose caches know how many tokens they have seen before any layer is called:
    one of transformers cannot say where no layer has keys.
    """

    def prepare(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        original(self, generation_config, model_kwargs, *args, **kwargs)
        config = self.config.get_text_config(decoder=True)
        if isinstance(config, SSDConfig):
            for name in ALL_CACHE_NAMES & model_kwargs.keys():
                as_mamba2_cache(model_kwargs[name], config)  # in place

    return prepare


def _holds_ours(model: Any) -> bool:
    return isinstance(model, nn.Module) and any(isinstance(module, SSDPreTrainedModel) for module in model.modules())


def _spread_sequences(accelerator: Any) -> None:
    """Wraps ``Accelerator._prepare_cp``, which leaves nothing but causal attention to pass from slice to slice."""

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare(self: Any, *args: Any) -> Any:
            ours = [arg for arg in args if _holds_ours(arg)]
            if not ours:
                return original(self, *args)
            for model in ours:
                context_parallel(model, self.torch_device_mesh["cp"])
            self._cp_context = lambda **_: (
                contextlib.nullcontext()
            )  # of maybe_context_parallel, which would cut batches
            return args

        return prepare

    _wrap(getattr(accelerator, "Accelerator", None), "_prepare_cp", around)


def _leave_batches_whole(trainer: Any) -> None:
    """Wraps ``Trainer._prepare_context_parallel_inputs``, which cuts batches that our models cut themselves."""

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare(self: Any, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            plan = getattr(self.accelerator, "parallelism_config", None)
            if plan is None or not plan.cp_enabled or not _holds_ours(model):
                return original(self, model, inputs)
            wholes = {
                "label_smoothing_factor": self.label_smoother is not None,
                "compute_loss_func": self.compute_loss_func is not None,
                "compute_metrics": self.compute_metrics is not None and not model.training,
            }
            for name, given in wholes.items():
                if given:
                    raise ArgumentError(
                        f"{name} needs all logits, and with cp_size={plan.cp_size} each process has those of its "
                        "slice: leave it out, or train without cp_size"
                    )
            return contextlib.nullcontext, inputs

        return prepare

    _wrap(getattr(trainer, "Trainer", None), "_prepare_context_parallel_inputs", around)


def _keep_decay_off(trainer: Any) -> None:
    """Wraps ``Trainer.get_decay_parameter_names``, which knows norms by their class and name patterns only."""

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_decay_parameter_names(self: Any, model: nn.Module) -> list[str]:
            kept_off = no_decay_parameter_names(model)
            return [name for name in original(self, model) if name not in kept_off]

        return get_decay_parameter_names

    if not _wrap(getattr(trainer, "Trainer", None), "get_decay_parameter_names", around):
        warnings.warn(
            "this version of transformers chooses the parameters with weight decay in a way that mamba2_hf does not "
            "know: to keep decay off A_log, D and the norms, pass Trainer an optimizer over "
            "mamba2_hf.parameter_groups(model)",
            stacklevel=2,
        )


def _keep_stream_in_fp32(module: Any) -> None:
    """Wraps ``fsdp2_prepare_model``, whose policy casts what blocks get and return to the dtype of their weights."""

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def fsdp2_prepare_model(accelerator: Any, model: nn.Module) -> nn.Module:
            models = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
            plugin = accelerator.state.fsdp_plugin
            policy = plugin.mixed_precision_policy
            if policy is None or not models or not all(isinstance(part, SSDPreTrainedModel) for part in models):
                return original(accelerator, model)
            plugin.mixed_precision_policy = without_casts(policy)
            try:
                return original(accelerator, model)
            finally:
                plugin.mixed_precision_policy = policy

        return fsdp2_prepare_model

    _wrap(module, "fsdp2_prepare_model", around)


def _return_logits_to_sft(sft_trainer: Any) -> None:
    """Wraps ``SFTTrainer.compute_loss``, which measures accuracy and entropy on logits that our models leave out in
    training. Newer versions of TRL put a fused head of their own into the model, and need nothing.
    """
    if hasattr(sft_trainer, "add_fused_lm_head"):
        return

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def compute_loss(self: Any, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            # With this loss, TRL has replaced the model's forward by one that returns the metrics.
            fused = getattr(self.args, "loss_type", None) == "chunked_nll"
            if not fused and any(isinstance(module, SSDForCausalLM) for module in model.modules()):
                inputs = {**inputs, "return_logits": True}
            return original(self, model, inputs, *args, **kwargs)

        return compute_loss

    _wrap(getattr(sft_trainer, "SFTTrainer", None), "compute_loss", around)


class _Transformers:
    """transformers to a module that looks up in it what a config's ``architectures`` name: the names of our models give
    our models, all others what they give anywhere. That config came from ``AutoConfig``, so it is one of ours too.
    """

    def __init__(self, original: ModuleType) -> None:
        self._original = original
        setattr(self, _MARK, True)

    def __getattr__(self, name: str) -> Any:
        return _BY_NAME.get(name) or getattr(self._original, name)


def _find_ours_by_name(module: Any) -> None:
    """Has a module that reads ``getattr(transformers, config.architectures[0])`` find our classes."""
    original = getattr(module, "transformers", None)
    if original is not None and not hasattr(original, _MARK):
        module.transformers = _Transformers(original)


def _load_ours_in_pipelines(pipelines: Any) -> None:
    """Wraps ``load_model``, which tries the stock class of that name once the Auto class has refused a checkpoint, and
    for an assistant nothing else.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def load_model(model: Any, config: Any, model_classes: Any = None, *args: Any, **kwargs: Any) -> Any:
            if isinstance(config, SSDConfig):
                named = config.architectures or ()
                model_classes = model_classes or tuple(_BY_NAME[name] for name in named if name in _BY_NAME)
                config = copy.copy(config)
                config.architectures = None
            return original(model, config, model_classes, *args, **kwargs)

        return load_model

    _wrap(pipelines, "load_model", around)


def _refuse_cached_prompts(peft_model: Any) -> None:
    """Wraps ``PeftModel.add_adapter``: keys and values that nobody computed are no past that an SSD layer can have."""

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def add_adapter(self: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
            kind = getattr(peft_config.peft_type, "value", peft_config.peft_type)
            if kind in ("PREFIX_TUNING", "CARTRIDGE") and any(
                isinstance(module, SSDPreTrainedModel) for module in self.modules()
            ):
                raise ArgumentError(
                    f"{type(peft_config).__name__}: {kind} learns keys and values that every layer attends to, and the "
                    "SSD layers of this model keep a state instead. Use PromptTuningConfig or PromptEncoderConfig, "
                    "which learn embeddings in front of the prompt, or LoraConfig"
                )
            return original(self, adapter_name, peft_config, *args, **kwargs)

        return add_adapter

    _wrap(getattr(peft_model, "PeftModel", None), "add_adapter", around)


def _shared(model: nn.Module) -> Group | None:
    """The processes that share the layers of a model, if any do."""
    return next((module.tensor_group for module in model.modules() if isinstance(module, SSDPreTrainedModel)), None)


def _cut_new_adapters(layer: Any) -> None:
    """Wraps ``LoraLayer.update_layer``, which makes the factors of a whole layer: of one that processes share they are
    cut as it is.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def update_layer(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            cut_adapters(self)

        return update_layer

    _wrap(getattr(layer, "LoraLayer", None), "update_layer", around)


def _save_whole_adapters(module: Any) -> None:
    """Wraps ``get_peft_model_state_dict``: adapters of layers that processes share are saved whole."""

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def get(model: nn.Module, state_dict: dict[str, Any] | None = None, *args: Any, **kwargs: Any) -> Any:
            group = _shared(model)
            if group is not None and state_dict is None:
                state_dict = model.state_dict()
                factors = {name: value for name, value in state_dict.items() if ".lora_" in name}
                state_dict |= whole_state_dict(model, group, factors)
            return original(model, state_dict, *args, **kwargs)

        return get

    _wrap(module, "get_peft_model_state_dict", around)


def _leave_parts_alone(trainer: Any) -> None:
    """Wraps ``Trainer._sync_replicated_trainable_parameters``, which takes plain tensors of a model that is spread for
    copies, and would make all processes train the first one's part.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def sync(self: Any, model: nn.Module) -> None:
            if _shared(model) is None:
                original(self, model)

        return sync

    _wrap(getattr(trainer, "Trainer", None), "_sync_replicated_trainable_parameters", around)


def _clip_shared_gradients(accelerator: Any) -> None:
    """Wraps ``Accelerator.clip_grad_norm_``, which knows the norm of a process's own gradients."""

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def clip_grad_norm_(self: Any, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
            parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
            ids = set(map(id, parameters))
            for model in self._models:
                if _shared(model) is not None and ids == set(map(id, model.parameters())):
                    self.unscale_gradients()
                    return clip_shared(model, max_norm, norm_type)
            return original(self, parameters, max_norm, norm_type)

        return clip_grad_norm_

    _wrap(getattr(accelerator, "Accelerator", None), "clip_grad_norm_", around)


def _name_lora_targets(constants: Any) -> None:
    """Gives LoRA without ``target_modules`` its defaults, where PEFT has none."""
    mapping = getattr(constants, "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", {})
    for model_type, targets in LORA_TARGETS.items():
        mapping.setdefault(model_type, targets)


def _allow_lora_everywhere(tuners_utils: Any) -> None:
    """Lifts PEFT's refusal of ``out_proj`` and ``conv1d`` for our models alone: their weights are never read behind
    the back of a wrapper (``layers.plain_weight``), as the stock fused kernel does.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def check(peft_config: Any, model: nn.Module, target_name: str) -> None:
            if not any(isinstance(module, SSDPreTrainedModel) for module in model.modules()):
                original(peft_config, model, target_name)

        return check

    _wrap(tuners_utils, "_check_lora_target_modules_mamba", around)
