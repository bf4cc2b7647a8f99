"""What the sequence classifiers have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layers.projection import call as call_linear
from .backbone import SSDBackbone
from .cache import Mamba2Cache, one_cache
from .outputs import CACHE, Mamba2SequenceClassifierOutput
from .pretrained import SSDPreTrainedModel


class SSDForSequenceClassification(SSDPreTrainedModel):
    """Backbone and a linear head that reads the last token of each sequence. A model adds the two."""

    _fsdp_plan = {"score": "keep_full_weight"}
    accepts_loss_kwargs = False  # Trainer would take that from **kwargs, and leave the loss undivided
    backbone: SSDBackbone
    score: nn.Module
    num_labels: int

    other_names = {"model": "backbone"}

    @property
    def model(self) -> SSDBackbone:
        """``backbone``, as most models name it."""
        return self.backbone

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
        cache: Mamba2Cache | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | Mamba2SequenceClassifierOutput:
        """:meth:`Mamba2Model.forward` and the head.

        The last token of a sequence is the last that ``attention_mask`` counts. Without a mask every token is read, as
        everywhere in transformers, and the last one is the last that is not ``config.pad_token_id``.

        Args:
            labels: ``(B,)`` classes, ``(B, num_labels)`` multi-label targets, or regression targets
                (``config.problem_type``, or by dtype and ``num_labels``).
            kwargs: more arguments of :meth:`Mamba2Model.forward`.
        """
        self.backbone.refuse_in_context(type(self).__name__)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=one_cache(past_key_values, cache_params, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **kwargs,
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
        logits = call_linear(self.score, hidden_states[rows, last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        output = Mamba2SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            past_key_values=getattr(outputs, CACHE),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if return_dict else output.to_tuple()
