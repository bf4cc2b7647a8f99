"""Continuous batching: requests of different lengths join a running batch, and leave it when they are done.

A batch is a static :class:`Mamba2Cache` with a row for each of its slots. Requests are read several in one call, in
pieces, each from the state of the longest known text that it begins with (:class:`PrefixCache`); a state is then copied
into a free row, and all rows take a token in one call. Buffers keep their addresses and the call its shape, however
many rows are taken, so that one compiled or captured step serves the whole life of a batch.

The continuous batching of transformers keeps keys and values in pages, and has no place for SSM states.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerationMode, LogitsProcessorList
from transformers.utils import logging

from ..distributed.tensor_parallel import agree_on_random_numbers
from ..errors import ArgumentError
from ..layers.placement import sent
from ..ops import batch_invariant as invariantly
from . import prefill
from .cache import CacheRow, Mamba2Cache
from .causal_lm import SSDForCausalLM
from .graphs import DecodeGraph, ModelWatch, why_not
from .mtp import HeadDrafts, check_heads
from .outputs import CACHE
from .prefix_cache import PrefixCache, beginning, text_key, text_tokens, tokens_of
from .speculation import (
    AssistantDrafts,
    TextLookup,
    accepted,
    assistant_setting,
    by_scores_alone,
    check_assistant,
    next_block,
)

logger = logging.get_logger(__name__)

_ROWS_AT_ONCE = 32, 64
"""Most prompts in one call: as many as the batch has rows, between these. Their states are held beside the batch's."""
_TOKENS_AHEAD = 8192
"""Prompts that do not join yet are read with those that do while all have at most as many tokens, which take a GPU
about as long as Python needs for the call: so that not every row that is free for the next costs one."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_return_sequences": (None, 1),
    "guidance_scale": (None, 1, 1.0),
    "stop_strings": (None,),
    "max_time": (None,),
    "token_healing": (None, False),
    "cache_implementation": (None,),
    "use_cache": (None, True),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}
"""Settings that a row of a batch cannot have, and the values that ask for nothing."""


@dataclass(frozen=True)
class Request:
    """A text to be continued.

    Args:
        input_ids: ``(T,)`` its tokens, at least one.
        settings: any that ``generate`` takes for one sequence, greedy or sampled: ``max_new_tokens`` or ``max_length``
            (needed, unless the model's generation config has the former), ``do_sample``, ``temperature``, ``top_p``,
            ``eos_token_id``, ... The others are the model's.
        seed: of its own random numbers; None draws one from PyTorch's.
        on_token: is called with every new token, as soon as it is there.
    """

    input_ids: Tensor | Sequence[int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    on_token: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Completion:
    """How a request ended.

    Attributes:
        request: the number that :meth:`ContinuousBatch.add` gave it.
        tokens: the new ones, with the one that ended the text.
        reason: ``"eos"``, ``"length"``, ``"cancelled"``, or ``"nan"`` where the model left nothing to draw from.
    """

    request: int
    tokens: list[int]
    reason: str


@dataclass
class _Running:
    """A request that was accepted."""

    number: int
    ids: list[int]
    most: int
    ends: frozenset[int]
    samples: bool
    processors: LogitsProcessorList
    sampler: Any  # see `_sampler`
    generator: torch.Generator
    on_token: Callable[[int], None] | None
    longest: int  # of the ends of its text that are looked up, where it is to guess ahead
    tokens: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)  # of what the next step chooses
    noise: deque[Tensor] = field(default_factory=deque)  # (V,) each, of its next tokens, drawn and not used yet
    text: Tensor | None = None  # (1, T) on the device, where processors may look at it
    prompt: bytes = b""  # the key of what is read, all but the last token
    is_read: bool = False
    state: CacheRow | None = None  # behind the prompt, once it is read; None behind nothing
    of_model: int = -1  # `PrefixCache.changes` at that time

    @property
    def seen(self) -> int:
        """Tokens that the cache holds before the next step."""
        return len(self.ids) + len(self.tokens) - 1

    @property
    def last(self) -> int:
        """The token that the next step feeds."""
        return (self.tokens or self.ids)[-1]


class _Launched:
    """A step whose tokens have not been looked at.

    Args:
        rows: who was in each.
        chosen: ``(slots, T)`` the tokens, -1 where there was nothing to choose from.
    """

    def __init__(self, rows: list[_Running | None], chosen: Tensor) -> None:
        self.rows, self.width = rows, chosen.shape[1]
        self._tokens = chosen.to("cpu", non_blocking=chosen.is_cuda)
        self._ready = torch.cuda.current_stream(chosen.device).record_event() if chosen.is_cuda else None

    def writes(self, row: int, rows: Sequence[_Running | None]) -> bool:
        """Whether one of its tokens is of who is in a row now."""
        return rows[row] is not None and self.rows[row] is rows[row]

    def follow(self) -> None:
        """Has what is launched now come after it, on whatever stream that is."""
        if self._ready is not None:
            self._ready.wait()

    def fetch(self) -> list[list[int]]:
        """The tokens, for which this waits."""
        if self._ready is not None:
            self._ready.synchronize()
        tokens: list[list[int]] = self._tokens.tolist()
        return tokens


def _sampler(config: GenerationConfig, processors: LogitsProcessorList) -> Any:
    """The settings that requests share whose tokens are chosen together; None for one that has to choose alone."""
    if not config.do_sample or not by_scores_alone(processors):
        return None
    return tuple((type(each), *sorted(vars(each).items())) for each in processors)


class _Alike:
    """Running requests whose tokens are chosen together: those with one sampler, or a single one that has none.

    Args:
        rows: theirs.
        requests: in that order.
        logits: ``(slots, T, V)``, such as they will be; T is 1 where nobody guesses ahead.
        ahead: most tokens in a draft, 0 where nobody guesses ahead.
    """

    def __init__(self, rows: list[int], requests: list[_Running], logits: Tensor, ahead: int) -> None:
        self._rows = sent(rows, logits.device)
        self._requests, self._first = requests, requests[0]
        self._noise: Tensor | None = None
        self._draws: list[tuple[Tensor, torch.Generator]] = []
        if self._first.samples and not ahead:
            self._noise = logits.new_empty(len(rows), *logits.shape[1:])
            self._draws = [(row[0], request.generator) for row, request in zip(self._noise, requests, strict=True)]

    def choose(self, logits: Tensor, tokens: Tensor) -> None:
        """Writes to ``tokens (slots, T)`` what ``generate`` would choose by ``logits (slots, T, V)``, behind the last
        token and behind each of a draft; -1 where those are no numbers.
        """
        scores = self._scores(logits[self._rows])
        if not self._first.samples:
            chosen = scores.argmax(-1)
        else:
            # As torch.multinomial, which takes one generator for all rows, and a dozen launches for one.
            probabilities = scores.softmax(-1)
            noise = self._drawn(scores)
            chosen = torch.where(probabilities.sum(-1) > 0, (probabilities / noise).argmax(-1), -1)
        tokens[self._rows, : chosen.shape[1]] = chosen

    def _scores(self, logits: Tensor) -> Tensor:
        """What the processors make of the rows' ``logits (rows, T, V)``; of one that looks at its text, as far as its
        draft goes.
        """
        first = self._first
        if first.text is None:
            return first.processors(None, logits.flatten(0, 1)).view(logits.shape)  # type: ignore[arg-type,no-any-return]
        texts = [first.text]
        if first.draft:
            text = torch.cat([first.text, torch.tensor([first.draft], device=first.text.device)], 1)
            texts = [text[:, : first.text.shape[1] + place] for place in range(len(first.draft) + 1)]
        return torch.stack([first.processors(text, logits[:, place]) for place, text in enumerate(texts)], 1)

    def _drawn(self, scores: Tensor) -> Tensor:
        """Random numbers for ``scores (rows, T, V)``, of each row its own. Those of a token that was guessed wrongly
        serve what comes there in its place, so that a text does not depend on what was guessed.
        """
        if self._noise is not None:
            for row, generator in self._draws:
                row.exponential_(1, generator=generator)
            return self._noise
        rows = []
        for request in self._requests:
            held = request.noise
            while len(held) <= len(request.draft):
                held.append(torch.empty_like(scores[0, 0]).exponential_(1, generator=request.generator))
            rows += [held[min(place, len(held) - 1)] for place in range(scores.shape[1])]
        return torch.stack(rows).view(scores.shape)


class _Guesser:
    """Who guesses for all rows of a batch.

    Attributes:
        most: tokens in a draft.
    """

    most: int

    def watch(self, cache: Mamba2Cache) -> None:
        """Is told of a cache that prompts are about to be read into."""

    def join(self, rows: Sequence[int], requests: Sequence[_Running]) -> None:
        """Goes on with requests that were read but for their last tokens, in these rows."""
        raise NotImplementedError

    def accept(self, row: int, tokens: list[int]) -> None:
        """Adds to a row the tokens that the model has chosen for it; none where its text has ended."""
        raise NotImplementedError

    def propose(self, most: Sequence[int]) -> list[list[int]]:
        """At most so many tokens for each row that may come next."""
        raise NotImplementedError


class _Lookup(_Guesser):
    """The texts themselves.

    Args:
        most: tokens in a draft.
        slots: rows of the batch.
    """

    def __init__(self, most: int, slots: int) -> None:
        self.most = most
        self._texts: list[TextLookup | None] = [None] * slots

    def join(self, rows: Sequence[int], requests: Sequence[_Running]) -> None:
        """See :class:`_Guesser`."""
        for row, request in zip(rows, requests, strict=True):
            self._texts[row] = TextLookup(request.ids, request.longest)

    def accept(self, row: int, tokens: list[int]) -> None:
        """See :class:`_Guesser`."""
        text = self._texts[row]
        if text is not None and tokens:
            text.extend(tokens)
        else:
            self._texts[row] = None

    def propose(self, most: Sequence[int]) -> list[list[int]]:
        """See :class:`_Guesser`."""
        return [[] if text is None else text.draft(room) for text, room in zip(self._texts, most, strict=True)]


class _Model(_Guesser):
    """A model, which reads what rows have got before it guesses.

    Args:
        settings: whose generation config says how many tokens to guess at most, and up to which probability.
        slots: rows of the batch.
    """

    def __init__(self, settings: SSDForCausalLM, slots: int) -> None:
        self.most = int(assistant_setting(settings, "num_assistant_tokens"))
        if self.most < 1:
            raise ArgumentError(
                f"num_assistant_tokens of the generation config of a {type(settings).__name__} that guesses is "
                f"{self.most}: at least 1 token"
            )
        self._threshold = float(assistant_setting(settings, "assistant_confidence_threshold") or 0.0)
        self._unread: list[list[int]] = [[] for _ in range(slots)]  # of each text, empty where it has ended

    def join(self, rows: Sequence[int], requests: Sequence[_Running]) -> None:
        """See :class:`_Guesser`."""
        for row, request in zip(rows, requests, strict=True):
            self._unread[row] = request.ids[-1:]

    def accept(self, row: int, tokens: list[int]) -> None:
        """See :class:`_Guesser`."""
        self._unread[row] = tokens

    def propose(self, most: Sequence[int]) -> list[list[int]]:
        """See :class:`_Guesser`."""
        drafts = self._drafts_of(self._unread, max(most))
        return [draft[:room] for draft, room in zip(drafts, most, strict=True)]

    def _drafts_of(self, new: list[list[int]], most: int) -> list[list[int]]:
        """Reads what rows have got, and guesses for all of them alike."""
        raise NotImplementedError


class _Assistant(_Model):
    """A smaller model, with a cache that has a row for each of the batch.

    Args:
        model: of this package, with the same tokens.
        slots: rows of the batch.
        max_length: tokens that a row of the batch has room for; None where it needs none.
        captured: whether its steps may be captured.
    """

    def __init__(self, model: SSDForCausalLM, slots: int, max_length: int | None, captured: bool) -> None:
        super().__init__(model, slots)
        self._model, self._captured = model, captured and not model.generation_config.disable_compile
        room = None if max_length is None else max_length + self.most + 1
        self._cache = Mamba2Cache(model.config, static=True, max_length=room)
        self._read(torch.zeros(slots, 1, dtype=torch.long), None, self._cache)
        for row in range(slots):
            self._cache.put(row, None)
        self._drafts = AssistantDrafts(model, self._cache, self._threshold, self.most)
        self._seen = [0] * slots
        self._watch = ModelWatch(model)

    def _read(self, ids: Tensor, mask: Tensor | None, cache: Mamba2Cache) -> None:
        device = self._model.device
        self._model.read(ids.to(device), None if mask is None else mask.to(device), past_key_values=cache)

    def join(self, rows: Sequence[int], requests: Sequence[_Running]) -> None:
        """Reads their prompts, too, all in one call."""
        super().join(rows, requests)
        texts = [request.ids[:-1] for request in requests]
        counts = list(map(len, texts))
        width, cache = max(counts), Mamba2Cache(self._model.config, defer_writes=False)
        if width:
            ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])
            uneven = min(counts) < width
            self._read(ids, (torch.arange(width) < torch.tensor(counts)[:, None]).long() if uneven else None, cache)
        for place, (row, count) in enumerate(zip(rows, counts, strict=True)):
            self._cache.put(row, CacheRow(cache, place, count) if count else None)
            self._seen[row] = count
        if self._watch.changed():
            self._capture_anew()

    def _capture_anew(self) -> None:
        goes = self._captured and why_not(self._model) is None
        self._cache.graph = DecodeGraph() if goes else None

    def _drafts_of(self, new: list[list[int]], most: int) -> list[list[int]]:
        if self._cache.graph is not None and self._watch.moved():
            self._watch.changed()
            self._capture_anew()
        self._cache.set_lengths(self._seen)
        self._drafts.accept(new)
        self._seen = [seen + len(tokens) for seen, tokens in zip(self._seen, new, strict=True)]
        return self._drafts.propose(most)


class _Heads(_Model):
    """The model's own heads, which see what it makes of prompts and of blocks.

    Args:
        model: with heads.
        slots: rows of the batch.
    """

    def __init__(self, model: SSDForCausalLM, slots: int) -> None:
        super().__init__(model, slots)
        self._model, self._drafts = model, HeadDrafts(model, self._threshold)
        self._of_prompts: WeakKeyDictionary[Mamba2Cache, HeadDrafts] = WeakKeyDictionary()

    def see_blocks(self, cache: Mamba2Cache) -> None:
        """Has the heads see what is read behind the cache of the batch."""
        cache.on_hidden_states = self._drafts.see

    def watch(self, cache: Mamba2Cache) -> None:
        """See :class:`_Guesser`."""
        self._of_prompts[cache] = drafts = HeadDrafts(self._model, self._threshold)
        cache.on_hidden_states = drafts.see

    def join(self, rows: Sequence[int], requests: Sequence[_Running]) -> None:
        """See :class:`_Guesser`. Of a prompt the heads know what was read of it for this request: nothing of what the
        state of another text has saved.
        """
        own: list[tuple[HeadDrafts, int] | None] = [
            (self._drafts, row) if new else None for row, new in enumerate(self._unread)
        ]
        for row, request in zip(rows, requests, strict=True):
            state = request.state
            drafts = None if state is None else self._of_prompts.get(state.cache)
            own[row] = None if state is None or drafts is None else (drafts, state.row)
        self._drafts.select(own)
        super().join(rows, requests)

    def _drafts_of(self, new: list[list[int]], most: int) -> list[list[int]]:
        self._drafts.accept(new)
        return self._drafts.propose(most) if self._drafts.has_read else [[] for _ in new]


def _most(settings: Mapping[str, Any], tokens: int, default: int | None) -> int | None:
    """How many tokens to write behind a prompt of ``tokens``: what the request says in either way, or the default."""
    if settings.get("max_new_tokens") is None and settings.get("max_length") is not None:
        return int(settings["max_length"]) - tokens
    given: int | None = settings.get("max_new_tokens")
    return default if given is None else given


class ContinuousBatch:
    """A batch that requests join and leave while it runs: :meth:`add` some, and call :meth:`step` until it is idle.

    What a request gets is what ``generate`` gives for it alone, up to the rounding of larger matrix products, which
    ``batch_invariant=True`` takes away. Reading new prompts holds the others up; many are read in one call, short ones
    before there is a slot for them. Of a model with attention all rows have the keys of ``max_length`` tokens.

    On a GPU the step is captured into a CUDA graph, where ``generate`` would do that, and replayed while the model is
    the same: weights that were moved are noticed before the next step; modules, hooks, and adapters with their settings
    when the next request joins. The step is then captured anew, or goes without, and ``why_not_captured`` says why.
    What the weights hold may change at any time.

    While the GPU is at a captured step, Python is at the tokens of the one before: a call of :meth:`step` launches a
    step and returns what the last one has ended. A request leaves its slot one step later for that. It is not done
    where tokens are guessed ahead, nor while a request has settings that look at its text, such as
    ``repetition_penalty``.

    Args:
        model: to generate with, in eval mode.
        slots: how many requests run at once.
        max_length: tokens of a request, new ones among them; models without attention need none.
        state_dtype: of the SSM states; see :class:`Mamba2Cache`.
        captured: whether the step may be captured; the model's generation config may say ``disable_compile``, too.
        prefix_cache: of states that prompts may go on from, such as ``PrefixCache(8 * 2**30)``, so that what they begin
            with in common is read once. It may have served other batches of the model. None keeps none.
        defer_writes: whether steps may write the SSM states once in 16 tokens; see :class:`Mamba2Cache`.
        batch_invariant: whether all is read and written under :func:`mamba2_hf.batch_invariant`, so that a request gets
            what it gets alone to the last bit, with and without a prefix cache.
        prompt_lookup_num_tokens: how many tokens to guess at most for each request from its own text, where its last
            tokens (``max_matching_ngram_size`` of the request, 2) were there before. A step verifies the guesses of all
            rows in one call, and each writes as many tokens as were right and one more. Texts are the same as without,
            sampled ones too, up to the rounding of larger matrix products. None guesses none.
        assistant_model: of this package, with the same tokens, which guesses in the place of the texts: as many tokens
            as ``num_assistant_tokens`` of its generation config says, and up to the first that it gives a lower
            probability than ``assistant_confidence_threshold``. It reads all prompts whole.
        use_mtp: whether the model's own heads guess, with these settings of the model's generation config.

    Attributes:
        prefix_cache: the one that was given, or an empty one; its ``stats`` count what was read and what was not.

    Raises:
        ArgumentError: an argument is out of range, or the prefix cache is another model's or too small for a state.
        CacheError: ``max_length`` is missing.
    """

    def __init__(
        self,
        model: SSDForCausalLM,
        *,
        slots: int = 8,
        max_length: int | None = None,
        state_dtype: torch.dtype | None = None,
        captured: bool = True,
        prefix_cache: PrefixCache | None = None,
        defer_writes: bool = True,
        batch_invariant: bool = False,
        prompt_lookup_num_tokens: int | None = None,
        assistant_model: SSDForCausalLM | None = None,
        use_mtp: bool = False,
    ) -> None:
        if not isinstance(model, SSDForCausalLM):
            raise ArgumentError(f"model is a {type(model).__name__}, expected a language model of this package")
        if slots < 1:
            raise ArgumentError(f"slots is {slots}: at least 1 request has to run at once")
        if prompt_lookup_num_tokens is not None and prompt_lookup_num_tokens < 1:
            raise ArgumentError(
                f"prompt_lookup_num_tokens is {prompt_lookup_num_tokens}: at least 1 token, or None to guess none"
            )
        if assistant_model is not None:
            check_assistant(assistant_model, prompt_lookup_num_tokens)
            if assistant_model.config.vocab_size != model.config.vocab_size:
                raise ArgumentError(
                    f"assistant_model knows {assistant_model.config.vocab_size} tokens and the model "
                    f"{model.config.vocab_size}: an assistant of a batch has to know the same ones"
                )
        if use_mtp:
            check_heads(model, prompt_lookup_num_tokens, assistant_model)
        if batch_invariant and (prompt_lookup_num_tokens is not None or assistant_model is not None or use_mtp):
            guesses = "use_mtp=True" if use_mtp else "assistant_model"
            if prompt_lookup_num_tokens is not None:
                guesses = f"prompt_lookup_num_tokens={prompt_lookup_num_tokens}"
            raise ArgumentError(
                f"{guesses} and batch_invariant=True: blocks of several sequences add up in another order than steps; "
                "leave one of them out"
            )
        if not isinstance(prefix_cache, PrefixCache | None):
            raise ArgumentError(
                f"prefix_cache is {prefix_cache!r:.80}: expected a mamba2_hf.PrefixCache(max_bytes), or None for none"
            )
        self.prefix_cache = PrefixCache(0) if prefix_cache is None else prefix_cache
        self.prefix_cache.bind(model, state_dtype=state_dtype, batch_invariant=batch_invariant)
        if model.tensor_group is not None:  # all go on with the same tokens
            agree_on_random_numbers(model.tensor_group, model.device)
        self.model, self.max_length = model, max_length
        self._states: dict[str, Any] = {"state_dtype": state_dtype, "defer_writes": defer_writes}
        self._guesser: _Guesser | None = _Heads(model, slots) if use_mtp else None
        if assistant_model is not None:
            with torch.inference_mode(False), torch.no_grad():
                self._guesser = _Assistant(assistant_model, slots, max_length, captured)
        if prompt_lookup_num_tokens is not None:
            self._guesser = _Lookup(prompt_lookup_num_tokens, slots)
        self._ahead = 0 if self._guesser is None else self._guesser.most
        room = None if max_length is None else max(max_length, 2) + self._ahead
        self.cache = Mamba2Cache(model.config, static=True, max_length=room, **self._states)
        if len({parameter.device for parameter in model.parameters()}) == 1:
            self.cache.lay_side_by_side()
        self._rows: list[_Running | None] = [None] * slots
        self._waiting: deque[_Running] = deque()
        self._prompts: list[bytes] = []  # of those that have not been read, sorted
        self._ended: list[Completion] = []
        self._alike: list[_Alike] | None = None  # of the rows as they are
        self._under_way: _Launched | None = None  # the last step, if that goes on
        self._fed: Tensor | None = None  # (slots, T) what the next step feeds, but for rows that joined since
        self._joined: list[int] = []
        self._chosen: Tensor | None = None  # (slots, T) of the last step
        self._count = 0
        least, most = _ROWS_AT_ONCE
        self._at_once = min(max(slots, least), most)
        self._captures = -1  # `PrefixCache.captures` of the graph
        self._captured = captured and not model.generation_config.disable_compile
        self._reason: str | None = None if self._captured else "it was asked for"
        self._numerics = invariantly if batch_invariant else contextlib.nullcontext
        with self._numerics():
            self._allocate()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _allocate(self) -> None:
        """Makes the buffers, on whatever devices the layers are, by a step that is forgotten."""
        ids = torch.zeros(len(self._rows), 1, dtype=torch.long, device=self.model.device)
        inputs = self._inputs(ids, is_first_iteration=True)
        if (tokens := prefill.token_count(inputs)) != 1:
            raise ArgumentError(
                f"prepare_inputs_for_generation of the model makes {tokens} tokens of one: a row of a batch has no "
                "place for soft prompts; call generate"
            )
        self.model(**inputs)
        for row in range(len(self._rows)):
            self.cache.put(row, None)
        if self._ahead:
            self.cache.activate_past_recording(self._ahead + 1)
        if isinstance(self._guesser, _Heads):
            self._guesser.see_blocks(self.cache)
        self.prefix_cache.check_room(sum(state.nbytes_of_row for state in self.cache.states))

    def _inputs(self, ids: Tensor, *, is_first_iteration: bool = False) -> dict[str, Any]:
        """What the forward gets for the next tokens of every row, ``(slots, T)``."""
        inputs: dict[str, Any] = self.model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=ids.shape[1],
            is_first_iteration=is_first_iteration,
            use_cache=True,
            logits_to_keep=ids.shape[1],
            **{CACHE: self.cache},
        )
        return inputs

    @property
    def why_not_captured(self) -> str | None:
        """Why steps go without a CUDA graph; None if they do not, or none has been made yet."""
        return self._reason if self.cache.graph is None else self.cache.graph.reason

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have one."""
        return sum(running is not None for running in self._rows)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do, and nothing to fetch."""
        return not (self.waiting or self.running or self._ended)

    def add(self, request: Request) -> int:
        """Queues a request, to join at the next step that has a slot for it.

        Returns:
            its number, counted from 0.

        Raises:
            ArgumentError: it has no tokens, is too long, or asks for what a row of a batch cannot have.
        """
        ids = torch.as_tensor(request.input_ids)
        vocabulary = self.model.config.vocab_size
        if ids.dim() != 1 or not len(ids) or ids.is_floating_point():
            raise ArgumentError(
                f"input_ids has shape {tuple(ids.shape)} of {ids.dtype}, expected (T,) token ids, T >= 1"
            )
        if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise ArgumentError(
                f"input_ids is between {int(ids.min())} and {int(ids.max())}, expected 0 to {vocabulary - 1}"
            )
        config = self._settings(request.settings, len(ids))
        if self.max_length is not None and len(ids) + config.max_new_tokens > self.max_length:
            raise ArgumentError(
                f"{len(ids)} tokens and max_new_tokens={config.max_new_tokens} are more than max_length="
                f"{self.max_length}: make a batch with a larger one, or ask for less"
            )
        device = self.model.device
        processors = self.model._get_logits_processor(
            generation_config=config, input_ids_seq_length=len(ids), device=device, model_kwargs={}
        )
        seed = int(torch.randint(2**62, ())) if request.seed is None else request.seed
        ends = config.eos_token_id
        tokens = ids.tolist()
        prompt = text_key(tokens[:-1])
        insort(self._prompts, prompt)
        self._waiting.append(
            _Running(
                number=self._count,
                ids=tokens,
                prompt=prompt,
                most=config.max_new_tokens,
                ends=frozenset(() if ends is None else [ends] if isinstance(ends, int) else ends),
                samples=config.do_sample,
                processors=processors,
                sampler=_sampler(config, processors),
                generator=torch.Generator(device).manual_seed(seed),
                on_token=request.on_token,
                longest=config.max_matching_ngram_size or 2,
            )
        )
        self._count += 1
        return self._count - 1

    def _settings(self, settings: Mapping[str, Any], tokens: int) -> GenerationConfig:
        config, unknown = self.model._prepare_generation_config(None, **settings)
        if unknown:
            raise ArgumentError(
                f"{next(iter(unknown))} is no setting of a request: it takes those of a GenerationConfig"
            )
        mode = config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ArgumentError(
                f"the settings ask for {mode.value}: a row of a batch is greedy or sampled; call generate, or give "
                "prompt_lookup_num_tokens, assistant_model or use_mtp to the batch"
            )
        for name, neutral in _NEUTRAL.items():
            if (value := getattr(config, name, None)) not in neutral:
                raise ArgumentError(f"{name}={value!r}: a row of a batch cannot have that; call generate")
        config.max_new_tokens = _most(settings, tokens, config.max_new_tokens)
        if config.max_new_tokens is None:
            raise ArgumentError("max_new_tokens is missing: say how many tokens to write at most")
        if config.max_new_tokens < 1:
            raise ArgumentError(f"max_length={config.max_length} leaves no room behind a prompt of {tokens} tokens")
        config.max_length = tokens + config.max_new_tokens
        self.model._prepare_special_tokens(config, True, device=self.model.device)
        return config

    def cancel(self, request: int) -> bool:
        """Ends a request; the next step returns what it has. Returns whether it was there to be ended."""
        for row, running in enumerate(self._rows):
            if running is not None and running.number == request:
                self._set_row(row, None)
                if self._guesser is not None:
                    self._guesser.accept(row, [])
                self._ended.append(Completion(request, running.tokens, "cancelled"))
                return True
        for waiting in self._waiting:
            if waiting.number == request:
                self._waiting.remove(waiting)
                if not waiting.is_read:
                    self._forget_prompt(waiting)
                self._ended.append(Completion(request, [], "cancelled"))
                return True
        return False

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self) -> list[Completion]:
        """Lets waiting requests join, and every running one write a token.

        Returns:
            the requests that have ended since the last step.
        """
        with self._numerics():
            callbacks = self._join_and_advance()
        for callback, token in callbacks:  # at the end, when the batch is ready to go on whatever they do
            callback(token)
        ended, self._ended = self._ended, []
        return ended

    def _join_and_advance(self) -> list[tuple[Callable[[int], None], int]]:
        """What :meth:`step` does; returns whom to tell of which token."""
        if self._under_way is not None:
            self._under_way.follow()
        free = [row for row, running in enumerate(self._rows) if running is None][: len(self._waiting)]
        if free:
            self.prefix_cache.look_at_model()
            for first in range(0, len(free), self._at_once):
                rows = free[first : first + self._at_once]
                self._read_waiting(len(rows))
                if self._guesser is not None:
                    self._guesser.join(rows, list(islice(self._waiting, len(rows))))
                for row in rows:
                    self._join(row, self._waiting[0])
                    self._waiting.popleft()
        elif self.cache.graph is not None and self.prefix_cache.model_moved():
            self.prefix_cache.look_at_model()
        callbacks = []
        if self._captured and self._captures != self.prefix_cache.captures:
            if self._under_way is not None:  # in the graph that goes
                callbacks = self._end(self._under_way, None)
                self._under_way = None
            self._renew_graph()
        return callbacks + self._advance()

    def _read_waiting(self, joining: int) -> None:
        """Reads the prompts of the first requests that wait, as many as join, and some behind them."""
        known = self.prefix_cache
        for request in takewhile(lambda request: request.is_read, self._waiting):
            if request.of_model != known.changes:
                request.is_read, request.state = False, None
                insort(self._prompts, request.prompt)
        if all(request.is_read for request in islice(self._waiting, joining)):
            return
        chosen, tokens = [], 0
        for place, request in enumerate(self._waiting):
            if not request.is_read:
                tokens += _new_tokens(request.prompt, known.find(request.prompt))
            if place >= joining and (place >= self._at_once or tokens > _TOKENS_AHEAD):
                break
            if not request.is_read:
                chosen.append(request)
        self._read(chosen)

    def _read(self, requests: Sequence[_Running]) -> None:
        """Reads prompts but for their last tokens, which steps take; what they begin with in common once."""
        known = self.prefix_cache
        states = [known.find(request.prompt) for request in requests]
        hit = [state is not None for state in states]
        stops = [
            deque(known.stops(request.prompt, 0 if state is None else state.tokens, self._prompts))
            for request, state in zip(requests, states, strict=True)
        ]
        read = 0
        while any(stops):
            pieces: dict[bytes, list[int]] = {}  # by what is to have been read, whose prompts begin so
            for place, request in enumerate(requests):
                if stops[place]:
                    pieces.setdefault(beginning(request.prompt, stops[place].popleft()), []).append(place)
            behind = {text: states[places[0]] for text, places in pieces.items()}
            read += sum(_new_tokens(text, state) for text, state in behind.items())
            for text, state in self._read_on(behind).items():
                for place in pieces[text]:
                    states[place] = state
                    hit[place] |= bool(text) and place != pieces[text][0]
                if state is not None:
                    known.store(text, state, used=any(stops[place] for place in pieces[text]))
        for request, state in zip(requests, states, strict=True):
            self._forget_prompt(request)
            request.is_read, request.state, request.of_model = True, state, known.changes
        tokens, prompts = sum(len(request.ids) - 1 for request in requests), sum(bool(each.prompt) for each in requests)
        known.count(hits=sum(hit), misses=prompts - sum(hit), tokens_read=read, tokens_saved=tokens - read)

    def _read_on(self, behind: Mapping[bytes, CacheRow | None]) -> dict[bytes, CacheRow | None]:
        """The states behind texts, each read on from the one in ``behind``, or from its first token; those of alike
        lengths in one call.
        """
        found = dict(behind)
        calls: list[list[bytes]] = []
        for text in sorted(behind, key=lambda text: _new_tokens(text, behind[text])):
            tokens = _new_tokens(text, behind[text])
            if not tokens:
                continue
            rows = 1 + len(calls[-1] if calls else ())
            if rows == 1 or rows > self._at_once or rows * tokens > prefill.TOKENS_AT_ONCE:
                calls.append([])
            calls[-1].append(text)
        for texts in calls:
            cache = self._call(texts, behind)
            finite = cache.finite_rows() if len(texts) > 1 else [True]
            for row, text in enumerate(texts):
                # The tokens of a call lie end to end, where what is no number reaches the texts beside its own.
                own = CacheRow(cache, row, text_tokens(text))
                found[text] = own if finite[row] else CacheRow(self._call([text], behind), 0, own.tokens)
        return found

    def _call(self, texts: Sequence[bytes], behind: Mapping[bytes, CacheRow | None]) -> Mamba2Cache:
        """Reads texts in one call, from the states ``behind`` has for them: a cache with a row for each."""
        cache = Mamba2Cache(self.model.config, **{**self._states, "defer_writes": False})  # nothing steps there
        if self.cache.whole("conv", "held") is not None:
            cache.lay_side_by_side()
        cache.gather([behind[text] for text in texts])
        if self._guesser is not None:
            self._guesser.watch(cache)
        new = [tokens_of(text)[-_new_tokens(text, behind[text]) :] for text in texts]
        width = max(map(len, new))
        ids = sent([[*row, *[0] * (width - len(row))] for row in new], self.model.device)  # (B, T)
        mask = None
        if min(map(len, new)) < width:
            counts = sent([*map(len, new)], ids.device)[:, None]
            columns = torch.arange(-cache.seen_tokens, width, device=ids.device)
            mask = (columns < counts).long()  # (B, seen + T)
        return self.model.read(ids, mask, past_key_values=cache)

    def _forget_prompt(self, request: _Running) -> None:
        del self._prompts[bisect_left(self._prompts, request.prompt)]

    def _join(self, row: int, running: _Running) -> None:
        """Puts a request that was read into a row."""
        self.cache.put(row, running.state)
        running.state = None
        if running.processors and running.sampler is None:
            running.text = sent([running.ids], self.model.device)  # (1, T)
        self._set_row(row, running)

    def _renew_graph(self) -> None:
        """Forgets what was captured, as the model has changed since."""
        self._captures = self.prefix_cache.captures
        self._reason = why_not(self.model)
        self.cache.graph = DecodeGraph() if self._reason is None else None
        if self._reason is not None:
            logger.info(f"a batch goes without a CUDA graph: {self._reason}")

    def _set_row(self, row: int, running: _Running | None) -> None:
        self._rows[row] = running
        self._alike = None
        if running is not None:
            self._joined.append(row)

    def _coming(self, row: int) -> int:
        """Tokens of who is in a row that a step under way writes."""
        return int(self._under_way is not None and self._under_way.writes(row, self._rows))

    def _last(self, row: int) -> int:
        """The token that the next step feeds a row."""
        running = self._rows[row]
        return 0 if running is None else running.last

    def _logits(self) -> Tensor:
        """Feeds every row its last token and its draft: logits ``(slots, T, V)`` in fp32, to be read before the next
        step.
        """
        self.cache.set_lengths(
            [0 if running is None else running.seen + self._coming(row) for row, running in enumerate(self._rows)]
        )
        if self._fed is None:
            last = [self._last(row) for row in range(len(self._rows))]
            drafts = [[] if running is None else running.draft for running in self._rows]
            self._fed = next_block(last, drafts, self._ahead, self.cache).to(self.model.device)
        elif self._joined:
            joined = sent([self._joined, [*map(self._last, self._joined)]], self._fed.device)
            self._fed = self._fed.index_copy(0, joined[0], joined[1][:, None])
        self._joined.clear()
        # generate runs experts in another way in steps than in prompts, on a GPU.
        with contextlib.nullcontext() if self._replays() else self.model._optimize_model_for_decode():
            logits: Tensor = self.model(**self._inputs(self._fed)).logits
            return logits[:, -self._fed.shape[1] :].float()

    def _tokens(self, logits: Tensor) -> Tensor:
        """The next token of every row, and those behind its draft, by logits ``(slots, T, V)``; those of rows that are
        free mean nothing.
        """
        if self._alike is None:
            together: dict[Any, list[int]] = {}
            for row, running in enumerate(self._rows):
                if running is not None and (running.samples or running.processors):
                    alone = running.sampler is None
                    together.setdefault(running.number if alone else running.sampler, []).append(row)
            self._alike = [
                _Alike(rows, [running for row in rows if (running := self._rows[row]) is not None], logits, self._ahead)
                for rows in together.values()
            ]
        chosen = logits.argmax(-1)
        for alike in self._alike:
            alike.choose(logits, chosen)
        self._chosen = chosen
        self._fed = None if self._ahead else chosen.clamp(min=0).to(self.model.device)
        return chosen

    def _advance(self) -> list[tuple[Callable[[int], None], int]]:
        """Launches a step of every running request, and ends one: this, or the one before, which the device was at
        meanwhile. Returns whom to tell of which token.
        """
        if self._guesser is not None:
            self._draft(self._guesser)
        before, now = self._under_way, None
        if any(
            running is not None and len(running.tokens) + self._coming(row) < running.most
            for row, running in enumerate(self._rows)
        ):
            now = _Launched(list(self._rows), self._tokens(self._logits()))
        self._under_way = now if now is not None and self._overlaps(now) else None
        callbacks = [] if before is None else self._end(before, now)
        if now is not None and self._under_way is None:
            callbacks += self._end(now, None)
        return callbacks

    def _overlaps(self, step: _Launched) -> bool:
        """Whether the next step may be launched before the tokens of this one are looked at, so that Python takes no
        time from a device that is busy. Whoever's text has ended by then takes part once more, for nothing.
        """
        alone = self._guesser is None and all(running is None or running.text is None for running in step.rows)
        return alone and self._replays()

    def _replays(self) -> bool:
        """Whether a step is one launch."""
        graph, fed = self.cache.graph, self._fed
        return graph is not None and fed is not None and graph.fits(fed)

    def _end(self, step: _Launched, after: _Launched | None) -> list[tuple[Callable[[int], None], int]]:
        """Adds the tokens of a step to the texts, where another may have been launched after it. Returns whom to tell
        of which token.
        """
        callbacks, written, kept = [], [], [0] * len(self._rows)
        for row, (running, chosen) in enumerate(zip(step.rows, step.fetch(), strict=True)):
            if running is None or self._rows[row] is not running:
                continue
            tokens = accepted(chosen, running.draft, running.ends, running.most - len(running.tokens))
            kept[row] = len(tokens)
            fed = after is not None and after.writes(row, self._rows)  # the last token, too
            reason = self._write(row, running, tokens)
            if self._guesser is not None:
                self._guesser.accept(row, tokens if reason is None else [])
            if running.on_token is not None:
                callbacks += [(running.on_token, token) for token in tokens if token >= 0]
            if reason is not None:
                self._set_row(row, None)
                if reason != "nan" and self.prefix_cache.max_bytes:
                    written.append((row, running, running.seen + fed))
                self._ended.append(Completion(running.number, running.tokens, reason))
        if self._ahead:
            self.cache.crop(torch.tensor(kept) - step.width)
        for row, running, seen in written:
            if running.of_model == self.prefix_cache.changes:
                text = text_key([*running.ids, *running.tokens][:seen])
                self.prefix_cache.store(text, CacheRow(self.cache, row, seen))
        return callbacks

    def _draft(self, guesser: _Guesser) -> None:
        """Guesses what every running request goes on with."""
        room = [
            0 if running is None else min(self._ahead, running.most - len(running.tokens) - 1) for running in self._rows
        ]
        for running, draft in zip(self._rows, guesser.propose(room), strict=True):
            if running is not None:
                running.draft = draft

    def _write(self, row: int, running: _Running, tokens: list[int]) -> str | None:
        """Adds tokens to a text. Returns why it has ended, if so."""
        token = tokens[-1]
        reason = "nan" if token < 0 else "eos" if token in running.ends else None
        new = tokens if token >= 0 else tokens[:-1]
        running.tokens += new
        if running.text is not None:
            assert self._chosen is not None
            running.text = torch.cat([running.text, self._chosen[row : row + 1, : len(new)]], 1)
        for _ in range(min(len(new), len(running.noise))):
            running.noise.popleft()
        return "length" if reason is None and len(running.tokens) == running.most else reason


def _new_tokens(text: bytes, state: CacheRow | None) -> int:
    """How many tokens of a text are to be read behind a state."""
    return text_tokens(text) - (0 if state is None else state.tokens)


def generate_batch(
    model: SSDForCausalLM,
    requests: Iterable[Request],
    *,
    slots: int = 8,
    max_length: int | None = None,
    state_dtype: torch.dtype | None = None,
    captured: bool = True,
    prefix_cache: PrefixCache | None = None,
    defer_writes: bool = True,
    batch_invariant: bool = False,
    prompt_lookup_num_tokens: int | None = None,
    assistant_model: SSDForCausalLM | None = None,
    use_mtp: bool = False,
) -> list[Completion]:
    """Continues many texts of different lengths, ``slots`` at a time; a text that ends makes room for the next.

    Args:
        model: to generate with.
        requests: the texts. Those of a list are all looked at before the first is read; those of another iterable are
            taken when there is a slot for them.
        slots, max_length, state_dtype, captured, prefix_cache, defer_writes, batch_invariant,
            prompt_lookup_num_tokens, assistant_model, use_mtp: of the :class:`ContinuousBatch`. A model with attention
            that gets no ``max_length`` makes a list of the requests, and room for the longest.

    Returns:
        how each request ended, in their order.

    Raises:
        ArgumentError: a request or an argument cannot be honored.
    """
    kinds = {kind for each in (model, assistant_model) if each is not None for kind in each.config.mixer_kinds}
    if max_length is None and kinds - {"ssd"}:
        requests = list(requests)
        prompts = [(each.settings, len(each.input_ids)) for each in requests]
        default = model.generation_config.max_new_tokens
        max_length = max((length + (_most(given, length, default) or 0) for given, length in prompts), default=1)
    batch = ContinuousBatch(
        model,
        slots=slots,
        max_length=max_length,
        state_dtype=state_dtype,
        captured=captured,
        prefix_cache=prefix_cache,
        defer_writes=defer_writes,
        batch_invariant=batch_invariant,
        prompt_lookup_num_tokens=prompt_lookup_num_tokens,
        assistant_model=assistant_model,
        use_mtp=use_mtp,
    )
    if isinstance(requests, Sequence):
        for request in requests:
            batch.add(request)
        requests = ()
    coming, ended = iter(requests), []
    while True:
        for request in islice(coming, max(slots - batch.running - batch.waiting, 0)):
            batch.add(request)
        if batch.idle:
            break
        ended += batch.step()
    return sorted(ended, key=lambda completion: completion.request)
