"""Bamba (IBM, Princeton, UIUC): SSD or attention, then SwiGLU, in every layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...errors import ConfigurationError
from ...models import Mamba2HybridConfig
from ...models.base_config import as_limits
from ..equations import Equation, Shape
from .common import (
    common_fields,
    in_blocks,
    layers_of,
    neutral,
    own_limits,
    own_norm_epsilon,
    require,
    rotary,
    same_bias,
    split_head_dim,
    stock_config,
    whole_expand,
    write_published,
)

NAME = "bamba"
_LAYERS = {"ssd mlp": "mamba", "attention mlp": "attention"}
_SHARE = 0.5  # of a head that is rotated, in every published model
OUTER = {
    "backbone.embeddings.weight": "model.embed_tokens.weight",
    "backbone.norm_f.weight": "model.final_layernorm.weight",
    "lm_head.weight": "lm_head.weight",
}


def read_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` of this family as fields of ``mamba2_hybrid``."""
    stock = stock_config(NAME, raw)
    if stock.hidden_act not in ("silu", "swish"):
        raise ConfigurationError(f"hidden_act is {stock.hidden_act!r}: only 'silu' is known here")
    kinds = {"linear_attention": "ssd mlp", "full_attention": "attention mlp"}
    return {
        **common_fields(stock, raw),
        **mixer_fields(stock),
        "num_hidden_layers": stock.num_hidden_layers,
        "layer_blocks": [kinds[kind] for kind in stock.layers_block_type],
        "num_attention_heads": stock.num_attention_heads,
        "num_key_value_heads": stock.num_key_value_heads,
        "head_dim": stock.hidden_size // stock.num_attention_heads,
        "attention_bias": stock.attention_bias,
        "attention_dropout": stock.attention_dropout,
        "rope_parameters": dict(stock.rope_parameters),
        "intermediate_size": stock.intermediate_size,
        "mlp_type": "swiglu",
        "mlp_bias": stock.mlp_bias,
        "layer_norm_epsilon": stock.rms_norm_eps,
    }


def mixer_fields(stock: Any) -> dict[str, Any]:
    """The fields of the mixers, as this family and those that follow it name them."""
    limit = stock.time_step_limit
    return {
        "ssm_num_heads": stock.mamba_n_heads,
        "ssm_head_dim": stock.mamba_d_head,
        "ssm_n_groups": stock.mamba_n_groups,
        "ssm_state_size": stock.mamba_d_state,
        "ssm_conv_kernel": stock.mamba_d_conv,
        "ssm_use_bias": stock.mamba_proj_bias,
        "ssm_use_conv_bias": stock.mamba_conv_bias,
        "chunk_size": stock.mamba_chunk_size,
        **({} if limit is None else {"time_step_limit": as_limits(limit)}),
    }


def mixer_of(config: Mamba2HybridConfig) -> dict[str, Any]:
    """The way back, but for the inner width."""
    return {
        "mamba_n_heads": config.ssm_num_heads,
        "mamba_d_head": config.ssm_head_dim,
        "mamba_n_groups": config.ssm_n_groups,
        "mamba_d_state": config.ssm_state_size,
        "mamba_d_conv": config.ssm_conv_kernel,
        "mamba_proj_bias": config.ssm_use_bias,
        "mamba_conv_bias": config.ssm_use_conv_bias,
        "mamba_chunk_size": config.chunk_size,
        "hidden_act": "silu",
    }


def write_config(config: Mamba2HybridConfig) -> dict[str, Any]:
    """The ``config.json`` of a model that this family can express."""
    return write_published(NAME, "BambaForCausalLM", config, _fields, read_config)


def _fields(config: Mamba2HybridConfig) -> dict[str, Any]:
    layers = layers_of(config, NAME, _LAYERS)
    require(config, NAME, ssm_norm="gate_first", mlp_type="swiglu", attention_scale=None, attention_conv_kernel=None)
    neutral(config, NAME)
    own_norm_epsilon(config, NAME)
    same_bias(config, NAME, "ssm_use_bias", "ssm_out_bias")
    same_bias(config, NAME, "attention_bias", "attention_out_bias")
    split_head_dim(config, NAME)
    if config.rope_parameters is None:
        raise ConfigurationError("rope_parameters is None: attention of bamba always has a rotary embedding")
    return {
        **mixer_of(config),
        **own_limits(config),
        "mamba_expand": whole_expand(config, NAME),
        "num_hidden_layers": config.num_hidden_layers,
        "attn_layer_indices": [index for index, kind in enumerate(layers) if kind == "attention"],
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "attention_bias": config.attention_bias,
        "attention_dropout": config.attention_dropout,
        **_rotary(config.rope_parameters, config.head_dim or 0),
        "intermediate_size": config.intermediate_size,
        "mlp_bias": config.mlp_bias,
        "rms_norm_eps": config.layer_norm_epsilon,
    }


def _rotary(rope: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    share = rope.get("partial_rotary_factor", 1.0)
    spelled = {**rotary(rope), "partial_rotary_factor": share, "attn_rotary_emb": int(head_dim * share)}
    if share == _SHARE:
        return spelled
    # From 5.0 on, transformers takes any other share from inside of the newer key alone.
    if spelled["rope_scaling"] is None:
        return {**spelled, "rope_parameters": {**rope, "partial_rotary_factor": share}}
    return {**spelled, "rope_scaling": {**spelled["rope_scaling"], "partial_rotary_factor": share}}


def equations(config: Mamba2HybridConfig, shapes: Mapping[str, Shape], stored: Collection[str] = ()) -> list[Equation]:
    """Their tensors and ours."""
    return in_blocks(config, shapes, OUTER, rename)


def rename(layer: int, block: int, name: str) -> str:
    """Their name of a tensor in a block."""
    part, _, rest = name.partition(".")
    if part == "norm":
        return f"model.layers.{layer}.{('input_layernorm', 'pre_ff_layernorm')[block]}.{rest}"
    return f"model.layers.{layer}.{ {'mixer': 'mamba', 'attention': 'self_attn', 'mlp': 'feed_forward'}[part] }.{rest}"
