"""Names and sizes, from each format to ``mamba2`` and back. Pure functions: no file is read here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import ConfigurationError
from ..models import Mamba2Config, Mamba2ForCausalLM, Mamba2HybridConfig, Mamba2HybridForCausalLM
from ..models.base_config import strict_json
from ..models.mamba_ssm_config import as_mamba_ssm_config, translate_mamba_ssm_config

LABELS_LIMIT = 100_000
"""Most labels of a classifier that a configuration may name."""
EXPERTS_LIMIT = 2**16
"""Most experts of a layer that it may."""
EMBEDDING, HEAD = "backbone.embeddings.weight", "lm_head.weight"
KEPT = "mamba_ssm_config"
"""Key of a converted config under which the original one stays readable; it has no effect."""


@dataclass(frozen=True)
class KeyMap:
    """Names of tensors, theirs and ours. A ``{}`` in a name stands for the number of a layer.

    Attributes:
        renames: ours by theirs, for the names that differ; all others are the same.
        prefix: what stands before each of their names.
        accepted: more of their names that are read, but not written.
    """

    renames: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    accepted: Mapping[str, str] = field(default_factory=dict)

    def ours(self, name: str) -> str:
        """Our name of their tensor; a name outside of the format comes back as it is."""
        return _rename(name.removeprefix(self.prefix), {**self.accepted, **self.renames})

    def theirs(self, name: str) -> str:
        """Their name of our tensor."""
        return self.prefix + _rename(name, {ours: theirs for theirs, ours in self.renames.items()})


def _rename(name: str, renames: Mapping[str, str]) -> str:
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    template = re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)
    return renames[template].format(*numbers) if template in renames else name


MAMBA2_KEYS = KeyMap(accepted={"backbone.embedding.weight": EMBEDDING})
MAMBA_SSM_KEYS = KeyMap({"backbone.embedding.weight": EMBEDDING})
CODESTRAL_KEYS = KeyMap({"backbone.embedding.weight": EMBEDDING}, prefix="model.")


def expected_shapes(config: Mamba2Config | Mamba2HybridConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor that a model of this configuration has. Nothing is allocated for them.

    Raises:
        ConfigurationError: the sizes fit no tensor at all.
    """
    hybrid = isinstance(config, Mamba2HybridConfig)
    try:
        with torch.device("meta"):
            if hybrid:
                tensors = Mamba2HybridForCausalLM(config).state_dict()
            else:
                one_layer = Mamba2Config.from_dict({**config.to_dict(), "num_hidden_layers": 1})
                tensors = Mamba2ForCausalLM(one_layer).state_dict()
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ConfigurationError(f"no tensor can have the sizes it gives ({str(error).splitlines()[0]})") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if hybrid:
        return shapes
    layer = {name: shape for name, shape in shapes.items() if ".layers.0." in name}
    return {name: shape for name, shape in shapes.items() if name not in layer} | {
        name.replace(".layers.0.", f".layers.{number}."): shape
        for number in range(config.num_hidden_layers)
        for name, shape in layer.items()
    }


# What other readers of config.json act on although the format does not define it, and the only value it may have here:
# llama.cpp's converter takes inner width, head size and layers from these names first, vLLM the inner width.
_MISLEADING: dict[str, Callable[[Mamba2Config], int]] = {
    **dict.fromkeys(("mamba_d_ssm", "d_inner"), lambda config: config.intermediate_size),
    "mamba_d_head": lambda config: config.head_dim,
    "n_layers": lambda config: config.num_hidden_layers,
}
# How to run a model is for whoever runs it to say: a file could name code on the Hub here. And parts that other models
# have; llama.cpp's converter would take their sizes.
_DROPPED = frozenset(
    {"attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"}
    | {"text_config", "llm_config", "vision_config", "audio_config", "auto_map"}
)
QUANTIZED = ("quantization_config", "compression_config", "quantization")


def mamba2_config(fields: Mapping[str, Any], most_layers: int) -> Mamba2Config:
    """The configuration of ``mamba2`` fields. Keys that the format does not know stay, without effect, except those
    that would mislead another reader.

    Args:
        fields: from a file.
        most_layers: how many there can be: a layer has a tensor at least.

    Raises:
        ConfigurationError: no model can be built from a value.
    """
    config: Mamba2Config = _config(Mamba2Config, fields, most_layers)
    for key, value_of in _MISLEADING.items():
        if hasattr(config, key) and getattr(config, key) != value_of(config):
            delattr(config, key)
    config.architectures = [Mamba2ForCausalLM.__name__]
    config.rescale_prenorm_residual = False
    return config


def hybrid_config(fields: Mapping[str, Any], most_layers: int) -> Mamba2HybridConfig:
    """The configuration of ``mamba2_hybrid`` fields; see :func:`mamba2_config`."""
    config: Mamba2HybridConfig = _config(Mamba2HybridConfig, fields, most_layers)
    config.architectures = [Mamba2HybridForCausalLM.__name__]
    config.rescale_prenorm_residual = False
    return config


def _config(cls: Any, fields: Mapping[str, Any], most_layers: int) -> Any:
    of_a_head = fields.get("mtp_layer_blocks")
    most_heads = most_layers // max(len(of_a_head) if isinstance(of_a_head, list) else 1, 1)
    layers = (("num_hidden_layers", most_layers), ("num_mtp_layers", most_heads))
    limits = (*layers, ("num_labels", LABELS_LIMIT), ("num_experts", EXPERTS_LIMIT))
    for name, most in limits:
        count = fields.get(name)
        if isinstance(count, int) and count > most:  # a configuration, or the list of tensors, grows with each
            raise ConfigurationError(f"{name} is {count}, more than the {most} that there can be")
    if found := [name for name in QUANTIZED if fields.get(name) is not None]:
        raise ConfigurationError(f"{found[0]} says that the weights are quantized; dequantize and save them first")
    fields = {name: value for name, value in fields.items() if name not in _DROPPED}
    try:
        # transformers writes an infinity as an object, which its own reader of files turns back.
        return cls.from_dict(cls._decode_special_floats(dict(fields)))
    except ConfigurationError:
        raise
    except Exception as error:  # transformers trips over types that its own fields cannot have
        raise ConfigurationError(f"no configuration can be made of these fields ({error})") from None


def read_mamba2(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Checks that a ``config.json`` is one of ``mamba2``.

    Raises:
        ConfigurationError: it is another model's.
    """
    return _own(raw, "mamba2")


def read_hybrid(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Checks that a ``config.json`` is one of ``mamba2_hybrid``; raises as :func:`read_mamba2`."""
    return _own(raw, "mamba2_hybrid")


def _own(raw: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    if raw.get("model_type") != model_type:
        raise ConfigurationError(f"model_type is {raw.get('model_type')!r}: this is no {model_type}")
    return dict(raw)


def read_mamba_ssm(raw: Mapping[str, Any]) -> dict[str, Any]:
    """mamba_ssm's ``config.json`` as ``mamba2`` fields, with the original under ``KEPT``."""
    return {**translate_mamba_ssm_config(raw), KEPT: dict(raw)}


def write_mamba_ssm(config: Mamba2Config) -> dict[str, Any]:
    """mamba_ssm's ``config.json`` of a configuration: the original one if it came from there and still holds.

    Raises:
        ConfigurationError: mamba_ssm has no option for a value.
    """
    written = strict_json(as_mamba_ssm_config(config.to_dict()))
    original = getattr(config, KEPT, None)
    if isinstance(original, dict):
        try:
            before = as_mamba_ssm_config(Mamba2Config.from_dict(translate_mamba_ssm_config(original)).to_dict())
            kept = strict_json(key_for_key(original, written, strict_json(before)))
            if strict_json(translate_mamba_ssm_config(kept)) == strict_json(translate_mamba_ssm_config(written)):
                written = kept
        except ConfigurationError:
            pass
    found: dict[str, Any] = written
    return found


def write_own(config: Mamba2Config | Mamba2HybridConfig, original: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The ``config.json`` of ``mamba2`` or ``mamba2_hybrid``, with the keys that other readers look up.

    Args:
        config: of the model.
        original: the file that it came from, which is then written key for key, but for what was changed since.
    """
    written: dict[str, Any] = json.loads(config.to_json_string())
    if original is None:
        return written
    read = mamba2_config if isinstance(config, Mamba2Config) else hybrid_config
    kept = key_for_key(original, written, write_own(read(original, config.num_hidden_layers)))
    if "dtype" in written:
        kept.pop("dtype", None)
        kept["torch_dtype" if "torch_dtype" in original else "dtype"] = written["dtype"]
    found: dict[str, Any] = strict_json(kept)
    return found


def key_for_key(original: Mapping[str, Any], written: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """A file that was read, with what was changed since.

    Args:
        original: the file.
        written: what the configuration is spelled as now.
        before: what it was spelled as when it had been read.
    """
    dropped = {*_DROPPED, *(before.keys() - written.keys())}
    changed = {key: value for key, value in written.items() if key not in before or before[key] != value}
    return {**{key: value for key, value in original.items() if key not in dropped}, **changed}


def read_codestral(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Mistral's ``params.json`` as ``mamba2`` fields. Its reader hands six of them to mamba_ssm and drops the rest.

    Source: ``mistral_inference/mamba.py``.
    """
    if raw.get("model_type", "mamba") != "mamba":
        raise ConfigurationError(f"model_type is {raw['model_type']!r}: not a Mamba, but another model of Mistral's")
    if missing := [name for name in ("dim", "n_layers", "vocab_size", "n_groups") if name not in raw]:
        raise ConfigurationError(f"{missing[0]} is missing")
    fields = translate_mamba_ssm_config(
        {
            "d_model": raw["dim"],
            "n_layer": raw["n_layers"],
            "vocab_size": raw["vocab_size"],
            "ssm_cfg": {"layer": "Mamba2", "ngroups": raw["n_groups"]},
            "rms_norm": raw.get("rms_norm", True),
            "residual_in_fp32": raw.get("residual_in_fp32", True),
            "pad_vocab_size_multiple": raw.get("pad_vocab_size_multiple", 1),
            "tie_embeddings": raw.get("tie_embeddings", False),
        }
    )
    return {**fields, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}  # of its tokenizer
