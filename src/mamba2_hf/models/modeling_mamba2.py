"""The Mamba-2 models ("Transformers are SSMs", Dao & Gu 2024), to the contract of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..layers import Head, Mamba2Mixer, RMSNorm, SequenceLayout
from ..layers.sequence import PLAIN
from .arguments import check_ignored
from .backbone import SSDBackbone, SSDLayer, batch_and_tokens, read_layout
from .cache import Mamba2Cache, one_cache
from .causal_lm import SSDForCausalLM
from .classification import SSDForSequenceClassification
from .configuration_mamba2 import Mamba2Config
from .outputs import Mamba2CausalLMOutput, Mamba2Output
from .pretrained import SSDPreTrainedModel

ATTENTION_BYTES_LIMIT = 8 * 2**30
"""Most bytes that ``output_attentions=True`` may take, over all layers."""


class Mamba2Block(SSDLayer):
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
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """``(B, T, d)`` to ``(B, T, d)``; with ``output_attentions`` also the mixer's matrices ``(B, H, T, T)``, and no
        router's logits.
        """
        if self.residual_in_fp32:
            hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        state = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        if output_attentions:
            mixed, attention = self.mixer(self.norm(hidden_states), layout, state, output_attentions=True)
            return hidden_states + mixed, (attention,), ()
        if isinstance(self.mixer, Mamba2Mixer):  # what wraps one may hand on its methods, and has to be called
            return self.mixer.layer(hidden_states, self.norm, layout, state)
        return hidden_states + self.mixer(self.norm(hidden_states), layout, state)


class Mamba2PreTrainedModel(SSDPreTrainedModel):
    """What makes a pretrained model a Mamba-2."""

    config: Mamba2Config
    config_class = Mamba2Config
    _no_split_modules = ["Mamba2Block"]
    old_names = {r"embedding\.weight": "embeddings.weight"}  # the original's

    def init_parallel_plans(self) -> None:
        """As in transformers. FSDP2 trains one dtype per group, so that beside half-precision weights the fp32
        parameters of a mixer cannot be in the group of their block: its modules are sharded one by one.
        """
        super().init_parallel_plans()
        if self.base_model is self and self.dtype in (torch.float16, torch.bfloat16):
            style = self._fsdp_plan.pop("layers.*")
            parts = ("norm", "mixer.in_proj", "mixer.conv1d", "mixer.norm", "mixer.out_proj")
            self._fsdp_plan.update({f"layers.*.{part}": style for part in parts})


def _read_legacy_embedding(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets ``load_state_dict`` read the original's name of the embedding too."""
    if f"{prefix}embedding.weight" in state_dict:
        state_dict[f"{prefix}embeddings.weight"] = state_dict.pop(f"{prefix}embedding.weight")


class Mamba2Model(SSDBackbone, Mamba2PreTrainedModel):
    """The backbone: embeddings, mixers, final norm."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Mamba2Block(config, index) for index in range(config.num_hidden_layers)])
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.register_load_state_dict_pre_hook(_read_legacy_embedding)
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

        Args:
            input_ids: ``(B, T)``, or ``inputs_embeds (B, T, d)`` in its place.
            attention_mask: ``(B, T)`` (or wider, with the cached tokens first), nonzero where a token counts. Padding
                may be anywhere, and then comes out as zeros.
            position_ids: ``(B, T)``; only read for where documents start (position 0).
            past_key_values, cache_params, cache: names for the cache to continue from; it is updated in place.
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
            kwargs: what code for any model passes, and this one has no use for (``arguments.IGNORED``).

        Raises:
            ArgumentError: inputs contradict each other or cannot be honored.
            CacheError: the cache is of another kind or batch.
            TypeError: there is no argument of that name.
        """
        check_ignored(self, kwargs)
        if layout is None:
            shape = batch_and_tokens(input_ids, inputs_embeds)
            layout = read_layout(*shape, attention_mask, position_ids, seq_idx, cu_seq_lens_q, cu_seq_lens_k)
        return self._run(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past_key_values=one_cache(past_key_values, cache_params, cache),
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=return_dict,
            layout=layout,
        )

    def _check_attentions(self, batch: int, tokens: int, cache: Mamba2Cache | None) -> None:
        check_attentions(batch, tokens, self.config.num_hidden_layers * self.config.num_heads, cache)


def check_attentions(batch: int, tokens: int, heads: int, cache: Mamba2Cache | None) -> None:
    """Refuses matrices of attention that a cached state does not tell, or that take more than the limit.

    Args:
        batch, tokens: of the input.
        heads: of all layers together.
        cache: to continue from.
    """
    if cache is not None and cache.seen_tokens:
        raise ArgumentError(
            f"output_attentions=True with a cache of {cache.seen_tokens} tokens: their columns of the matrix "
            "cannot be known from a state; run the whole sequence in one call without a cache"
        )
    needed = 4 * heads * batch * tokens**2
    if needed > ATTENTION_BYTES_LIMIT:
        raise ArgumentError(
            f"output_attentions=True for {batch} x {tokens} tokens takes {needed / 2**30:.1f} GiB, more than the "
            f"limit of {ATTENTION_BYTES_LIMIT / 2**30:.1f} GiB: pass fewer tokens, or raise "
            "mamba2_hf.models.modeling_mamba2.ATTENTION_BYTES_LIMIT"
        )


class Mamba2ForCausalLM(SSDForCausalLM, Mamba2PreTrainedModel):
    """The language model: backbone and head."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__(config)
        self.backbone = Mamba2Model(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        """:meth:`Mamba2Model.forward` and the head.

        Args:
            labels: ``(B, T)``, shifted inside; -100 is ignored. So is a token that would be predicted from padding or
                from another document.
            logits_to_keep: how many of the last positions to compute logits for (0 for all), or their indices.
            num_items_in_batch: what to divide the summed loss by, in place of the number of labels.
            return_logits: whether to return logits beside the loss. By default they are left out where the model is in
                training mode and labels are given: they are then never held whole, which saves most of the memory of a
                small model with a large vocabulary. Reading them raises a LogitsError. False does so in eval mode too.
                A head that must be called as a module (adapters, quantization, hooks) computes them all the same.

        The other arguments are those of :meth:`Mamba2Model.forward`.
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
            return_dict=return_dict,
            logits_to_keep=logits_to_keep,
            num_items_in_batch=num_items_in_batch,
            return_logits=return_logits,
            layout=layout,
        )


class Mamba2ForSequenceClassification(SSDForSequenceClassification, Mamba2PreTrainedModel):
    """Backbone and a linear head that reads the last token of each sequence."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = Mamba2Model(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()
