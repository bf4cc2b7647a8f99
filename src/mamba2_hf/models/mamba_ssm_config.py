"""Reading a ``config.json`` as mamba_ssm writes it (no ``model_type``; ``d_model``, ``n_layer``, ``ssm_cfg``, ...)."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigurationError

_DEFAULTS = {"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1, "chunk_size": 256}


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
    for name, expected, need in (
        ("D_has_hdim", False, "a skip weight per channel"),
        ("norm_before_gate", False, "a norm before the gate"),
        ("rmsnorm", True, "a gate without a norm"),
        ("d_ssm", None, "an MLP inside the mixer"),
    ):
        if ssm.pop(name, expected) not in (expected, None):
            raise ConfigurationError(f"ssm_cfg.{name} asks for {need}, which the mamba2 format cannot express")
    if config.get("attn_layer_idx") or config.get("d_intermediate"):
        raise ConfigurationError(
            f"attn_layer_idx is {config.get('attn_layer_idx')!r} and d_intermediate {config.get('d_intermediate')!r}: "
            "a model with attention or MLP layers is a hybrid, not a pure Mamba-2"
        )
    if not config.get("rms_norm", True):
        raise ConfigurationError("rms_norm is False: LayerNorm blocks cannot be expressed in the mamba2 format")
    values = {name: ssm.get(name, default) for name, default in _DEFAULTS.items()}
    multiple = config.get("pad_vocab_size_multiple", 8)
    limit = ssm.get("dt_limit", (0.0, float("inf")))
    return {
        "model_type": "mamba2",
        "vocab_size": -(-config.get("vocab_size", 50277) // multiple) * multiple,
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layer"],
        "state_size": values["d_state"],
        "conv_kernel": values["d_conv"],
        "expand": values["expand"],
        "head_dim": values["headdim"],
        "num_heads": int(config["d_model"] * values["expand"]) // values["headdim"],
        "n_groups": values["ngroups"],
        "chunk_size": values["chunk_size"],
        "use_bias": ssm.get("bias", False),
        "use_conv_bias": ssm.get("conv_bias", True),
        "time_step_limit": tuple(limit),
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "tie_word_embeddings": config.get("tie_embeddings", True),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
