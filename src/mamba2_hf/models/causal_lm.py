"""What the language models have in common: head, loss, and generation that continues any cache."""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.configuration_utils import GenerationMode
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import logging

from ..distributed.tensor_parallel import agree_on_random_numbers
from ..errors import ArgumentError, CacheError
from ..layers import Head, SequenceLayout, linear, plain_weight
from ..layers.weights import all_hooked, hooked_by_fsdp2, is_part
from ..ops import batch_invariant as invariantly
from ..ops import is_batch_invariant, linear_cross_entropy
from ..ops.runtime.modes import observed
from . import prefill, speculation
from .backbone import SSDBackbone, batch_and_tokens
from .cache import Mamba2Cache, as_mamba2_cache, check_implementation, one_cache
from .graphs import DecodeGraph, why_not
from .mtp import HeadCandidates, HeadDrafts, check_heads
from .outputs import CACHE, Mamba2CausalLMOutput, Mamba2Output, step_output
from .pretrained import SSDPreTrainedModel

logger = logging.get_logger(__name__)

_ONE_BY_ONE = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)
"""Ways of generating that feed one token of each sequence at a time."""

_WHOLE_FORWARD = ("output_hidden_states", "output_attentions", "output_router_logits")
"""What a captured step does not give, among arguments of a forward and in the config."""

_OF_A_STEP = {"use_cache", "logits_to_keep", "position_ids", *_WHOLE_FORWARD}
"""What ``generate`` passes at every step of its own; anything else is the caller's."""

_OF_GENERATE = {*inspect.signature(GenerationMixin._assisted_decoding).parameters, "debug_io", "mm_encoder_outputs"}
"""What ``generate`` takes for itself and may pass on, as some ways of generating have no parameter for it."""


class SSDForCausalLM(SSDPreTrainedModel, GenerationMixin):
    """Backbone and head. A model adds the two and the signature of its forward."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    accepts_loss_kwargs = True
    backbone: SSDBackbone
    lm_head: nn.Module

    other_names = {"model": "backbone"}

    @property
    def model(self) -> SSDBackbone:
        """``backbone``, as most models name it."""
        return self.backbone

    @property
    def mtp_heads(self) -> tuple[nn.Module, ...]:
        """Heads that predict further tokens; this model has none."""
        return ()

    def _run(
        self,
        *,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        num_items_in_batch: Tensor | int | None,
        return_logits: bool | None,
        return_dict: bool | None,
        layout: SequenceLayout,
        **inputs: Any,
    ) -> tuple[Any, ...] | Mamba2CausalLMOutput:
        """The forward of every language model; ``inputs`` are for the backbone."""
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if labels is None and (cache := self._captured_cache(inputs, layout)) is not None:
            output = step_output(self._captured_step(inputs["input_ids"], cache, layout), cache)
            return output if return_dict else output.to_tuple()
        some = isinstance(logits_to_keep, Tensor) or logits_to_keep != 0
        if return_logits is False and (labels is None or some):
            contrary = "no labels" if labels is None else "logits_to_keep"
            raise ArgumentError(f"return_logits=False and {contrary} were given: return_logits=None leaves it open")
        # Some of the logits with all of the labels is for the loss function to refuse.
        without_logits = return_logits is False or (return_logits is None and self.training and not some)
        shape = batch_and_tokens(inputs["input_ids"], inputs["inputs_embeds"])
        usual_loss = labels is not None and self.loss_function is ForCausalLMLoss
        if labels is not None and usual_loss:
            labels = _token_labels(labels, None if some else shape)
        context = self.backbone.context
        if some:
            self.backbone.refuse_in_context("logits_to_keep")
        if labels is not None and not usual_loss:
            self.backbone.refuse_in_context("a loss function other than transformers' for language models")
        with_heads = labels is not None and self.training and self._mtp_loss_coef > 0
        if with_heads:
            self.backbone.refuse_in_context("mtp_loss_coef")
            if some or not usual_loss:
                raise ArgumentError(
                    f"mtp_loss_coef={self._mtp_loss_coef}: the heads have the usual loss, and "
                    f"{'logits_to_keep' if some else 'another loss_function'} was given; set "
                    "model.config.mtp_loss_coef = 0 to leave theirs out"
                )
        outputs = self.backbone(**inputs, return_dict=True, layout=layout)
        hidden_states, cache = outputs.last_hidden_state, getattr(outputs, CACHE)
        if cache is not None and cache.on_hidden_states is not None:
            cache.on_hidden_states(inputs["input_ids"], inputs["inputs_embeds"], hidden_states, layout.keep)
        if isinstance(logits_to_keep, Tensor):
            hidden_states = hidden_states[:, logits_to_keep]
        elif logits_to_keep:
            hidden_states = hidden_states[:, -logits_to_keep:]
        if labels is not None and layout.breaks is not None:
            labels = labels.masked_fill(layout.breaks.to(labels.device), -100)

        more: dict[str, Tensor] = {}
        processes = 1  # whose shares of the loss are summed, as where a number of items is that of them all
        if labels is not None and usual_loss and not some:
            more["shift_labels"] = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()  # (B, T)
        if context is not None and labels is not None:
            targets = more["shift_labels"]
            if num_items_in_batch is None:
                num_items_in_batch = (targets != -100).sum()
            else:
                processes = context.group.size
            more["shift_labels"] = context.cut(targets, -100).contiguous()

        logits = loss = None
        if without_logits and more:
            loss = self._fused_loss(hidden_states, more["shift_labels"], num_items_in_batch)
        if loss is None:
            logits = self._logits(hidden_states)
            if labels is not None:
                loss = self.loss_function(
                    logits=logits,
                    labels=labels,
                    vocab_size=self.config.vocab_size,
                    num_items_in_batch=num_items_in_batch,
                    **more,
                )
        if context is not None and outputs.router_logits:
            layout = context.layout(layout, *shape, hidden_states.device)
        if loss is not None and with_heads:
            states, targets = outputs.last_hidden_state, more["shift_labels"]
            loss = loss + self._heads_loss(states, inputs, targets, layout, num_items_in_batch).to(loss.device)
        aux_loss = self._aux_loss(outputs, layout)
        if context is not None and loss is not None:
            loss = context.sum(loss) / processes
        if loss is not None and aux_loss is not None:
            loss = loss + self.config.router_aux_loss_coef / processes * aux_loss.to(loss.device)
        output = Mamba2CausalLMOutput(
            loss=loss,
            logits=None if return_logits is False else logits,
            past_key_values=cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            aux_loss=aux_loss,
            router_logits=outputs.router_logits,
        )
        return output if return_dict else output.to_tuple()

    def _logits(self, hidden_states: Tensor) -> Tensor:
        """``(B, T, d)`` to ``(B, T, vocab)``, in fp32 at least."""
        logits = self._scale_logits(linear(self.lm_head, hidden_states))
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def _captured_cache(self, inputs: dict[str, Any], layout: SequenceLayout) -> Mamba2Cache | None:
        """The cache whose graph gives this forward, if it is a plain step of one token per sequence, or a block that
        may be taken back.
        """
        cache, ids = inputs["past_key_values"], inputs["input_ids"]
        if not isinstance(cache, Mamba2Cache) or cache.graph is None or not cache.seen_tokens:
            return None
        if (
            ids is None
            or ids.shape[1] > cache.captured_tokens
            or not layout.is_plain
            or inputs.get("position_ids") is not None
        ):
            return None
        wanted = [name for name in _WHOLE_FORWARD if name in inputs]
        if inputs["use_cache"] is False or any(inputs[name] or getattr(self.config, name) for name in wanted):
            return None
        refused = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        watched = all_hooked() or observed()  # a replay shows neither modules nor operations
        return None if refused or watched or torch.is_autocast_enabled(ids.device.type) else cache

    def _captured_step(self, input_ids: Tensor, cache: Mamba2Cache, layout: SequenceLayout) -> Tensor:
        """Logits ``(B, T, vocab)``."""
        cache.reserve(cache.seen_tokens + input_ids.shape[1])

        def run(ids: Tensor) -> tuple[Tensor, Tensor]:
            outputs = self.backbone(
                input_ids=ids, past_key_values=cache, use_cache=True, return_dict=True, layout=layout
            )
            return self._logits(outputs.last_hidden_state), outputs.last_hidden_state

        assert cache.graph is not None
        if self.tensor_group is not None:
            self.tensor_group.check()  # a replay does not
        logits, hidden_states = cache.graph.step(run, input_ids, cache)
        if cache.on_hidden_states is not None:
            cache.on_hidden_states(input_ids, None, hidden_states, None)
        return logits

    def _fused_loss(
        self, hidden_states: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None
    ) -> Tensor | None:
        """The usual loss without logits, given the label of each token's next one, ``(B, T)``; None where somebody sees
        the head's logits.
        """
        head = self.lm_head
        weight = plain_weight(head)
        sharded = weight is None and isinstance(head, Head) and (hooked_by_fsdp2(head) or is_part(head))
        if not (sharded or weight is not None) or head.bias is not None:
            return None
        labels = labels.flatten().to(hidden_states.device)  # (B T,)
        if weight is None:
            loss = head(hidden_states, labels, self._logits_scale)
        else:
            loss = linear_cross_entropy(hidden_states.flatten(0, 1), weight, labels, scale=self._logits_scale)
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)

    def _token_loss(self, hidden_states: Tensor, labels: Tensor, num_items_in_batch: Tensor | int) -> Tensor:
        """The usual loss, of logits only where somebody sees them; arguments as in :meth:`_fused_loss`."""
        loss = self._fused_loss(hidden_states, labels, num_items_in_batch)
        if loss is None:
            loss = self.loss_function(
                logits=self._logits(hidden_states),
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=labels,
            )
        return loss

    @property
    def _mtp_loss_coef(self) -> float:
        """Weight of the loss of heads that predict further tokens."""
        return 0.0

    def _heads_loss(
        self,
        hidden_states: Tensor,
        inputs: dict[str, Any],
        labels: Tensor,
        layout: SequenceLayout,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """The loss of these heads, weighed.

        Args:
            hidden_states: ``(B, T, d)`` the last ones.
            inputs: of the backbone.
            labels: ``(B, T)`` of each token's next one.
            layout: documents and padding.
            num_items_in_batch: what to divide by; None for the number of labels.
        """
        raise NotImplementedError

    def _get_resized_lm_head(self, *args: Any, **kwargs: Any) -> nn.Linear:
        """As in transformers, which makes an ``nn.Linear`` of it."""
        head = super()._get_resized_lm_head(*args, **kwargs)
        if type(head) is nn.Linear:
            head.__class__ = Head
        return head

    @property
    def _logits_scale(self) -> float:
        """What ``_scale_logits`` multiplies by."""
        return 1.0

    def _scale_logits(self, logits: Tensor) -> Tensor:
        return logits

    def _aux_loss(self, outputs: Mamba2Output, layout: SequenceLayout) -> Tensor | None:
        """A loss beside that of the labels, weighed by ``config.router_aux_loss_coef``."""
        return None

    @torch.no_grad()
    def read(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: Mamba2Cache | None = None
    ) -> Mamba2Cache:
        """The cache after a prompt, read in pieces that fit the memory (``models.prefill``): to be saved, or copied for
        many continuations. It reads with the model's own ``prepare_inputs_for_generation``; an adapter's soft prompt,
        which PEFT puts in front in its own ``generate``, is not read.

        Args:
            input_ids: ``(B, T)``, the tokens that the cache has not seen.
            attention_mask: ``(B, seen + T)``, nonzero where a token counts.
            past_key_values: to go on from, in place; None for a new one.

        Raises:
            ArgumentError: shapes do not fit.
            CacheError: the cache is another model's, or full.
        """
        _, tokens = batch_and_tokens(input_ids, None)
        given = as_mamba2_cache(past_key_values, self.config)
        cache = Mamba2Cache(self.config) if given is None else given
        if tokens:
            prompt = {"attention_mask": attention_mask, "use_cache": True, "logits_to_keep": 1, CACHE: cache}
            prefill.read(self, self._prompt_inputs(input_ids, tokens, prompt))
        return cache

    def _prompt_inputs(
        self, input_ids: Tensor, new: int, model_kwargs: dict[str, Any], is_first_iteration: bool = True
    ) -> dict[str, Any]:
        """What the forward gets for a whole prompt, by way of ``prepare_inputs_for_generation``: it may be overridden,
        and put soft tokens in front.

        Args:
            input_ids: ``(B, T)``.
            new: the last tokens of it, or of ``inputs_embeds``, that the cache has not seen.
            model_kwargs: the other arguments, with names that ``generate`` uses.
            is_first_iteration: as ``generate`` says it.

        Raises:
            CacheError: new tokens were left out.
        """
        inputs: dict[str, Any] = self.prepare_inputs_for_generation(
            input_ids, next_sequence_length=new, is_first_iteration=is_first_iteration, **model_kwargs
        )
        cache, soft = model_kwargs.get(CACHE), prefill.token_count(inputs) - new
        if cache is not None and cache.seen_tokens and soft < 0:
            raise CacheError(
                f"prepare_inputs_for_generation of what wraps the model makes {new + soft} of {new} new tokens, as the "
                f"cache has seen {cache.seen_tokens}: PEFT's soft prompts cannot continue a cache, pass the whole text "
                "without one"
            )
        if cache is not None:
            cache.soft_tokens += max(soft, 0)
        return inputs

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
        kwargs = {name: value for name, value in kwargs.items() if value is not None and name not in _OF_GENERATE}
        given = kwargs.pop("cache_params", None)
        past_key_values = kwargs.pop("cache", past_key_values)
        cache, ids = past_key_values, input_ids[:, -1:]
        one_more = next_sequence_length == 1 and not is_first_iteration and kwargs.keys() <= _OF_A_STEP
        if one_more and isinstance(cache, Mamba2Cache) and cache.graph is not None and cache.graph.fits(ids):
            # What is below comes to the same, in the time of a small model's step.
            kwargs.pop("position_ids", None)
            return {"input_ids": ids, CACHE: cache, "attention_mask": None, **kwargs}
        recording = isinstance(past_key_values, Mamba2Cache) and past_key_values.recording
        if is_first_iteration and recording and next_sequence_length is None:
            # Assisted decoding, which has read the prompt up to its last token.
            next_sequence_length = input_ids.shape[1] - past_key_values.seen_tokens
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            **{CACHE: given if past_key_values is None else past_key_values},
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        inputs.pop("position_ids", None)
        if next_sequence_length == 1 and not is_first_iteration:  # every token that generate adds counts
            inputs["attention_mask"] = None
        elif attention_mask is not None:
            inputs["attention_mask"] = prefill.relevant_mask(attention_mask, prefill.token_count(inputs))
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers, but for positions, which cost four launches a token and which nothing reads."""
        model_kwargs.pop("position_ids", None)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """Feeds what the cache has not seen, with its padding moved to the front, so that each row ends in a token."""
        cache, mask = model_kwargs.get(CACHE), model_kwargs.get("attention_mask")
        embeds = model_kwargs.get("inputs_embeds")
        tokens = input_ids.shape[1] if embeds is None else embeds.shape[1]
        total = getattr(generation_config, "_mask_length", tokens) if mask is None else mask.shape[1]
        past = 0 if cache is None else cache.seen_tokens - cache.soft_tokens
        at_once = generation_config.prefill_chunk_size
        if at_once is not None and cache is None:
            raise ArgumentError(f"prefill_chunk_size={at_once} needs a cache, and use_cache=False leaves it out")
        _refuse_packed(model_kwargs)
        if cache is not None and cache.recording and not generation_config.is_assistant:
            cache.stop_recording()
        if cache is not None and cache.recording:
            # An assistant that goes on: all that the target wrote counts. What generate makes of a mask that is missing
            # takes every pad token that was written for padding.
            new, mask = tokens - past, None
        else:
            if past and not (total > past and tokens in (total, total - past)):
                raise CacheError(
                    f"the cache has seen {past} tokens, the input holds {tokens} and the attention mask {total}: pass "
                    "the ids of all tokens, seen and new, or the new ones with an attention_mask over all of them"
                )
            if cache is not None and past:
                cache.check_padding(input_ids.new_ones(len(input_ids), past) if mask is None else mask[:, :past])
                if cache.token_hashes is not None and embeds is None and tokens == total:
                    cache.token_hashes.check(input_ids, mask)
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
                if embeds is None:
                    input_ids = input_ids.gather(1, order)
                else:
                    moved = embeds[:, -new:].gather(1, order[..., None].expand(-1, -1, embeds.shape[2]))
                    model_kwargs = {**model_kwargs, "inputs_embeds": torch.cat([embeds[:, :-new], moved], 1)}
        given = {**model_kwargs, "attention_mask": mask}
        inputs = {**self._prompt_inputs(input_ids, new, given, is_first_iteration), "return_dict": True}
        if cache is not None and generation_config.is_assistant and not cache.recording:
            # It may have to take back its last token, and with it all that it proposes.
            before = 0 if prefill.why_not_cut(inputs) else prefill.token_count(inputs) - 1
            if before:
                prefill.read(self, prefill.cut(inputs, 0, before), at_once)
                inputs = prefill.cut(inputs, before, before + 1)
            cache.activate_past_recording()
        return prefill.read(self, inputs, at_once)

    def _assisted_decoding(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Any:
        """As in transformers: the prompt up to its last token is read first, so that only blocks of candidates have to
        be recorded for taking them back. With ``use_mtp=True`` the candidates are the model's own heads'.
        """
        if generation_config.assistant_early_exit is not None:
            raise ArgumentError("assistant_early_exit: a state belongs to all layers; pass an assistant_model instead")
        if generation_config.use_mtp:
            check_heads(self, generation_config.prompt_lookup_num_tokens, kwargs.get("assistant_model"))
            if generation_config.num_assistant_tokens < 1:
                raise ArgumentError(
                    f"num_assistant_tokens is {generation_config.num_assistant_tokens}: a draft has at least 1 token"
                )
        if len(input_ids) > 1:
            return self._speculate(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        cache, mask = kwargs.get(CACHE), kwargs.get("attention_mask")
        if mask is None:  # an assistant that gets none takes pad tokens for padding
            mask = torch.ones_like(input_ids)
            kwargs["attention_mask"] = mask
        if cache is not None:
            past, tokens = cache.seen_tokens, input_ids.shape[1]
            if kwargs.get("inputs_embeds") is not None or not 0 <= past < tokens:
                raise ArgumentError(
                    f"assisted decoding needs the ids of the whole text, and got {tokens} where the cache has seen "
                    f"{past}: pass those that it has seen, too, and no inputs_embeds"
                )
            if mask.shape[1] != tokens or not bool(mask[0, -1]):
                raise ArgumentError(
                    f"attention_mask has shape {tuple(mask.shape)} for {tokens} tokens and ends in "
                    f"{int(mask[0, -1])}: assisted decoding needs one over all tokens, with padding on the left"
                )
            _refuse_packed(kwargs)
            if past:
                cache.check_padding(mask[:, :past])
                if cache.token_hashes is not None:
                    cache.token_hashes.check(input_ids, mask)
            inputs = self._prompt_inputs(input_ids[:, past:], tokens - past, kwargs)
            if cache.soft_tokens:
                raise ArgumentError(
                    f"assisted decoding takes tokens back by their place in the text, and {cache.soft_tokens} soft "
                    "tokens of what wraps the model stand before it: generate without an assistant or prompt lookup"
                )
        try:
            if cache is not None:
                if generation_config.use_mtp:
                    drafts = self._head_drafts(generation_config, cache)
                    kwargs["assistant_model"] = HeadCandidates(drafts, tokens, generation_config, logits_processor)
                if tokens - past > 1 and not prefill.why_not_cut(inputs):
                    start = prefill.cut(inputs, 0, tokens - past - 1)
                    prefill.read(self, start, generation_config.prefill_chunk_size)
            return super()._assisted_decoding(
                input_ids, logits_processor, stopping_criteria, generation_config, **kwargs
            )
        finally:
            if cache is not None:
                cache.stop_recording()
                cache.on_hidden_states = None

    def _head_drafts(self, generation_config: Any, cache: Mamba2Cache) -> HeadDrafts:
        """Drafts of the model's own heads, which see what it reads behind a cache."""
        drafts = HeadDrafts(self, generation_config.assistant_confidence_threshold or 0.0)
        cache.on_hidden_states = drafts.see
        return drafts

    def _speculate(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        assistant_model: Any = None,
        assistant_tokenizer: Any = None,
        tokenizer: Any = None,
        inputs_tensor: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """:meth:`_assisted_decoding` of several sequences."""
        cache: Mamba2Cache | None = kwargs.get(CACHE)
        if cache is None or generation_config.cache_implementation is not None:
            raise ArgumentError(
                "assisted decoding takes tokens back from a cache that it makes: it requires use_cache=True, and no "
                f"cache_implementation (it is {generation_config.cache_implementation!r})"
            )
        speculation.check(generation_config, assistant_model, assistant_tokenizer, streamer)
        mask, tokens = kwargs.get("attention_mask"), input_ids.shape[1]
        if kwargs.get("inputs_embeds") is not None:
            raise ArgumentError("assisted decoding looks at the ids of a text: pass input_ids, and no inputs_embeds")
        counts = torch.ones_like(input_ids) if mask is None else mask
        most = speculation.most_tokens(generation_config, assistant_model)
        if assistant_model is not None and counts.shape != input_ids.shape:
            raise ArgumentError(
                f"attention_mask has shape {tuple(counts.shape)} for {tokens} tokens: an assistant needs the ids of "
                "the whole text, those that the cache has seen, too"
            )
        choices = speculation.Choices(
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config.do_sample,
            generation_config.max_length,
            most,
        )
        pad = generation_config.pad_token_id
        if choices.criteria and pad is None:
            raise ArgumentError(
                f"{type(choices.criteria[0]).__name__} may end rows apart: pass pad_token_id, to fill them up with"
            )
        kwargs.pop("position_ids", None)
        goes_on = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
        drafts: speculation.Drafts
        try:
            if generation_config.use_mtp:  # before the prompt, which they read along
                drafts = self._head_drafts(generation_config, cache)
            logits = self._prefill(input_ids, generation_config, kwargs).logits[:, -1:]
            if assistant_model is not None:
                device, captured = assistant_model.device, assistant_model._may_capture(generation_config)
                room = generation_config.max_length + most + 1
                read = Mamba2Cache(assistant_model.config, captured=captured, max_length=room)
                assistant_model.read(input_ids.to(device), counts.to(device), read)
                threshold = speculation.assistant_setting(assistant_model, "assistant_confidence_threshold")
                drafts = speculation.AssistantDrafts(assistant_model, read, threshold, most)
            elif not generation_config.use_mtp:
                own = counts[:, -tokens:] != 0
                texts = [ids[keep].tolist() for ids, keep in zip(input_ids, own, strict=True)]
                drafts = speculation.LookupDrafts(texts, generation_config.max_matching_ngram_size or 2)
            kwargs["attention_mask"] = None

            def forward(block: Tensor) -> Tensor:
                # The class's own: what wraps an instance puts soft tokens in front of a prompt, and takes one token a
                # step.
                prepare = type(self).prepare_inputs_for_generation
                inputs = prepare(self, block, next_sequence_length=block.shape[1], **kwargs)
                return self(**{**inputs, "logits_to_keep": 0, "return_dict": True}).logits  # type: ignore[no-any-return]

            new = speculation.decode(
                *(self, forward, logits, input_ids[:, -1:], cache, drafts, choices, most, synced_gpus, goes_on)
            )
        finally:
            cache.stop_recording()
            cache.on_hidden_states = None
        width = max(map(len, new))
        filled = [text + [0 if pad is None else pad] * (width - len(text)) for text in new]
        sequences = torch.cat([input_ids, torch.tensor(filled, device=input_ids.device)], 1)
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=cache)

    def _get_candidate_generator(self, *args: Any, assistant_model: Any = None, **kwargs: Any) -> Any:
        """As in transformers, which has a generator of its own for models that keep their heads as it does."""
        if isinstance(assistant_model, HeadCandidates):
            return assistant_model
        return super()._get_candidate_generator(*args, assistant_model=assistant_model, **kwargs)

    @functools.wraps(GenerationMixin.generate, assigned=())
    def generate(self, *args: Any, batch_invariant: bool = False, **kwargs: Any) -> Any:
        """As in transformers.

        Args:
            args, kwargs: of transformers.
            batch_invariant: whether to generate under :func:`mamba2_hf.batch_invariant`.

        Raises:
            ProcessError: a process that shares the model did not answer in time.
        """
        with invariantly() if batch_invariant else contextlib.nullcontext():
            found = super().generate(*args, **kwargs)
        if self.tensor_group is not None:
            self.tensor_group.check()
        return found

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        """As in transformers, but for a compiler that would decide on the order of sums."""
        return not is_batch_invariant() and super()._valid_auto_compile_criteria(*args, **kwargs)

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """Refused: transformers keeps what it batches continuously in pages of keys and values.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError(
            "transformers' continuous batching has no place for SSM states: use mamba2_hf.generate_batch(model, "
            "requests) or mamba2_hf.ContinuousBatch"
        )

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
        """Installs a :class:`Mamba2Cache` as ``past_key_values``, whatever name the caller used. Processes that share
        the model agree on random numbers, so that all go on with the same tokens.
        """
        if self.tensor_group is not None and generation_config.do_sample:
            agree_on_random_numbers(self.tensor_group, self.device)
        self.backbone.refuse_in_context("generate")
        given = as_mamba2_cache(one_cache(model_kwargs.get(CACHE), model_kwargs.pop("cache_params", None)), self.config)
        kind, use_cache = generation_config.cache_implementation, generation_config.use_cache is not False
        may_capture = generation_mode in _ONE_BY_ONE
        if generation_mode == GenerationMode.ASSISTED_GENERATION and batch_size > 1:  # one graph for all blocks
            may_capture = True
            max_cache_length += speculation.most_tokens(generation_config)
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
            if given.captured or (given.key_counts is None and not given.static):  # SSD states have fixed places anyway
                given.captured = True
                # Anew, as the model may have changed since.
                given.graph = DecodeGraph() if may_capture and self._may_capture(generation_config) else None
                given.reserve(max_cache_length)
            model_kwargs[CACHE] = given
        elif use_cache:
            check_implementation(kind, self.config)
            length = max(max_cache_length, generation_config.max_cache_len or 0, 1)
            model_kwargs[CACHE] = Mamba2Cache(
                self.config,
                static=kind == "static",
                max_length=length,
                captured=kind != "static" and may_capture and self._may_capture(generation_config),
            )

    def _may_capture(self, generation_config: Any) -> bool:
        """Whether ``generate`` is to decode through a CUDA graph."""
        if generation_config.disable_compile or self.device.type != "cuda":
            return False
        reason = why_not(self)
        if reason is not None:
            logger.info(f"generate goes without a CUDA graph: {reason}")
        return reason is None


def _token_labels(labels: Tensor, shape: tuple[int, int] | None) -> Tensor:
    """Labels of the usual loss as int64; ``shape`` is theirs where they have to be as many as the tokens."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ArgumentError(f"labels has dtype {labels.dtype}, expected an integer dtype: pass labels.long()")
    if shape is not None and tuple(labels.shape) != shape:
        raise ArgumentError(
            f"labels has shape {tuple(labels.shape)}, expected (B, T) = {shape} as the tokens have; they are shifted "
            "inside"
        )
    return labels.long()


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
