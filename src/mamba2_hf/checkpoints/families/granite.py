"""Granite 4 H (IBM): SSD or attention, then a SwiGLU that every token passes, with or without experts beside it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...errors import ConfigurationError
from ...models import Mamba2HybridConfig
from ..equations import Equation, Rows, Shape
from . import bamba
from .common import (
    common_fields,
    full_rotary,
    in_blocks,
    layers_of,
    limits,
    neutral,
    own_norm_epsilon,
    require,
    rotary,
    same_bias,
    shared_expert,
    split_head_dim,
    stock_config,
    whole_expand,
    without_share,
    write_published,
)

NAME = "granitemoehybrid"
_KINDS = {"linear_attention": "ssd", "full_attention": "attention"}
_PUBLISHED_KINDS = {"ssd": "mamba", "attention": "attention"}  # which every version of transformers reads
_OUTER = {**bamba.OUTER, "backbone.norm_f.weight": "model.norm.weight"}
_PARTS = {
    "mixer": "mamba",
    "attention": "self_attn",
    "mlp": "shared_mlp",
    "moe.shared": "shared_mlp",
    "moe.router.weight": "block_sparse_moe.router.layer.weight",
    "moe.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
    "moe.experts.down_proj": "block_sparse_moe.output_linear.weight",
}
_NEW_NAMES = {
    "block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",
    "block_sparse_moe.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.experts.down_proj": "block_sparse_moe.output_linear.weight",
}


def read_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` of this family as fields of ``mamba2_hybrid``."""
    stock = stock_config(NAME, raw)
    if stock.hidden_act not in ("silu", "swish"):
        raise ConfigurationError(f"hidden_act is {stock.hidden_act!r}: only 'silu' is known here")
    experts = stock.num_local_experts or 0
    if unknown := set(stock.layers_block_type) - _KINDS.keys():
        raise ConfigurationError(f"layer_types names {sorted(unknown)[0]!r}: known here are {', '.join(_KINDS)}")
    then = "moe" if experts else "mlp"
    fields = {
        **common_fields(stock, raw),
        **bamba.mixer_fields(stock),
        "num_hidden_layers": stock.num_hidden_layers,
        "layer_blocks": [f"{_KINDS[kind]} {then}" for kind in stock.layers_block_type],
        "num_attention_heads": stock.num_attention_heads,
        "num_key_value_heads": stock.num_key_value_heads,
        "head_dim": stock.hidden_size // stock.num_attention_heads,
        "attention_bias": stock.attention_bias,
        "attention_dropout": stock.attention_dropout,
        "attention_scale": float(stock.attention_multiplier),
        "rope_parameters": without_share(stock.rope_parameters) if stock.position_embedding_type == "rope" else None,
        "mlp_type": "swiglu",
        "mlp_bias": False,
        "embedding_multiplier": stock.embedding_multiplier,
        "residual_multiplier": stock.residual_multiplier,
        "logits_scaling": stock.logits_scaling,
        "layer_norm_epsilon": stock.rms_norm_eps,
    }
    if not experts:
        return {**fields, "intermediate_size": stock.shared_intermediate_size}
    return {
        **fields,
        "intermediate_size": stock.intermediate_size,
        "shared_expert_intermediate_size": stock.shared_intermediate_size,
        "num_experts": experts,
        "num_experts_per_tok": stock.num_experts_per_tok,
        "moe_router": "softmax",
        "router_aux_loss_coef": stock.router_aux_loss_coef,
        "output_router_logits": bool(stock.output_router_logits),
    }


def write_config(config: Mamba2HybridConfig) -> dict[str, Any]:
    """The ``config.json`` of a model that this family can express."""
    return write_published(NAME, "GraniteMoeHybridForCausalLM", config, _fields, read_config)


def _fields(config: Mamba2HybridConfig) -> dict[str, Any]:
    then = "moe" if any("moe" in kinds for kinds in config.blocks) else "mlp"
    names = {f"{ours} {then}": theirs for ours, theirs in _PUBLISHED_KINDS.items()}
    layers = layers_of(config, NAME, names)
    require(config, NAME, ssm_norm="gate_first", mlp_type="swiglu", mlp_bias=False, attention_conv_kernel=None)
    neutral(config, NAME, "embedding_multiplier", "residual_multiplier", "logits_scaling", "lm_head_multiplier")
    own_norm_epsilon(config, NAME)
    same_bias(config, NAME, "ssm_use_bias", "ssm_out_bias")
    same_bias(config, NAME, "attention_bias", "attention_out_bias")
    split_head_dim(config, NAME)
    assert config.head_dim is not None
    rope = None if config.rope_parameters is None else full_rotary(config, NAME)
    fields = {
        **bamba.mixer_of(config),
        "time_step_limit": limits(config),  # mlx-lm clamps to limits of its own where there is none
        "mamba_expand": whole_expand(config, NAME),
        "num_hidden_layers": config.num_hidden_layers,
        "layer_types": layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "attention_bias": config.attention_bias,
        "attention_dropout": config.attention_dropout,
        "attention_multiplier": config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
        "position_embedding_type": "nope" if rope is None else "rope",
        **rotary({"rope_type": "default", "rope_theta": 10000.0} if rope is None else rope),
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "logits_scaling": logits_scaling(config),
        "rms_norm_eps": config.layer_norm_epsilon,
        "intermediate_size": config.intermediate_size,
        "shared_intermediate_size": config.intermediate_size,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
    }
    if then == "moe":
        require(config, NAME, moe_router="softmax", moe_latent_size=None)
        width = config.moe_intermediate_size
        fields |= {
            "intermediate_size": config.intermediate_size if width is None else width,
            "shared_intermediate_size": shared_expert(config, NAME),
            "num_local_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "router_aux_loss_coef": config.router_aux_loss_coef,
            "output_router_logits": config.output_router_logits,
        }
    return fields


def logits_scaling(config: Mamba2HybridConfig) -> float:
    """What logits are divided by."""
    if config.logits_scaling is not None:
        return config.logits_scaling
    return 1.0 if config.lm_head_multiplier is None else 1 / config.lm_head_multiplier


def equations(config: Mamba2HybridConfig, shapes: Mapping[str, Shape], stored: Collection[str] = ()) -> list[Equation]:
    """Their tensors and ours; gate and up projection are one."""

    def rename(layer: int, block: int, name: str) -> str | None:
        if name == "norm.weight":
            return f"model.layers.{layer}.{('input_layernorm', 'post_attention_layernorm')[block]}.weight"
        if name in _PARTS:
            return f"model.layers.{layer}.{_PARTS[name]}"
        part, _, rest = name.partition(".")
        if part in ("mlp", "moe"):
            joined = not rest.endswith("down_proj.weight")
            return None if joined else f"model.layers.{layer}.shared_mlp.output_linear.weight"
        return f"model.layers.{layer}.{_PARTS[part]}.{rest}"

    found = in_blocks(config, shapes, _OUTER, rename)
    for layer, kinds in enumerate(config.blocks):
        inside = "moe.shared" if "moe" in kinds else "mlp"
        gate, up = (f"backbone.layers.{layer}.blocks.1.{inside}.{name}_proj.weight" for name in ("gate", "up"))
        rows, width = shapes[gate]
        joined = Rows(f"model.layers.{layer}.shared_mlp.input_linear.weight", (2 * rows, width))
        found.append(Equation((joined,), (Rows(gate, shapes[gate]), Rows(up, shapes[up]))))
    return found


def canonical(config: Mamba2HybridConfig, name: str) -> str:
    """The name of a stored tensor as published, also where transformers' names in memory were stored."""
    for new, old in _NEW_NAMES.items():
        if name.endswith(f".{new}"):
            return name.removesuffix(new) + old
    return name
