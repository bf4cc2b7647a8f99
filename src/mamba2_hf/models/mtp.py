"""Guesses of what comes next, by heads that predict further tokens, for assisted decoding to verify."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator

from ..errors import ArgumentError
from .cache import Mamba2Cache

if TYPE_CHECKING:
    from .causal_lm import SSDForCausalLM


def check_heads(model: SSDForCausalLM, rows: int, generation_config: Any, assistant: Any) -> None:
    """Checks that the heads of a model can draft what ``generate`` asks for with ``use_mtp=True``.

    Raises:
        ArgumentError: there are no heads, there is another draft or more than one sequence, or the draft has no token.
    """
    if not model.mtp_heads:
        raise ArgumentError(
            "use_mtp=True: this model has no heads that predict further tokens (num_mtp_layers is 0, or its checkpoint "
            "has none); pass prompt_lookup_num_tokens or an assistant_model"
        )
    look = generation_config.prompt_lookup_num_tokens
    if assistant is not None or look is not None:
        other = "assistant_model" if look is None else f"prompt_lookup_num_tokens={look}"
        raise ArgumentError(f"use_mtp=True and {other} both guess ahead: pass one of them")
    if rows != 1:
        raise ArgumentError(
            f"use_mtp=True: heads guess for one sequence, and {rows} came (num_return_sequences counts): generate them "
            "one by one"
        )
    if generation_config.num_assistant_tokens < 1:
        raise ArgumentError(
            f"num_assistant_tokens is {generation_config.num_assistant_tokens}: a draft has at least 1 token"
        )


class _Head:
    """A head and what it has read: position i is the hidden state there and the token ``depth`` places further on."""

    def __init__(self, head: Any, depth: int, config: Any) -> None:
        self.head, self.depth = head, depth
        self.cache = Mamba2Cache(config)
        self.seen = 0  # positions whose token is known
        self.waiting: Tensor | None = None  # (1, W, d) hidden states of those behind, whose token is not
        self.guessed = 0  # positions read with tokens that were guessed

    def read(self, embeddings: Tensor, hidden_states: Tensor) -> Tensor:
        """``(1, T, d)`` each, to what the head makes of them."""
        return self.head(embeddings.to(hidden_states), hidden_states, self.cache)  # type: ignore[no-any-return]

    def guess(self, embeddings: Tensor, hidden_states: Tensor) -> Tensor:
        """The same, until :meth:`forget`."""
        if not self.guessed:
            self.cache.activate_past_recording()
        self.guessed += hidden_states.shape[1]
        return self.read(embeddings, hidden_states)

    def forget(self) -> None:
        """Takes back all guesses."""
        if self.guessed and self.cache.layers:
            self.cache.crop(-self.guessed)
        self.cache.stop_recording()
        self.guessed = 0


class HeadCandidates(CandidateGenerator):  # type: ignore[misc]
    """Candidates for assisted decoding of one sequence, drafted by the model's own heads.

    The heads read what the model has read, one token late. A draft takes one token of each head in turn; further ones
    are the last head's, which then reads its own results as if the model had made them. What it read of a draft is
    taken back before the next one.

    Args:
        model: with heads.
        input_ids: ``(1, T)`` the text so far.
        mask: ``(1, T)`` which of its tokens count.
        past: how many of them the model's cache has seen: the heads know the others alone.
        generation_config: of ``generate``; ``num_assistant_tokens`` is the most that a draft has, which ends at the
            first token that a head gives a lower probability than ``assistant_confidence_threshold``.
        logits_processor: that ``generate`` makes scores with.
    """

    def __init__(
        self,
        model: SSDForCausalLM,
        input_ids: Tensor,
        mask: Tensor,
        past: int,
        generation_config: Any,
        logits_processor: Any,
    ) -> None:
        self.most = int(generation_config.num_assistant_tokens)
        self.model, self.process, self.sample = model, logits_processor, generation_config.do_sample
        self.threshold = generation_config.assistant_confidence_threshold or 0.0
        self.max_length = generation_config.max_length
        config = model.config.get_mtp_config()
        self.heads = [_Head(head, depth, config) for depth, head in enumerate(model.mtp_heads, 1)]
        self.past, self.ids, self.mask = past, input_ids, None if bool(mask.all()) else mask[0] != 0
        self.read = past  # positions of the text whose hidden states the heads have had
        self.unread: Tensor | None = None  # (1, S, d) hidden states from there on
        self.foretold: Tensor | None = None  # (1, 1, d) what the first head made of the last of them

    def __enter__(self) -> HeadCandidates:
        """Takes the hidden states of every forward of the model from now on."""
        self.handle = self.model.backbone.norm_f.register_forward_hook(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        """Takes no more."""
        self.handle.remove()

    def _see(self, _: Any, __: Any, hidden_states: Tensor) -> None:
        self.unread = hidden_states  # what is left of former ones belongs to guesses that were wrong
        self._follow()

    def _follow(self) -> None:
        """Lets the heads read what the model has read of the text, where the next token is known."""
        if self.unread is None:
            return
        new = min(self.ids.shape[1] - 1 - self.read, self.unread.shape[1])
        hidden_states, self.unread = self.unread[:, :new], self.unread[:, new:]
        if self.mask is not None:
            hidden_states = hidden_states[:, self._counting(self.read, self.read + new)]
        self.read += new
        tokens = self._tokens()
        for head in self.heads:
            if head.waiting is not None:
                hidden_states = torch.cat([head.waiting, hidden_states], 1)
            known = min(tokens.shape[1] - head.depth - head.seen, hidden_states.shape[1])
            head.waiting = hidden_states[:, max(known, 0) :]
            if known <= 0:
                return
            following = tokens[:, head.seen + head.depth :][:, :known]
            hidden_states = head.read(self._embed(following), hidden_states[:, :known])
            head.seen += known
            if head.depth == 1:
                self.foretold = hidden_states[:, -1:]

    def get_candidates(self, input_ids: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        """The text ``(1, T)`` with a draft behind it, and the scores ``(1, K, vocab)`` by which it was chosen."""
        self.ids = input_ids
        self._follow()
        most = min(self.most, self.max_length - input_ids.shape[1] - 1)
        if self.foretold is None or most < 1:
            return input_ids, None
        scores: list[Tensor] = []
        last, between = self.foretold, self.foretold[:, :0]
        for depth in range(1, most + 1):
            if depth > 1:
                head = self.heads[min(depth, len(self.heads)) - 1]
                # Each head reads up to the place where the first one has stopped, but for what it has read before;
                # from there on the last one goes on by itself.
                waiting = [] if head.waiting is None else [head.waiting]
                hidden_states = torch.cat([*waiting, between], 1) if depth <= len(self.heads) else last
                following = input_ids[:, -hidden_states.shape[1] :]
                between = head.guess(self._embed(following), hidden_states)
                last = between[:, -1:]
            logits = self.model._logits(last)[:, -1].to(input_ids.device, torch.float32)
            scores.append(self.process(input_ids, logits))
            probabilities = scores[-1].softmax(-1)  # (1, vocab)
            token = probabilities.multinomial(1) if self.sample else scores[-1].argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, token], 1)
            if self.threshold and bool(probabilities[0, token[0, 0]] < self.threshold):
                break
        for head in self.heads:
            head.forget()
        return input_ids, torch.stack(scores, 1)

    def _tokens(self) -> Tensor:
        """Those that count, from the first one that the heads know on."""
        tokens = self.ids[:, self.past :]
        return tokens if self.mask is None else tokens[:, self._counting(self.past, self.ids.shape[1])]

    def _counting(self, start: int, stop: int) -> Tensor:
        """Which tokens of the text count; all that was generated does."""
        assert self.mask is not None
        prompt = self.mask[start:stop]
        return torch.cat([prompt, prompt.new_ones(stop - start - len(prompt))])

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.model.backbone._scale_embeddings(self.model.get_input_embeddings()(tokens))
