"""Guesses of what comes next, by heads that predict further tokens, for decoding to verify."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator

from ..errors import ArgumentError
from ..layers.sequence import sequence_layout
from .cache import CacheRow, Mamba2Cache
from .speculation import likeliest

if TYPE_CHECKING:
    from .causal_lm import SSDForCausalLM


def check_heads(model: SSDForCausalLM, look: int | None, assistant: Any) -> None:
    """Checks that a model has heads that can draft, and that nothing else is to: an assistant, or a
    ``prompt_lookup_num_tokens``.

    Raises:
        ArgumentError: there are no heads, or there is another draft.
    """
    if not model.mtp_heads:
        raise ArgumentError(
            "use_mtp=True: this model has no heads that predict further tokens (num_mtp_layers is 0, or its checkpoint "
            "has none); pass prompt_lookup_num_tokens or an assistant_model"
        )
    if assistant is not None or look is not None:
        other = "assistant_model" if look is None else f"prompt_lookup_num_tokens={look}"
        raise ArgumentError(f"use_mtp=True and {other} both guess ahead: pass one of them")


class _Head:
    """A head and what it has read: of position i the hidden state, and the token as many places on as its depth."""

    def __init__(self, head: Any, config: Any) -> None:
        self._head, self._config, self.cache = head, config, Mamba2Cache(config)
        self.last: Tensor | None = None  # (B, 1, d) what it made of the last position that it has read
        self.has_read: Tensor | None = None  # (B,) on the CPU, whether there is such a position

    def read(self, embeddings: Tensor, hidden_states: Tensor, keep: Tensor) -> Tensor:
        """What the head makes of ``(B, T, d)`` each, of which ``keep (B, T)``, on the CPU, says what counts."""
        if not bool(keep.any()):
            return torch.zeros_like(hidden_states)
        mask = None if bool(keep.all()) else keep.to(hidden_states.device)
        layout = sequence_layout(*keep.shape, attention_mask=mask)
        return self._head(embeddings.to(hidden_states), hidden_states, self.cache, layout)  # type: ignore[no-any-return]

    def guess(self, embeddings: Tensor, hidden_states: Tensor) -> Tensor:
        """The same where all counts, until the cache forgets guesses."""
        self.cache.start_guessing()
        return self._head(embeddings.to(hidden_states), hidden_states, self.cache)  # type: ignore[no-any-return]

    def select(self, rows: Sequence[tuple[_Head, int] | None]) -> None:
        """Holds copies of rows of such heads from now on, itself among them; None for one that has read nothing."""
        heads = {row[0] for row in rows if row is not None}
        padding = {head: None if head.cache.padding is None else head.cache.padding.tolist() for head in heads}

        def own(head: _Head, place: int) -> CacheRow | None:
            left_out = padding[head]
            tokens = head.cache.seen_tokens - (0 if left_out is None else left_out[place])
            return CacheRow(head.cache, place, tokens) if tokens else None

        cache = Mamba2Cache(self._config)
        cache.gather([None if row is None else own(*row) for row in rows])
        made = [None if row is None or row[0].last is None else row[0].last[row[1]] for row in rows]
        told = [False if row is None or row[0].has_read is None else bool(row[0].has_read[row[1]]) for row in rows]
        known = [each for each in made if each is not None]
        blank = torch.zeros_like(known[0]) if known else None
        self.last = None if blank is None else torch.stack([blank if each is None else each for each in made])
        self.cache, self.has_read = cache, torch.tensor(told)


class HeadDrafts:
    """Drafts of a model's own heads, for several rows; see :class:`.speculation.Drafts`.

    The heads read what the model reads, as soon as the next token is known. A draft takes one token of each head in
    turn; further ones are the last head's, which then reads its own results as if the model had made them. What is read
    of a draft is taken back before the next one.

    Args:
        model: with heads.
        threshold: a draft ends with the first token that is given a lower probability.
    """

    def __init__(self, model: SSDForCausalLM, threshold: float) -> None:
        self._model, self._threshold = model, threshold
        config = model.config.get_mtp_config()
        self._heads = [_Head(head, config) for head in model.mtp_heads]
        self._in_prompt = True
        self._unread: Tensor | None = None  # (B, S, d) hidden states of positions whose next token is not known
        self._keep: Tensor | None = None  # (B, S) on the CPU, which of them count
        self._ended: Tensor | None = None  # (B,) on the CPU, rows that got no token
        self._drafted: Tensor | None = None  # (B, S, d) what was made of positions behind the one that foretold

    @property
    def has_read(self) -> bool:
        """Whether the model has read anything, without which there are no drafts."""
        return self._unread is not None

    def see(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, hidden_states: Tensor, keep: Tensor | None
    ) -> None:
        """Takes what the model has made of tokens: see :attr:`Mamba2Cache.on_hidden_states`."""
        keep = torch.ones(hidden_states.shape[:2], dtype=torch.bool) if keep is None else keep.cpu()
        if not self._in_prompt:  # a block: how much of it stays is not known
            self._unread, self._keep = hidden_states, keep
            return
        if self._unread is not None and self._keep is not None:
            hidden_states, keep = torch.cat([self._unread, hidden_states], 1), torch.cat([self._keep, keep], 1)
        rows, new = torch.arange(len(keep)), keep.shape[1] - 1
        # Where a row ends, which is before padding on its right.
        ends = torch.where(keep.any(1), (keep * torch.arange(new + 1)).argmax(1), new)
        self._unread = hidden_states[rows.to(hidden_states.device), ends.to(hidden_states.device)][:, None]
        self._keep = keep[rows, ends][:, None]
        if new:
            own = self._model.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            embeddings = self._model.backbone._scale_embeddings(own[:, -new:])
            self._read(embeddings, hidden_states[:, :-1], keep[:, :-1] & keep[:, 1:], ends)

    def select(self, rows: Sequence[tuple[HeadDrafts, int] | None]) -> None:
        """Goes on from rows of such drafts, its own among them, that have read a prompt or a block; None for one that
        has read nothing. Which tokens they have got since :meth:`accept` is still to say.
        """
        for index, head in enumerate(self._heads):
            head.select([None if row is None else (row[0]._heads[index], row[1]) for row in rows])
        held = [(None, None) if row is None else (row[0]._unread, row[0]._keep) for row in rows]
        width = max((keep.shape[1] for _, keep in held if keep is not None), default=0)
        unread, keeps = None, torch.zeros(len(rows), width, dtype=torch.bool)
        for place, (row, (hidden_states, keep)) in enumerate(zip(rows, held, strict=True)):
            if row is None or hidden_states is None or keep is None:
                continue
            if unread is None:
                unread = hidden_states.new_zeros(len(rows), width, hidden_states.shape[2])
            unread[place, : keep.shape[1]], keeps[place, : keep.shape[1]] = hidden_states[row[1]], keep[row[1]]
        self._unread, self._keep, self._in_prompt = unread, None if unread is None else keeps, False

    def accept(self, tokens: list[list[int]]) -> None:
        """See :class:`.speculation.Drafts`."""
        self._in_prompt = False
        counts = torch.tensor([len(new) for new in tokens])
        self._ended = counts == 0
        if self._unread is None or self._keep is None or not (most := max(map(len, tokens))):
            return
        filled = torch.tensor([[*new, *[0] * (most - len(new))] for new in tokens], device=self._model.device)
        there = self._keep[:, :most] & (torch.arange(most) < counts[:, None])
        self._read(self._embed(filled), self._unread[:, :most], there, counts)

    def _read(self, embeddings: Tensor, hidden_states: Tensor, keep: Tensor, counts: Tensor) -> None:
        """Lets each head read positions and their next tokens, one position later than the head before it.

        Args:
            embeddings: ``(B, T, d)`` of the tokens.
            hidden_states: ``(B, T, d)`` for the first head: of the positions before them.
            keep: ``(B, T)`` on the CPU, which of these count.
            counts: ``(B,)`` on the CPU, behind how many of them the row goes on.
        """
        rows, columns = torch.arange(len(keep)), torch.arange(keep.shape[1])
        ends = (counts - 1).clamp(min=0)  # a row that has got nothing has ended
        for head, following in zip(self._heads, [*self._heads[1:], None], strict=True):
            made, before, known = head.read(embeddings, hidden_states, keep), head.last, head.has_read
            even = bool((counts == len(columns)).all())
            head.last = made[:, -1:] if even else made[rows.to(made.device), ends.to(made.device)][:, None]
            head.has_read = keep[rows, ends]
            if following is not None:
                if before is None or known is None:  # as behind padding
                    before, known = torch.zeros_like(head.last), torch.zeros_like(head.has_read)
                hidden_states = torch.cat([before, made[:, :-1]], 1)
                keep = torch.cat([known[:, None], keep[:, :-1]], 1) & (columns < counts[:, None])

    def foretell(self, drafted: Tensor) -> Tensor | None:
        """Logits ``(B, vocab)`` of the token behind ``drafted (B, K)``, those of the draft so far; None where the text
        of a row is too short for the next head.
        """
        depth = drafted.shape[1] + 1
        head, before = (self._heads[max(min(depth, len(self._heads)) - back, 0)] for back in (1, 2))
        if depth == 1:
            last, self._drafted = head.last, None
        elif depth <= len(self._heads):
            # Up to the place where the first head has stopped, but for what this one has read before.
            assert before.last is not None
            assert before.has_read is not None
            assert self._ended is not None
            if not bool((before.has_read | self._ended).all()):
                return None
            ahead = [before.last] if self._drafted is None else [before.last, self._drafted]
            last = self._drafted = head.guess(self._embed(drafted), torch.cat(ahead, 1))
        else:  # from there on the last one goes on by itself
            made = head.last if self._drafted is None else self._drafted
            assert made is not None
            last = self._drafted = head.guess(self._embed(drafted[:, -1:]), made[:, -1:])
        assert last is not None
        return self._model._logits(last[:, -1:])[:, -1]

    def forget(self) -> None:
        """Takes back what was read of a draft."""
        for head in self._heads:
            head.cache.forget_guesses()

    def propose(self, most: int) -> list[list[int]]:
        """See :class:`.speculation.Drafts`."""
        assert self._ended is not None
        drafts = likeliest(self.foretell, len(self._ended), most, self._threshold, self._model.device)
        self.forget()
        return drafts

    def _embed(self, tokens: Tensor) -> Tensor:
        return self._model.backbone._scale_embeddings(self._model.get_input_embeddings()(tokens))


class HeadCandidates(CandidateGenerator):  # type: ignore[misc]
    """The same drafts of one sequence, for transformers' assisted decoding: it samples by their scores.

    Args:
        drafts: of the heads, which see what the model reads.
        tokens: of the text that the model has read when the first draft is asked for, and one more.
        generation_config: of ``generate``; ``num_assistant_tokens`` is the most that a draft has, which ends at the
            first token that a head gives a lower probability than ``assistant_confidence_threshold``.
        logits_processor: that ``generate`` makes scores with.
    """

    def __init__(self, drafts: HeadDrafts, tokens: int, generation_config: Any, logits_processor: Any) -> None:
        self._drafts, self._tokens, self._process = drafts, tokens, logits_processor
        self._most, self._sample = int(generation_config.num_assistant_tokens), generation_config.do_sample
        self._threshold = generation_config.assistant_confidence_threshold or 0.0
        self._max_length = generation_config.max_length

    def get_candidates(self, input_ids: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        """The text ``(1, T)`` with a draft behind it, and the scores ``(1, K, vocab)`` by which it was chosen."""
        new, self._tokens = input_ids[0, self._tokens - 1 :].tolist(), input_ids.shape[1] + 1
        most = min(self._most, self._max_length - input_ids.shape[1] - 1)
        if not self._drafts.has_read:
            return input_ids, None
        self._drafts.accept([new])
        text, scores = input_ids, list[Tensor]()
        while len(scores) < most and (logits := self._drafts.foretell(text[:, input_ids.shape[1] :])) is not None:
            scores.append(self._process(text, logits.to(input_ids.device, torch.float32)))
            probabilities = scores[-1].softmax(-1)  # (1, vocab)
            token = probabilities.multinomial(1) if self._sample else scores[-1].argmax(-1, keepdim=True)
            text = torch.cat([text, token], 1)
            if self._threshold and bool(probabilities[0, token[0, 0]] < self._threshold):
                break
        self._drafts.forget()
        return text, torch.stack(scores, 1) if scores else None
