"""Other programs that read checkpoints: the keys that each looks up, the models that it computes rightly, and the place
in its own source where that stands.

A reader is one entry of ``READERS``. What is in it was read out of the program of the version that it names; a program
reads a key wrongly where it gets another value from a file than from the one that a writer here makes anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckpointError, ConfigurationError
from ..models import Mamba2Config, Mamba2HybridConfig
from ..models.base_config import strict_json

Check = Callable[[Any], str | None]
"""From a model's configuration, why a program computes it wrongly; None if it does not."""

REQUIRED = "(required)"
"""In place of the value that a program takes where a key is missing: it has none, and fails."""


@dataclass(frozen=True)
class Reading:
    """How a program reads a family.

    Attributes:
        place: file and class, in the program's source.
        keys: the value that it takes where a key is missing, by the key; several names with ``|`` between them are
            looked up in that order.
        takes: the only values that it takes, by the key.
        wrong: models that it refuses or computes wrongly.
        cautions: where its numbers may differ a little.
        steps: what is left to do by hand.
    """

    place: str
    keys: Mapping[str, Any]
    takes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    wrong: tuple[Check, ...] = ()
    cautions: tuple[Check, ...] = ()
    steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reader:
    """A program.

    Attributes:
        title: its name, for a person.
        version: that was read, or the oldest and the newest.
        source: its repository.
        families: how it reads each of them, by the format's name.
        lacking: why it reads a family not at all, by the format's name; others it does not know.
    """

    title: str
    version: str
    source: str
    families: Mapping[str, Reading]
    lacking: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """Whether a program computes the same model from a converted checkpoint.

    Attributes:
        reader: its key in ``READERS``.
        wrong: why it does not.
        missing: keys that it would read wrongly, and that a conversion for this reader writes.
        cautions: where its numbers may differ a little.
        steps: what is left to do by hand.
    """

    reader: str
    wrong: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)

    @property
    def takes(self) -> bool:
        """Whether it does, as the checkpoint is."""
        return not self.wrong and not self.missing


def _required(*names: str) -> dict[str, Any]:
    return dict.fromkeys(" ".join(names).split(), REQUIRED)


# --- what models must not be ---


def _ssm(config: Any, name: str) -> Any:
    """A field of the mixers, by its name in a pure model."""
    hybrid = {"num_heads", "head_dim", "n_groups", "state_size", "use_bias", "use_conv_bias"}
    return getattr(config, f"ssm_{name}" if isinstance(config, Mamba2HybridConfig) and name in hybrid else name)


def _kinds(config: Mamba2HybridConfig) -> set[str]:
    return {kind for kinds in config.blocks for kind in kinds}


_USUAL_STEP = 1e-3  # time_step_min of published models, below which steps hardly ever are
_NO_STEP = 1e-6


def _limits(config: Any) -> str | None:
    low, high = config.time_step_limit
    if high == math.inf and low <= _USUAL_STEP:
        return None
    return f"time_step_limit is {config.time_step_limit}, and it does not clamp the step size"


def _any_limit(config: Any) -> str | None:
    low, high = config.time_step_limit
    return None if (low, high) == (0.0, math.inf) else f"time_step_limit is {(low, high)}: it clamps nothing"


def _low_limit(config: Any) -> str | None:
    low = config.time_step_limit[0]
    if low <= _NO_STEP:
        return None
    return f"it does not raise steps to time_step_limit[0]={low:g}, which moves logits where a step is shorter"


def _limits_in_decoding(config: Any) -> str | None:
    low, high = config.time_step_limit
    if high == math.inf and low <= _USUAL_STEP:
        return None
    return f"its cached decoding does not clamp to time_step_limit={(low, high)}, as its full forward does"


def _low_limit_in_decoding(config: Any) -> str | None:
    low = config.time_step_limit[0]
    if low <= _NO_STEP or _limits_in_decoding(config):
        return None
    return f"its cached decoding does not raise steps to time_step_limit[0]={low:g}, as its full forward does"


def _projection_bias(config: Any) -> str | None:
    if _ssm(config, "use_bias"):
        return "the projections of the mixers have biases, which it has no place for"
    if isinstance(config, Mamba2HybridConfig) and config.ssm_out_bias:
        return "ssm_out_bias is True: it has no place for a bias of out_proj"
    return None


def _no_conv_bias(config: Any) -> str | None:
    return None if _ssm(config, "use_conv_bias") else "use_conv_bias is False: it wants a bias of the convolution"


def _expand_2(config: Any) -> str | None:
    inner = _ssm(config, "num_heads") * _ssm(config, "head_dim")
    if inner == 2 * config.hidden_size:
        return None
    return f"the inner width is {inner}: it knows only 2 * hidden_size = {2 * config.hidden_size}"


def _whole_expand(config: Mamba2Config) -> str | None:
    return None if config.expand % 1 == 0 else f"expand is {config.expand}: its configuration takes whole factors"


def _groups(config: Any) -> str | None:
    groups = _ssm(config, "n_groups")
    if groups == 1 or getattr(config, "ssm_norm", None) == "none":
        return None
    return f"n_groups is {groups}: it norms all channels of a mixer together, and not each group"


def _metal_states(config: Any) -> str | None:
    size = config.ssm_state_size if isinstance(config, Mamba2HybridConfig) else config.state_size
    return f"state_size is {size}: its Metal kernel wants a multiple of 32" if size % 32 else None


def _norm_epsilon(config: Any) -> str | None:
    eps = config.layer_norm_epsilon
    return None if eps == 1e-5 else f"layer_norm_epsilon is {eps}: it takes 1e-05 for the norm before a mixer"


def _vocabulary_of_8(config: Any) -> str | None:
    size = config.vocab_size
    if size % 8 == 0:
        return None
    return (
        f"vocab_size is {size}, which it rounds up to a multiple of 8 that the embedding has no rows for; give it them "
        "with resize_token_embeddings(pad_to_multiple_of=8)"
    )


def _scaled_rotary(config: Mamba2HybridConfig) -> str | None:
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    return None if kind == "default" else f"rope_parameters scales positions ({kind!r}), which it does not do here"


def _partial_rotary(config: Mamba2HybridConfig) -> str | None:
    share = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    if share == 1.0:
        return None
    return f"partial_rotary_factor is {share}: its converter reorders whole heads for a rotation of whole heads"


def _rotary_with_ssd(config: Mamba2HybridConfig) -> str | None:
    rope, ssd = config.rope_parameters is not None, "ssd" in _kinds(config)
    if rope != ssd:
        return None
    return "it gives positions to attention in models without SSD layers, and in no others"


def _no_attention(config: Mamba2HybridConfig) -> str | None:
    return None if "attention" in _kinds(config) else "no layer has attention, and it wants one"


def _no_ssd(config: Mamba2HybridConfig) -> str | None:
    return None if "ssd" in _kinds(config) else "no layer has SSD, and it wants one"


def _norm_first(config: Mamba2HybridConfig) -> str | None:
    return "ssm_norm is 'norm_first': its gate is always first" if config.ssm_norm == "norm_first" else None


def _attention_bias(config: Mamba2HybridConfig) -> str | None:
    return "attention_bias is True: it leaves out biases of attention" if config.attention_bias else None


def _mlp_bias(config: Mamba2HybridConfig) -> str | None:
    return "mlp_bias is True: it has no place for biases of MLPs" if config.mlp_bias else None


def _mlp_bias_of_experts(config: Mamba2HybridConfig) -> str | None:
    return _mlp_bias(config) if "moe" in _kinds(config) else None


def _only_relu2(config: Mamba2HybridConfig) -> str | None:
    if config.mlp_type == "relu2" or not _kinds(config) & {"mlp", "moe"}:
        return None
    return f"mlp_type is {config.mlp_type!r}: it knows only 'relu2'"


def _mlp_beside_experts(config: Mamba2HybridConfig) -> str | None:
    if {"mlp", "moe"} <= _kinds(config):
        return "some layers are an MLP and some experts: it knows one of the two in a model"
    return None


def _other_heads(config: Mamba2HybridConfig) -> str | None:
    if not config.num_mtp_layers or (config.num_mtp_layers, config.mtp_layer_blocks) == (1, ["attention", "moe"]):
        return None
    return (
        f"num_mtp_layers is {config.num_mtp_layers} and mtp_layer_blocks {config.mtp_layer_blocks!r}: of heads "
        "that predict further tokens it knows one, of attention and experts; leave them out (num_mtp_layers=0)"
    )


def _tied_multipliers(config: Mamba2HybridConfig) -> str | None:
    if not config.tie_word_embeddings or (config.embedding_multiplier, _head_multiplier(config)) == (1.0, 1.0):
        return None
    return "the head shares the embedding, which it multiplies by embedding_multiplier for both"


def _head_multiplier(config: Mamba2HybridConfig) -> float:
    if config.lm_head_multiplier is not None:
        return float(config.lm_head_multiplier)
    return 1.0 if config.logits_scaling is None else 1 / config.logits_scaling


def _own_multipliers(config: Mamba2HybridConfig) -> str | None:
    for name in ("key_multiplier", "attention_in_multiplier"):
        value = getattr(config, name)
        if value != 1.0:
            return f"{name} is {value}: it does not multiply all of keys and values by it"
    return None


def _any_bias(config: Mamba2HybridConfig) -> str | None:
    if config.attention_bias or config.mlp_bias or config.ssm_use_bias or config.ssm_out_bias:
        return "projections have biases, which it does not multiply as it multiplies their weights"
    return None


def _two_biases(config: Mamba2HybridConfig) -> str | None:
    if config.ssm_out_bias in (None, config.ssm_use_bias):
        return None
    return f"ssm_out_bias is {config.ssm_out_bias}: it has one setting for both projections of a mixer"


def _zamba_norms(config: Mamba2HybridConfig) -> str | None:
    if config.layer_norm_epsilon == 1e-5:
        return None
    return f"layer_norm_epsilon is {config.layer_norm_epsilon}: it takes that for the gated norm too, which has 1e-05"


def _grouped_keys(config: Mamba2HybridConfig) -> str | None:
    if config.num_key_value_heads == config.num_attention_heads:
        return None
    return f"num_key_value_heads is {config.num_key_value_heads}: it knows only as many as num_attention_heads"


def _zamba_chunks(config: Mamba2HybridConfig) -> str | None:
    return (
        f"where mamba_ssm's CUDA kernels are not installed, its class mixes up the states of chunks past the first "
        f"chunk_size={config.chunk_size} tokens"
    )


def _zamba_tied(config: Mamba2HybridConfig) -> str | None:
    return None if config.tie_word_embeddings else "the head is apart from the embedding: it always ties them"


def _conv_kernel_4(config: Any) -> str | None:
    taps = config.ssm_conv_kernel if isinstance(config, Mamba2HybridConfig) else config.conv_kernel
    return None if taps <= 4 else f"the convolution has {taps} taps: its kernels know up to 4"


# --- keys of the families, which transformers' classes and most readers look up ---

_MAMBA2 = _required(
    "hidden_size num_hidden_layers vocab_size num_heads head_dim n_groups state_size conv_kernel expand",
    "use_bias use_conv_bias layer_norm_epsilon tie_word_embeddings",
)
_ATTENTION = _required("num_attention_heads num_key_value_heads max_position_embeddings")
_MODEL = _required("vocab_size hidden_size num_hidden_layers intermediate_size rms_norm_eps")
_MIXER = _required(
    "mamba_n_heads mamba_d_head mamba_n_groups mamba_d_state mamba_d_conv mamba_expand mamba_conv_bias mamba_proj_bias"
)
_TIED = {"tie_word_embeddings": False}
_BIASES = {"attention_bias": False, "mlp_bias": False}
_GRANITE = {
    **_MODEL,
    **_ATTENTION,
    **_MIXER,
    **_TIED,
    **_required("layer_types shared_intermediate_size num_local_experts num_experts_per_tok position_embedding_type"),
    **_required("embedding_multiplier residual_multiplier attention_multiplier logits_scaling"),
    "attention_bias": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
}
_FALCON_MULTIPLIERS = _required(
    "embedding_multiplier lm_head_multiplier key_multiplier attention_in_multiplier attention_out_multiplier",
    "ssm_in_multiplier ssm_out_multiplier ssm_multipliers mlp_multipliers",
)
_FALCON = {
    **_MODEL,
    **_ATTENTION,
    **{name: value for name, value in _MIXER.items() if name != "mamba_expand"},  # mamba_d_ssm says more
    **_TIED,
    **_FALCON_MULTIPLIERS,
    **_required("mamba_d_ssm mamba_rms_norm mamba_norm_before_gate projectors_bias"),
    "rope_scaling": None,
}
_ZAMBA = {
    **_MODEL,
    **_ATTENTION,
    **_required("layers_block_type n_mamba_heads mamba_ngroups mamba_d_state mamba_d_conv mamba_expand"),
    **_required("num_mem_blocks adapter_rank use_shared_attention_adapter use_mem_rope add_bias_linear hidden_act"),
    **{"time_step_min": 0.001, "use_conv_bias": True, "use_long_context": False, "tie_word_embeddings": True},
}
_NEMOTRON = _required(
    "vocab_size hidden_size hybrid_override_pattern num_attention_heads num_key_value_heads head_dim",
    "mamba_num_heads mamba_head_dim n_groups ssm_state_size conv_kernel use_bias use_conv_bias mlp_bias",
    "layer_norm_epsilon intermediate_size",
)
_NEMOTRON_EXPERTS = {
    "n_routed_experts": None,
    "num_experts_per_tok": None,
    "n_shared_experts": None,
    "moe_intermediate_size": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_latent_size": None,
    "n_group": None,
    "topk_group": None,
    "norm_topk_prob": None,
    "routed_scaling_factor": None,
}
_MAMBA_OR_ATTENTION = {"layer_types": ("mamba", "attention")}
_LLAMA_CPP_STEPS = (
    "run its convert_hf_to_gguf.py with the transformers that it pins (4.57.6): a newer one gives it other keys",
)

TENSORS: dict[str, tuple[str, ...]] = {
    "mamba2": (
        r"backbone\.(embeddings|norm_f)\.weight|lm_head\.weight",
        r"backbone\.layers\.\d+\.norm\.weight",
        r"backbone\.layers\.\d+\.mixer\.((in_proj|conv1d|out_proj)\.(weight|bias)|A_log|D|dt_bias|norm\.weight)",
    ),
    "bamba": (
        r"model\.(embed_tokens|final_layernorm)\.weight|lm_head\.weight",
        r"model\.layers\.\d+\.(input|pre_ff)_layernorm\.weight",
        r"model\.layers\.\d+\.mamba\.((in_proj|conv1d|out_proj)\.(weight|bias)|A_log|D|dt_bias|norm\.weight)",
        r"model\.layers\.\d+\.self_attn\.[qkvo]_proj\.(weight|bias)",
        r"model\.layers\.\d+\.feed_forward\.(gate|up|down)_proj\.(weight|bias)",
    ),
    "granitemoehybrid": (
        r"model\.(embed_tokens|norm)\.weight|lm_head\.weight",
        r"model\.layers\.\d+\.(input|post_attention)_layernorm\.weight",
        r"model\.layers\.\d+\.mamba\.((in_proj|conv1d|out_proj)\.(weight|bias)|A_log|D|dt_bias|norm\.weight)",
        r"model\.layers\.\d+\.self_attn\.[qkvo]_proj\.(weight|bias)",
        r"model\.layers\.\d+\.(shared_mlp|block_sparse_moe)\.(input|output)_linear\.weight",
        r"model\.layers\.\d+\.block_sparse_moe\.router\.layer\.weight",
    ),
    "nemotron_h": (
        r"backbone\.(embeddings|norm_f)\.weight|lm_head\.weight",
        r"backbone\.layers\.\d+\.norm\.weight",
        r"backbone\.layers\.\d+\.mixer\.((in_proj|conv1d|out_proj)\.(weight|bias)|A_log|D|dt_bias|norm\.weight)",
        r"backbone\.layers\.\d+\.mixer\.[qkvo]_proj\.weight",
        r"backbone\.layers\.\d+\.mixer\.(shared_experts\.)?(up|down)_proj\.(weight|bias)",
        r"backbone\.layers\.\d+\.mixer\.experts\.\d+\.(up|down)_proj\.weight",
        r"backbone\.layers\.\d+\.mixer\.gate\.(weight|e_score_correction_bias)",
        r"backbone\.layers\.\d+\.mixer\.fc[12]_latent_proj\.(weight|bias)",
    ),
    "zamba2": (
        r"model\.(embed_tokens|final_layernorm)\.weight|lm_head\.weight",
        r"model\.layers\.\d+\.(mamba_decoder\.)?input_layernorm\.weight",
        r"model\.layers\.\d+\.(mamba_decoder\.)?mamba\."
        r"((in_proj|conv1d|out_proj)\.(weight|bias)|A_log|D|dt_bias|norm\.weight)",
        r"model\.layers\.\d+\.linear\.weight",
        r"model\.layers\.\d+\.shared_transformer\.(input|pre_ff)_layernorm\.weight",
        r"model\.layers\.\d+\.shared_transformer\.self_attn\.[qkvo]_proj\.weight",
        r"model\.layers\.\d+\.shared_transformer\.self_attn\.linear_[qkv]_adapter_list\.\d+\.[01]\.weight",
        r"model\.layers\.\d+\.shared_transformer\.feed_forward\.(gate_up|down)_proj\.(weight|bias)",
        r"model\.layers\.\d+\.shared_transformer\.feed_forward\.gate_up_proj_adapter_list\.\d+\.[01]\.weight",
    ),
}
"""Patterns of the names of tensors, which all readers of a family share: those of the published checkpoints."""
TENSORS["falcon_h1"] = TENSORS["bamba"]


def _transformers(version: str, *, old: bool = False, norms_groups: bool = True) -> Reader:
    """transformers' own classes, whose fields have the names of the keys.

    Args:
        version: of it.
        old: whether it is a 4.
        norms_groups: whether a gated norm is over the channels of each group, as it is from 5.23 on; Falcon-H1,
            Nemotron-H and Zamba2 always had it so.
    """
    limits: tuple[Check, ...] = (_any_limit if old else _limits_in_decoding,)
    groups: tuple[Check, ...] = () if norms_groups else (_groups,)
    cautions: tuple[Check, ...] = () if old else (_low_limit_in_decoding,)
    clamps = {} if old else {"time_step_limit": (0.0, math.inf)}

    def place(name: str) -> str:
        return f"src/transformers/models/{name}/configuration_{name}.py, modeling_{name}.py"

    families = {
        "mamba2": Reading(
            place=place("mamba2"),
            keys={
                **_MAMBA2,
                **{"architectures": None, "hidden_act": "silu", "time_step_limit": (0.0, math.inf)},
                # An old one scales out_proj again at every load.
                "rescale_prenorm_residual": False,
            },
            wrong=groups if old else (*groups, *limits, _whole_expand),
            cautions=cautions,
        ),
        "bamba": Reading(
            place=place("bamba"),
            keys={
                **{**_MODEL, **_ATTENTION, **_MIXER, **_TIED, **_BIASES, **clamps, "attn_layer_indices": None},
                **{"rope_theta": 10000.0, "rope_scaling": None},
                **({"partial_rotary_factor": 0.5} if old else {}),
            },
            wrong=(*limits, *groups),
            cautions=cautions,
        ),
        "granitemoehybrid": Reading(
            place=place("granitemoehybrid"),
            keys={**_GRANITE, **clamps},
            takes=_MAMBA_OR_ATTENTION if old else {},
            wrong=(*limits, *groups),
            cautions=cautions,
        ),
        "falcon_h1": Reading(
            place=place("falcon_h1"),
            keys={**_FALCON, **_BIASES, **clamps, "head_dim": "hidden_size / num_attention_heads", "rope_theta": 1e5},
            wrong=limits,
            cautions=cautions,
        ),
        "zamba2": Reading(
            place=place("zamba2"),
            keys={**_ZAMBA, "rope_theta": 10000.0},
            wrong=(_zamba_chunks,) if old else limits,
            cautions=cautions,
        ),
    }
    if not old:
        families["nemotron_h"] = Reading(
            place=place("nemotron_h"),
            keys={
                **{**_NEMOTRON, **_NEMOTRON_EXPERTS, "time_step_min": 0.001, "attention_bias": False},
                **{"mlp_hidden_act": "relu2", "num_nextn_predict_layers": 0},
            },
            wrong=limits,
            cautions=cautions,
        )
    return Reader(
        title="transformers",
        version=version,
        source="huggingface/transformers",
        families=families,
        lacking={"nemotron_h": "it has no class for it; NVIDIA's remote code is not taken along"} if old else {},
    )


READERS: dict[str, Reader] = {
    "llama.cpp": Reader(
        title="llama.cpp",
        version="of October 2026",
        source="ggml-org/llama.cpp",
        families={
            "mamba2": Reading(
                place="conversion/mamba.py, Mamba2Model; src/models/mamba2.cpp, mamba-base.cpp",
                keys={
                    "architectures": REQUIRED,
                    "hidden_size|d_model|dim": REQUIRED,
                    "mamba_expand|expand": 2,
                    "mamba_d_ssm|intermediate_size|d_inner": "expand * hidden_size",
                    "n_groups": 1,
                    "vocab_size": REQUIRED,
                    "pad_vocab_size_multiple": 16,
                    "conv_kernel|d_conv": 4,
                    "state_size|d_state": 128,
                    "mamba_d_head|head_dim": 64,
                    "layer_norm_epsilon|rms_norm_eps": 1e-5,
                    "n_layers|num_hidden_layers|n_layer|num_layers": REQUIRED,
                },
                takes={"architectures": ("Mamba2ForCausalLM",)},
                wrong=(_limits, _projection_bias, _no_conv_bias),
                cautions=(_low_limit,),
            ),
            "bamba": Reading(
                place="conversion/granite.py, GraniteHybridModel; src/models/granite-hybrid.cpp",
                keys={
                    **_required("architectures vocab_size hidden_size num_hidden_layers intermediate_size"),
                    **_required("num_attention_heads num_key_value_heads rms_norm_eps attn_layer_indices"),
                    **_required("mamba_n_groups mamba_expand mamba_d_conv mamba_d_state mamba_n_heads"),
                    **{"mamba_d_head": 64, "attn_rotary_emb": "head_dim", "rope_theta": 10000.0, "rope_scaling": None},
                    **{"hidden_act": None, "num_local_experts|num_experts": None, "num_experts_per_tok": None},
                },
                takes={"architectures": ("BambaForCausalLM",), "hidden_act": (None, "silu")},
                wrong=(
                    *(_limits, _projection_bias, _no_conv_bias, _expand_2, _partial_rotary, _scaled_rotary),
                    *(_no_attention, _vocabulary_of_8),
                ),
                cautions=(_low_limit,),
            ),
            "granitemoehybrid": Reading(
                place="conversion/granite.py, GraniteHybridModel; src/models/granite-hybrid.cpp",
                keys={
                    **_required("architectures vocab_size hidden_size num_hidden_layers intermediate_size layer_types"),
                    **_required("num_attention_heads num_key_value_heads rms_norm_eps shared_intermediate_size"),
                    **_required("mamba_n_groups mamba_expand mamba_d_conv mamba_d_state mamba_n_heads"),
                    **{"mamba_d_head": 64, "hidden_act": None, "num_local_experts": 0, "num_experts_per_tok": 0},
                    **{"embedding_multiplier": None, "residual_multiplier": None, "attention_multiplier": None},
                    **{"logits_scaling": None, "rope_theta": 10000.0},
                },
                takes={
                    "architectures": ("GraniteMoeHybridForCausalLM",),
                    "hidden_act": (None, "silu"),
                    **_MAMBA_OR_ATTENTION,
                },
                wrong=(
                    *(_limits, _projection_bias, _no_conv_bias, _expand_2, _rotary_with_ssd, _scaled_rotary),
                    _vocabulary_of_8,
                ),
                cautions=(_low_limit,),
            ),
            "nemotron_h": Reading(
                place="conversion/nemotron.py, NemotronHModel; src/models/nemotron-h.cpp",
                keys={
                    **_required("architectures vocab_size hidden_size hybrid_override_pattern num_hidden_layers"),
                    **_required("num_attention_heads num_key_value_heads layer_norm_epsilon intermediate_size"),
                    **_required("mamba_head_dim mamba_num_heads n_groups conv_kernel ssm_state_size"),
                    **{"head_dim|attention_head_dim": REQUIRED, "rms_norm_eps": None, "num_nextn_predict_layers": 0},
                    **_NEMOTRON_EXPERTS,
                },
                takes={"architectures": ("NemotronHForCausalLM",)},
                wrong=(
                    *(_limits, _projection_bias, _no_conv_bias, _only_relu2, _mlp_beside_experts),
                    *(_mlp_bias_of_experts, _no_ssd, _vocabulary_of_8, _other_heads),
                ),
                cautions=(_low_limit,),
                steps=_LLAMA_CPP_STEPS,
            ),
            "falcon_h1": Reading(
                place="conversion/falcon_h1.py, FalconH1Model; src/models/falcon-h1.cpp",
                keys={
                    **_required("architectures vocab_size hidden_size num_hidden_layers intermediate_size head_dim"),
                    **_required("num_attention_heads num_key_value_heads rms_norm_eps rope_theta"),
                    **_required("mamba_d_ssm mamba_d_head mamba_n_groups mamba_d_state mamba_d_conv"),
                    **{**_FALCON_MULTIPLIERS, "hidden_act": None, "max_position_embeddings": 0},
                },
                takes={"architectures": ("FalconH1ForCausalLM",), "hidden_act": (None, "silu")},
                wrong=(
                    *(_limits, _projection_bias, _no_conv_bias, _norm_first, _attention_bias, _scaled_rotary),
                    _tied_multipliers,
                ),
                cautions=(_low_limit,),
            ),
        },
    ),
    "mlx-lm": Reader(
        title="mlx-lm",
        version="0.32.2",
        source="ml-explore/mlx-lm",
        families={
            "mamba2": Reading(
                place="mlx_lm/models/mamba2.py, ModelArgs",
                keys={
                    **{name: REQUIRED for name in _MAMBA2 if name != "expand"},
                    **_required("intermediate_size time_step_limit time_step_rank"),
                },
                wrong=(_groups, _metal_states, _norm_epsilon, _whole_expand),
            ),
            "granitemoehybrid": Reading(
                place="mlx_lm/models/granitemoehybrid.py, ModelArgs",
                keys={
                    **{name: value for name, value in _GRANITE.items() if name != "mamba_expand"},
                    **{"attention_bias": REQUIRED, "tie_word_embeddings": True, "time_step_limit": (0.001, 100.0)},
                },
                takes={**_MAMBA_OR_ATTENTION, "position_embedding_type": ("nope", "rope")},
                wrong=(_groups, _metal_states, _scaled_rotary),
            ),
            "nemotron_h": Reading(
                place="mlx_lm/models/nemotron_h.py, ModelArgs",
                keys={
                    **_NEMOTRON,
                    **_NEMOTRON_EXPERTS,
                    **_required("max_position_embeddings attention_bias mamba_proj_bias"),
                    "time_step_limit": (0.0, math.inf),
                },
                wrong=(_metal_states, _only_relu2, _no_attention, _no_ssd),
            ),
            "falcon_h1": Reading(
                place="mlx_lm/models/falcon_h1.py, ModelArgs and Model.sanitize",
                keys={
                    **{name: "(of Falcon-H1 0.5B)" for name in _FALCON if name != "rope_scaling"},
                    **{"attention_bias": False, "mlp_bias": False, "head_dim": 64, "rope_theta": 1e11},
                },
                wrong=(_groups, _metal_states, _own_multipliers, _any_bias, _scaled_rotary, _any_limit),
            ),
        },
    ),
    "vllm": Reader(
        title="vLLM",
        version="0.33.0",
        source="vllm-project/vllm",
        families={
            "mamba2": Reading(
                place="vllm/model_executor/models/mamba2.py, layers/mamba/mamba_mixer2.py",
                keys={**_MAMBA2, "architectures": REQUIRED, "intermediate_size": "expand * hidden_size"},
                takes={"architectures": ("Mamba2ForCausalLM",)},
                wrong=(_limits, _no_conv_bias, _conv_kernel_4, _whole_expand),
                cautions=(_low_limit,),
            ),
            "granitemoehybrid": Reading(
                place="vllm/model_executor/models/granitemoehybrid.py",
                keys={**_GRANITE, "architectures": REQUIRED},
                takes={"architectures": ("GraniteMoeHybridForCausalLM",)},
                wrong=(_limits, _no_conv_bias, _conv_kernel_4),
                cautions=(_low_limit,),
            ),
            "nemotron_h": Reading(
                place="vllm/model_executor/models/nemotron_h.py",
                keys={**_NEMOTRON, **_NEMOTRON_EXPERTS, "architectures": REQUIRED, "num_nextn_predict_layers": 0},
                takes={"architectures": ("NemotronHForCausalLM",)},
                wrong=(_limits, _no_conv_bias, _conv_kernel_4, _only_relu2, _mlp_bias_of_experts),
                cautions=(_low_limit,),
            ),
            "falcon_h1": Reading(
                place="vllm/model_executor/models/falcon_h1.py",
                keys={**_FALCON, "architectures": REQUIRED, "head_dim": "hidden_size / num_heads", "rope_theta": 1e11},
                takes={"architectures": ("FalconH1ForCausalLM",)},
                wrong=(
                    *(_limits, _no_conv_bias, _conv_kernel_4, _norm_first, _attention_bias, _mlp_bias),
                    _two_biases,
                ),
                cautions=(_low_limit,),
            ),
            "zamba2": Reading(
                place="vllm/model_executor/models/zamba2.py",
                keys={**_ZAMBA, "architectures": REQUIRED, "rope_theta": 10000.0},
                takes={"architectures": ("Zamba2ForCausalLM",)},
                wrong=(_limits, _conv_kernel_4, _zamba_norms, _grouped_keys, _zamba_tied, _scaled_rotary),
                cautions=(_low_limit,),
            ),
        },
        lacking={"bamba": "it has none since 0.23"},
    ),
    "transformers-4": _transformers("4.57", old=True, norms_groups=False),
    "transformers-5.20": _transformers("5.20 to 5.22", norms_groups=False),
    "transformers-5": _transformers("5.23 and 5.24"),
}
"""Programs by the names that ``convert(..., for_reader=...)`` takes."""

_BESIDE = {"time_step_limit"}
"""Keys that published files of the hybrid families lack: a file of theirs gets them for a reader alone."""


def reader_named(name: str) -> Reader:
    """An entry of ``READERS``; raises CheckpointError with all of their names."""
    if name not in READERS:
        raise CheckpointError(f"{name!r} is no reader known here; there are {', '.join(READERS)}")
    return READERS[name]


def complete(
    family: str, written: Mapping[str, Any], anew: Mapping[str, Any], for_reader: str | None = None
) -> dict[str, Any]:
    """A ``config.json`` with the keys that readers would else read wrongly, as a new file has them.

    Args:
        family: the format's name.
        written: the file.
        anew: the file that a writer makes of the same model when it has none to start from.
        for_reader: the one to write it for; None for all.
    """
    readers = [READERS[for_reader]] if for_reader else list(READERS.values())
    result = dict(written)
    for reader in readers:
        reading = reader.families.get(family)
        for key in _misread(reading, result, anew) if reading else ():
            if for_reader is None and family != "mamba2" and key in _BESIDE:
                continue
            for name in key.split("|"):
                result.pop(name, None)
                if name in anew:
                    result[name] = anew[name]
    return result


def verdict(name: str, family: str, config: Any, written: Mapping[str, Any], anew: Mapping[str, Any]) -> Verdict:
    """What a reader makes of a checkpoint.

    Args:
        name: its key in ``READERS``.
        family: the format's name.
        config: of the model.
        written: its ``config.json``.
        anew: the file that a writer makes of the same model when it has none to start from.
    """
    reader = READERS[name]
    reading = reader.families.get(family)
    if reading is None:
        return Verdict(name, wrong=[reader.lacking.get(family, f"it does not read {family}")])
    return Verdict(
        name,
        wrong=[reason for check in reading.wrong if (reason := check(config))],
        missing=_misread(reading, written, anew),
        cautions=[reason for check in reading.cautions if (reason := check(config))],
        steps=list(reading.steps),
    )


def refuse(found: Verdict) -> None:
    """Raises ConfigurationError with the reasons, if a reader does not compute the model."""
    if found.wrong:
        reader = READERS[found.reader]
        raise ConfigurationError(f"{reader.title} ({reader.version}) does not compute it: {'; '.join(found.wrong)}")


def _misread(reading: Reading, written: Mapping[str, Any], anew: Mapping[str, Any]) -> list[str]:
    """The keys that it looks up with another result than in a new file."""
    return [
        key for key, default in reading.keys.items() if _look_up(written, key, default) != _look_up(anew, key, default)
    ]


def _look_up(config: Mapping[str, Any], key: str, default: Any) -> Any:
    return strict_json(next((config[name] for name in key.split("|") if name in config), default))
