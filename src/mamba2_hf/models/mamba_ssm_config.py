"""``config.json`` as mamba_ssm writes it (no ``model_type``; ``d_model``, ``n_layer``, ``ssm_cfg``, ...), both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigurationError

# mamba_ssm's name, ours, and its default.
_OPTIONS: tuple[tuple[str, str, Any], ...] = (
    ("d_state", "state_size", 128),
    ("d_conv", "conv_kernel", 4),
    ("expand", "expand", 2),
    ("headdim", "head_dim", 64),
    ("ngroups", "n_groups", 1),
    ("chunk_size", "chunk_size", 256),
    ("bias", "use_bias", False),
    ("conv_bias", "use_conv_bias", True),
    ("activation", "hidden_act", "silu"),
    ("dt_min", "time_step_min", 0.001),
    ("dt_max", "time_step_max", 0.1),
    ("dt_init_floor", "time_step_floor", 1e-4),
    ("dt_limit", "time_step_limit", (0.0, math.inf)),
)
# What mamba2 cannot express unless it has this value, and what it would take.
_FIXED: tuple[tuple[str, Any, str], ...] = (
    ("D_has_hdim", False, "a skip weight per channel: D of shape (inner width,) in place of (num_heads,)"),
    ("norm_before_gate", False, "a norm before the gate: a gated norm of the other order"),
    ("rmsnorm", True, "a gate without a norm: mixers that have no norm.weight"),
)
_WITHOUT_EFFECT = {"A_init_range", "conv_init", "use_mem_eff_path", "sequence_parallel"}  # on a trained model
_NORM_EPS = 1e-5  # a constant in mamba_ssm


def is_mamba_ssm_config(config: Mapping[str, Any]) -> bool:
    """Whether a dictionary has mamba_ssm's layout."""
    return "model_type" not in config and "d_model" in config and "n_layer" in config


def translate_mamba_ssm_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """mamba_ssm's fields as those of ``mamba2``.

    Raises:
        ConfigurationError: the model is a Mamba-1, a hybrid, or uses an option that ``mamba2`` cannot express.
    """
    ssm = config.get("ssm_cfg") or {}
    if not isinstance(ssm, Mapping):
        raise ConfigurationError(f"ssm_cfg is {ssm!r}: expected an object with the options of the mixer")
    ssm = dict(ssm)
    layer = ssm.pop("layer", "Mamba1")
    if layer != "Mamba2":
        raise ConfigurationError(
            f"ssm_cfg.layer is {layer!r} (a missing one means Mamba1): this is not a Mamba-2; load it with "
            "transformers' MambaForCausalLM"
        )
    for name, expected, need in _FIXED:
        if ssm.pop(name, expected) != expected:
            raise ConfigurationError(f"ssm_cfg.{name} asks for {need}, which the mamba2 format cannot express")
    d_ssm = ssm.pop("d_ssm", None)
    options = {ours: ssm.pop(name, default) for name, ours, default in _OPTIONS}
    if unknown := sorted(ssm.keys() - _WITHOUT_EFFECT):
        raise ConfigurationError(f"ssm_cfg.{unknown[0]} is {ssm[unknown[0]]!r}: not an option of Mamba-2 known here")
    if config.get("attn_layer_idx") or config.get("d_intermediate"):
        raise ConfigurationError(
            f"attn_layer_idx is {config.get('attn_layer_idx')!r} and d_intermediate {config.get('d_intermediate')!r}: "
            "a model with attention or MLP layers is a hybrid, not a pure Mamba-2"
        )
    if config.get("rms_norm", True) is not True:
        raise ConfigurationError(
            f"rms_norm is {config['rms_norm']!r}: LayerNorm blocks, with a bias each, cannot be expressed in the "
            "mamba2 format"
        )
    width, head_dim = _whole(config, "d_model"), _whole(options, "head_dim", "ssm_cfg.headdim")
    if not isinstance(options["expand"], (int, float)) or not 0 < options["expand"] < math.inf:
        raise ConfigurationError(f"ssm_cfg.expand is {options['expand']!r}: expected a factor above 0, usually 2")
    inner = int(width * options["expand"])
    if d_ssm is not None and d_ssm != inner:
        raise ConfigurationError(
            f"ssm_cfg.d_ssm is {d_ssm!r} and the inner width {inner}: the channels between them are an MLP inside the "
            "mixer, which the mamba2 format cannot express"
        )
    multiple = _whole(config, "pad_vocab_size_multiple", default=8)
    return {
        "model_type": "mamba2",
        "vocab_size": -(-_whole(config, "vocab_size", default=50277) // multiple) * multiple,
        "hidden_size": width,
        "num_hidden_layers": config.get("n_layer", 64),
        "num_heads": inner // head_dim,
        **options,
        "layer_norm_epsilon": _NORM_EPS,
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "tie_word_embeddings": config.get("tie_embeddings", True),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def as_mamba_ssm_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The way back: the fields of ``mamba2`` as mamba_ssm reads them.

    Token ids and what only concerns new weights have no place there.

    Args:
        config: every field of a ``Mamba2Config``.

    Raises:
        ConfigurationError: mamba_ssm has no option for a value.
    """
    if config["layer_norm_epsilon"] != _NORM_EPS:
        raise ConfigurationError(
            f"layer_norm_epsilon is {config['layer_norm_epsilon']!r}: mamba_ssm knows only {_NORM_EPS}, a constant"
        )
    if config["expand"] != int(config["expand"]):
        raise ConfigurationError(f"expand is {config['expand']!r}: mamba_ssm reads whole factors only")
    ssm: dict[str, Any] = {"layer": "Mamba2"}
    for name, ours, default in _OPTIONS:
        value = list(config[ours]) if ours == "time_step_limit" else config[ours]
        if ours != "hidden_act" and value != (list(default) if ours == "time_step_limit" else default):
            ssm[name] = value  # its mixer always runs SiLU, and takes no argument that says so
    return {
        "d_model": config["hidden_size"],
        "d_intermediate": 0,
        "n_layer": config["num_hidden_layers"],
        "vocab_size": config["vocab_size"],
        "ssm_cfg": ssm,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": config["residual_in_fp32"],
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config["tie_word_embeddings"],
    }


def _whole(config: Mapping[str, Any], name: str, shown: str | None = None, default: int | None = None) -> int:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{shown or name} is {value!r}: expected a whole number of at least 1")
    return value
