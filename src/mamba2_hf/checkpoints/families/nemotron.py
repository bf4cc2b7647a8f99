"""Nemotron-H and Nemotron 3 (NVIDIA): one of SSD, attention, MLP or experts in a layer."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ...errors import ConfigurationError
from ...models import Mamba2HybridConfig
from ..equations import Equation, Rows, Shape, same
from .common import (
    NO_STEP,
    common_fields,
    in_blocks,
    layers_of,
    neutral,
    only_lower_limit,
    own_norm_epsilon,
    require,
    same_bias,
    shared_expert,
    stock_config,
    write_published,
)

NAME = "nemotron_h"
_LAYERS = {"ssd": "linear_attention", "attention": "full_attention", "mlp": "mlp", "moe": "moe"}
_PATTERN = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
_ACTIVATIONS = {"relu2": "relu2", "gelu": "gelu"}
_OUTER = {
    "backbone.embeddings.weight": "backbone.embeddings.weight",
    "backbone.norm_f.weight": "backbone.norm_f.weight",
    "lm_head.weight": "lm_head.weight",
}
_HEAD = re.compile(r"mtp\.(\d+)\.(?:layers\.(\d+)\.blocks\.\d+\.)?(.+)")
_EXPERTS = re.compile(r"moe\.experts\.(up|down)_proj")


def read_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` of this family as fields of ``mamba2_hybrid``.

    transformers' class clamps the step size from ``time_step_min`` up and reads no other limit, and never ties the head
    to the embedding.
    """
    stock = stock_config(NAME, raw)
    if stock.mlp_hidden_act not in _ACTIVATIONS:
        raise ConfigurationError(
            f"mlp_hidden_act is {stock.mlp_hidden_act!r}: known here are {', '.join(map(repr, _ACTIVATIONS))}"
        )
    kinds = {theirs: ours for ours, theirs in _LAYERS.items()}
    pattern = raw.get("hybrid_override_pattern")
    if pattern and raw.get("layers_block_type"):
        spelled = stock_config(NAME, {name: value for name, value in raw.items() if name != "layers_block_type"})
        if spelled.layers_block_type != stock.layers_block_type:
            raise ConfigurationError(
                f"hybrid_override_pattern is {pattern!r} and layers_block_type lists other layers: keep the right one"
            )
    fields = {
        **common_fields(stock, raw),
        "num_hidden_layers": len(stock.layers_block_type),
        "layer_blocks": [kinds[kind] for kind in stock.layers_block_type],
        "tie_word_embeddings": False,
        "ssm_num_heads": stock.mamba_num_heads,
        "ssm_head_dim": stock.mamba_head_dim,
        "ssm_n_groups": stock.n_groups,
        "ssm_state_size": stock.ssm_state_size,
        "ssm_conv_kernel": stock.conv_kernel,
        "ssm_use_bias": stock.use_bias,
        "ssm_use_conv_bias": stock.use_conv_bias,
        "chunk_size": stock.chunk_size,
        "time_step_limit": (stock.time_step_min, float("inf")),
        "time_step_min": stock.time_step_min,
        "time_step_max": max(stock.time_step_max, stock.time_step_min),
        "time_step_floor": stock.time_step_floor,
        "num_attention_heads": stock.num_attention_heads,
        "num_key_value_heads": stock.num_key_value_heads,
        "head_dim": raw.get("head_dim", raw.get("attention_head_dim", stock.head_dim)),
        "attention_dropout": stock.attention_dropout,
        "rope_parameters": None,
        "intermediate_size": stock.intermediate_size,
        "mlp_type": _ACTIVATIONS[stock.mlp_hidden_act],
        "mlp_bias": stock.mlp_bias,
        "layer_norm_epsilon": stock.layer_norm_epsilon,
    }
    layers = stock.layers_block_type
    if stock.num_nextn_predict_layers:
        fields["num_mtp_layers"] = stock.num_nextn_predict_layers
        fields["mtp_layer_blocks"] = [kinds[kind] for kind in stock.mtp_layers_block_type]
        layers = [*layers, *stock.mtp_layers_block_type]
    if "moe" not in layers:
        return fields
    return {
        **fields,
        "num_experts": stock.n_routed_experts,
        "num_experts_per_tok": stock.num_experts_per_tok,
        "moe_intermediate_size": stock.moe_intermediate_size,
        "shared_expert_intermediate_size": stock.moe_shared_expert_intermediate_size,
        "moe_latent_size": stock.moe_latent_size,
        "moe_router": "sigmoid",
        "n_group": stock.n_group,
        "topk_group": stock.topk_group,
        "norm_topk_prob": stock.norm_topk_prob,
        "routed_scaling_factor": stock.routed_scaling_factor,
        "output_router_logits": stock.output_router_logits,
        "router_aux_loss_coef": 0.0,
    }


def write_config(config: Mamba2HybridConfig) -> dict[str, Any]:
    """The ``config.json`` of a model that this family can express."""
    return write_published(NAME, "NemotronHForCausalLM", config, _fields, read_config)


def _fields(config: Mamba2HybridConfig) -> dict[str, Any]:
    layers = own = layers_of(config, NAME, _LAYERS)
    heads: dict[str, Any] = {"num_nextn_predict_layers": config.num_mtp_layers}
    if config.num_mtp_layers:
        of_a_head = layers_of(config.get_mtp_config(), NAME, _LAYERS)
        heads["mtp_hybrid_override_pattern"] = "".join(_PATTERN[kind] for kind in of_a_head)
        layers = [*own, *of_a_head]
    require(config, NAME, ssm_norm="gate_first", attention_scale=None, attention_conv_kernel=None, rope_parameters=None)
    require(config, NAME, attention_bias=False)
    neutral(config, NAME)
    own_norm_epsilon(config, NAME)
    same_bias(config, NAME, "ssm_use_bias", "ssm_out_bias")
    same_bias(config, NAME, "attention_bias", "attention_out_bias")
    if config.mlp_type not in _ACTIVATIONS.values() and {"mlp", "moe"} & set(layers):
        raise ConfigurationError(f"mlp_type is {config.mlp_type!r}: the MLPs of {NAME} have no gate")
    low = only_lower_limit(config, NAME)
    fields = {
        "hybrid_override_pattern": "".join(_PATTERN[kind] for kind in own),
        "num_hidden_layers": config.num_hidden_layers,
        **heads,
        "tie_word_embeddings": False,
        "mamba_num_heads": config.ssm_num_heads,
        "mamba_head_dim": config.ssm_head_dim,
        "n_groups": config.ssm_n_groups,
        "ssm_state_size": config.ssm_state_size,
        "conv_kernel": config.ssm_conv_kernel,
        "expand": max(1, config.ssm_num_heads * config.ssm_head_dim // config.hidden_size),
        "use_bias": config.ssm_use_bias,
        "mamba_proj_bias": config.ssm_use_bias,
        "use_conv_bias": config.ssm_use_conv_bias,
        "chunk_size": config.chunk_size,
        "mamba_hidden_act": "silu",
        "time_step_limit": [0.0 if low == NO_STEP else low, config.time_step_limit[1]],
        "time_step_min": low,
        "time_step_max": max(config.time_step_max, low),
        "time_step_floor": config.time_step_floor,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "attention_bias": config.attention_bias,
        "attention_dropout": config.attention_dropout,
        "intermediate_size": config.intermediate_size,
        "mlp_hidden_act": config.mlp_type if config.mlp_type in _ACTIVATIONS else "relu2",
        "mlp_bias": config.mlp_bias,
        **dict.fromkeys(("layer_norm_epsilon", "rms_norm_eps"), config.layer_norm_epsilon),
        "residual_in_fp32": config.residual_in_fp32,
        "rescale_prenorm_residual": False,
    }
    if "moe" in layers:
        require(config, NAME, moe_router="sigmoid")
        width = config.moe_intermediate_size
        fields |= {
            "n_routed_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "n_shared_experts": 1,
            "moe_intermediate_size": config.intermediate_size if width is None else width,
            "moe_shared_expert_intermediate_size": shared_expert(config, NAME),
            "moe_latent_size": config.moe_latent_size,
            "n_group": config.n_group,
            "topk_group": config.topk_group,
            "norm_topk_prob": config.norm_topk_prob,
            "routed_scaling_factor": config.routed_scaling_factor,
            "output_router_logits": config.output_router_logits,
        }
    return fields


def equations(config: Mamba2HybridConfig, shapes: Mapping[str, Shape], stored: Collection[str] = ()) -> list[Equation]:
    """Their tensors and ours; every expert is a tensor of its own. The layers of all heads that predict further tokens
    are one list.
    """
    found: list[Equation] = []

    def of_block(outside: str, name: str, ours: str) -> str | None:
        part, _, rest = name.partition(".")
        if part == "norm":
            return f"{outside}.norm.{rest}"
        if part != "moe":
            return f"{outside}.mixer.{rest}"
        if (experts := _EXPERTS.fullmatch(name)) is not None:
            count, *each = shapes[ours]
            names = [f"{outside}.mixer.experts.{expert}.{experts[1]}_proj.weight" for expert in range(count)]
            theirs = tuple(Rows(name, tuple(each)) for name in names)
            found.append(Equation(theirs, (Rows(ours, shapes[ours]),)))
            return None
        inside, _, last = rest.partition(".")
        theirs_inside = {
            "router": "gate",
            "shared": "shared_experts",
            "latent_in": "fc1_latent_proj",
            "latent_out": "fc2_latent_proj",
        }[inside]
        return f"{outside}.mixer.{theirs_inside}.{last}"

    def rename(layer: int, block: int, name: str) -> str | None:
        outside = f"backbone.layers.{layer}"
        return of_block(outside, name, f"{outside}.blocks.{block}.{name}")

    layers = len(config.mtp_layer_blocks or [])
    for ours, shape in shapes.items():
        if (of_head := _HEAD.fullmatch(ours)) is None:
            continue
        number, layer, name = int(of_head[1]), of_head[2], of_head[3]
        if layer is not None:
            theirs = of_block(f"mtp.layers.{number * layers + int(layer)}", name, ours)
        else:
            place = layers - 1 if name.startswith("final_layernorm") else 0
            theirs = f"mtp.layers.{number * layers + place}.{name}"
        if theirs is not None:
            found.append(same(theirs, ours, shape))
    return in_blocks(config, shapes, _OUTER, rename) + found


def canonical(config: Mamba2HybridConfig, name: str) -> str | None:
    """The name of a stored tensor as published; None for a head that predicts further tokens where the configuration
    says that there is none.
    """
    if name.startswith("mtp.") and not config.num_mtp_layers:
        return None
    name = re.sub(r"^model\.", "backbone.", name)
    return "backbone.embeddings.weight" if name == "backbone.embedding.weight" else name
