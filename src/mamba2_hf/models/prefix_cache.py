"""States of texts that others begin with, so that a :class:`ContinuousBatch` reads what they share once.

A state of an SSD layer has the same size behind one token and behind a million, and exists only where a call ends. It
is not kept every few tokens, as pages of keys are, but where a text is known to be continued, or likely to be:

- where a prompt parts from another one that waits, or from a text whose state is kept: behind a system prompt, or the
  examples that many prompts begin with. A prompt is read up to there, its state is kept, and it is read on from it;
- at the end of a prompt but for its last token, for the same prompt again;
- at the end of a text that was written, for the next turn of a chat.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from .cache import CacheRow, KeptRow
from .graphs import ModelWatch

if TYPE_CHECKING:
    from .causal_lm import SSDForCausalLM

_BYTES = 4
"""Of a token in a :func:`text_key`."""
_RARELY = 8
"""Of so many states one is kept where nobody comes back to any."""


@dataclass(frozen=True)
class PrefixCacheStats:
    """What a :class:`PrefixCache` has saved.

    Attributes:
        hits: prompts that went on from the state of another text, one that was kept or that was read with them.
        misses: prompts that were read from their first token.
        tokens_saved: of prompts, that were not read as another text begins with them.
        tokens_read: of prompts, that were read; the last token of a prompt is not among them, a step takes it.
        states: that are held.
        nbytes: that they take.
        evicted: states that had to go for others.
        skipped: states that were not kept, because those before them had to go before anybody went on from them.
    """

    hits: int = 0
    misses: int = 0
    tokens_saved: int = 0
    tokens_read: int = 0
    states: int = 0
    nbytes: int = 0
    evicted: int = 0
    skipped: int = 0


class PrefixCache:
    """States of texts in a budget of bytes, on the model's device.

    When a state needs room, those go first that nobody has gone on from yet, then the others, of either the ones used
    least recently: many texts that end at once do not displace what all prompts begin with. At most half of the budget
    is kept from new states in this way.

    Where as many states as fit have had to go and nobody came back to one of them, there are more texts than the budget
    has room for: one of eight, at random, is kept from then on, which stays long enough to be found, until somebody
    comes back to one (bimodal insertion: Qureshi et al., "Adaptive insertion policies for high performance caching",
    2007). Copies of the others would displace each other, for which the batch would wait.

    It may serve several batches of one model, one after the other. It forgets everything when the model's weights,
    adapters, modules or hooks have changed, as far as PyTorch counts that: call :meth:`clear` after weights were
    written by way of ``.data``.

    A hit gives the tokens of a miss up to rounding: sums are taken in another order where a text is read in other
    pieces, or was written and not read. A ``state_dtype`` of 16 bits makes that a rounding of the states; in a batch
    with ``batch_invariant=True`` there is no difference.

    Args:
        max_bytes: that all states may take; 0 keeps none. One state of a model without attention takes what a slot of
            the batch does (168 MB of Mamba-2 2.7B), however long its text; one of a hybrid has the keys and values of
            its tokens, too.
        min_tokens: that a state has to save those who go on from it.

    Raises:
        ArgumentError: an argument is out of range.
    """

    def __init__(self, max_bytes: int, *, min_tokens: int = 64) -> None:
        for name, value, least in (("max_bytes", max_bytes, 0), ("min_tokens", min_tokens, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ArgumentError(f"{name} is {value!r}: expected an int of at least {least}")
        self.max_bytes, self.min_tokens = max_bytes, min_tokens
        self.changes = 0
        """How often all states became useless: what was read at another value is of another model."""
        self.captures = 0
        """How often the model became another than a graph of it: by more than what its weights hold."""
        self._watch: ModelWatch | None = None
        self._new: OrderedDict[bytes, KeptRow] = OrderedDict()  # used least recently first
        self._used: OrderedDict[bytes, KeptRow] = OrderedDict()
        self._texts: list[bytes] = []  # the keys of both, sorted
        self._in_vain = 0  # states that had to go since somebody came back to a new one
        self._chance = Random(0)  # the same in all processes that share a model
        names = ("hits", "misses", "tokens_saved", "tokens_read", "evicted", "skipped")
        self._counts = dict.fromkeys(names, 0)
        self._of: tuple[SSDForCausalLM, dict[str, Any]] | None = None

    @property
    def stats(self) -> PrefixCacheStats:
        """What it has saved since it was made, and what it holds now."""
        nbytes = _nbytes(self._new) + _nbytes(self._used)
        return PrefixCacheStats(**self._counts, states=len(self._texts), nbytes=nbytes)

    def clear(self) -> None:
        """Forgets all states."""
        for held in (self._new, self._used, self._texts):
            held.clear()
        self.changes += 1

    def bind(self, model: SSDForCausalLM, **options: Any) -> None:
        """Says whose states these are, and with which options of a :class:`ContinuousBatch` they are made.

        Raises:
            ArgumentError: they are those of another model, or made with other options.
        """
        if self._of is not None and (self._of[0] is not model or self._of[1] != options):
            same, known = self._of[0] is model, self._of[1]
            held, wanted = (
                {name: each[name] for name in each if known[name] != options[name]} for each in (known, options)
            )
            raise ArgumentError(
                f"prefix_cache holds states of {_said(held) if same else 'another model'}, and the batch has "
                f"{_said(wanted) if same else 'this one'}: make a PrefixCache for each"
            )
        if self._watch is None:
            self._of, self._watch = (model, options), ModelWatch(model)

    def check_room(self, nbytes: int) -> None:
        """Raises :class:`ArgumentError` where a state of so many bytes, which a text at least has, would not fit."""
        if 0 < self.max_bytes < nbytes:
            raise ArgumentError(
                f"prefix_cache has max_bytes={self.max_bytes}, and one state of this model takes {nbytes}: make room "
                f"for some of them, such as PrefixCache({16 * nbytes}), or leave prefix_cache out"
            )

    def model_moved(self) -> bool:
        """Whether a weight lies elsewhere than when :meth:`look_at_model` last looked; takes microseconds."""
        return self._watch is not None and self._watch.moved()

    def look_at_model(self) -> None:
        """Forgets all states if the model is not what it was when this was last asked. Takes milliseconds."""
        assert self._watch is not None
        changed = self._watch.changed()
        self.captures += changed
        if changed or self._watch.written:
            self.clear()

    def find(self, text: bytes) -> CacheRow | None:
        """The state of the longest text that is kept and that ``text`` begins with."""
        while self._texts:
            place = bisect_right(self._texts, text)
            if not place:
                break
            near = self._texts[place - 1]
            common = shared_tokens(near, text)
            if common * _BYTES == len(near):
                if near in self._new:
                    self._in_vain = 0
                return CacheRow(self._use(near).cache, 0, common)
            text = text[: common * _BYTES]  # all between a text and what it begins with begin with that, too
        return None

    def stops(self, text: bytes, past: int, others: list[bytes]) -> list[int]:
        """Where to end calls that read a text: behind how many tokens it parts from others, at least ``min_tokens``
        behind each other, and then its end.

        Args:
            text: to be read.
            past: tokens of it that need not be read.
            others: sorted texts to be read, beside those that are kept.
        """
        tokens, found = text_tokens(text), []
        if self.max_bytes:
            at = past
            for branch in sorted({*_branches(text, others), *_branches(text, self._texts)}):
                if at + self.min_tokens <= branch < tokens:
                    found.append(branch)
                    at = branch
        return [*found, tokens]

    def store(self, text: bytes, row: CacheRow, *, used: bool = False) -> None:
        """Keeps a copy of the state behind ``text``, if it may be of use and there is room for it.

        Args:
            text: that is behind it.
            row: of the cache that holds it, or a row of a batch.
            used: whether somebody goes on from it already.
        """
        if row.tokens < self.min_tokens or not self.max_bytes:
            return
        if text not in self._new and text not in self._used:
            in_vain = not used and self._in_vain >= max(len(self._texts), _RARELY)
            if in_vain and self._chance.randrange(_RARELY):
                self.count(skipped=1)
                return
            assert self._of is not None
            state = KeptRow(row, self._of[0].config, self._of[1]["state_dtype"])
            if state.nbytes > self.max_bytes:
                return
            self._make_room(state.nbytes)
            self._new[text] = state
            insort(self._texts, text)
        if used or text in self._used:
            self._use(text)
        else:
            self._new.move_to_end(text)

    def _use(self, text: bytes) -> KeptRow:
        state = self._used.pop(text) if text in self._used else self._new.pop(text)
        self._used[text] = state
        more = _nbytes(self._used) - self.max_bytes // 2
        while more > 0:
            oldest, held = self._used.popitem(last=False)
            self._new[oldest] = held
            more -= held.nbytes
        return state

    def _make_room(self, nbytes: int) -> None:
        more = _nbytes(self._new) + _nbytes(self._used) + nbytes - self.max_bytes
        while more > 0:
            self._in_vain += bool(self._new)
            text, held = (self._new or self._used).popitem(last=False)
            del self._texts[bisect_left(self._texts, text)]
            more -= held.nbytes
            self.count(evicted=1)

    def count(self, **counts: int) -> None:
        """Adds to those of :attr:`stats` that count what happened."""
        for name, more in counts.items():
            self._counts[name] += more

    def __repr__(self) -> str:
        return f"{type(self).__name__}(max_bytes={self.max_bytes}, min_tokens={self.min_tokens}, {self.stats})"


def _said(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


def _nbytes(states: OrderedDict[bytes, KeptRow]) -> int:
    return sum(state.nbytes for state in states.values())


def text_key(tokens: Sequence[int]) -> bytes:
    """Tokens as bytes, which are in the order of the tokens."""
    return struct.pack(f">{len(tokens)}I", *tokens)


def text_tokens(text: bytes) -> int:
    """How many tokens a :func:`text_key` holds."""
    return len(text) // _BYTES


def tokens_of(text: bytes) -> list[int]:
    """The tokens of a :func:`text_key`."""
    return list(struct.unpack(f">{text_tokens(text)}I", text))


def beginning(text: bytes, tokens: int) -> bytes:
    """The key of the first tokens of a :func:`text_key`."""
    return text[: tokens * _BYTES]


def shared_tokens(one: bytes, other: bytes) -> int:
    """How many tokens two texts begin with in common."""
    low, high = 0, min(len(one), len(other)) // _BYTES
    while low < high:
        middle = (low + high + 1) // 2
        if one[low * _BYTES : middle * _BYTES] == other[low * _BYTES : middle * _BYTES]:
            low = middle
        else:
            high = middle - 1
    return low


def _branches(text: bytes, others: list[bytes]) -> list[int]:
    """The numbers of tokens that ``text`` begins with in common with texts of a sorted list, other than itself."""
    found: list[int] = []
    low, high = bisect_left(others, text), bisect_right(others, text)
    while low or high < len(others):
        common = max(shared_tokens(text, other) for other in (*others[max(low - 1, 0) : low], *others[high : high + 1]))
        if not common:
            break
        found.append(common)
        # The neighbors of all those that have as much in common have less.
        start = beginning(text, common)
        low = bisect_left(others, start, 0, low)
        high = bisect_right(others, start, high, key=lambda other: other[: len(start)])
    return found
