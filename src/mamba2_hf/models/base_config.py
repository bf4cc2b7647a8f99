"""What the configurations have in common: unknown names are refused, files are read leniently, values are judged."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import fields
from os import PathLike
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig
from transformers.generation import GenerationConfig

from ..errors import ConfigurationError

NO_LIMIT = 65504.0
"""What no upper limit of the step size is saved as: JSON has no infinity, and no step is above the largest float16."""
_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# Keyword arguments that PreTrainedConfig reads without declaring a field for them.
_UNDECLARED = {
    *("name_or_path", "num_labels", "output_attentions", "attn_implementation", "experts_implementation"),
    *("torch_dtype", "model_type", "tie_last_hidden_states", "_commit_hash", "_name_or_path", "_attn_implementation"),
    *("_experts_implementation", "transformers_version", "auto_map"),
    *GenerationConfig().to_dict(),
}


class SSDConfig(PreTrainedConfig):
    """Construction, reading and judging of a configuration. A model adds fields, and ``validate_architecture``."""

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]  # Trainer gathers the other outputs

    def __post_init__(self, **kwargs: Any) -> None:
        inert = kwargs.pop("_inert", {})
        self._refuse_unknown(kwargs)
        self._check_undeclared(kwargs)
        self._normalize()
        super().__post_init__(**kwargs)
        for key, value in inert.items():
            if not hasattr(type(self), key):  # what the class defines, such as layer_types, cannot be overridden
                setattr(self, key, value)

    def _normalize(self) -> None:
        """Brings fields into the form that they are saved in."""

    @classmethod
    def _translate(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """The fields of a file of another format, as those of this class; of its own as they are."""
        return config_dict

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Reads a ``config.json``, of this model or of a format that can be expressed as one; unknown keys are kept as
        attributes without effect.

        Raises:
            ConfigurationError: as the constructor; also for a format that cannot.
        """
        config_dict = cls._translate(config_dict)
        known = {field.name for field in fields(cls)} | _UNDECLARED
        inert = {key: value for key, value in config_dict.items() if key not in known}
        rest = {key: value for key, value in config_dict.items() if key in known}
        return super().from_dict({**rest, "_inert": inert} if inert else rest, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: str | PathLike[str]) -> Any:
        """:meth:`from_dict` of a file."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def to_json_string(self, use_diff: bool = True) -> str:
        """As in transformers, but JSON that every reader takes: an infinity is ``NO_LIMIT``; and with the keys that
        other readers of the format look up.
        """
        content: dict[str, Any] = json.loads(super().to_json_string(use_diff))
        return json.dumps(strict_json({**content, **self._for_other_readers()}), indent=2, sort_keys=True) + "\n"

    def _for_other_readers(self) -> dict[str, Any]:
        """Keys of a ``config.json`` that follow from fields, and that other readers look up."""
        return {}

    def _check_common(self) -> None:
        """Judges the fields that every model has."""
        for name, usual in (("layer_norm_epsilon", 1e-5), ("initializer_range", 0.02)):
            self._require(0 < getattr(self, name) < math.inf, name, f"a small number above 0, usually {usual}")
        low, high, floor = self.time_step_min, self.time_step_max, self.time_step_floor
        self._require(0 < low < math.inf, "time_step_min", "a step size above 0, usually 0.001")
        self._require(low <= high < math.inf, "time_step_max", f"a step size of at least time_step_min={low}")
        self._require(0 < floor < math.inf, "time_step_floor", "a step size above 0, usually 1e-4")
        limit = self.time_step_limit
        self._require(
            len(limit) == 2 and 0 <= limit[0] < limit[1],
            "time_step_limit",
            "a pair (low, high) with 0 <= low < high; (0.0, inf) clamps nothing",
        )
        for name in ("pad_token_id", "bos_token_id"):
            self._check_token(name, getattr(self, name))
        eos = self.eos_token_id
        self._require(eos != [], "eos_token_id", "one token id or more, or None")
        for token in eos if isinstance(eos, list) else [eos]:
            self._check_token("eos_token_id", token)
        self._require(self.num_labels is None or self.num_labels >= 1, "num_labels", "a count of at least 1")
        self._require(
            self.problem_type in (None, *_PROBLEM_TYPES), "problem_type", f"None or one of {', '.join(_PROBLEM_TYPES)}"
        )

    def _check_token(self, name: str, token: int | None) -> None:
        # Published files hold ids past a vocabulary that was cut, and -1 for "none": harmless, so only warned about
        # by transformers. Below -1 there is no such reading.
        self._require(token is None or token >= -1, name, "a token id, or None")

    def _require(self, ok: bool, name: str, remedy: str) -> None:
        if not ok:
            raise ConfigurationError(f"{name} is {getattr(self, name)!r}: {remedy}")

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        if kwargs.get("add_cross_attention"):
            raise ConfigurationError(
                "add_cross_attention=True: these models attend to no encoder, so they cannot be the decoder of one; "
                "models such as LLaVA put what an encoder found among the embeddings instead"
            )
        known = {field.name for field in fields(self)}
        for key, value in kwargs.items():
            if key not in _UNDECLARED:
                near = difflib.get_close_matches(key, known, n=1)
                remedy = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(sorted(known))}"
                raise ConfigurationError(f"{key}={value!r} is no field of {type(self).__name__}: {remedy}")

    def _check_undeclared(self, kwargs: dict[str, Any]) -> None:
        """What PreTrainedConfig would trip over before anything is validated."""
        labels = kwargs.get("num_labels")
        if labels is not None and (not isinstance(labels, int) or labels < 1):
            raise ConfigurationError(f"num_labels is {labels!r}: a count of at least 1")
        dtype = self.dtype if self.dtype is not None else kwargs.get("torch_dtype")
        if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ConfigurationError(f"dtype is {dtype!r}: the name of a torch dtype, such as 'float32' or 'bfloat16'")


def as_limits(values: Any) -> tuple[float, ...]:
    """``time_step_limit`` as floats; ``NO_LIMIT`` and above are infinity again."""
    return tuple(math.inf if value >= NO_LIMIT else float(value) for value in values)


def strict_json(value: Any) -> Any:
    """A value of a ``config.json`` without infinities, bare or as the objects that transformers makes of them, and with
    NaN as such an object.
    """
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity"):
            return strict_json(float(value["__float__"]))
        return {key: strict_json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN"} if math.isnan(value) else math.copysign(NO_LIMIT, value)
    return value
