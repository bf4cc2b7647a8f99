"""The Mamba-2 models ("Transformers are SSMs", Dao & Gu 2024), to the contract of transformers."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from ..errors import ArgumentError, CacheError, CheckpointError
from ..layers import GatedRMSNorm, Mamba2Mixer, RMSNorm, SequenceLayout, linear
from ..layers.mixer import FP32_PARAMETERS
from ..layers.sequence import PLAIN, sequence_layout
from .cache import Mamba2Cache, as_mamba2_cache
from .configuration_mamba2 import Mamba2Config

ATTENTION_BYTES_LIMIT = 8 * 2**30
"""Most bytes that ``output_attentions=True`` may take, over all layers."""


@dataclass
class Mamba2Output(ModelOutput):
    """Output of :class:`Mamba2Model`.

    Attributes:
        last_hidden_state: ``(B, T, d)`` after the final norm.
        past_key_values: the cache after these tokens; also readable as ``cache_params``.
        hidden_states: embeddings, then every layer's output, the last one after the final norm; ``(B, T, d)`` each.
        attentions: per layer ``(B, H, T, T)``, the SSD attention matrices.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Mamba2Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    @property
    def cache_params(self) -> Mamba2Cache | None:
        """``past_key_values`` under the name that transformers' Mamba models use."""
        return self.past_key_values


@dataclass
class Mamba2CausalLMOutput(ModelOutput):
    """Output of :class:`Mamba2ForCausalLM`: :class:`Mamba2Output` with ``loss ()`` and ``logits (B, T, vocab)``."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Mamba2Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    @property
    def cache_params(self) -> Mamba2Cache | None:
        """``past_key_values`` under the name that transformers' Mamba models use."""
        return self.past_key_values


@dataclass
class Mamba2SequenceClassifierOutput(ModelOutput):
    """Output of :class:`Mamba2ForSequenceClassification`: ``loss ()`` and ``logits (B, num_labels)``."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Mamba2Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Mamba2Block(GradientCheckpointingLayer):
    """Pre-norm mixer on a residual stream."""

    def __init__(self, config: Mamba2Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = Mamba2Mixer(
            config.hidden_size,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            n_groups=config.n_groups,
            state_size=config.state_size,
            conv_kernel=config.conv_kernel,
            use_bias=config.use_bias,
            use_conv_bias=config.use_conv_bias,
            activation=config.hidden_act,
            norm_eps=config.layer_norm_epsilon,
            dt_limit=(config.time_step_limit[0], config.time_step_limit[1]),
        )

    def forward(
        self,
        hidden_states: Tensor,
        layout: SequenceLayout = PLAIN,
        past_key_values: Mamba2Cache | None = None,
        output_attentions: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``(B, T, d)`` to ``(B, T, d)``; with ``output_attentions`` also the mixer's matrices ``(B, H, T, T)``."""
        if self.residual_in_fp32:
            hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        state = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        if output_attentions:
            mixed, attention = self.mixer(self.norm(hidden_states), layout, state, output_attentions=True)
            return hidden_states + mixed, attention
        return hidden_states + self.mixer(self.norm(hidden_states), layout, state)


class Mamba2PreTrainedModel(PreTrainedModel):
    """Initialization, dtype policy and the flags by which transformers knows what the models can do."""

    config: Mamba2Config
    config_class = Mamba2Config
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    _no_split_modules = ["Mamba2Block"]
    _keep_in_fp32_modules_strict = list(FP32_PARAMETERS)
    _skip_keys_device_placement = ["past_key_values", "cache_params"]
    _can_compile_fullgraph = True
    _is_stateful = True
    supports_gradient_checkpointing = True

    def __init__(self, config: Mamba2Config, *args: Any, **kwargs: Any) -> None:
        config.validate()  # fields that were assigned one by one have not been judged together yet
        super().__init__(config, *args, **kwargs)

    def init_parallel_plans(self) -> None:
        """As in transformers. FSDP2 trains one dtype per group, so that beside half-precision weights the fp32
        parameters of a mixer cannot be in the group of their block: its modules are sharded one by one.
        """
        super().init_parallel_plans()
        if self.base_model is self and self.dtype in (torch.float16, torch.bfloat16):
            style = self._fsdp_plan.pop("layers.*")
            parts = ("norm", "mixer.in_proj", "mixer.conv1d", "mixer.norm", "mixer.out_proj")
            self._fsdp_plan.update({f"layers.*.{part}": style for part in parts})

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The original's initialization; every write goes through ``transformers.initialization``, which leaves loaded
        weights alone.
        """
        if isinstance(module, Mamba2Mixer):
            self._init_mixer(module)
        elif isinstance(module, (RMSNorm, GatedRMSNorm)):
            init.ones_(module.weight)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Linear):
            self._init_linear(module, scale=1.0)
        else:
            super()._init_weights(module)

    def _init_mixer(self, mixer: Mamba2Mixer) -> None:
        config = self.config
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = torch.exp(torch.empty_like(mixer.dt_bias).uniform_(low, high)).clamp(min=config.time_step_floor)
        init.copy_(mixer.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        init.copy_(mixer.A_log, torch.log(torch.empty_like(mixer.A_log).uniform_(1, 16)))
        init.ones_(mixer.D)
        init.kaiming_uniform_(mixer.conv1d.weight, a=math.sqrt(5))
        if mixer.conv1d.bias is not None:
            bound = 1 / math.sqrt(config.conv_kernel)
            init.uniform_(mixer.conv1d.bias, -bound, bound)
        if config.rescale_prenorm_residual and isinstance(mixer.out_proj, nn.Linear):
            # Drawn anew rather than multiplied, so that however often this runs, the scale is there once.
            self._init_linear(mixer.out_proj, scale=1 / math.sqrt(config.num_hidden_layers))

    @staticmethod
    def _init_linear(linear: nn.Linear, scale: float) -> None:
        """Kaiming uniform as in ``nn.Linear`` itself, times ``scale``."""
        bound = scale / math.sqrt(linear.in_features)
        init.uniform_(linear.weight, -bound, bound)
        if linear.bias is not None:
            init.zeros_(linear.bias)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        key_mapping: dict[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; also reads the original's name of the embedding, and refuses what cannot be a Mamba-2.

        Raises:
            CheckpointError: the backbone lacks a weight, a weight has another shape (unless
                ``ignore_mismatched_sizes=True``, which makes up new values for both), or a decay rate, skip or step
                bias is not finite.
        """
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            key_mapping={_LEGACY_EMBEDDING: "embeddings.weight", **(key_mapping or {})},
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
            **kwargs,
        )
        source = pretrained_model_name_or_path or "the state dict"
        if not ignore_mismatched_sizes:
            _refuse_made_up(model, info, source)
        _refuse_infinite(model, source)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, always under the names of the ``mamba2`` format. The saved config says
        ``rescale_prenorm_residual: false``: the weights are scaled already, and stock transformers would scale them
        again at every load.
        """
        kwargs.setdefault("save_original_format", False)
        rescale = self.config.rescale_prenorm_residual
        self.config.rescale_prenorm_residual = False
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.config.rescale_prenorm_residual = rescale


_LEGACY_EMBEDDING = r"embedding\.weight"


def _read_legacy_embedding(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets ``load_state_dict`` read the original's name of the embedding too."""
    if f"{prefix}embedding.weight" in state_dict:
        state_dict[f"{prefix}embeddings.weight"] = state_dict.pop(f"{prefix}embedding.weight")


def _refuse_made_up(model: Mamba2PreTrainedModel, info: dict[str, Any], source: Any) -> None:
    """A new task's head may start anew; a backbone with random weights in it is never what was asked for."""
    backbone = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    problems = [f"{name} is missing" for name in sorted(info["missing_keys"]) if name.startswith(backbone)]
    problems += [
        f"{name} has shape {tuple(found)}, the model expects {tuple(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{source}: {'; '.join(problems[:3])}{more}. Get the complete checkpoint and its own config.json, or pass "
            "ignore_mismatched_sizes=True to start these weights anew"
        )


def _refuse_infinite(model: Mamba2PreTrainedModel, source: Any) -> None:
    """One NaN in a decay rate turns every state, and so every logit, into NaN."""
    for prefix, module in model.named_modules():
        for name in FP32_PARAMETERS if isinstance(module, Mamba2Mixer) else ():
            value = _stored_value(module, name)
            if value is not None and not bool(torch.isfinite(value).all()):
                raise CheckpointError(
                    f"{source}: {prefix}.{name} holds NaN or Inf. The file is damaged or was saved after training "
                    "diverged: get it again, or load an earlier checkpoint"
                )


def _stored_value(module: nn.Module, name: str) -> Tensor | None:
    """A parameter, also where accelerate keeps its value on the CPU or on disk; None on the meta device alone."""
    parameter: Tensor = getattr(module, name)
    if not parameter.is_meta:
        return parameter
    hook = getattr(module, "_hf_hook", None)
    for inner in getattr(hook, "hooks", [hook]):
        values = getattr(inner, "weights_map", None)
        if values is not None and name in values:
            return values[name]
    return None


class Mamba2Model(Mamba2PreTrainedModel):
    """The backbone: embeddings, mixers, final norm."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Mamba2Block(config, index) for index in range(config.num_hidden_layers)])
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.register_load_state_dict_pre_hook(_read_legacy_embedding)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding layer."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding layer."""
        self.embeddings = value  # type: ignore[assignment]

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
        return_dict: bool | None = None,
        cache_params: Mamba2Cache | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        token_type_ids: Tensor | None = None,
        layout: SequenceLayout | None = None,
    ) -> tuple[Any, ...] | Mamba2Output:
        """Runs the tokens through the layers.

        Args:
            input_ids: ``(B, T)``, or ``inputs_embeds (B, T, d)`` in its place.
            attention_mask: ``(B, T)`` (or wider, with the cached tokens first), nonzero where a token counts. Padding
                may be anywhere, and then comes out as zeros.
            position_ids: ``(B, T)``; only read for where documents start (position 0).
            past_key_values, cache_params: two names for the cache to continue from; it is updated in place.
            use_cache: whether to return a cache; by default in eval mode, where the config says so.
            output_hidden_states, output_attentions: see :class:`Mamba2Output`. Attention matrices need the whole
                sequence in one call and at most ``ATTENTION_BYTES_LIMIT`` bytes.
            return_dict: whether to return a :class:`Mamba2Output` instead of a tuple.
            seq_idx: ``(B, T)`` document of each token, for packed sequences.
            cu_seq_lens_q, cu_seq_lens_k: ``(S + 1,)`` document bounds of a flat batch, as made by transformers'
                ``DataCollatorWithFlattening``; equal where both are given.
            max_length_q, max_length_k: accepted from the same collator; not needed.
            token_type_ids: accepted because some tokenizers make them; a Mamba-2 has no use for them.
            layout: what all of these amount to, for callers that have worked it out.

        Raises:
            ArgumentError: inputs contradict each other or cannot be honored.
            CacheError: the cache is of another kind or batch.
        """
        batch, tokens = _batch_and_tokens(input_ids, inputs_embeds)
        cache = as_mamba2_cache(past_key_values, cache_params, self.config)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training and (use_cache or cache is not None):
            use_cache, cache = _refuse_filled(cache)
        if cache is None and use_cache:
            cache = Mamba2Cache(self.config)
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return_dict = self.config.return_dict if return_dict is None else return_dict

        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, d)
        if layout is None:
            layout = _read_layout(batch, tokens, attention_mask, position_ids, seq_idx, cu_seq_lens_q, cu_seq_lens_k)
        if output_attentions:
            self._check_attentions(batch, tokens, cache)
        hidden_states = layout.pack(hidden_states)  # (1, R, d) where there was padding
        every_state: list[Tensor] = []
        attentions: list[Tensor] = []
        for layer in self.layers:
            if output_hidden_states:
                every_state.append(layout.unpack(hidden_states))
            if output_attentions:
                hidden_states, matrix = layer(hidden_states, layout, past_key_values=cache, output_attentions=True)
                attentions.append(matrix)
            else:
                hidden_states = layer(hidden_states, layout, past_key_values=cache)
        hidden_states = layout.unpack(self.norm_f(hidden_states))
        if output_hidden_states:
            every_state.append(hidden_states)
        if cache is not None:
            cache.count(tokens, layout.keep)

        output = Mamba2Output(
            last_hidden_state=hidden_states,
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(every_state) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()

    def _check_attentions(self, batch: int, tokens: int, cache: Mamba2Cache | None) -> None:
        if cache is not None and cache.seen_tokens:
            raise ArgumentError(
                f"output_attentions=True with a cache of {cache.seen_tokens} tokens: their columns of the matrix "
                "cannot be known from a state; run the whole sequence in one call without a cache"
            )
        needed = 4 * self.config.num_hidden_layers * batch * self.config.num_heads * tokens**2
        if needed > ATTENTION_BYTES_LIMIT:
            raise ArgumentError(
                f"output_attentions=True for {batch} x {tokens} tokens takes {needed / 2**30:.1f} GiB, more than the "
                f"limit of {ATTENTION_BYTES_LIMIT / 2**30:.1f} GiB: pass fewer tokens, or raise "
                "mamba2_hf.models.modeling_mamba2.ATTENTION_BYTES_LIMIT"
            )


def _refuse_filled(cache: Mamba2Cache | None) -> tuple[bool, None]:
    """Gradient checkpointing runs a layer twice, so it cannot write a cache: no cache, if none is lost by that."""
    if cache is not None and cache.seen_tokens:
        raise CacheError(
            f"gradient checkpointing cannot continue a cache of {cache.seen_tokens} tokens: its layers run twice; "
            "turn it off, or pass the whole sequence"
        )
    return False, None


def _batch_and_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int]:
    """B and T of whichever was given."""
    if input_ids is not None and inputs_embeds is None:
        if input_ids.dim() != 2:
            raise ArgumentError(f"input_ids has shape {tuple(input_ids.shape)}, expected (B, T)")
        return input_ids.shape[0], input_ids.shape[1]
    if inputs_embeds is not None and input_ids is None:
        if inputs_embeds.dim() != 3:
            raise ArgumentError(f"inputs_embeds has shape {tuple(inputs_embeds.shape)}, expected (B, T, d)")
        return inputs_embeds.shape[0], inputs_embeds.shape[1]
    raise ArgumentError("pass either input_ids or inputs_embeds, and not both")


def _read_layout(
    batch: int,
    tokens: int,
    attention_mask: Tensor | dict[str, Tensor] | None,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
) -> SequenceLayout:
    if isinstance(attention_mask, dict):  # one mask per kind of layer, from a compiled generate
        attention_mask = attention_mask.get("linear_attention")
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None and cu_seq_lens_q is not cu_seq_lens_k:
        same = cu_seq_lens_q.shape == cu_seq_lens_k.shape
        if not torch.compiler.is_compiling() and not (same and bool((cu_seq_lens_q == cu_seq_lens_k).all())):
            raise ArgumentError("cu_seq_lens_q and cu_seq_lens_k differ: an SSD layer has one sequence, not two")
    return sequence_layout(
        batch,
        tokens,
        attention_mask=attention_mask,
        seq_idx=seq_idx,
        cu_seqlens=cu_seq_lens_q if cu_seq_lens_q is not None else cu_seq_lens_k,
        position_ids=position_ids,
    )


class Mamba2ForCausalLM(Mamba2PreTrainedModel, GenerationMixin):
    """The language model: backbone and head."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    accepts_loss_kwargs = True

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__(config)
        self.backbone = Mamba2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding layer."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding layer."""
        self.backbone.set_input_embeddings(value)

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
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache_params: Mamba2Cache | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        token_type_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> tuple[Any, ...] | Mamba2CausalLMOutput:
        """:meth:`Mamba2Model.forward` and the head.

        Args:
            labels: ``(B, T)``, shifted inside; -100 is ignored. So is a token that would be predicted from padding or
                from another document.
            logits_to_keep: how many of the last positions to compute logits for (0 for all), or their indices.
            num_items_in_batch: what to divide the summed loss by, in place of the number of labels.

        The other arguments are those of :meth:`Mamba2Model.forward`.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        batch, tokens = _batch_and_tokens(input_ids, inputs_embeds)
        layout = _read_layout(batch, tokens, attention_mask, position_ids, seq_idx, cu_seq_lens_q, cu_seq_lens_k)
        outputs = self.backbone(
            input_ids=input_ids,
            past_key_values=past_key_values,
            cache_params=cache_params,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            layout=layout,
        )
        hidden_states = outputs.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden_states = hidden_states[:, logits_to_keep]
        elif logits_to_keep:
            hidden_states = hidden_states[:, -logits_to_keep:]
        logits = linear(self.lm_head, hidden_states)  # (B, T', vocab)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()

        loss = None
        if labels is not None:
            if layout.breaks is not None:
                labels = labels.masked_fill(layout.breaks.to(labels.device), -100)
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        output = Mamba2CausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if return_dict else output.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Mamba2Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers, with a cache that counts its tokens and no positions."""
        given = kwargs.pop("cache_params", None)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=given if past_key_values is None else past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        inputs.pop("position_ids", None)
        if next_sequence_length == 1 and not is_first_iteration:  # every token that generate adds counts
            inputs["attention_mask"] = None
        return inputs

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Feeds what the cache has not seen, with its padding moved to the front, so that each row ends in a token."""
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        embeds = model_kwargs.get("inputs_embeds")
        tokens = input_ids.shape[1] if embeds is None else embeds.shape[1]
        total = getattr(generation_config, "_mask_length", tokens) if mask is None else mask.shape[1]
        past = 0 if cache is None else cache.get_seq_length()
        _refuse_packed(model_kwargs)
        if embeds is not None and generation_config.prefill_chunk_size is not None:
            raise ArgumentError("prefill_chunk_size cuts input_ids, not inputs_embeds: pass one or the other")
        if past and not (total > past and tokens in (total, total - past)):
            raise CacheError(
                f"the cache has seen {past} tokens, the input holds {tokens} and the attention mask {total}: pass the "
                "ids of all tokens, seen and new, or the new ones with an attention_mask over all of them"
            )
        if cache is not None and past:
            cache.check_padding(input_ids.new_ones(len(input_ids), past) if mask is None else mask[:, :past])
        new = total - past if past else tokens
        if embeds is None:
            input_ids = input_ids[:, -new:]
        if mask is not None:
            keep = mask[:, -new:] != 0
            if not bool(keep.any(1).all()):
                raise ArgumentError(
                    "attention_mask leaves a row without any new token, so there is nothing to continue"
                )
            if not bool(keep[:, -1].all()):
                order = torch.argsort(keep, dim=1, stable=True)  # (B, T) padding first, tokens as they were
                mask = torch.cat([mask[:, :-new], mask[:, -new:].gather(1, order)], 1)
                model_kwargs = {**model_kwargs, "attention_mask": mask}
                if embeds is None:
                    input_ids = input_ids.gather(1, order)
                else:
                    moved = embeds[:, -new:].gather(1, order[..., None].expand(-1, -1, embeds.shape[2]))
                    model_kwargs["inputs_embeds"] = torch.cat([embeds[:, :-new], moved], 1)
        chunk = generation_config.prefill_chunk_size
        if past and chunk is not None:
            # Before transformers 5.21, generate reads the mask of a continuation's chunks from its first column on.
            for start in range(0, new - chunk, chunk):
                self(
                    input_ids[:, start : start + chunk],
                    attention_mask=None if mask is None else mask[:, : past + start + chunk],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            input_ids = input_ids[:, (new - 1) // chunk * chunk :]
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """The mask as it is: an SSD layer needs no matrix of pairs, also where ``generate`` compiles the model."""
        return attention_mask

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Installs a :class:`Mamba2Cache` as ``past_key_values``, whatever name the caller used."""
        names = (model_kwargs.get("past_key_values"), model_kwargs.pop("cache_params", None))
        given = as_mamba2_cache(*names, self.config)
        kind, use_cache = generation_config.cache_implementation, generation_config.use_cache is not False
        if generation_config.is_assistant:
            raise ArgumentError("a Mamba-2 cannot be the assistant of another model: it cannot take tokens back")
        if use_cache and generation_config.output_attentions:
            raise ArgumentError(
                "output_attentions=True: the matrix of earlier tokens cannot be known from a cached state; call "
                "model(sequences, output_attentions=True) on what was generated, or pass use_cache=False"
            )
        if given is not None:
            if kind is not None or not use_cache:
                other = f"cache_implementation={kind!r}" if use_cache else "use_cache=False"
                raise ArgumentError(f"{other} and a cache were both given: pass one")
            given._is_user_defined = True
            model_kwargs["past_key_values"] = given
        elif use_cache:
            if kind not in (None, "dynamic", "static"):
                raise ArgumentError(
                    f"cache_implementation={kind!r}: the states of a Mamba-2 are constant in size, so there is nothing "
                    "to offload, quantize or slide; use 'dynamic' (the default) or 'static'"
                )
            model_kwargs["past_key_values"] = Mamba2Cache(self.config, static=kind == "static")


def _refuse_packed(model_kwargs: dict[str, Any]) -> None:
    """``generate`` continues one document per row; it makes position ids itself, which restart only if packed."""
    named = [name for name in ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k") if model_kwargs.get(name) is not None]
    positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    if positions is not None:
        restarts = (positions[:, 1:] == 0) & (positions[:, :-1] != 0)
        if bool((restarts if mask is None else restarts & (mask[:, 1 - positions.shape[1] :] != 0)).any()):
            named.append("position_ids")
    if named:
        raise ArgumentError(f"{named[0]} packs several documents into a row: generate continues one, pass a row each")


class Mamba2ForSequenceClassification(Mamba2PreTrainedModel):
    """Backbone and a linear head that reads the last token of each sequence."""

    _fsdp_plan = {"score": "keep_full_weight"}

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = Mamba2Model(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding layer."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding layer."""
        self.backbone.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Mamba2Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache_params: Mamba2Cache | None = None,
        token_type_ids: Tensor | None = None,
    ) -> tuple[Any, ...] | Mamba2SequenceClassifierOutput:
        """:meth:`Mamba2Model.forward` and the head.

        The last token of a sequence is the last that ``attention_mask`` counts. Without a mask every token is read, as
        everywhere in transformers, and the last one is the last that is not ``config.pad_token_id``.

        Args:
            labels: ``(B,)`` classes, ``(B, num_labels)`` multi-label targets, or regression targets
                (``config.problem_type``, or by dtype and ``num_labels``).
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache_params=cache_params,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        hidden_states = outputs.last_hidden_state
        batch, tokens = hidden_states.shape[:2]
        rows = torch.arange(batch, device=hidden_states.device)
        last = torch.full_like(rows, tokens - 1)
        counts = None
        if attention_mask is not None:
            counts = attention_mask[:, -tokens:] != 0
        elif input_ids is not None and self.config.pad_token_id is not None:
            counts = input_ids != self.config.pad_token_id
        if counts is not None:
            last = (counts * torch.arange(tokens, device=counts.device)).argmax(1).to(rows)
        logits = self.score(hidden_states[rows, last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        output = Mamba2SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if return_dict else output.to_tuple()
