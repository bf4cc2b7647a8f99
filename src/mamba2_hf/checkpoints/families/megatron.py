"""Megatron's Mamba-2 models (nvidia/mamba2-8b-3t-4k, nvidia/mamba2-hybrid-8b-3t-4k): one block in a layer.

Megatron keeps its arguments in a pickle that also holds its own classes, which is not loaded here. So the weights are
read from a file of tensors under Megatron's names, and the arguments from a ``config.json`` beside it, with their names
(``hidden_size``, ``hybrid_layer_pattern``, ``num_query_groups``, ...).

Source: ``megatron/core/ssm/mamba_mixer.py``, ``megatron/core/models/mamba`` and ``transformer/attention.py``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ...errors import ConfigurationError
from ...models import Mamba2HybridConfig
from ..equations import Equation, Rows, Shape, same
from .common import KEPT

_KINDS = {"M": "ssd", "*": "attention", "-": "mlp"}
_PATTERNS = ("hybrid_layer_pattern", "hybrid_override_pattern")
# Arguments that change the model, and the only value that each may have here.
_FIXED: dict[str, Any] = {
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "normalization": "RMSNorm",
    "apply_layernorm_1p": False,
    "layernorm_zero_centered_gamma": False,
    "qk_layernorm": False,
    "attention_output_gate": False,
    "multi_latent_attention": False,
    "num_experts": None,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
}
_NORMS = (
    *("mixer.in_proj.layer_norm_weight", "self_attention.linear_qkv.layer_norm_weight"),
    *("mlp.linear_fc1.layer_norm_weight", "input_layernorm.weight", "pre_mlp_layernorm.weight"),
)
_OUTER = {
    "backbone.embeddings.weight": "embedding.word_embeddings.weight",
    "backbone.norm_f.weight": "decoder.final_norm.weight",
    "lm_head.weight": "output_layer.weight",
}
_BLOCK = re.compile(r"backbone\.layers\.(\d+)\.(?:blocks\.0\.)?(.+)")


def pattern(raw: Mapping[str, Any]) -> str | None:
    """The kinds of a model's layers, if this is Megatron's."""
    found = next((raw[name] for name in _PATTERNS if raw.get(name)), None)
    return found if "model_type" not in raw and isinstance(found, str) else None


def recognizes_hybrid(raw: Mapping[str, Any]) -> bool:
    """Whether these are the arguments of a hybrid."""
    kinds = pattern(raw)
    return kinds is not None and set(kinds) != {"M"}


def recognizes_pure(raw: Mapping[str, Any]) -> bool:
    """Whether these are the arguments of a pure Mamba-2."""
    kinds = pattern(raw)
    return kinds is not None and set(kinds) == {"M"}


def read_hybrid(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments as fields of ``mamba2_hybrid``.

    Raises:
        ConfigurationError: one is missing, or cannot be expressed there.
    """
    kinds = _checked_pattern(raw)
    width, heads = _whole(raw, "hidden_size"), _whole(raw, "num_attention_heads")
    mixer, common = _mixer(raw, width), _common(raw, width, len(kinds))
    mlp = "gelu"
    for flag, kind in (("swiglu", "swiglu"), ("squared_relu", "relu2")):
        if raw.get(flag):
            mlp = kind
    return {
        "model_type": Mamba2HybridConfig.model_type,
        **common,
        **{f"ssm_{name}": value for name, value in mixer.items()},
        "layer_blocks": [_KINDS[kind] for kind in kinds],
        "residual_in_fp32": bool(raw.get("fp32_residual_connection", False)),
        "num_attention_heads": heads,
        "num_key_value_heads": _whole(raw, "num_query_groups", heads),
        "head_dim": _whole(raw, "kv_channels", width // heads),
        "rope_parameters": _rope(raw),
        "max_position_embeddings": _whole(raw, "max_position_embeddings", 4096),
        "intermediate_size": _whole(raw, "ffn_hidden_size", 4 * width),
        "mlp_type": mlp,
        KEPT: dict(raw),
    }


def read_pure(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments as fields of ``mamba2``; raises as :func:`read_hybrid`."""
    kinds = _checked_pattern(raw)
    width = _whole(raw, "hidden_size")
    mixer = _mixer(raw, width)
    return {
        "model_type": "mamba2",
        **_common(raw, width, len(kinds)),
        **mixer,
        "expand": mixer["num_heads"] * mixer["head_dim"] / width,
        "residual_in_fp32": bool(raw.get("fp32_residual_connection", False)),
        KEPT: dict(raw),
    }


def _checked_pattern(raw: Mapping[str, Any]) -> str:
    kinds = pattern(raw)
    if kinds is None:
        raise ConfigurationError(f"neither of {' and '.join(_PATTERNS)} is there: these are not Megatron's arguments")
    if unknown := set(kinds) - _KINDS.keys():
        raise ConfigurationError(
            f"the pattern of layers holds {sorted(unknown)[0]!r}: known here are {', '.join(map(repr, _KINDS))}"
        )
    layers = raw.get("num_layers", len(kinds))
    if layers != len(kinds):
        raise ConfigurationError(f"num_layers is {layers!r} and the pattern of layers has {len(kinds)}")
    for name, value in _FIXED.items():
        if raw.get(name, value) != value:
            raise ConfigurationError(f"{name} is {raw[name]!r}: only {value!r} is known here")
    return kinds


def _common(raw: Mapping[str, Any], width: int, layers: int) -> dict[str, Any]:
    eps = raw.get("norm_epsilon", raw.get("layernorm_epsilon", 1e-5))
    return {
        "vocab_size": _whole(raw, "padded_vocab_size"),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "layer_norm_epsilon": eps,
        "tie_word_embeddings": not raw.get("untie_embeddings_and_output_weights", False),
        "rescale_prenorm_residual": False,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    }


def _mixer(raw: Mapping[str, Any], width: int) -> dict[str, Any]:
    head_dim = _whole(raw, "mamba_head_dim", 64)
    return {
        "num_heads": _whole(raw, "mamba_num_heads", 2 * width // head_dim),
        "head_dim": head_dim,
        "n_groups": _whole(raw, "mamba_num_groups", 8),
        "state_size": _whole(raw, "mamba_state_dim", 128),
    }


def _rope(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = raw.get("position_embedding_type", "none")
    if kind == "none":
        return None
    if kind != "rope" or raw.get("rotary_interleaved"):
        raise ConfigurationError(f"position_embedding_type is {kind!r}: known here are 'none' and a plain 'rope'")
    return {
        "rope_type": "default",
        "rope_theta": float(raw.get("rotary_base", 10000)),
        "partial_rotary_factor": float(raw.get("rotary_percent", 1.0)),
    }


def equations(config: Any, shapes: Mapping[str, Shape], stored: Collection[str] = ()) -> list[Equation]:
    """Their tensors and ours. Each group's queries, key and value stand together; a distributed checkpoint has the
    parts of in_proj and of the convolution as tensors of their own.

    Args:
        config: of the model.
        shapes: of our tensors.
        stored: names in the files, which tell the two apart.
    """
    found = [same(theirs, ours, shapes[ours]) for ours, theirs in _OUTER.items() if ours in shapes]
    hybrid = isinstance(config, Mamba2HybridConfig)
    names = ("ssm_num_heads", "ssm_head_dim", "ssm_n_groups", "ssm_state_size")
    heads, head_dim, groups, state = (getattr(config, name if hybrid else name[4:]) for name in names)
    inner, bc = heads * head_dim, groups * state
    convolved = {"x": inner, "B": bc, "C": bc}
    split = {"in_proj": {"z": inner, **convolved, "dt": heads}, "conv1d": convolved}
    for name, shape in shapes.items():
        if (match := _BLOCK.fullmatch(name)) is None:
            continue
        outside, inside = f"decoder.layers.{match[1]}", match[2]
        part, _, rest = inside.partition(".")
        module, _, last = rest.partition(".")
        parts = [f"{outside}.{inside}.{piece}" for piece in split.get(module, ())] if part == "mixer" else []
        if parts and parts[0] in stored:
            sizes = split[module].values()
            pieces = tuple(Rows(piece, (size, *shape[1:])) for piece, size in zip(parts, sizes, strict=True))
            found.append(Equation(pieces, (Rows(name, shape),)))
        elif part in ("norm", "mixer"):
            found.append(same(f"{outside}.{inside}", name, shape))
        elif inside == "attention.o_proj.weight":
            found.append(same(f"{outside}.self_attention.linear_proj.weight", name, shape))
        elif inside == "attention.q_proj.weight":
            found.append(_interleaved(config, shapes, name, f"{outside}.self_attention.linear_qkv.weight"))
        elif module == "down_proj":
            found.append(same(f"{outside}.mlp.linear_fc2.{last}", name, shape))
        elif module == "up_proj":
            gate = name.replace("up_proj", "gate_proj")
            ours = tuple(Rows(own, shape) for own in (gate, name) if own in shapes)
            fc1 = Rows(f"{outside}.mlp.linear_fc1.{last}", (len(ours) * shape[0], *shape[1:]))
            found.append(Equation((fc1,), ours))
    return found


def _interleaved(config: Mamba2HybridConfig, shapes: Mapping[str, Shape], queries: str, theirs: str) -> Equation:
    keys, values = (queries.replace("q_proj", part) for part in ("k_proj", "v_proj"))
    groups, size = config.num_key_value_heads, config.head_dim
    assert groups is not None
    assert size is not None
    each = shapes[queries][0] // groups
    ours: list[Rows] = []
    for group in range(groups):
        ours.append(Rows(queries, shapes[queries], group * each, (group + 1) * each))
        ours += [Rows(name, shapes[name], group * size, (group + 1) * size) for name in (keys, values)]
    rows = shapes[queries][0] + 2 * groups * size
    return Equation((Rows(theirs, (rows, shapes[queries][1])),), tuple(ours))


def canonical(config: Any, name: str) -> str | None:
    """One name for what versions of Megatron name differently; None for what belongs to no weight."""
    if name.endswith("_extra_state"):
        return None
    name = name.replace(".mixer.conv1d_weight", ".mixer.conv1d.weight").replace(
        ".mixer.conv1d_bias", ".mixer.conv1d.bias"
    )
    for norm in _NORMS:
        if name.endswith(f".{norm}"):
            return name.removesuffix(norm) + "norm.weight"
    return name


def _whole(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} is {value!r}: expected a whole number of at least 1")
    return value
