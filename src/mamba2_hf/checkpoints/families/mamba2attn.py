"""The original code's hybrids (state-spaces/mamba2attn-2.7b): some mixers are attention, and MLPs may follow.

Source: ``mamba_ssm/models/mixer_seq_simple.py``, ``modules/mha.py`` and ``modules/mlp.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...errors import ConfigurationError
from ...models import Mamba2HybridConfig
from ...models.mamba_ssm_config import is_mamba_ssm_config, translate_mamba_ssm_config
from ..equations import Equation, Rows, Shape
from .common import KEPT, in_blocks

NAME = "mamba2attn"
_MLP_MULTIPLE = 128  # widths are rounded up to it
_OUTER = {
    "backbone.embeddings.weight": "backbone.embedding.weight",
    "backbone.norm_f.weight": "backbone.norm_f.weight",
    "lm_head.weight": "lm_head.weight",
}
# Options of attention, and the only value that each may have; None for any.
_ATTENTION = {
    "causal": True,
    "mlp_dim": 0,
    "rotary_emb_interleaved": False,
    **dict.fromkeys(("num_heads", "num_heads_kv", "head_dim", "qkv_proj_bias", "out_proj_bias", "softmax_scale")),
    **dict.fromkeys(("d_conv", "rotary_emb_dim", "rotary_emb_base")),
}


def recognizes(raw: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of this family."""
    return is_mamba_ssm_config(raw) and bool(raw.get("attn_layer_idx") or raw.get("d_intermediate"))


def read_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` of this family as fields of ``mamba2_hybrid``.

    Raises:
        ConfigurationError: an option cannot be expressed there.
    """
    pure = translate_mamba_ssm_config({**raw, "attn_layer_idx": [], "d_intermediate": 0})
    layers, width = pure["num_hidden_layers"], raw.get("d_intermediate") or 0
    if not isinstance(width, int) or width < 0:
        raise ConfigurationError(f"d_intermediate is {width!r}: expected a whole number of at least 0")
    places = raw.get("attn_layer_idx") or []
    fits = isinstance(places, list) and all(isinstance(place, int) and 0 <= place < layers for place in places)
    if not isinstance(layers, int) or not fits:
        raise ConfigurationError(f"attn_layer_idx is {places!r}: expected numbers of layers below n_layer={layers}")
    then = " mlp" if width else ""
    fields = {
        "model_type": Mamba2HybridConfig.model_type,
        **{name: pure[name] for name in ("vocab_size", "hidden_size", "residual_in_fp32", "tie_word_embeddings")},
        **{name: pure[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id", "time_step_limit")},
        **{name: pure[name] for name in ("time_step_min", "time_step_max", "time_step_floor", "chunk_size")},
        "num_hidden_layers": layers,
        "layer_blocks": [("attention" if layer in places else "ssd") + then for layer in range(layers)],
        "ssm_num_heads": pure["num_heads"],
        "ssm_head_dim": pure["head_dim"],
        "ssm_n_groups": pure["n_groups"],
        "ssm_state_size": pure["state_size"],
        "ssm_conv_kernel": pure["conv_kernel"],
        "ssm_use_bias": pure["use_bias"],
        "ssm_use_conv_bias": pure["use_conv_bias"],
        "intermediate_size": -(-width // _MLP_MULTIPLE) * _MLP_MULTIPLE or 1,
        "mlp_type": "swiglu",
        "layer_norm_epsilon": pure["layer_norm_epsilon"],
        KEPT: dict(raw),
    }
    return {**fields, **_attention_fields(raw, pure["hidden_size"])} if places else fields


def _attention_fields(raw: Mapping[str, Any], hidden_size: int) -> dict[str, Any]:
    options = raw.get("attn_cfg") or {}
    if not isinstance(options, Mapping):
        raise ConfigurationError(f"attn_cfg is {options!r}: expected an object with the options of attention")
    for name, value in options.items():
        if name not in _ATTENTION:
            raise ConfigurationError(f"attn_cfg.{name} is {value!r}: not an option of attention known here")
        if _ATTENTION[name] is not None and value != _ATTENTION[name]:
            raise ConfigurationError(f"attn_cfg.{name} is {value!r}: only {_ATTENTION[name]!r} can be expressed here")
    if not options.get("causal", False):
        raise ConfigurationError("attn_cfg.causal is not true: attention that sees later tokens is no language model's")
    heads = options.get("num_heads")
    if not isinstance(heads, int) or heads < 1:
        raise ConfigurationError(f"attn_cfg.num_heads is {heads!r}: expected a whole number of at least 1")
    head_dim = options.get("head_dim") or hidden_size // heads
    rotated, taps = options.get("rotary_emb_dim") or 0, options.get("d_conv") or 0
    rope = None
    if rotated:
        base = float(options.get("rotary_emb_base", 10000.0))
        rope = {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": rotated / head_dim}
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": options.get("num_heads_kv") or heads,
        "head_dim": head_dim,
        "attention_bias": options.get("qkv_proj_bias", True),
        "attention_out_bias": options.get("out_proj_bias", True),
        "attention_scale": options.get("softmax_scale"),
        "attention_conv_kernel": taps or None,
        "rope_parameters": rope,
    }


def equations(config: Mamba2HybridConfig, shapes: Mapping[str, Shape], stored: Collection[str] = ()) -> list[Equation]:
    """Their tensors and ours. Queries, keys and values are one projection, and so are the MLP's two, its gate last."""

    def rename(layer: int, block: int, name: str) -> str | None:
        outside = f"backbone.layers.{layer}"
        part, _, rest = name.partition(".")
        if part == "norm":
            return f"{outside}.{('norm', 'norm2')[block]}.{rest}"
        if part == "mlp":
            return f"{outside}.mlp.fc2.{rest.rpartition('.')[2]}" if rest.startswith("down_proj.") else None
        if part == "attention" and not rest.startswith("conv1d."):
            return f"{outside}.mixer.out_proj.{rest.rpartition('.')[2]}" if rest.startswith("o_proj.") else None
        return f"{outside}.mixer.{rest}"

    found = in_blocks(config, shapes, _OUTER, rename)
    for layer, kinds in enumerate(config.blocks):
        for block, kind in enumerate(kinds):
            inside = f"backbone.layers.{layer}.blocks.{block}"
            joins = {
                "attention": ("mixer.in_proj", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
                "mlp": ("mlp.fc1", ("mlp.up_proj", "mlp.gate_proj")),
            }
            for last in ("weight", "bias") if kind in joins else ():
                theirs, ours = joins[kind]
                names = [f"{inside}.{own}.{last}" for own in ours]
                if names[0] in shapes:
                    own_rows = tuple(Rows(name, shapes[name]) for name in names)
                    shape = (sum(rows.shape[0] for rows in own_rows), *own_rows[0].shape[1:])
                    found.append(Equation((Rows(f"backbone.layers.{layer}.{theirs}.{last}", shape),), own_rows))
    return found
