"""Reading a ``config.json`` as mamba_ssm writes it (no ``model_type``; ``d_model``, ``n_layer``, ``ssm_cfg``, ...)."""

from __future__ import annotations

import math
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
    ("activation", "hidden_act", "swish"),
    ("dt_min", "time_step_min", 0.001),
    ("dt_max", "time_step_max", 0.1),
    ("dt_init_floor", "time_step_floor", 1e-4),
    ("dt_limit", "time_step_limit", (0.0, math.inf)),
)
# What mamba2 cannot express unless it has this value, and what it would take.
_FIXED: tuple[tuple[str, Any, str], ...] = (
    ("D_has_hdim", False, "a skip weight per channel"),
    ("norm_before_gate", False, "a norm before the gate"),
    ("rmsnorm", True, "a gate without a norm"),
    ("d_ssm", None, "an MLP inside the mixer"),
)
_WITHOUT_EFFECT = {"A_init_range", "conv_init", "use_mem_eff_path", "sequence_parallel"}  # on a trained model


def is_mamba_ssm_config(config: dict[str, Any]) -> bool:
    """Whether a dictionary has mamba_ssm's layout."""
    return "model_type" not in config and "d_model" in config and "n_layer" in config


def translate_mamba_ssm_config(config: dict[str, Any]) -> dict[str, Any]:
    """mamba_ssm's fields as those of ``mamba2``.

    Raises:
        ConfigurationError: the model is a Mamba-1, a hybrid, or uses an option that ``mamba2`` cannot express.
    """
    ssm = dict(config.get("ssm_cfg") or {})
    layer = ssm.pop("layer", "Mamba1")
    if layer != "Mamba2":
        raise ConfigurationError(
            f"ssm_cfg.layer is {layer!r} (a missing one means Mamba1): this is not a Mamba-2; load it with "
            "transformers' MambaForCausalLM"
        )
    for name, expected, need in _FIXED:
        if ssm.pop(name, expected) != expected:
            raise ConfigurationError(f"ssm_cfg.{name} asks for {need}, which the mamba2 format cannot express")
    options = {ours: ssm.pop(name, default) for name, ours, default in _OPTIONS}
    if unknown := sorted(ssm.keys() - _WITHOUT_EFFECT):
        raise ConfigurationError(f"ssm_cfg.{unknown[0]} is {ssm[unknown[0]]!r}: not an option of Mamba-2 known here")
    if config.get("attn_layer_idx") or config.get("d_intermediate"):
        raise ConfigurationError(
            f"attn_layer_idx is {config.get('attn_layer_idx')!r} and d_intermediate {config.get('d_intermediate')!r}: "
            "a model with attention or MLP layers is a hybrid, not a pure Mamba-2"
        )
    if not config.get("rms_norm", True):
        raise ConfigurationError("rms_norm is False: LayerNorm blocks cannot be expressed in the mamba2 format")
    multiple = config.get("pad_vocab_size_multiple", 8)
    return {
        "model_type": "mamba2",
        "vocab_size": -(-config.get("vocab_size", 50277) // multiple) * multiple,
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layer"],
        "num_heads": int(config["d_model"] * options["expand"]) // options["head_dim"],
        **options,
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "tie_word_embeddings": config.get("tie_embeddings", True),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
