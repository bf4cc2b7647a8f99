"""Falcon-H1 (TII): SSD and attention side by side in every layer, then SwiGLU; a multiplier for almost everything."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...errors import ConfigurationError
from ...models import Mamba2HybridConfig
from ..equations import Equation, Shape
from . import bamba
from .common import (
    common_fields,
    full_rotary,
    in_blocks,
    layers_of,
    own_limits,
    own_norm_epsilon,
    require,
    rotary,
    same_bias,
    stock_config,
    without_share,
    write_published,
)

NAME = "falcon_h1"
_LAYERS = {"ssd+attention mlp": "hybrid"}
_MULTIPLIERS = (
    *("embedding_multiplier", "key_multiplier", "attention_in_multiplier", "attention_out_multiplier"),
    *("ssm_in_multiplier", "ssm_out_multiplier"),
)


def read_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` of this family as fields of ``mamba2_hybrid``."""
    stock = stock_config(NAME, raw)
    if stock.hidden_act not in ("silu", "swish"):
        raise ConfigurationError(f"hidden_act is {stock.hidden_act!r}: only 'silu' is known here")
    norm = "none"
    if stock.mamba_rms_norm:
        norm = "norm_first" if stock.mamba_norm_before_gate else "gate_first"
    return {
        **common_fields(stock, raw),
        **bamba.mixer_fields(stock),
        "ssm_norm": norm,
        "ssm_out_bias": stock.projectors_bias,
        "num_hidden_layers": stock.num_hidden_layers,
        "layer_blocks": list(_LAYERS) * stock.num_hidden_layers,
        "num_attention_heads": stock.num_attention_heads,
        "num_key_value_heads": stock.num_key_value_heads,
        "head_dim": getattr(stock, "head_dim", None) or stock.hidden_size // stock.num_attention_heads,
        "attention_bias": stock.attention_bias,
        "attention_dropout": stock.attention_dropout,
        "rope_parameters": without_share(stock.rope_parameters),
        "intermediate_size": stock.intermediate_size,
        "mlp_type": "swiglu",
        "mlp_bias": stock.mlp_bias,
        "layer_norm_epsilon": stock.rms_norm_eps,
        **{name: getattr(stock, name) for name in _MULTIPLIERS},
        "lm_head_multiplier": stock.lm_head_multiplier,
        "ssm_multipliers": list(stock.ssm_multipliers),
        "mlp_multipliers": list(stock.mlp_multipliers),
    }


def write_config(config: Mamba2HybridConfig) -> dict[str, Any]:
    """The ``config.json`` of a model that this family can express."""
    return write_published(NAME, "FalconH1ForCausalLM", config, _fields, read_config)


def _fields(config: Mamba2HybridConfig) -> dict[str, Any]:
    layers_of(config, NAME, _LAYERS)
    require(config, NAME, mlp_type="swiglu", attention_scale=None, attention_conv_kernel=None, residual_multiplier=1.0)
    own_norm_epsilon(config, NAME)
    same_bias(config, NAME, "attention_bias", "attention_out_bias")
    inner = config.ssm_num_heads * config.ssm_head_dim
    scale = config.lm_head_multiplier
    if scale is None:
        scale = 1.0 if config.logits_scaling is None else 1 / config.logits_scaling
    fields = {
        **bamba.mixer_of(config),
        **own_limits(config),
        "mamba_d_ssm": inner,
        "mamba_expand": max(1, inner // config.hidden_size),
        "mamba_rms_norm": config.ssm_norm != "none",
        "mamba_norm_before_gate": config.ssm_norm == "norm_first",
        "projectors_bias": config.ssm_use_bias if config.ssm_out_bias is None else config.ssm_out_bias,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "attention_bias": config.attention_bias,
        "attention_dropout": config.attention_dropout,
        **rotary(full_rotary(config, NAME)),
        "intermediate_size": config.intermediate_size,
        "mlp_bias": config.mlp_bias,
        "rms_norm_eps": config.layer_norm_epsilon,
        **{name: getattr(config, name) for name in _MULTIPLIERS},
        "lm_head_multiplier": scale,
        "ssm_multipliers": list(config.ssm_multipliers or [1.0] * 5),
        "mlp_multipliers": list(config.mlp_multipliers or [1.0] * 2),
    }
    return {key: float(value) if key.endswith("_multiplier") else value for key, value in fields.items()}


def equations(config: Mamba2HybridConfig, shapes: Mapping[str, Shape], stored: Collection[str] = ()) -> list[Equation]:
    """Their tensors and ours."""
    return in_blocks(config, shapes, bamba.OUTER, bamba.rename)
