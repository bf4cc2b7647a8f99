"""Zamba2 (Zyphra): SSD everywhere, some of it helped by attention and MLP blocks that layers share."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ...errors import ConfigurationError
from ...models import Mamba2HybridConfig
from ..equations import Equation, Rows, Shape, same
from . import bamba
from .common import (
    common_fields,
    full_rotary,
    in_blocks,
    layers_of,
    neutral,
    only_lower_limit,
    require,
    rotary,
    same_bias,
    stock_config,
    whole_expand,
    without_share,
    write_published,
)

NAME = "zamba2"
_LAYERS = {"ssd": "mamba", "shared>ssd": "hybrid"}
_NORM_EPS = 1e-5  # of the gated norm, a constant there
_SHARED = re.compile(r"backbone\.shared_blocks\.(\d+)\.(.+)")
_ADAPTER = re.compile(r"([qkv]|mlp)_adapters\.(\d+)\.(.+)")
_STORED_SHARED = re.compile(r"model\.layers\.(\d+)\.shared_transformer\.(.+)")


def read_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` of this family as fields of ``mamba2_hybrid``. transformers' class clamps the step size from
    ``time_step_min`` up.
    """
    stock = stock_config(NAME, raw)
    if stock.hidden_act != "gelu":
        raise ConfigurationError(f"hidden_act is {stock.hidden_act!r}: only 'gelu' is known here")
    kinds = {"linear_attention": "ssd", "hybrid": "shared>ssd"}
    return {
        **common_fields(stock, raw),
        "num_hidden_layers": len(stock.layers_block_type),
        "layer_blocks": [kinds[kind] for kind in stock.layers_block_type],
        "ssm_num_heads": stock.n_mamba_heads,
        "ssm_head_dim": stock.mamba_headdim,
        "ssm_n_groups": stock.mamba_ngroups,
        "ssm_state_size": stock.mamba_d_state,
        "ssm_conv_kernel": stock.mamba_d_conv,
        "ssm_use_bias": stock.add_bias_linear,
        "ssm_norm_epsilon": _NORM_EPS,
        "chunk_size": stock.chunk_size,
        "time_step_limit": (stock.time_step_min, float("inf")),
        "time_step_min": stock.time_step_min,
        "time_step_max": max(stock.time_step_max, stock.time_step_min),
        "time_step_floor": stock.time_step_floor,
        "num_attention_heads": stock.num_attention_heads,
        "num_key_value_heads": stock.num_key_value_heads,
        "head_dim": stock.attention_head_dim,
        "attention_scale": (stock.attention_head_dim / 2) ** -0.5,
        "attention_dropout": stock.attention_dropout,
        "rope_parameters": without_share(stock.rope_parameters) if stock.use_mem_rope else None,
        "intermediate_size": stock.intermediate_size,
        "mlp_type": "geglu",
        "mlp_bias": stock.add_bias_linear,
        "num_shared_blocks": stock.num_mem_blocks,
        "shared_adapter_rank": stock.adapter_rank,
        "shared_attention_adapters": stock.use_shared_attention_adapter,
        "layer_norm_epsilon": stock.rms_norm_eps,
    }


def write_config(config: Mamba2HybridConfig) -> dict[str, Any]:
    """The ``config.json`` of a model that this family can express."""
    return write_published(NAME, "Zamba2ForCausalLM", config, _fields, read_config)


def _fields(config: Mamba2HybridConfig) -> dict[str, Any]:
    layers = layers_of(config, NAME, _LAYERS)
    if "hybrid" not in layers:
        raise ConfigurationError(f"no layer of layer_blocks is 'shared>ssd': without shared blocks this is no {NAME}")
    require(config, NAME, ssm_norm="gate_first", mlp_type="geglu", ssm_use_conv_bias=True, attention_conv_kernel=None)
    require(config, NAME, attention_bias=False, ssm_norm_group_size=None)
    same_bias(config, NAME, "ssm_use_bias", "ssm_out_bias", "mlp_bias")
    same_bias(config, NAME, "attention_bias", "attention_out_bias")
    neutral(config, NAME)
    eps = config.layer_norm_epsilon if config.ssm_norm_epsilon is None else config.ssm_norm_epsilon
    if eps != _NORM_EPS:
        raise ConfigurationError(f"ssm_norm_epsilon is {eps}: it is a constant of {NAME}, {_NORM_EPS}")
    assert config.num_attention_heads is not None
    assert config.head_dim is not None
    if config.head_dim * config.num_attention_heads != 2 * config.hidden_size:
        raise ConfigurationError(
            f"head_dim is {config.head_dim}: {NAME} makes it 2 * hidden_size / num_attention_heads = "
            f"{2 * config.hidden_size / config.num_attention_heads:g}"
        )
    scale = (config.head_dim / 2) ** -0.5
    if config.attention_scale is None or abs(config.attention_scale / scale - 1) > 1e-12:
        raise ConfigurationError(f"attention_scale is {config.attention_scale}: {NAME} makes it {scale}")
    if not config.shared_adapter_rank:
        raise ConfigurationError(f"shared_adapter_rank is 0: {NAME} always has adapters beside its shared MLPs")
    rope = None if config.rope_parameters is None else full_rotary(config, NAME)
    low = only_lower_limit(config, NAME)
    return {
        "num_hidden_layers": config.num_hidden_layers,
        "layers_block_type": layers,
        "hybrid_layer_ids": config.shared_layers,
        "n_mamba_heads": config.ssm_num_heads,
        "mamba_headdim": config.ssm_head_dim,
        "mamba_expand": whole_expand(config, NAME),
        "mamba_ngroups": config.ssm_n_groups,
        "mamba_d_state": config.ssm_state_size,
        "mamba_d_conv": config.ssm_conv_kernel,
        "use_conv_bias": True,
        "add_bias_linear": config.ssm_use_bias,
        "chunk_size": config.chunk_size,
        "time_step_min": low,
        "time_step_max": max(config.time_step_max, low),
        "time_step_floor": config.time_step_floor,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "attention_head_dim": config.head_dim,
        "attention_hidden_size": 2 * config.hidden_size,
        "attention_dropout": config.attention_dropout,
        "use_mem_rope": rope is not None,
        "use_long_context": False,
        **({} if rope is None else rotary(rope)),
        "intermediate_size": config.intermediate_size,
        "hidden_act": "gelu",
        "num_mem_blocks": config.num_shared_blocks,
        "adapter_rank": config.shared_adapter_rank,
        "use_shared_attention_adapter": config.shared_attention_adapters,
        "rms_norm_eps": config.layer_norm_epsilon,
    }


def equations(config: Mamba2HybridConfig, shapes: Mapping[str, Shape], stored: Collection[str] = ()) -> list[Equation]:
    """Their tensors and ours. A shared block is stored in the first layer that uses it, with the adapters of all its
    uses; gate and up projection are one.
    """
    shared = config.shared_layers

    def rename(layer: int, block: int, name: str) -> str:
        part, _, rest = name.partition(".")
        outside = f"model.layers.{layer}"
        if part == "linear":
            return f"{outside}.linear.{rest}"
        inside = f"{outside}.mamba_decoder" if layer in shared else outside
        return f"{inside}.input_layernorm.{rest}" if part == "norm" else f"{inside}.mamba.{rest}"

    found = in_blocks(config, shapes, bamba.OUTER, rename)
    for name, shape in shapes.items():
        if (match := _SHARED.fullmatch(name)) is None:
            continue
        block, rest = int(match[1]), match[2]
        outside = f"model.layers.{shared[block]}.shared_transformer"
        if (adapter := _ADAPTER.fullmatch(rest)) is not None:
            use = int(adapter[2]) * config.num_shared_blocks + block
            kind = adapter[1]
            where = "feed_forward.gate_up_proj" if kind == "mlp" else f"self_attn.linear_{kind}"
            found.append(same(f"{outside}.{where}_adapter_list.{use}.{adapter[3]}", name, shape))
        elif rest.startswith("mlp.gate_proj."):
            up = name.replace("gate_proj", "up_proj")
            joined = Rows(f"{outside}.feed_forward.gate_up_proj.{rest.rpartition('.')[2]}", (2 * shape[0], *shape[1:]))
            found.append(Equation((joined,), (Rows(name, shape), Rows(up, shapes[up]))))
        elif not rest.startswith("mlp.up_proj."):
            part, _, last = rest.partition(".")
            where = {
                "norm": "input_layernorm",
                "mlp_norm": "pre_ff_layernorm",
                "attention": "self_attn",
                "mlp": "feed_forward",
            }[part]
            found.append(same(f"{outside}.{where}.{last}", name, shape))
    return found


def canonical(config: Mamba2HybridConfig, name: str) -> str:
    """The name of a stored tensor; that of a shared block is the one in the first layer that uses it."""
    match = _STORED_SHARED.fullmatch(name)
    shared = config.shared_layers
    if match is None or int(match[1]) not in shared:
        return name
    first = shared[shared.index(int(match[1])) % config.num_shared_blocks]
    return f"model.layers.{first}.shared_transformer.{match[2]}"
