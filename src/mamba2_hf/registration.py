"""What ``import mamba2_hf`` does to transformers and PEFT, in one place.

* Auto classes build our models for ``model_type: mamba2``; the stock classes stay reachable by their own names.
* Trainer keeps weight decay off ``A_log``, ``D``, ``dt_bias`` and the norms of our models.
* PEFT may put LoRA on every linear of our models, ``out_proj`` included, and knows the default targets.

Libraries that are not imported yet are not imported here; they are met when they come.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
)

from .models import (
    Mamba2Config,
    Mamba2ForCausalLM,
    Mamba2ForSequenceClassification,
    Mamba2Model,
    Mamba2PreTrainedModel,
)
from .training import no_decay_parameter_names

LORA_TARGETS = {"mamba2": ["in_proj", "out_proj"]}


def register() -> None:
    """Makes every change of this module; calling it again changes nothing."""
    AutoConfig.register("mamba2", Mamba2Config, exist_ok=True)
    AutoModel.register(Mamba2Config, Mamba2Model, exist_ok=True)
    AutoModelForCausalLM.register(Mamba2Config, Mamba2ForCausalLM, exist_ok=True)
    AutoModelForPreTraining.register(Mamba2Config, Mamba2ForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(Mamba2Config, Mamba2ForSequenceClassification, exist_ok=True)
    when_imported("transformers.trainer", _keep_decay_off)
    when_imported("peft.utils.constants", _name_lora_targets)
    when_imported("peft.tuners.tuners_utils", _allow_lora_everywhere)


def when_imported(name: str, then: Callable[[ModuleType], None]) -> None:
    """Calls ``then(module)`` once the module is imported: now, if it is already."""
    if (module := sys.modules.get(name)) is not None:
        then(module)
    elif not any(isinstance(finder, _Waiting) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting(name, then))


class _Waiting(importlib.abc.MetaPathFinder):
    """Lets a module be found as usual and calls back after it was executed."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _keep_decay_off(trainer: Any) -> None:
    """Wraps ``Trainer.get_decay_parameter_names``, which knows norms by their class and name patterns only."""
    original = trainer.Trainer.get_decay_parameter_names
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def get_decay_parameter_names(self: Any, model: nn.Module) -> list[str]:
        kept_off = no_decay_parameter_names(model)
        return [name for name in original(self, model) if name not in kept_off]

    trainer.Trainer.get_decay_parameter_names = get_decay_parameter_names


def _name_lora_targets(constants: Any) -> None:
    """Gives LoRA without ``target_modules`` its defaults, where PEFT has none."""
    for model_type, targets in LORA_TARGETS.items():
        constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(model_type, targets)


def _allow_lora_everywhere(tuners_utils: Any) -> None:
    """Lifts PEFT's refusal of ``out_proj`` and ``conv1d`` for our models alone: their weights are never read behind
    the back of a wrapper (``layers.plain_weight``), as the stock fused kernel does.
    """
    original = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def check(peft_config: Any, model: nn.Module, target_name: str) -> None:
        if not any(isinstance(module, Mamba2PreTrainedModel) for module in model.modules()):
            original(peft_config, model, target_name)

    tuners_utils._check_lora_target_modules_mamba = check
