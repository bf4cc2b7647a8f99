"""What the backbones have in common: from inputs, masks and a cache to hidden states."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import ArgumentError, CacheError
from ..layers import SequenceLayout
from ..layers.sequence import sequence_layout
from ..layers.weights import is_unobserved
from ..ops import is_batch_invariant
from .cache import Mamba2Cache, as_mamba2_cache
from .outputs import Mamba2Output
from .pretrained import SSDPreTrainedModel

if TYPE_CHECKING:
    from ..distributed import Context


class SSDLayer(GradientCheckpointingLayer):
    """A layer that gradient checkpointing runs twice where gradients are recorded, and nowhere else: without them there
    is no backward, and the layer may write a cache, in training mode too. So does transformers itself from 5.24 on.
    """

    _is_checkpointed = False

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether a call runs through the checkpointing function."""
        return self._is_checkpointed and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self._is_checkpointed = value


class SSDBackbone(SSDPreTrainedModel):
    """Embeddings, layers, final norm. A model adds its layers and what they need beside the hidden states."""

    embeddings: nn.Embedding
    layers: nn.ModuleList
    norm_f: nn.Module
    gradient_checkpointing = False
    context: Any = None
    """The ``Context`` by which sequences are spread over processes: see ``mamba2_hf.distributed.context_parallel``."""
    other_names = {"embed_tokens": "embeddings", "norm": "norm_f"}

    @property
    def embed_tokens(self) -> nn.Embedding:
        """``embeddings``, as most models name them."""
        return self.embeddings

    @property
    def norm(self) -> nn.Module:
        """``norm_f``, as most models name it."""
        return self.norm_f

    def _run(
        self,
        *,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Mamba2Cache | None,
        use_cache: bool | None,
        output_hidden_states: bool | None,
        output_attentions: bool | None,
        return_dict: bool | None,
        layout: SequenceLayout,
        output_router_logits: bool = False,
    ) -> tuple[Any, ...] | Mamba2Output:
        """The forward of every backbone; its arguments are those of :meth:`Mamba2Model.forward`."""
        batch, tokens = batch_and_tokens(input_ids, inputs_embeds)
        cache = as_mamba2_cache(past_key_values, self.config)
        context: Context | None = self.context
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and context is None
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            _refuse_cache(cache, use_cache)
        if cache is None and use_cache:
            cache = Mamba2Cache(self.config)
        if cache is not None:
            cache.reserve(cache.seen_tokens + tokens)
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if context is not None:
            if torch.compiler.is_compiling() or _calls_are_compiled():
                self.refuse_in_context("torch.compile")
            if cache is not None:
                self.refuse_in_context("a cache (use_cache=True or past_key_values)")
            if output_attentions:
                self.refuse_in_context("output_attentions=True")
            given = inputs_embeds if input_ids is None else input_ids
            assert given is not None  # one of them is
            context.check(given, layout)
            layout = context.layout(layout, batch, tokens, given.device)
            input_ids = None if input_ids is None else context.cut(input_ids)
            inputs_embeds = None if inputs_embeds is None else context.cut(inputs_embeds)
            position_ids = None if position_ids is None else context.cut(position_ids[:, -tokens:])
            tokens = context.length(tokens)

        if is_batch_invariant():
            self._refuse_invariant(cache, output_attentions)
        hidden_states = inputs_embeds if input_ids is None else self._embed(input_ids)  # (B, T, d)
        assert hidden_states is not None
        if output_attentions:
            if self.tensor_group is not None:
                raise ArgumentError(
                    f"output_attentions=True of a model that {self.tensor_group.size} processes share: each has the "
                    "matrices of its own heads; ask for them where one process has the whole model"
                )
            self._check_attentions(batch, tokens, cache)
        hidden_states = layout.blank(self._scale_embeddings(hidden_states))  # what padding holds may be anything
        # Padding is no work where nobody looks at what is between the layers.
        packed = layout.source is not None and not (output_hidden_states or output_attentions)
        if packed:
            ends = (self.embeddings, self.norm_f)
            packed = is_unobserved(*(part for part in self.children() if all(part is not end for end in ends)))
        options, counted = self._layer_options(hidden_states, layout, batch, tokens, position_ids, cache, packed)
        if output_attentions:
            options["output_attentions"] = True
        if output_router_logits:
            options["output_router_logits"] = True
        every_state: list[Tensor] = []
        attentions: list[Tensor] = []
        router_logits: list[Tensor] = []
        inside, restore = (layout.row, layout.unpack) if packed else (layout, layout.blank)
        if context is not None:  # padding is behind all that counts, where it reaches none of it
            inside = replace(layout, keep=None)
        hidden_states = layout.pack(hidden_states) if packed else hidden_states  # (1, R, d) or (B, T, d)
        for layer in self.layers:
            if output_hidden_states:
                every_state.append(hidden_states)
            hidden_states = layer(hidden_states, inside, past_key_values=cache, **options)
            if output_attentions or output_router_logits:
                hidden_states, matrices, logits = hidden_states
                attentions.extend(matrices)
                router_logits.extend(restore(routed).flatten(0, 1) for routed in logits)
            if not packed:
                hidden_states = layout.blank(hidden_states)
        hidden_states = self.norm_f(restore(hidden_states) if packed else hidden_states)
        if output_hidden_states:
            every_state.append(hidden_states)
        if cache is not None:
            cache.count(tokens, layout.keep, **counted)

        output = Mamba2Output(
            last_hidden_state=hidden_states,
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(every_state) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            router_logits=tuple(router_logits) or None,
        )
        return output if return_dict else output.to_tuple()

    def refuse_in_context(self, what: str) -> None:
        """Raises an :class:`ArgumentError` where sequences are spread over processes."""
        if self.context is not None:
            raise ArgumentError(
                f"{what} cannot be had while sequences are spread over {self.context.group.size} processes: end that "
                "by mamba2_hf.distributed.context_parallel(model, None)"
            )

    def _refuse_invariant(self, cache: Mamba2Cache | None, output_attentions: bool) -> None:
        """Raises an :class:`ArgumentError` for what ``batch_invariant()`` cannot keep its promise with."""
        refused = None
        if torch.is_grad_enabled():
            refused = "gradients: use torch.no_grad()"
        elif torch.compiler.is_compiling():
            refused = "torch.compile, which decides on the order of sums: call the model itself"
        elif self.context is not None or self.tensor_group is not None:
            refused = "a model or sequences that several processes share: use one process"
        elif self.training and getattr(self.config, "attention_dropout", 0):
            refused = f"attention_dropout={self.config.attention_dropout} in training mode: call model.eval()"
        elif output_attentions:
            refused = "output_attentions=True: leave it out, or ask for them outside of it"
        elif cache is not None and cache.state_dtype in (torch.float16, torch.bfloat16):
            refused = (
                f"state_dtype={cache.state_dtype}, as states that are rounded where a call ends depend on where that "
                "is: leave it out"
            )
        if refused is not None:
            raise ArgumentError(f"batch_invariant does not go with {refused}")

    def _embed(self, input_ids: Tensor) -> Tensor:
        try:
            return self.embeddings(input_ids)  # type: ignore[no-any-return]
        except IndexError:  # on a CPU; a GPU stops the program
            low, high = input_ids.aminmax()
            raise ArgumentError(
                f"input_ids holds ids from {int(low)} to {int(high)}, and vocab_size={self.config.vocab_size}: use the "
                "model's own tokenizer, or model.resize_token_embeddings(len(tokenizer)) for one that has grown"
            ) from None

    def _scale_embeddings(self, embeddings: Tensor) -> Tensor:
        return embeddings

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
        """More arguments for every layer, and for :meth:`Mamba2Cache.count`; ``hidden_states (B, T, d)`` are the
        embeddings, and ``packed`` says whether layers get what ``layout`` packs of them.
        """
        return {}, {}

    def _check_attentions(self, batch: int, tokens: int, cache: Mamba2Cache | None) -> None:
        """Refuses ``output_attentions=True`` where it cannot be had."""
        raise NotImplementedError


def _calls_are_compiled() -> bool:
    """Whether functions that are called here are compiled, as those of a caller are that ``torch.compile`` gave up."""
    return _traced(torch.empty(0))[1]


def _traced(tensor: Tensor) -> tuple[Tensor, bool]:
    return tensor.neg(), torch.compiler.is_compiling()  # a function without any operation would not be compiled


def _refuse_cache(cache: Mamba2Cache | None, use_cache: bool) -> None:
    """Gradient checkpointing runs a layer again in the backward, which would write the cache a second time."""
    if cache is not None or use_cache:
        given = "use_cache=True" if cache is None else f"a cache of {cache.seen_tokens} tokens"
        raise CacheError(
            f"{given} in training mode with gradient checkpointing, which runs every layer twice: use torch.no_grad() "
            "if no gradients are needed, else pass the whole sequence without a cache, or turn checkpointing off"
        )


def batch_and_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int]:
    """B and T of whichever was given, once its shape and dtype are known to fit."""
    if input_ids is not None and inputs_embeds is None:
        if input_ids.dim() != 2:
            raise ArgumentError(f"input_ids has shape {tuple(input_ids.shape)}, expected (B, T)")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ArgumentError(
                f"input_ids has dtype {input_ids.dtype}, expected int64 or int32: pass input_ids.long(), or embeddings "
                "as inputs_embeds"
            )
        return input_ids.shape[0], input_ids.shape[1]
    if inputs_embeds is not None and input_ids is None:
        if inputs_embeds.dim() != 3:
            raise ArgumentError(f"inputs_embeds has shape {tuple(inputs_embeds.shape)}, expected (B, T, d)")
        if not inputs_embeds.is_floating_point():
            raise ArgumentError(
                f"inputs_embeds has dtype {inputs_embeds.dtype}, expected a floating dtype: pass token ids as input_ids"
            )
        return inputs_embeds.shape[0], inputs_embeds.shape[1]
    raise ArgumentError("pass either input_ids or inputs_embeds, and not both")


def read_layout(
    batch: int,
    tokens: int,
    attention_mask: Tensor | dict[str, Tensor] | None,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
) -> SequenceLayout:
    """What the arguments of a forward amount to."""
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
