"""The hybrids: one decoder of SSD, attention, feed-forward parts and mixtures of experts in any order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers import initialization as init
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from ..layers import (
    MLP,
    Attention,
    Experts,
    Head,
    Mamba2Mixer,
    MoE,
    Placement,
    RMSNorm,
    SequenceLayout,
    SigmoidRouter,
    SoftmaxRouter,
    place,
)
from ..layers.mixer import FP32_PARAMETERS
from ..layers.projection import Adapter
from ..layers.projection import call as call_linear
from ..layers.sequence import PLAIN
from ..ops.mixer.torch import scaled
from .arguments import check_ignored
from .backbone import SSDBackbone, SSDLayer, batch_and_tokens, read_layout
from .cache import Mamba2Cache, one_cache
from .causal_lm import SSDForCausalLM
from .classification import SSDForSequenceClassification
from .configuration_mamba2_hybrid import ATTENTION, KINDS, MOE, SHARED, SLIDING, SSD, Mamba2HybridConfig
from .interfaces import attend, experts, prepare_masks
from .modeling_mamba2 import check_attentions
from .outputs import Mamba2CausalLMOutput, Mamba2Output
from .pretrained import SSDPreTrainedModel
from .rotary import RotaryEmbedding

if TYPE_CHECKING:
    from ..distributed import Context

_TO_STREAM = "writes_to_the_stream"
"""Marks linear layers whose result is added to the residual stream."""


@dataclass
class _Call:
    """What all blocks of a forward share."""

    layout: SequenceLayout
    placement: Placement | None
    cache: Mamba2Cache | None
    embeddings: Tensor | None
    shared_blocks: nn.ModuleList | None
    output_attentions: bool
    attentions: list[Tensor]
    router_logits: list[Tensor]

    def state(self, index: int) -> Any:
        """A mixer's state."""
        return None if self.cache is None else self.cache.layers[index]


class SharedBlock(nn.Module):
    """Attention, then an MLP, over stream and embeddings side by side: weights that several layers share, with adapters
    for each of its uses ("The Zamba2 Suite", arXiv 2411.15242).

    Args:
        config: of the model.
        uses: how many layers use this block.
    """

    def __init__(self, config: Mamba2HybridConfig, uses: int) -> None:
        super().__init__()
        width, rank = 2 * config.hidden_size, config.shared_adapter_rank
        self.norm = RMSNorm(width, config.layer_norm_epsilon)
        self.attention = _attention(config, ATTENTION, width)
        self.mlp_norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = _mlp(config, config.intermediate_size)

        def adapters(inputs: int, outputs: int) -> nn.ModuleList:
            return nn.ModuleList([Adapter(inputs, rank, outputs) for _ in range(uses)])

        self.has_adapters, self.has_attention_adapters = rank > 0, config.shared_attention_adapters
        if self.has_attention_adapters:
            self.q_adapters, self.k_adapters, self.v_adapters = (adapters(width, size) for size in self.attention.sizes)
        if self.has_adapters:
            self.mlp_adapters = adapters(config.hidden_size, 2 * config.intermediate_size)

    def added_projections(self) -> Iterator[tuple[Adapter, list[nn.Module]]]:
        """Each adapter, and the projections whose outputs, side by side, it is added to."""
        pairs: list[tuple[Any, list[nn.Module]]] = []
        if self.has_attention_adapters:
            attention = self.attention
            pairs += [(self.q_adapters, [attention.q_proj]), (self.k_adapters, [attention.k_proj])]
            pairs += [(self.v_adapters, [attention.v_proj])]
        if self.has_adapters:
            pairs += [(self.mlp_adapters, [self.mlp.gate_proj, self.mlp.up_proj])]
        return ((adapter, projections) for adapters, projections in pairs for adapter in adapters)

    def forward(
        self,
        hidden_states: Tensor,
        embeddings: Tensor,
        use: int,
        placement: Placement,
        layout: SequenceLayout,
        state: Any,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Stream and embeddings ``(B, T, d)`` to ``(B, T, d)``, for the ``use``-th of the layers that use it."""
        x = self.norm(torch.cat([hidden_states.to(embeddings.dtype), embeddings], -1))  # (B, T, 2 d)
        # Not the adapters themselves, which what offloads modules would move as it moves other arguments.
        adds: tuple[Any, ...] = ()
        if self.has_attention_adapters:
            adds = tuple(each[use].add_to for each in (self.q_adapters, self.k_adapters, self.v_adapters))
        x, weights = self.attention(x, placement, layout, state, adds=adds, output_attentions=output_attentions)
        return self.mlp(self.mlp_norm(x), self.mlp_adapters[use].add_to if self.has_adapters else None), weights


class MixerBlock(nn.Module):
    """SSD, attention, or both side by side, behind one norm.

    Args:
        config: of the model.
        kind: one of ``KINDS`` with mixers.
        first_state: place of its first state in the cache.
    """

    def __init__(self, config: Mamba2HybridConfig, kind: str, first_state: int) -> None:
        super().__init__()
        self.state_index = {mixer: first_state + place for place, mixer in enumerate(KINDS[kind])}
        self.scale = config.residual_multiplier
        self.ssm_scales = (config.ssm_in_multiplier, config.ssm_out_multiplier)
        self.attention_scales = (config.attention_in_multiplier, config.attention_out_multiplier)
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        if SSD in self.state_index:
            self.mixer = _mixer(config)
        self.attention_kind = next((mixer for mixer in KINDS[kind] if mixer != SSD), None)
        if self.attention_kind is not None and kind != SHARED:
            self.attention = _attention(config, self.attention_kind, config.hidden_size)
            setattr(self.attention.o_proj, _TO_STREAM, True)

    def forward(self, stream: Tensor, call: _Call) -> Tensor:
        """``(B, T, d)`` to ``(B, T, d)``."""
        after = stream
        if self.attention_kind is not None:
            after = self._attend(stream, call, self.attention_kind)
        if SSD not in self.state_index:
            return after
        after = self._mix(stream, after, call)
        if call.output_attentions and self.attention_kind is not None:
            call.attentions[-2:] = call.attentions[:-3:-1]  # in the order of the states
        return after

    def _mix(self, stream: Tensor, residual: Tensor, call: _Call) -> Tensor:
        """``residual`` plus what the mixer makes of ``stream``."""
        before, after = self.ssm_scales
        state = call.state(self.state_index[SSD])
        # What wraps a mixer may hand on its methods, and has to be called.
        if isinstance(self.mixer, Mamba2Mixer) and not call.output_attentions:
            return self.mixer.layer(
                *(stream, self.norm, call.layout, state),
                residual=None if residual is stream else residual,
                input_multiplier=before,
                output_multiplier=after * self.scale,
            )
        mixed = self.mixer(scaled(self.norm(stream), before), call.layout, state, call.output_attentions)
        if call.output_attentions:
            mixed, matrix = mixed
            call.attentions.append(matrix)
        return residual + scaled(mixed, after * self.scale)

    def _attend(self, stream: Tensor, call: _Call, kind: str) -> Tensor:
        """``stream`` plus what attention makes of it."""
        before, after = self.attention_scales
        placement: Any = call.placement
        arguments = placement, call.layout, call.state(self.state_index[kind])
        # What wraps attention may hand on its methods, and has to be called.
        if type(self.attention) is Attention:
            added, weights = self.attention.layer(
                *(stream, self.norm, *arguments),
                multipliers=(before, after * self.scale),
                output_attentions=call.output_attentions,
            )
        else:
            attended, weights = self.attention(
                scaled(self.norm(stream), before), *arguments, output_attentions=call.output_attentions
            )
            added = torch.add(stream, attended, alpha=after * self.scale)
        if weights is not None:
            call.attentions.append(weights)
        return added


class SharedMixerBlock(MixerBlock):
    """SSD that reads, beside the stream, what a shared block finds there.

    Args:
        config: of the model.
        first_state: place of its first state in the cache.
        use: how many layers before this one use shared blocks.
    """

    def __init__(self, config: Mamba2HybridConfig, first_state: int, use: int) -> None:
        super().__init__(config, SHARED, first_state)
        self.use, self.block = divmod(use, config.num_shared_blocks)
        self.linear = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, stream: Tensor, call: _Call) -> Tensor:
        """``(B, T, d)`` to ``(B, T, d)``."""
        assert call.shared_blocks is not None
        found, weights = call.shared_blocks[self.block](
            *(stream, call.embeddings, self.use, call.placement, call.layout, call.state(self.state_index[ATTENTION])),
            output_attentions=call.output_attentions,
        )
        if weights is not None:
            call.attentions.append(weights)
        return self._mix(stream + call_linear(self.linear, found.to(stream.device)), stream, call)


class FeedForwardBlock(nn.Module):
    """An MLP or a mixture of experts behind a norm.

    Args:
        config: of the model.
        kind: ``"mlp"`` or ``"moe"``.
    """

    def __init__(self, config: Mamba2HybridConfig, kind: str) -> None:
        super().__init__()
        self.scale, self.routed = config.residual_multiplier, kind == MOE
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        if self.routed:
            self.moe = _moe(config)
        else:
            self.mlp = _mlp(config, config.intermediate_size)
        for part in (module for module in self.modules() if isinstance(module, MLP)):
            setattr(part.down_proj, _TO_STREAM, True)

    def forward(self, stream: Tensor, call: _Call) -> Tensor:
        """``(B, T, d)`` to ``(B, T, d)``."""
        # What wraps one may hand on its methods, and has to be called.
        if not self.routed:
            if type(self.mlp) is MLP:
                return self.mlp.layer(stream, self.norm, self.scale)
            return torch.add(stream, self.mlp(self.norm(stream)), alpha=self.scale)
        if type(self.moe) is MoE:
            after, logits = self.moe.layer(stream, self.norm, self.scale)
        else:
            out, logits = self.moe(self.norm(stream))
            after = torch.add(stream, out, alpha=self.scale)
        call.router_logits.append(logits)
        return after


def _mixer(config: Mamba2HybridConfig) -> Mamba2Mixer:
    eps, multipliers = config.ssm_norm_epsilon, config.ssm_multipliers
    return Mamba2Mixer(
        config.hidden_size,
        num_heads=config.ssm_num_heads,
        head_dim=config.ssm_head_dim,
        n_groups=config.ssm_n_groups,
        state_size=config.ssm_state_size,
        conv_kernel=config.ssm_conv_kernel,
        use_bias=config.ssm_use_bias,
        out_bias=config.ssm_out_bias,
        use_conv_bias=config.ssm_use_conv_bias,
        norm=config.ssm_norm,
        norm_group_size=config.ssm_norm_group_size,
        norm_eps=config.layer_norm_epsilon if eps is None else eps,
        dt_limit=(config.time_step_limit[0], config.time_step_limit[1]),
        multipliers=None if multipliers is None else tuple(map(float, multipliers)),
    )


def _attention(config: Mamba2HybridConfig, kind: str, input_size: int) -> Attention:
    assert config.num_attention_heads is not None
    assert config.num_key_value_heads is not None
    assert config.head_dim is not None
    attention = Attention(
        input_size,
        config.hidden_size,
        num_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        bias=config.attention_bias,
        out_bias=config.attention_bias if config.attention_out_bias is None else config.attention_out_bias,
        scale=config.attention_scale,
        window=config.sliding_window if kind == SLIDING else None,
        conv_kernel=config.attention_conv_kernel,
        conv_bias=config.attention_conv_bias,
        key_multiplier=config.key_multiplier,
        dropout=config.attention_dropout,
        attend=attend,
    )
    attention.config = config  # transformers' attention functions look for it
    return attention


def _mlp(config: Mamba2HybridConfig, width: int) -> MLP:
    gate, down = config.mlp_multipliers or (1.0, 1.0)
    return MLP(config.hidden_size, width, config.mlp_type, config.mlp_bias, (gate, down))


def _moe(config: Mamba2HybridConfig) -> MoE:
    sizes = (config.hidden_size, config.num_experts, config.num_experts_per_tok)
    router: SoftmaxRouter | SigmoidRouter
    if config.moe_router == "softmax":
        router = SoftmaxRouter(*sizes)
    else:
        router = SigmoidRouter(
            *sizes,
            num_groups=config.n_group,
            top_groups=config.topk_group,
            normalize=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
        )
    latent, width = config.moe_latent_size, config.moe_intermediate_size
    return MoE(
        router,
        experts(
            *(config, config.num_experts, config.hidden_size if latent is None else latent),
            *(config.intermediate_size if width is None else width, config.mlp_type),
        ),
        _mlp(config, config.shared_expert_intermediate_size) if config.shared_expert_intermediate_size else None,
        hidden_size=config.hidden_size,
        latent_size=latent,
        bias=config.mlp_bias,
    )


class Mamba2HybridLayer(SSDLayer):
    """The blocks of one layer.

    Args:
        config: of the model.
        kinds: of its blocks.
        first_state: place of its first state in the cache.
        first_use: how many layers before it use shared blocks.
    """

    def __init__(self, config: Mamba2HybridConfig, kinds: tuple[str, ...], first_state: int, first_use: int) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.blocks = nn.ModuleList()
        for kind in kinds:
            if kind == SHARED:
                self.blocks.append(SharedMixerBlock(config, first_state, first_use))
                first_use += 1
            elif KINDS[kind]:
                self.blocks.append(MixerBlock(config, kind, first_state))
            else:
                self.blocks.append(FeedForwardBlock(config, kind))
            first_state += len(KINDS[kind])

    def forward(
        self,
        hidden_states: Tensor,
        layout: SequenceLayout = PLAIN,
        past_key_values: Mamba2Cache | None = None,
        placement: Placement | None = None,
        embeddings: Tensor | None = None,
        shared_blocks: nn.ModuleList | None = None,
        output_attentions: bool = False,
        output_router_logits: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """``(B, T, d)`` to ``(B, T, d)``; if either is asked for, also the matrices ``(B, H, T, T)`` of its mixers and
        the logits ``(B, T, E)`` of its routers.
        """
        if self.residual_in_fp32:
            hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        call = _Call(layout, placement, past_key_values, embeddings, shared_blocks, output_attentions, [], [])
        for block in self.blocks:
            hidden_states = block(hidden_states, call)
        if output_attentions or output_router_logits:
            return hidden_states, tuple(call.attentions), tuple(call.router_logits)
        return hidden_states


def _windows(config: Mamba2HybridConfig) -> set[int | None]:
    """Those of all layers with attention; None is one that reaches every token."""
    windows = {ATTENTION: None, SLIDING: config.sliding_window}
    return {windows[kind] for kind in config.mixer_kinds if kind in windows}


def _place(
    config: Mamba2HybridConfig,
    windows: set[int | None],
    rotary: RotaryEmbedding | None,
    hidden_states: Tensor,
    layout: SequenceLayout,
    batch: int,
    tokens: int,
    position_ids: Tensor | None,
    cache: Mamba2Cache | None,
) -> dict[str, Any]:
    """Where ``hidden_states (B, T, d)`` stand for attention: what :meth:`Mamba2Cache.count` wants to know."""
    counts = None if cache is None else cache.key_counts
    device, neighbors = hidden_states.device, layout.neighbors
    placement = place(layout, batch, tokens, counts, device) if neighbors is None else neighbors.place(device)
    positions = None
    if rotary is not None:
        if position_ids is not None:
            given = position_ids[:, position_ids.shape[1] - tokens :].expand(batch, -1)
            positions = placement.align(given)  # (B, T) on the grid
        shift = None if counts is None else counts.shift
        counted = placement.positions(shift) if positions is None else positions
        placement.rotary = rotary(hidden_states, counted)
    for each in placement.pieces or (placement,):
        prepare_masks(config, each, windows, hidden_states.dtype, piece=neighbors is not None)
    return {"placement": placement, "positions": positions}


class MTPHead(nn.Module):
    """Predicts one token further ahead than what it reads (multi-token prediction; "DeepSeek-V3 Technical Report",
    arXiv 2412.19437, Section 2.2): layers of its own over hidden states and the tokens that they foretold.

    Args:
        config: of the model.
    """

    def __init__(self, config: Mamba2HybridConfig) -> None:
        super().__init__()
        width, epsilon, self.config = config.hidden_size, config.layer_norm_epsilon, config
        own = config.get_mtp_config()
        self.windows = _windows(own)
        self.enorm, self.hnorm = RMSNorm(width, epsilon), RMSNorm(width, epsilon)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.layers = nn.ModuleList()
        states = 0
        for kinds in own.blocks:
            self.layers.append(Mamba2HybridLayer(config, kinds, states, 0))
            states += sum(len(KINDS[kind]) for kind in kinds)
        self.has_rotary = config.rope_parameters is not None and bool(self.windows)
        if self.has_rotary:
            self.rotary = RotaryEmbedding(config)
        self.final_layernorm = RMSNorm(width, epsilon)

    def forward(
        self,
        embeddings: Tensor,
        hidden_states: Tensor,
        cache: Mamba2Cache | None = None,
        layout: SequenceLayout = PLAIN,
    ) -> Tensor:
        """What the language model's head reads.

        Args:
            embeddings: ``(B, T, d)`` of the tokens that follow.
            hidden_states: ``(B, T, d)`` the last ones of the model, or what the head before this one returned.
            cache: of this head, after the tokens before.
            layout: documents and padding.

        Returns:
            ``(B, T, d)``.
        """
        batch, tokens, _ = hidden_states.shape
        fused = torch.cat([self.enorm(embeddings), self.hnorm(hidden_states)], -1)  # (B, T, 2 d)
        stream, counted = layout.blank(call_linear(self.eh_proj, fused)), {}
        if self.windows:
            rotary = self.rotary if self.has_rotary else None
            counted = _place(self.config, self.windows, rotary, stream, layout, batch, tokens, None, cache)
        for layer in self.layers:
            stream = layer(stream, layout, past_key_values=cache, placement=counted.get("placement"))
            stream = layout.blank(stream)
        if cache is not None:
            cache.count(tokens, layout.keep, **counted)
        return self.final_layernorm(stream)  # type: ignore[no-any-return]


class Mamba2HybridPreTrainedModel(SSDPreTrainedModel):
    """What makes a pretrained model a hybrid."""

    config: Mamba2HybridConfig
    config_class = Mamba2HybridConfig
    _no_split_modules: Any = ["Mamba2HybridLayer", "SharedBlock", "MTPHead"]
    _keep_in_fp32_modules_strict = [*FP32_PARAMETERS, "e_score_correction_bias"]
    _keys_to_ignore_on_load_unexpected = [r"^mtp\."]  # of a model that is not to have these heads
    _skip_keys_device_placement = ["past_key_values", "cache_params", "cache", "shared_blocks"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    foreign_reader: ClassVar[Any] = None
    """Reads checkpoints of other formats: ``mamba2_hf.checkpoints.loading.read_foreign``, once it is registered."""

    def post_init(self) -> None:
        """As in transformers. Layers that are not to be split are those that there are: FSDP looks each of them up."""
        super().post_init()
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = set(self._no_split_modules or ()) & present

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, also from checkpoints of bamba, granitemoehybrid, nemotron_h, falcon_h1, zamba2 and the
        original code's hybrids; their weights are all in memory while the model is made.

        Raises:
            CheckpointError: weights are missing, of another shape, or not finite.
            ConfigurationError: the checkpoint's configuration cannot be expressed as a hybrid's.
        """
        source = pretrained_model_name_or_path
        given = source is None or kwargs.get("config") is not None or kwargs.get("state_dict") is not None
        if cls.foreign_reader is not None and not given:
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
            found = cls.foreign_reader(source, dtype, kwargs.get("revision"))
            if found is not None:
                config, state, dtype = found
                for name in ("dtype", "torch_dtype", "revision"):
                    kwargs.pop(name, None)
                fields = config.to_dict()
                config, kwargs = cls.config_class.from_dict(fields, return_unused_kwargs=True, **kwargs)
                loaded = super().from_pretrained(None, *args, config=config, state_dict=state, dtype=dtype, **kwargs)
                model = loaded[0] if isinstance(loaded, tuple) else loaded
                model.name_or_path = model.config.name_or_path = str(source)  # adapters remember their base by it
                if model.can_generate():
                    with contextlib.suppress(OSError):  # a checkpoint need not have one
                        model.generation_config = GenerationConfig.from_pretrained(source)
                return loaded
        return super().from_pretrained(source, *args, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers would look for it in the source of this file, and it is in another

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def init_parallel_plans(self) -> None:
        """As in transformers. FSDP2 trains one dtype per group, so that beside half-precision weights the fp32
        parameters of a mixer cannot be in the group of their layer: its modules are sharded one by one.
        """
        super().init_parallel_plans()
        if self.base_model is self and self.dtype in (torch.float16, torch.bfloat16):
            style = self._fsdp_plan.pop("layers.*")
            mixer = (f"mixer.{part}" for part in ("in_proj", "conv1d", "norm", "out_proj"))
            parts = ("norm", *mixer, "linear", "attention", "mlp", "moe")
            self._fsdp_plan.update({f"layers.*.blocks.*.{part}": style for part in parts})

    def _optimize_model_for_decode(self) -> Any:
        """Leaves the experts as they are: which way is quickest for the tokens of a call they decide themselves."""
        return contextlib.nullcontext()

    @property
    def _residual_scale(self) -> float:
        return sum(map(len, self.config.blocks)) ** -0.5

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # transformers asks for modules that have parameters of their own, and for no others of classes outside of it.
        if isinstance(module, nn.Linear) and hasattr(module, _TO_STREAM):
            self._init_residual(module)
        elif isinstance(module, nn.Conv1d):
            self._init_conv(module, module.kernel_size[0])
        elif isinstance(module, (SoftmaxRouter, SigmoidRouter)):
            init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, SigmoidRouter):
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, Experts):
            inner = getattr(module, module.up_name)
            rescale = self._residual_scale if self.config.rescale_prenorm_residual else 1.0
            for weight, scale in ((inner, 1.0), (module.down_proj, rescale)):
                bound = scale * weight.shape[-1] ** -0.5
                init.uniform_(weight, -bound, bound)


class Mamba2HybridModel(SSDBackbone, Mamba2HybridPreTrainedModel):
    """The backbone: embeddings, layers, final norm, and the blocks that layers share."""

    def __init__(self, config: Mamba2HybridConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList()
        states, uses = 0, 0
        for kinds in config.blocks:
            self.layers.append(Mamba2HybridLayer(config, kinds, states, uses))
            states += sum(len(KINDS[kind]) for kind in kinds)
            uses += kinds.count(SHARED)
        if uses:
            count = config.num_shared_blocks
            self.shared_blocks = nn.ModuleList(
                SharedBlock(config, len(range(block, uses, count))) for block in range(count)
            )
        self.has_shared = uses > 0
        self.windows = _windows(config)
        self.has_rotary = config.rope_parameters is not None and bool(self.windows)
        if self.has_rotary:
            self.rotary = RotaryEmbedding(config)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Mamba2Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        cache_params: Mamba2Cache | None = None,
        cache: Mamba2Cache | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        token_type_ids: Tensor | None = None,
        layout: SequenceLayout | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | Mamba2Output:
        """Runs the tokens through the layers.

        The arguments are those of :meth:`Mamba2Model.forward`, and two differ:

        Args:
            position_ids: ``(B, T)``; a document starts where the position is 0, and rotary embeddings take the
                positions as they are. Left out, they count the tokens of each document that are no padding.
            output_router_logits: see :class:`Mamba2Output`.

        Raises:
            ArgumentError: inputs contradict each other or cannot be honored.
            CacheError: the cache is of another kind or batch, or static and full.
        """
        check_ignored(self, kwargs)
        if layout is None:
            shape = batch_and_tokens(input_ids, inputs_embeds)
            layout = read_layout(*shape, attention_mask, position_ids, seq_idx, cu_seq_lens_q, cu_seq_lens_k)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        return self._run(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past_key_values=one_cache(past_key_values, cache_params, cache),
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_router_logits=output_router_logits,
            return_dict=return_dict,
            layout=layout,
        )

    def _scale_embeddings(self, embeddings: Tensor) -> Tensor:
        return scaled(embeddings, self.config.embedding_multiplier)

    def _layer_options(
        self,
        hidden_states: Tensor,
        layout: SequenceLayout,
        batch: int,
        tokens: int,
        position_ids: Tensor | None,
        cache: Mamba2Cache | None,
        packed: bool,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        options: dict[str, Any] = {}
        if self.has_shared:
            embeddings = layout.pack(hidden_states) if packed else hidden_states
            options |= {"embeddings": embeddings, "shared_blocks": self.shared_blocks}
        if not self.windows:
            return options, {}
        rotary = self.rotary if self.has_rotary else None
        counted = _place(self.config, self.windows, rotary, hidden_states, layout, batch, tokens, position_ids, cache)
        placement = counted["placement"]
        return {**options, "placement": placement.of_row(layout) if packed else placement}, counted

    def _check_attentions(self, batch: int, tokens: int, cache: Mamba2Cache | None) -> None:
        heads = {SSD: self.config.ssm_num_heads}
        each = (heads.get(kind, self.config.num_attention_heads) or 0 for kind in self.config.mixer_kinds)
        check_attentions(batch, tokens, sum(each), cache)


class Mamba2HybridForCausalLM(SSDForCausalLM, Mamba2HybridPreTrainedModel):
    """The language model: backbone and head."""

    def __init__(self, config: Mamba2HybridConfig) -> None:
        super().__init__(config)
        self.backbone = Mamba2HybridModel(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        if config.num_mtp_layers:
            self.mtp = nn.ModuleList(MTPHead(config) for _ in range(config.num_mtp_layers))
            self.mtp.requires_grad_(config.mtp_loss_coef > 0)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """:meth:`Mamba2HybridPreTrainedModel.from_pretrained`; ``num_mtp_layers=0`` leaves out heads that predict
        further tokens.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for head in model.mtp_heads:
            head.requires_grad_(model.config.mtp_loss_coef > 0)
        return loaded

    @property
    def mtp_heads(self) -> tuple[nn.Module, ...]:
        """:class:`MTPHead`, that of the nearest token first."""
        return tuple(self.mtp) if self.config.num_mtp_layers else ()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Mamba2Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache_params: Mamba2Cache | None = None,
        cache: Mamba2Cache | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        token_type_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | Mamba2CausalLMOutput:
        """:meth:`Mamba2HybridModel.forward` and the head.

        Args:
            labels: ``(B, T)``, shifted inside; -100 is ignored. So is a token that would be predicted from padding or
                from another document.
            logits_to_keep: how many of the last positions to compute logits for (0 for all), or their indices.
            num_items_in_batch: what to divide the summed loss by, in place of the number of labels.
            return_logits: whether to return logits beside the loss. By default they are left out where the model is in
                training mode and labels are given: they are then never held whole, which saves most of the memory of a
                small model with a large vocabulary. Reading them raises a LogitsError. False does so in eval mode too.
                A head that must be called as a module (adapters, quantization, hooks) computes them all the same.

        The other arguments are those of :meth:`Mamba2HybridModel.forward`.
        """
        check_ignored(self, kwargs)
        shape = batch_and_tokens(input_ids, inputs_embeds)
        layout = read_layout(*shape, attention_mask, position_ids, seq_idx, cu_seq_lens_q, cu_seq_lens_k)
        return self._run(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past_key_values=one_cache(past_key_values, cache_params, cache),
            labels=labels,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_router_logits=output_router_logits,
            return_dict=return_dict,
            logits_to_keep=logits_to_keep,
            num_items_in_batch=num_items_in_batch,
            return_logits=return_logits,
            layout=layout,
        )

    @property
    def _logits_scale(self) -> float:
        if self.config.logits_scaling is not None:
            return 1 / self.config.logits_scaling
        return 1.0 if self.config.lm_head_multiplier is None else self.config.lm_head_multiplier

    def _scale_logits(self, logits: Tensor) -> Tensor:
        if self.config.logits_scaling is not None:
            return logits / self.config.logits_scaling
        return logits if self.config.lm_head_multiplier is None else logits * self.config.lm_head_multiplier

    @property
    def _mtp_loss_coef(self) -> float:
        return float(self.config.mtp_loss_coef)

    def _heads_loss(
        self,
        hidden_states: Tensor,
        inputs: dict[str, Any],
        labels: Tensor,
        layout: SequenceLayout,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        ids, embeddings = inputs["input_ids"], inputs["inputs_embeds"]
        embeddings = self.backbone._embed(ids) if embeddings is None else embeddings
        embeddings = layout.blank(self.backbone._scale_embeddings(embeddings))  # (B, T, d)
        # Not the number of labels that reach so far: there may be none.
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        loss = hidden_states.new_zeros((), dtype=torch.float32)
        for head in self.mtp:
            if layout.breaks is not None:
                labels = labels.masked_fill(layout.breaks.to(labels.device), -100)
            embeddings, labels = F.pad(embeddings, (0, 0, 0, 1))[:, 1:], F.pad(labels, (0, 1), value=-100)[:, 1:]
            hidden_states = head(embeddings, hidden_states, layout=layout)
            loss = loss + self._token_loss(hidden_states, labels, count)
        return loss * (self._mtp_loss_coef / len(self.mtp))

    def _aux_loss(self, outputs: Mamba2Output, layout: SequenceLayout) -> Tensor | None:
        """How far the routers are from using all experts alike (Switch Transformer, arXiv 2101.03961)."""
        if not outputs.router_logits:
            return None
        if self.backbone.context is not None:
            return self._aux_loss_of_slices(outputs.router_logits, self.backbone.context, layout)
        loss: Tensor = load_balancing_loss_func(
            outputs.router_logits, self.config.num_experts, self.config.num_experts_per_tok, layout.keep
        )
        return loss

    def _aux_loss_of_slices(
        self, router_logits: tuple[Tensor, ...], context: Context, layout: SequenceLayout
    ) -> Tensor:
        """The same where each process has the logits ``(B n, E)`` of its slice: what is averaged is summed over all."""
        experts, chosen = self.config.num_experts, self.config.num_experts_per_tok
        counts = router_logits[0].new_zeros(experts, dtype=torch.float32)
        shares, rows = counts, counts[:1]
        length = router_logits[0].shape[0]
        keep = counts.new_ones(length) if layout.keep is None else layout.keep.flatten().to(counts)
        for logits in router_logits:
            probabilities = torch.softmax(logits, -1)
            index = probabilities.topk(chosen, -1).indices
            counts = counts.index_add(0, index.flatten(), keep.repeat_interleave(chosen))
            shares = shares + (probabilities.float() * keep[:, None]).sum(0)
            rows = rows + keep.sum()
        counts, rows = context.sum(torch.cat([counts, rows])).detach().split([experts, 1])
        return experts * (counts / rows * (context.sum(shares) / rows)).sum()


class Mamba2HybridForSequenceClassification(SSDForSequenceClassification, Mamba2HybridPreTrainedModel):
    """Backbone and a linear head that reads the last token of each sequence."""

    def __init__(self, config: Mamba2HybridConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = Mamba2HybridModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()
