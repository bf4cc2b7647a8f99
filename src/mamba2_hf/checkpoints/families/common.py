"""What the families of transformers have in common."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ...errors import ConfigurationError
from ...models import Mamba2HybridConfig
from ...models.base_config import strict_json
from ..equations import Equation, Shape, same
from ..mapping import QUANTIZED, key_for_key

KEPT = "original_config"
"""Key of a converted config under which the original one stays readable; it has no effect."""

LAYERS_LIMIT = 10_000
NO_STEP = 1e-20
"""The shortest step of a family that takes the logarithm of it in its initialization."""
_SHARED = ("vocab_size", "hidden_size", "tie_word_embeddings", "max_position_embeddings", "initializer_range")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")

_BLOCK = re.compile(r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.(.+)")


def stock_config(model_type: str, raw: Mapping[str, Any]) -> Any:
    """The configuration as transformers' own class reads it, with its defaults and old names.

    Raises:
        ConfigurationError: it is another model's, or that class refuses it.
    """
    if raw.get("model_type") != model_type:
        raise ConfigurationError(f"model_type is {raw.get('model_type')!r}: this is no {model_type}")
    if found := [name for name in QUANTIZED if raw.get(name) is not None]:
        raise ConfigurationError(f"{found[0]} says that the weights are quantized; dequantize and save them first")
    layers = raw.get("num_hidden_layers")
    if isinstance(layers, int) and layers > LAYERS_LIMIT:  # that class makes lists of this length
        raise ConfigurationError(f"num_hidden_layers is {layers}, more than the {LAYERS_LIMIT} that there can be")
    try:
        return CONFIG_MAPPING[model_type].from_dict(PreTrainedConfig._decode_special_floats(dict(raw)))
    except Exception as error:  # whatever values of wrong types lead to
        raise ConfigurationError(f"no {model_type} can be made of it ({_line(error)})") from None


def common_fields(stock: Any, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``mamba2_hybrid`` that every family has under the same name, and the original."""
    optional = {name: raw[name] for name in ("id2label", "label2id", "problem_type") if name in raw}
    return {
        "model_type": Mamba2HybridConfig.model_type,
        **{name: getattr(stock, name) for name in (*_SHARED, *_TOKENS)},
        **optional,
        "use_cache": bool(stock.use_cache),
        "residual_in_fp32": bool(getattr(stock, "residual_in_fp32", False)),
        "rescale_prenorm_residual": False,
        KEPT: dict(raw),
    }


def write_published(
    model_type: str,
    architecture: str,
    config: Mamba2HybridConfig,
    fields: Callable[[Mamba2HybridConfig], dict[str, Any]],
    read: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    """A family's ``config.json``, with the keys of published ones. A model that came from a file of the family gets
    that file again, key for key, but for what was changed since.

    Args:
        model_type: the family.
        architecture: its language model.
        config: of the model.
        fields: of the family, from a configuration: those that every family has left out.
        read: the way back.

    Raises:
        ConfigurationError: the family cannot express the model, or transformers' own class refuses a value.
    """

    def spell(config: Mamba2HybridConfig) -> dict[str, Any]:
        shared = {name: getattr(config, name) for name in (*_SHARED, *_TOKENS, "use_cache")}
        return {"architectures": [architecture], "model_type": model_type, **shared, **fields(config)}

    written = spell(config)
    says = read(written)
    if config.num_mtp_layers != says.get("num_mtp_layers", 0):
        raise ConfigurationError(
            f"num_mtp_layers is {config.num_mtp_layers}: {model_type} has no heads that predict further tokens; load "
            "the model with num_mtp_layers=0 to leave them out"
        )
    original = getattr(config, KEPT, None)
    if isinstance(original, dict) and original.get("model_type") == model_type:
        try:
            kept = key_for_key(original, written, spell(Mamba2HybridConfig.from_dict(read(original))))
            said = read(kept)
        except ConfigurationError:
            said = {}
        if all(said.get(name) == value for name, value in says.items() if name != KEPT):
            written = kept
    if config.dtype is not None:
        name = "dtype" if "dtype" in written else "torch_dtype"
        written[name] = str(config.dtype).removeprefix("torch.")
    published: dict[str, Any] = strict_json(written)
    return published


def require(config: Mamba2HybridConfig, family: str, **values: Any) -> None:
    """Refuses a configuration that the family has no way to say.

    Args:
        config: of the model.
        family: for the message.
        values: the only value that each field may have; of a list of lists any one.

    Raises:
        ConfigurationError: naming the first field that has another.
    """
    for name, value in values.items():
        found = getattr(config, name)
        if found != value:
            raise ConfigurationError(f"{name} is {found!r}: {family} knows only {value!r}")


def same_bias(config: Mamba2HybridConfig, family: str, *names: str) -> None:
    """Refuses projections of which only some have a bias."""
    first, *others = names
    for name in others:
        if getattr(config, name) not in (None, getattr(config, first)):
            raise ConfigurationError(
                f"{name} is {getattr(config, name)!r} and {first} {getattr(config, first)!r}: {family} has one setting "
                "for both"
            )


def whole_expand(config: Mamba2HybridConfig, family: str) -> int:
    """The inner width of the mixers over the hidden one."""
    inner = config.ssm_num_heads * config.ssm_head_dim
    if inner % config.hidden_size:
        raise ConfigurationError(
            f"ssm_num_heads * ssm_head_dim is {inner}: {family} knows only multiples of hidden_size="
            f"{config.hidden_size}"
        )
    return inner // config.hidden_size


def own_norm_epsilon(config: Mamba2HybridConfig, family: str) -> None:
    """Refuses a gated norm with an epsilon or group size of its own."""
    if config.ssm_norm_epsilon not in (None, config.layer_norm_epsilon):
        raise ConfigurationError(
            f"ssm_norm_epsilon is {config.ssm_norm_epsilon}: {family} has one for all norms, layer_norm_epsilon="
            f"{config.layer_norm_epsilon}"
        )
    own = config.ssm_num_heads * config.ssm_head_dim // config.ssm_n_groups
    if config.ssm_norm_group_size not in (None, own):
        raise ConfigurationError(
            f"ssm_norm_group_size is {config.ssm_norm_group_size}: {family} norms the channels of a group together, "
            f"{own}"
        )


def shared_expert(config: Mamba2HybridConfig, family: str) -> int:
    """Width of the MLP beside the experts, of a family that always has one."""
    width = config.shared_expert_intermediate_size
    if not width:
        raise ConfigurationError(f"shared_expert_intermediate_size is 0: {family} always has an MLP beside its experts")
    return width


def split_head_dim(config: Mamba2HybridConfig, family: str) -> None:
    """Refuses heads of attention that are not hidden_size over their number wide."""
    if config.head_dim != config.hidden_size // (config.num_attention_heads or 1):
        raise ConfigurationError(
            f"head_dim is {config.head_dim}: {family} makes it hidden_size / num_attention_heads = "
            f"{config.hidden_size / (config.num_attention_heads or 1):g}"
        )


def full_rotary(config: Mamba2HybridConfig, family: str) -> dict[str, Any]:
    """The rotary embedding of a family that rotates whole heads."""
    rope = config.rope_parameters
    if rope is None or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigurationError(f"rope_parameters is {rope!r}: {family} rotates whole heads, and always")
    return dict(rope)


def without_share(rope: Mapping[str, Any]) -> dict[str, Any]:
    """A rotary embedding of whole heads, of a family that does not read which share is rotated."""
    return {key: value for key, value in rope.items() if key != "partial_rotary_factor"}


NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "key_multiplier"), 1.0),
    **dict.fromkeys(("attention_in_multiplier", "attention_out_multiplier"), 1.0),
    **dict.fromkeys(("ssm_in_multiplier", "ssm_out_multiplier"), 1.0),
    **dict.fromkeys(("ssm_multipliers", "mlp_multipliers", "logits_scaling", "lm_head_multiplier"), None),
}
"""Multipliers that change nothing."""


def neutral(config: Mamba2HybridConfig, family: str, *known: str) -> None:
    """Refuses multipliers that a family does not know.

    Args:
        config: of the model.
        family: for the message.
        known: those that it knows.
    """
    for name, value in NEUTRAL.items():
        found = getattr(config, name)
        if isinstance(found, (list, tuple)) and set(found) == {1.0}:
            continue
        if name not in known and found != value and found != 1.0:
            raise ConfigurationError(f"{name} is {found!r}: {family} has no such multiplier")


def limits(config: Mamba2HybridConfig) -> list[float]:
    """``time_step_limit``, low and high."""
    return [float(config.time_step_limit[0]), float(config.time_step_limit[1])]


def own_limits(config: Mamba2HybridConfig) -> dict[str, Any]:
    """``time_step_limit`` for a family whose published files lack it: only where it clamps anything."""
    return {} if limits(config) == [0.0, math.inf] else {"time_step_limit": limits(config)}


def rotary(rope: Mapping[str, Any]) -> dict[str, Any]:
    """A rotary embedding as published files spell it, which every version of transformers reads."""
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    return {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if scaling == {"rope_type": "default"} else scaling,
    }


def only_lower_limit(config: Mamba2HybridConfig, family: str) -> float:
    """The lower clamp of the step size, for a family that knows no other; not quite 0, which its initialization takes
    the logarithm of.
    """
    low, high = config.time_step_limit
    if high != math.inf:
        raise ConfigurationError(f"time_step_limit is {config.time_step_limit}: {family} has no upper limit")
    return max(float(low), NO_STEP)


def layers_of(config: Mamba2HybridConfig, family: str, kinds: Mapping[str, str]) -> list[str]:
    """What a family calls each layer.

    Args:
        config: of the model.
        family: for the message.
        kinds: its names by ours, such as ``"ssd mlp"``.

    Raises:
        ConfigurationError: a layer is of no kind that it knows.
    """
    named = []
    for index, blocks in enumerate(config.blocks):
        kind = " ".join(blocks)
        if kind not in kinds:
            known = ", ".join(map(repr, kinds))
            raise ConfigurationError(f"layer_blocks[{index}] is {kind!r}: a layer of {family} is one of {known}")
        named.append(kinds[kind])
    return named


def in_blocks(
    config: Mamba2HybridConfig,
    shapes: Mapping[str, Shape],
    outer: Mapping[str, str],
    rename: Callable[[int, int, str], str | None],
) -> list[Equation]:
    """Equations of a decoder, but for the tensors of blocks that are not only renamed.

    Args:
        config: of the model.
        shapes: of our tensors by name.
        outer: their names of tensors outside of layers, by ours.
        rename: their name of a tensor in a block, from the layer's number, the block's, and the name inside of it;
            None for what is left to the caller.
    """
    equations = [same(theirs, ours, shapes[ours]) for ours, theirs in outer.items() if ours in shapes]
    for name, shape in shapes.items():
        if (found := _BLOCK.fullmatch(name)) is not None:
            theirs = rename(int(found[1]), int(found[2]), found[3])
            if theirs is not None:
                equations.append(same(theirs, name, shape))
    return equations


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[-1].strip()[:200] if text else type(error).__name__
