"""Decoding that guesses ahead for several sequences at once: a draft for each, one call that verifies all of them.

A block holds the last token of every row and its draft. The model's own choices at all of its places are made in one
call; a row keeps those up to the first that its draft did not guess, and its states take back the others. A choice is
made as without drafts, from the scores behind the same tokens, whatever was guessed: greedy texts are the same, and
sampled ones have the same distribution.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from ..errors import ArgumentError
from ..ops import is_batch_invariant
from .cache import Mamba2Cache

if TYPE_CHECKING:
    from .causal_lm import SSDForCausalLM

_BY_SCORES = {
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
}


def by_scores_alone(processors: LogitsProcessorList) -> bool:
    """Whether processors look at the scores of a row and at nothing else, so that all rows and places with equal ones
    may go through together.
    """
    return all(type(each) in _BY_SCORES for each in processors)


def assistant_setting(assistant: Any, name: str) -> Any:
    """A setting of the assistant's own generation config, as transformers reads it."""
    config = assistant.generation_config
    value = getattr(config, name)
    return config._get_default_generation_params()[name] if value is None else value


def most_tokens(generation_config: Any, assistant: Any = None) -> int:
    """Most tokens of a draft that ``generate`` asks for; 0 where only an assistant, which is not given, could tell."""
    if assistant is not None:
        return int(assistant_setting(assistant, "num_assistant_tokens"))
    config = generation_config
    return int((config.num_assistant_tokens if config.use_mtp else config.prompt_lookup_num_tokens) or 0)


def check(generation_config: Any, assistant: Any, tokenizer: Any, streamer: Any) -> None:
    """Checks what ``generate`` asks for with several sequences and drafts; ``tokenizer`` is the assistant's, if that is
    another one.

    Raises:
        ArgumentError: it cannot be had.
    """
    if is_batch_invariant():
        raise ArgumentError(
            "batch_invariant does not go with drafts for several sequences, whose blocks add up in another order than "
            "steps: leave out prompt_lookup_num_tokens, assistant_model and use_mtp"
        )
    if streamer is not None:
        raise ArgumentError("streamer: several sequences that guess ahead get their tokens apart; stream one")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(generation_config, name) and generation_config.return_dict_in_generate:
            raise ArgumentError(
                f"{name}=True: several sequences that guess ahead get their tokens apart; generate them one by one, or "
                "without prompt_lookup_num_tokens, assistant_model and use_mtp"
            )
    look, longest = generation_config.prompt_lookup_num_tokens, generation_config.max_matching_ngram_size
    for name, value in (("prompt_lookup_num_tokens", look), ("max_matching_ngram_size", longest)):
        if assistant is None and value is not None and value < 1:
            raise ArgumentError(f"{name} is {value}: at least 1 token")
    if generation_config.assistant_ensemble_weight is not None:
        raise ArgumentError("assistant_ensemble_weight: drafts of several sequences are verified exactly; leave it out")
    if assistant is None:
        return
    check_assistant(assistant, look)
    if tokenizer is not None:
        raise ArgumentError("assistant_tokenizer: an assistant of several sequences has to know the same tokens")


def check_assistant(assistant: Any, look: int | None) -> None:
    """Checks a model that is to guess for several sequences, and a ``prompt_lookup_num_tokens`` beside it.

    Raises:
        ArgumentError: it cannot, or both are given.
    """
    if not hasattr(assistant, "read"):
        raise ArgumentError(
            f"assistant_model is a {type(assistant).__name__}: of several sequences each takes back tokens of its own, "
            "which a model of this package can; pass one, or generate the sequences one by one"
        )
    if look is not None:
        raise ArgumentError(f"assistant_model and prompt_lookup_num_tokens={look} both guess ahead: pass one of them")


class TextLookup:
    """A text, and what came in it behind the tokens that it ends in now.

    Behind a guess that was wrong the next ones are short: as many tokens as were right, and twice as many when all are.

    Args:
        tokens: the text so far.
        longest: how many of its last tokens are looked up at most; where they were not there before, fewer are.
    """

    def __init__(self, tokens: Sequence[int], longest: int) -> None:
        self._tokens: list[int] = []
        self._behind: list[dict[tuple[int, ...], int]] = [{} for _ in range(longest)]  # where each first went on
        self._draft: list[int] = []
        self._reach = sys.maxsize  # tokens of the next draft at most
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds tokens to the text, those that the last draft was about."""
        if self._draft:
            right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._draft, tokens, strict=False)))
            all_right = right == len(self._draft)
            self._reach = max(self._reach, 2 * right) if all_right else max(right, 1)
            self._draft = []
        for token in tokens:
            here = len(self._tokens)
            for size, behind in enumerate(self._behind[:here], 1):
                behind.setdefault(tuple(self._tokens[here - size :]), here)
            self._tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """At most so many tokens that may come next; none where no end of the text was there before."""
        self._draft = []
        for size in range(min(len(self._behind), len(self._tokens)), 0, -1):
            start = self._behind[size - 1].get(tuple(self._tokens[-size:]))
            if start is not None:
                self._draft = self._tokens[start : start + max(min(most, self._reach), 0)]
                break
        return list(self._draft)


class Drafts(Protocol):
    """Guesses for several rows."""

    def propose(self, most: int) -> list[list[int]]:
        """At most so many tokens for each row that may come next."""

    def accept(self, tokens: list[list[int]]) -> None:
        """Adds to every row the ``tokens`` that the model has chosen for it; none for one that has ended."""


class LookupDrafts:
    """Drafts from the texts themselves; see :class:`TextLookup`."""

    def __init__(self, texts: Sequence[Sequence[int]], longest: int) -> None:
        self._texts = [TextLookup(text, longest) for text in texts]

    def propose(self, most: int) -> list[list[int]]:
        """See :class:`Drafts`."""
        return [text.draft(most) for text in self._texts]

    def accept(self, tokens: list[list[int]]) -> None:
        """See :class:`Drafts`."""
        for text, new in zip(self._texts, tokens, strict=True):
            text.extend(new)


class AssistantDrafts:
    """Drafts of another model: the tokens that it finds likeliest, one after the other.

    It reads what rows have got in one block, of which each keeps its own, and then its guesses by steps, which are
    taken back before the next draft.

    Args:
        assistant: of this package, with the same tokens.
        cache: behind the prompts.
        threshold: a draft ends with the first token that is given a lower probability.
        most: tokens in a draft.
    """

    def __init__(self, assistant: SSDForCausalLM, cache: Mamba2Cache, threshold: float, most: int) -> None:
        self._model, self._cache, self._threshold, self._most = assistant, cache, threshold, most
        self._unread: list[list[int]] = []  # of each row's text
        cache.activate_past_recording(most + 1)

    def propose(self, most: int) -> list[list[int]]:
        """See :class:`Drafts`."""
        device, counts = self._model.device, torch.tensor([len(new) for new in self._unread])
        first = [new[0] if new else 0 for new in self._unread]
        block = next_block(first, [new[1:] for new in self._unread], self._most, self._cache)
        logits = self._read(block.to(device))
        last = (counts - 1).clamp(min=0).to(logits.device)
        behind = logits[torch.arange(len(logits), device=logits.device), last]  # (B, vocab)
        self._cache.crop(counts - block.shape[1])

        def foretell(drafted: Tensor) -> Tensor:
            if not drafted.shape[1]:
                return behind
            self._cache.start_guessing()
            return self._read(drafted[:, -1:])[:, -1]

        drafts = likeliest(foretell, len(behind), most, self._threshold, device)
        self._cache.forget_guesses()
        return drafts

    def _read(self, tokens: Tensor) -> Tensor:
        """Logits ``(B, T, vocab)`` behind ``tokens (B, T)``."""
        return self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True).logits  # type: ignore[no-any-return]

    def accept(self, tokens: list[list[int]]) -> None:
        """See :class:`Drafts`."""
        self._unread = tokens


def likeliest(
    foretell: Callable[[Tensor], Tensor | None], rows: int, most: int, threshold: float, device: torch.device
) -> list[list[int]]:
    """Drafts of the tokens that a model finds likeliest, one after the other, until each row's has ended.

    Args:
        foretell: of tokens ``(B, K)``, those of the draft so far, to logits ``(B, vocab)`` of the next; None where
            there is no next one.
        rows: B.
        most: tokens in a draft.
        threshold: a draft ends with the first token that is given a lower probability.
        device: of the tokens.
    """
    drafts: list[list[int]] = [[] for _ in range(rows)]
    goes_on, drafted = [True] * rows, torch.zeros(rows, 0, dtype=torch.long, device=device)
    while drafted.shape[1] < most and any(goes_on) and (logits := foretell(drafted)) is not None:
        chances, token = logits.float().softmax(-1).max(-1, keepdim=True)
        drafted = torch.cat([drafted, token.to(device)], 1)
        for row, (new, chance) in enumerate(zip(token[:, 0].tolist(), chances[:, 0].tolist(), strict=True)):
            if goes_on[row]:
                drafts[row].append(new)
                goes_on[row] = chance >= threshold
    return drafts


def accepted(chosen: Sequence[int], draft: Sequence[int], ends: Collection[int], most: int) -> list[int]:
    """The tokens that a row goes on with: those chosen up to the first that its draft did not guess, or that ends it.

    Args:
        chosen: at each place of a block.
        draft: what was guessed for all of them but the first.
        ends: tokens that end a text.
        most: how many there is room for.
    """
    tokens: list[int] = []
    for place, token in enumerate(chosen[:most]):
        tokens.append(token)
        if token in ends or place >= len(draft) or draft[place] != token:
            break
    return tokens


class Choices:
    """What ``generate`` chooses by the logits of blocks, and where it ends each row.

    Args:
        input_ids: ``(B, T)`` the prompts.
        processors, criteria: of ``generate``.
        samples: whether tokens are drawn.
        max_length: of a row, prompt and padding included.
        most: tokens in a draft.
    """

    def __init__(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        samples: bool,
        max_length: int,
        most: int,
    ) -> None:
        rows, width = input_ids.shape
        self.running = [True] * rows
        self.lengths = [width] * rows
        self._processors, self._samples, self._max_length = processors, samples, max_length
        ends = [each.eos_token_id.tolist() for each in criteria if isinstance(each, EosTokenCriteria)]
        self._ends = frozenset(token for tokens in ends for token in tokens)
        self.criteria = [each for each in criteria if not isinstance(each, (EosTokenCriteria, MaxLengthCriteria))]
        self._text: Tensor | None = None  # (B, max_length + most), where somebody looks at more than scores
        if self.criteria or not by_scores_alone(processors):
            self._text = input_ids.new_zeros(rows, max_length + most + 1)
            self._text[:, :width] = input_ids

    @property
    def room(self) -> int:
        """Tokens that the shortest row that goes on has room for."""
        return max(
            (self._max_length - n for n, runs in zip(self.lengths, self.running, strict=True) if runs), default=1
        )

    def choose(self, block: Tensor, logits: Tensor, drafts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The tokens that each row goes on with; none for one that has ended.

        Args:
            block: ``(B, T)`` what was fed: the last token of a row, and its draft.
            logits: ``(B, T, V)`` of the block.
            drafts: those of the block.
        """
        logits = logits.float()
        if self._text is not None:
            lengths = torch.tensor(self.lengths, device=block.device)[:, None]
            at = (lengths + torch.arange(block.shape[1], device=block.device)).clamp(max=self._text.shape[1] - 1)
            self._text.scatter_(1, at[:, :-1], block[:, 1:])
        scores = self._scores(logits, drafts)
        if self._samples:
            found = scores.flatten(0, 1).softmax(-1).multinomial(1).view(block.shape)
        else:
            found = scores.argmax(-1)
        if self._text is not None:
            self._text.scatter_(1, at, found)
        chosen: list[list[int]] = found.tolist()  # the one time that a block waits for what it computes
        new = [
            accepted(tokens, draft, self._ends, self._max_length - length) if runs else []
            for tokens, draft, length, runs in zip(chosen, drafts, self.lengths, self.running, strict=True)
        ]
        stopped = self._stop(new)
        for row, added in enumerate(new):
            self.lengths[row] += len(added)
            if self.running[row]:
                full = self.lengths[row] >= self._max_length
                self.running[row] = not (full or stopped[row] or added[-1] in self._ends)
        return new

    def _scores(self, logits: Tensor, drafts: Sequence[Sequence[int]]) -> Tensor:
        """``logits (B, T, V)`` as processed behind the text of each place."""
        if not self._processors:
            return logits
        if by_scores_alone(self._processors):
            return self._processors(None, logits.flatten(0, 1)).view(logits.shape)  # type: ignore[arg-type,no-any-return]
        assert self._text is not None
        places = [
            range(length, length + len(draft) + 1) if runs else range(0)
            for length, draft, runs in zip(self.lengths, drafts, self.running, strict=True)
        ]
        rows, scores = torch.arange(len(logits), device=logits.device), logits.clone()
        # Processors take texts of one length: each length that occurs in turn, for the rows that have it.
        for length in sorted(set().union(*places)):
            own = torch.tensor([each.index(length) if length in each else -1 for each in places], device=logits.device)
            there = own >= 0
            found = self._processors(self._text[:, :length], logits[rows, own.clamp(min=0)])  # type: ignore[arg-type]
            scores[rows[there], own[there]] = found[there]
        return scores

    def _stop(self, new: list[list[int]]) -> list[bool]:
        """Cuts what comes behind a token at which a criterion ends its row. Returns which rows ended so."""
        stopped = [False] * len(new)
        if not self.criteria:
            return stopped
        assert self._text is not None
        spans = [range(length + 1, length + len(tokens) + 1) for length, tokens in zip(self.lengths, new, strict=True)]
        for length in sorted(set().union(*spans)):
            answers = [each(self._text[:, :length], None) for each in self.criteria]  # type: ignore[arg-type]
            says_stop = torch.stack([answer.to(self._text.device) for answer in answers]).any(0).tolist()
            for row, span in enumerate(spans):
                if says_stop[row] and length in span and not stopped[row]:
                    stopped[row] = True
                    del new[row][span.index(length) + 1 :]
        return stopped


def decode(
    model: SSDForCausalLM,
    forward: Callable[[Tensor], Tensor],
    logits: Tensor,
    last: Tensor,
    cache: Mamba2Cache,
    drafts: Drafts,
    choices: Choices,
    most: int,
    synced: bool,
    goes_on: bool,
) -> list[list[int]]:
    """Continues texts until all have ended, and returns the new tokens of each.

    Args:
        model: that ``generate`` was called of.
        forward: of a block ``(B, T)`` behind the cache, to logits ``(B, T, V)``.
        logits: ``(B, 1, V)`` behind the prompts, which the cache has seen.
        last: ``(B, 1)`` their last tokens.
        cache: to go on from.
        drafts: to be verified.
        choices: of tokens.
        most: tokens in a draft.
        synced: whether to go on until other processes, which share the weights, have ended too.
        goes_on: whether somebody may go on from the cache: it has seen all but the last token of the longest rows
            afterwards, and all tokens of the others.
    """
    texts: list[list[int]] = [[] for _ in logits]
    guesses: list[list[int]] = [[] for _ in texts]
    block, read, late = last, set[int](), set[int]()
    cache.activate_past_recording(most + 1)
    while True:
        new = choices.choose(block, logits, guesses)
        kept = torch.tensor([len(tokens) or int(row in late) for row, tokens in enumerate(new)])
        if block is not last:
            cache.crop(kept - block.shape[1])
            read |= late
        drafts.accept(new)
        for text, tokens in zip(texts, new, strict=True):
            text += tokens
        # Rows that have ended before the longest one, and whose last token has not been fed.
        longest, running = max(choices.lengths), choices.running
        late = {row for row, n in enumerate(choices.lengths) if n < longest and not running[row]} - read
        if not model._has_unfinished_sequences(not any(running), synced, device=last.device):
            break
        guesses = drafts.propose(min(most, choices.room - 1, _free(cache)))
        block = next_block([text[-1] for text in texts], guesses, most, cache).to(last.device)
        logits = forward(block)
    if goes_on and late:
        forward(torch.tensor([text[-1:] for text in texts], device=last.device))
        cache.crop(torch.tensor([int(row in late) - 1 for row in range(len(texts))]))
    return texts


def next_block(last: Sequence[int], drafts: Sequence[Sequence[int]], most: int, cache: Mamba2Cache) -> Tensor:
    """``(B, T)`` on the CPU: the last token of each row and its draft, filled up with zeros. Drafts of what is captured
    are filled up to a power of two, or the most that may come, so that few widths are.
    """
    width = max(map(len, drafts))
    if width and cache.graph is not None:
        width = min(most, 1 << (width - 1).bit_length())
    return torch.tensor(
        [[token, *draft, *[0] * (width - len(draft))] for token, draft in zip(last, drafts, strict=True)]
    )


def _free(cache: Mamba2Cache) -> int:
    """Tokens that a cache has room for behind one more, of any row."""
    if cache.key_counts is None or cache.key_counts.capacity is None or cache.captured:
        return sys.maxsize
    return cache.key_counts.capacity - cache.key_counts.width - 1
