"""Configuration of the hybrids: layers of SSD, attention, feed-forward parts and mixtures of experts in any order."""

# No `from __future__ import annotations` here: the types of the fields are checked, see `strict_config`.

import copy
import math
from typing import Any, ClassVar

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import ConfigurationError
from ..layers.mixer import NORMS
from ..layers.mlp import MLP_KINDS
from .base_config import SSDConfig, as_limits
from .strict_config import strict_config

Number = int | float

SSD, ATTENTION, SLIDING, MLP, MOE = "ssd", "attention", "sliding_attention", "mlp", "moe"
SHARED = "shared>ssd"
KINDS: dict[str, tuple[str, ...]] = {
    SSD: (SSD,),
    ATTENTION: (ATTENTION,),
    SLIDING: (SLIDING,),
    "ssd+attention": (SSD, ATTENTION),
    "ssd+sliding_attention": (SSD, SLIDING),
    SHARED: (ATTENTION, SSD),
    MLP: (),
    MOE: (),
}
"""Kinds of blocks, and the mixers in each, in the order in which they keep their states."""
ROUTERS = ("softmax", "sigmoid")
_FLOATS = ("layer_norm_epsilon", "initializer_range", "time_step_min", "time_step_max", "time_step_floor")
_MULTIPLIERS = ("embedding", "residual", "attention_in", "attention_out", "key", "ssm_in", "ssm_out")

# Width, layers, attention layers, attention heads, their size, heads of keys and values.
_PRESETS: dict[str, tuple[int, int, int, int, int, int]] = {
    "130m": (768, 24, 2, 12, 64, 4),
    "370m": (1024, 48, 5, 16, 64, 4),
    "780m": (1536, 48, 5, 24, 64, 8),
    "1.3b": (2048, 48, 5, 16, 128, 4),
    "2.7b": (2560, 64, 6, 20, 128, 4),
}


def spread_layers(
    count: int, attention: int | None = None, *, kind: str = ATTENTION, then: str | None = None
) -> list[str]:
    """Blocks of ``count`` layers, ``attention`` of them spread evenly among SSD layers.

    About one in ten is what serves best, and neither the first nor the last layer ("Transformers are SSMs", Dao & Gu
    2024, Section 9.2.3).

    Args:
        count: layers.
        attention: how many of them have attention; None for one in ten, at least one.
        kind: of these: ``"attention"``, ``"sliding_attention"``, or with SSD beside it, ``"ssd+attention"``.
        then: a block that follows in every layer, ``"mlp"`` or ``"moe"``; None for none.

    Raises:
        ConfigurationError: there are more of them than layers, or a kind is unknown.
    """
    if attention is None:
        attention = max(1, round(count / 10))
    if not 0 <= attention <= count:
        raise ConfigurationError(f"attention is {attention}: a number of layers from 0 to count={count}")
    for name in (kind, then):
        if name is not None and name not in KINDS:
            raise ConfigurationError(f"{name!r} is no kind of block; there are {', '.join(KINDS)}")
    places = {round((index + 1) * (count - 1) / (attention + 1)) for index in range(attention)}
    if len(places) < attention:  # nearly all of them
        places = set(range(attention))
    return [" ".join([kind if layer in places else SSD, *([then] if then else [])]) for layer in range(count)]


@strict_config
class Mamba2HybridConfig(SSDConfig):
    """Layers, sizes and options of a hybrid of SSD and attention. Every published architecture of that kind is a
    setting of these fields; ``preset`` makes new ones.

    Args:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        num_hidden_layers: layers.
        layer_blocks: for each layer its blocks in order, such as ``"ssd mlp"``. A block norms the stream, and its
            result is added to it: ``"ssd"``, ``"attention"``, ``"sliding_attention"``, ``"ssd+attention"`` (side by
            side, summed), ``"mlp"``, ``"moe"``, or ``"shared>ssd"``: a block of attention and MLP whose weights several
            layers share reads stream and embeddings side by side, and what it finds is added to what the SSD reads.
            None for ``spread_layers(num_hidden_layers, then="mlp")``.
        ssm_num_heads, ssm_head_dim, ssm_n_groups, ssm_state_size, ssm_conv_kernel: H, P, G, N and K of the mixers;
            their inner width is ``ssm_num_heads * ssm_head_dim``.
        ssm_use_bias, ssm_out_bias, ssm_use_conv_bias: biases of in_proj, out_proj (None as in_proj) and convolution.
        ssm_norm: ``"gate_first"``, ``"norm_first"`` or ``"none"`` (a gate alone).
        ssm_norm_group_size: channels that are normed together; None for those of one group.
        ssm_norm_epsilon: of that norm; None for ``layer_norm_epsilon``.
        time_step_limit: clamp of the step size, in the forward; an upper limit of 65504 or more is none.
        time_step_min, time_step_max, time_step_floor: range of the initial step sizes, drawn log-uniformly.
        chunk_size: tiling hint kept for other readers; it never changes a result here.
        num_attention_heads, num_key_value_heads, head_dim: of attention; None for as many key and value heads as query
            heads, and for ``hidden_size / num_attention_heads``.
        attention_bias, attention_out_bias: biases of the query, key and value projections, and of the last one (None as
            those).
        attention_scale: of the scores; None for ``head_dim ** -0.5``.
        attention_conv_kernel: taps of a causal convolution over queries, keys and values; None for none.
        attention_conv_bias: whether it has a bias.
        attention_dropout: of the attention weights, in training.
        sliding_window: tokens that each token of a ``"sliding_attention"`` sees, itself among them.
        rope_parameters: rotary embedding, in transformers' terms: ``{"rope_type": "default", "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5}``; None for no positions.
        max_position_embeddings: tokens it was trained on; no limit.
        intermediate_size: width of the MLP.
        mlp_type: ``"swiglu"``, ``"geglu"``, ``"gelu"`` or ``"relu2"``, also of experts and shared blocks.
        mlp_bias: biases of the MLP.
        num_experts, num_experts_per_tok: experts of a ``"moe"``, and how many a token is sent to.
        moe_intermediate_size: width of an expert; None for ``intermediate_size``.
        shared_expert_intermediate_size: width of the MLP beside the experts; 0 for none.
        moe_latent_size: width that experts work in; None for ``hidden_size``.
        moe_router: ``"softmax"`` over the chosen experts, or ``"sigmoid"`` with a bias that balances their load.
        n_group, topk_group: of the sigmoid router: groups of experts, and how many of them a token may reach.
        norm_topk_prob, routed_scaling_factor: whether its weights sum to 1, and what they are multiplied by.
        num_mtp_layers: heads that predict further tokens (multi-token prediction): the first reads the model's last
            hidden states and the next tokens, each other one what the head before it made of them.
            ``generate(use_mtp=True)`` has them guess ahead; a forward does not run them.
        mtp_layer_blocks: for each layer of such a head its blocks, as in ``layer_blocks``.
        mtp_loss_coef: weight of their loss, the mean of all heads, in training; at 0 they are left alone, and their
            parameters need no gradients.
        output_router_logits: whether a forward returns them, and the loss includes balancing them.
        router_aux_loss_coef: weight of that loss; None for 0.001, and for 0 in a model without experts.
        num_shared_blocks: blocks that the ``"shared>ssd"`` layers take in turns.
        shared_adapter_rank: rank of an adapter for each use of a shared block, beside its MLP; 0 for none.
        shared_attention_adapters: whether there are such adapters beside its attention too.
        embedding_multiplier: of the embeddings.
        residual_multiplier: of what a block adds to the stream.
        logits_scaling: what logits are divided by. lm_head_multiplier: what they are multiplied by. Not both.
        attention_in_multiplier, attention_out_multiplier, key_multiplier: of input, output and keys of attention.
        ssm_in_multiplier, ssm_out_multiplier: of input and output of the mixers.
        ssm_multipliers: of z, x, B, C and dt as they leave in_proj; None for ones.
        mlp_multipliers: of what the MLP's activation gets, and of its result; None for ones.
        layer_norm_epsilon: of every norm.
        residual_in_fp32: whether the residual stream is kept in fp32.
        initializer_range: standard deviation of new embeddings and routers.
        rescale_prenorm_residual: whether new weights that write to the stream are scaled by one over the square root of
            the number of blocks.
        use_cache: whether a forward in eval mode returns a cache.
        tie_word_embeddings: whether the head shares the embedding.
        pad_token_id, bos_token_id, eos_token_id: special tokens.

    Raises:
        ConfigurationError: a field holds a value that no model can be built from, or is misspelt. The message names the
            field, the value and a remedy. Files are read more leniently: unknown keys of a ``config.json`` are kept
            without effect.
    """

    model_type = "mamba2_hybrid"
    foreign_reader: ClassVar[Any] = None
    """Translates other formats' files: ``mamba2_hf.checkpoints.loading.read_foreign_config``, once it is registered."""
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {
        "embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
        "shared_blocks.*": "free_full_weight",
        "norm_f": "keep_full_weight",
    }
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {
        "embeddings": "embedding_rowwise",
        **{
            f"{place}.{name}": "colwise_gather_output"
            for place in ("layers.*.blocks.*", "shared_blocks.*")
            for name in ("attention.q_proj", "attention.k_proj", "attention.v_proj")
        },
        **{f"{place}.attention.o_proj": "rowwise_split_input" for place in ("layers.*.blocks.*", "shared_blocks.*")},
        "layers.*.blocks.*.mixer.in_proj": "colwise_gather_output",
        "layers.*.blocks.*.mixer.out_proj": "rowwise_split_input",
        **{
            f"layers.*.blocks.*.{part}.{name}_proj": "colwise"
            for part in ("mlp", "moe.shared")
            for name in ("gate", "up")
        },
        **{f"layers.*.blocks.*.{part}.down_proj": "rowwise" for part in ("mlp", "moe.shared")},
    }

    vocab_size: int = 50288
    hidden_size: int = 768
    num_hidden_layers: int = 24
    layer_blocks: list[str] | None = None
    ssm_num_heads: int = 24
    ssm_head_dim: int = 64
    ssm_n_groups: int = 1
    ssm_state_size: int = 128
    ssm_conv_kernel: int = 4
    ssm_use_bias: bool = False
    ssm_out_bias: bool | None = None
    ssm_use_conv_bias: bool = True
    ssm_norm: str = "gate_first"
    ssm_norm_group_size: int | None = None
    ssm_norm_epsilon: Number | None = None
    time_step_limit: list[Number] | tuple[Number, ...] = (0.0, math.inf)
    time_step_min: Number = 0.001
    time_step_max: Number = 0.1
    time_step_floor: Number = 1e-4
    chunk_size: int = 256
    num_attention_heads: int | None = 12
    num_key_value_heads: int | None = 4
    head_dim: int | None = None
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    attention_scale: Number | None = None
    attention_conv_kernel: int | None = None
    attention_conv_bias: bool = True
    attention_dropout: Number = 0.0
    sliding_window: int | None = None
    rope_parameters: dict[str, Any] | None = None
    max_position_embeddings: int = 8192
    intermediate_size: int = 2048
    mlp_type: str = "swiglu"
    mlp_bias: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int = 0
    moe_latent_size: int | None = None
    moe_router: str = "softmax"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: Number = 1.0
    num_mtp_layers: int = 0
    mtp_layer_blocks: list[str] | None = None
    mtp_loss_coef: Number = 0.0
    output_router_logits: bool = False
    router_aux_loss_coef: Number | None = None
    num_shared_blocks: int = 1
    shared_adapter_rank: int = 0
    shared_attention_adapters: bool = False
    embedding_multiplier: Number = 1.0
    residual_multiplier: Number = 1.0
    logits_scaling: Number | None = None
    lm_head_multiplier: Number | None = None
    attention_in_multiplier: Number = 1.0
    attention_out_multiplier: Number = 1.0
    key_multiplier: Number = 1.0
    ssm_in_multiplier: Number = 1.0
    ssm_out_multiplier: Number = 1.0
    ssm_multipliers: list[Number] | tuple[Number, ...] | None = None
    mlp_multipliers: list[Number] | tuple[Number, ...] | None = None
    layer_norm_epsilon: Number = 1e-5
    residual_in_fp32: bool = True
    initializer_range: Number = 0.02
    rescale_prenorm_residual: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0

    def _normalize(self) -> None:
        if self.layer_blocks is None and self.num_hidden_layers >= 1:
            self.layer_blocks = spread_layers(self.num_hidden_layers, then=MLP)
        if self.num_attention_heads is not None and self.num_attention_heads > 0:
            if self.num_key_value_heads is None:
                self.num_key_value_heads = self.num_attention_heads
            if self.head_dim is None:
                self.head_dim = self.hidden_size // self.num_attention_heads
        if self.router_aux_loss_coef is None:  # TRL adds the loss to any model that has a coefficient
            self.router_aux_loss_coef = 0.001 if any(MOE in kinds for kinds in self.blocks) else 0.0
        for name in _FLOATS:
            setattr(self, name, float(getattr(self, name)))
        self.time_step_limit = as_limits(self.time_step_limit)

    @classmethod
    def _translate(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        kind = config_dict.get("model_type")
        if kind == cls.model_type:
            return config_dict
        found: dict[str, Any] | None = cls.foreign_reader(config_dict) if cls.foreign_reader else None
        if found is None and kind is not None:
            raise ConfigurationError(f"model_type is {kind!r}: the configuration of another model, and no hybrid's")
        return config_dict if found is None else found

    @classmethod
    def preset(cls, name: str, *, mlp: bool = False, attention: int | None = None, **changes: Any) -> Any:
        """A new hybrid of a published size: Mamba-2's widths and depths with about one layer in ten attention, which
        makes it up to six percent smaller.

        Args:
            name: ``"130m"``, ``"370m"``, ``"780m"``, ``"1.3b"`` or ``"2.7b"``, the size of the model without MLPs.
            mlp: whether an MLP follows in every layer, of twice the width.
            attention: how many layers have attention in place of SSD; None for the preset's number.
            changes: other fields, as in the constructor.

        Raises:
            ConfigurationError: there is no such preset, or see the constructor.
        """
        if name not in _PRESETS:
            raise ConfigurationError(f"preset is {name!r}: there are {', '.join(_PRESETS)}")
        width, layers, spread, heads, head_dim, groups = _PRESETS[name]
        layers = changes.pop("num_hidden_layers", layers)
        sizes = {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "layer_blocks": spread_layers(
                layers, min(spread, layers) if attention is None else attention, then=MLP if mlp else None
            ),
            "ssm_num_heads": 2 * width // 64,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": head_dim,
            "intermediate_size": 2 * width,
        }
        return cls(**{**sizes, **changes})

    def validate_architecture(self) -> None:
        """Refuses every value that no model can be built from (run on construction and on save)."""
        for name in ("vocab_size", "hidden_size", "chunk_size", "max_position_embeddings"):
            self._require(getattr(self, name) >= 1, name, "a size of at least 1")
        self._check_layers()
        mixers = self.mixer_kinds
        if SSD in mixers:
            self._check_ssd()
        if ATTENTION in mixers or SLIDING in mixers:
            self._check_attention()
        self._check_feed_forward()
        self._check_shared()
        for name in _MULTIPLIERS:
            name = f"{name}_multiplier"
            self._require(_is_factor(getattr(self, name)), name, "a finite factor other than 0; 1.0 changes nothing")
        for name in ("logits_scaling", "lm_head_multiplier"):
            value = getattr(self, name)
            self._require(value is None or _is_factor(value), name, "a finite factor other than 0, or None")
        self._require(
            self.logits_scaling is None or self.lm_head_multiplier is None,
            "lm_head_multiplier",
            f"it multiplies the logits, and logits_scaling={self.logits_scaling} divides them: set one of the two",
        )
        for name, count in (("ssm_multipliers", 5), ("mlp_multipliers", 2)):
            values = getattr(self, name)
            fits = values is None or (len(values) == count and all(_is_factor(value) for value in values))
            self._require(fits, name, f"{count} finite factors other than 0, or None")
        self._require(self.num_mtp_layers >= 0, "num_mtp_layers", "a count, or 0 for no heads")
        if self.num_mtp_layers:
            self._check_heads()
        coef = self.mtp_loss_coef
        known = coef == 0 or (self.num_mtp_layers > 0 and 0 < coef < math.inf)
        self._require(known, "mtp_loss_coef", "a weight of at least 0; without heads (num_mtp_layers=0) it has to be 0")
        self._check_common()

    def get_mtp_config(self) -> Any:
        """The configuration of a model with the layers of one head that predicts further tokens.

        Raises:
            ConfigurationError: there are no heads.
        """
        self._require(self.num_mtp_layers > 0, "num_mtp_layers", "there are no heads that predict further tokens")
        config = copy.copy(self)
        config.layer_blocks = list(self.mtp_layer_blocks or [])
        config.num_hidden_layers, config.num_mtp_layers, config.mtp_loss_coef = len(config.layer_blocks), 0, 0.0
        config.num_shared_blocks, config.shared_adapter_rank, config.shared_attention_adapters = 1, 0, False
        return config

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """As in transformers, but None stays None: no rotary embedding, and not the usual one."""
        if self.rope_parameters is None:
            return kwargs
        self.rope_parameters = dict(self.rope_parameters)
        rest: dict[str, Any] = super().convert_rope_params_to_dict(**kwargs)
        return rest

    def validate_layer_type(self) -> None:
        """Nothing: ``layer_types`` follows from ``layer_blocks``, and transformers' list of names lacks ``"mlp"``."""

    def _check_layers(self) -> None:
        self._require(self.num_hidden_layers >= 1, "num_hidden_layers", "a count of at least 1")
        blocks = self.layer_blocks or []
        if len(blocks) != self.num_hidden_layers:
            raise ConfigurationError(
                f"layer_blocks has {len(blocks)} layers and num_hidden_layers is {self.num_hidden_layers}: give the "
                "blocks of each layer"
            )
        for index, kinds in enumerate(self.blocks):
            for kind in kinds:
                if kind not in KINDS:
                    raise ConfigurationError(
                        f"layer_blocks[{index}] is {blocks[index]!r}: {kind!r} is no kind of block; there are "
                        f"{', '.join(KINDS)}, with spaces between those of a layer"
                    )
            if not kinds:
                raise ConfigurationError(f"layer_blocks[{index}] is {blocks[index]!r}: a layer has at least one block")

    def _check_ssd(self) -> None:
        for name in ("ssm_num_heads", "ssm_head_dim", "ssm_n_groups", "ssm_state_size"):
            self._require(getattr(self, name) >= 1, name, "a size of at least 1")
        self._require(self.ssm_conv_kernel >= 2, "ssm_conv_kernel", "a number of taps: 2 or more, usually 4")
        self._require(
            self.ssm_num_heads % self.ssm_n_groups == 0,
            "ssm_n_groups",
            f"it has to divide ssm_num_heads={self.ssm_num_heads}, so that every group has as many heads",
        )
        self._require(self.ssm_norm in NORMS, "ssm_norm", f"one of {', '.join(map(repr, NORMS))}")
        inner, group = self.ssm_num_heads * self.ssm_head_dim, self.ssm_norm_group_size
        self._require(
            group is None or (group >= 1 and inner % group == 0),
            "ssm_norm_group_size",
            f"it has to divide the inner width ssm_num_heads * ssm_head_dim = {inner}, or be None",
        )
        eps = self.ssm_norm_epsilon
        self._require(eps is None or 0 < eps < math.inf, "ssm_norm_epsilon", "a small number above 0, or None")

    def _check_attention(self) -> None:
        where = next(i for i, kinds in enumerate(self.blocks) if any("attention" in k or k == SHARED for k in kinds))
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            value = getattr(self, name)
            self._require(
                value is not None and value >= 1,
                name,
                f"layer_blocks[{where}] has attention, which needs a size of at least 1",
            )
        assert self.num_attention_heads is not None
        assert self.num_key_value_heads is not None
        assert self.head_dim is not None
        self._require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            f"it has to divide num_attention_heads={self.num_attention_heads}, so that every group has as many heads",
        )
        scale, taps, window = self.attention_scale, self.attention_conv_kernel, self.sliding_window
        self._require(scale is None or 0 < scale < math.inf, "attention_scale", "a factor above 0, or None")
        self._require(
            taps is None or taps >= 2, "attention_conv_kernel", "a number of taps: 2 or more, or None for none"
        )
        self._require(0 <= self.attention_dropout < 1, "attention_dropout", "a share from 0 to below 1")
        if SLIDING in self.mixer_kinds:
            self._require(
                window is not None and window >= 1,
                "sliding_window",
                "a number of tokens of at least 1, for the layers that have it",
            )
        if self.rope_parameters is not None:
            self._check_rotary(self.rope_parameters, self.head_dim)

    def _check_rotary(self, rope: dict[str, Any], head_dim: int) -> None:
        kinds = ("default", *ROPE_INIT_FUNCTIONS)
        self._require(
            rope.get("rope_type") in kinds, "rope_parameters", f"its rope_type has to be one of {', '.join(kinds)}"
        )
        theta, share = rope.get("rope_theta"), rope.get("partial_rotary_factor", 1.0)
        self._require(
            isinstance(theta, Number) and 0 < theta < math.inf,
            "rope_parameters",
            "its rope_theta has to be a number above 0, usually 10000.0",
        )
        rotated = head_dim * share if isinstance(share, Number) and 0 < share <= 1 else math.nan
        self._require(
            rotated >= 2 and int(rotated) % 2 == 0,
            "rope_parameters",
            f"its partial_rotary_factor has to be a share above 0 and up to 1 of head_dim={head_dim} that rotates an "
            "even number of channels; None in place of it all for no rotary embedding",
        )

    def _check_feed_forward(self) -> None:
        kinds = {kind for kinds in self.blocks for kind in kinds}
        if kinds & {MLP, MOE, SHARED}:
            self._require(self.mlp_type in MLP_KINDS, "mlp_type", f"one of {', '.join(map(repr, MLP_KINDS))}")
            self._require(self.intermediate_size >= 1, "intermediate_size", "a size of at least 1")
        if MOE not in kinds:
            return
        experts, groups = self.num_experts, self.n_group
        self._require(experts >= 1, "num_experts", "a count of at least 1, for the layers with a mixture of experts")
        self._require(
            1 <= self.num_experts_per_tok <= experts, "num_experts_per_tok", f"a count from 1 to num_experts={experts}"
        )
        for name in ("moe_intermediate_size", "moe_latent_size"):
            value = getattr(self, name)
            self._require(value is None or value >= 1, name, "a size of at least 1, or None")
        self._require(
            self.shared_expert_intermediate_size >= 0, "shared_expert_intermediate_size", "a size, or 0 for none"
        )
        self._require(self.moe_router in ROUTERS, "moe_router", f"one of {', '.join(map(repr, ROUTERS))}")
        self._require(
            groups >= 1 and experts % groups == 0 and (groups == 1 or experts // groups >= 2),
            "n_group",
            f"it has to divide num_experts={experts} into groups of two or more; 1 for no groups",
        )
        reachable = self.topk_group * (experts // groups)
        self._require(
            1 <= self.topk_group <= groups and reachable >= self.num_experts_per_tok,
            "topk_group",
            f"a count from 1 to n_group={groups}, with num_experts_per_tok={self.num_experts_per_tok} experts in them",
        )
        self._require(_is_factor(self.routed_scaling_factor), "routed_scaling_factor", "a finite factor other than 0")
        coef = self.router_aux_loss_coef
        self._require(coef is not None and 0 <= coef < math.inf, "router_aux_loss_coef", "a weight of at least 0")

    def _check_shared(self) -> None:
        uses = len(self.shared_layers)
        self._require(self.shared_adapter_rank >= 0, "shared_adapter_rank", "a rank, or 0 for no adapters")
        self._require(self.num_shared_blocks >= 1, "num_shared_blocks", "a count of at least 1")
        if uses:
            self._require(
                self.num_shared_blocks <= uses,
                "num_shared_blocks",
                f"{uses} layers are {SHARED!r}, so that nobody uses {self.num_shared_blocks - uses} of them",
            )
            self._require(
                self.shared_adapter_rank > 0 or not self.shared_attention_adapters,
                "shared_attention_adapters",
                "it needs a shared_adapter_rank above 0",
            )
            self._require(
                self.mlp_type.endswith("glu"), "mlp_type", f"the MLP of {SHARED!r} layers is gated: 'swiglu' or 'geglu'"
            )
        else:
            self._require(
                self.num_shared_blocks == 1 and not self.shared_adapter_rank and not self.shared_attention_adapters,
                "num_shared_blocks" if self.num_shared_blocks != 1 else "shared_adapter_rank",
                f"no layer of layer_blocks is {SHARED!r}, so that nobody uses it",
            )

    def _check_heads(self) -> None:
        heads = self.get_mtp_config()
        known = bool(heads.blocks) and not heads.shared_layers
        self._require(known, "mtp_layer_blocks", f"the blocks of each layer of a head, none of them {SHARED!r}")
        try:
            heads.validate_architecture()
        except ConfigurationError as error:
            raise ConfigurationError(f"mtp_layer_blocks is {self.mtp_layer_blocks!r}: of a head, {error}") from None

    @property
    def blocks(self) -> list[tuple[str, ...]]:
        """The blocks of every layer."""
        return [tuple(kinds.split()) for kinds in self.layer_blocks or []]

    @property
    def mixer_kinds(self) -> list[str]:
        """``"ssd"``, ``"attention"`` or ``"sliding_attention"`` for every mixer with a state, in order."""
        return [mixer for kinds in self.blocks for kind in kinds for mixer in KINDS[kind]]

    @property
    def shared_layers(self) -> list[int]:
        """The layers that use a shared block, in order; the n-th of them uses block n modulo ``num_shared_blocks``."""
        return [index for index, kinds in enumerate(self.blocks) for kind in kinds if kind == SHARED]

    @property
    def layer_types(self) -> list[str]:
        """What each layer is, in transformers' vocabulary."""
        return [_layer_type(kinds) for kinds in self.blocks]


def _layer_type(kinds: tuple[str, ...]) -> str:
    mixers = {mixer for kind in kinds for mixer in KINDS.get(kind, ())}  # read before it is judged
    if not mixers:
        return MOE if MOE in kinds else MLP
    if mixers == {SSD}:
        return "linear_attention"
    if SSD in mixers:
        return "hybrid"
    return "full_attention" if ATTENTION in mixers else "sliding_attention"


def _is_factor(value: Any) -> bool:
    return math.isfinite(value) and value != 0
