"""A byte n-gram with interpolated modified Kneser-Ney smoothing: what a language model has to beat.

Order 5 means that a byte is predicted from the five before it (Chen & Goodman 1999, "An Empirical Study of Smoothing
Techniques for Language Modeling", section 3). The longest n-grams count how often they occur; shorter ones count how
many different bytes they follow, which is what makes them good at the one job left to them: contexts never seen before.

    model = ByteNgram([b"some text", b"some more"])
    model.bits(b"some text")
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

END = 0  # a byte that no Python source contains: it ends a document, and fills the context before one


@dataclass
class _Level:
    """Counts of the n-grams of one length, as sorted keys: an n-gram is its bytes read as one big-endian integer."""

    ngrams: np.ndarray  # (M,) distinct n-grams
    counts: np.ndarray  # (M,)
    contexts: np.ndarray  # (K,) distinct n-grams without their last byte
    totals: np.ndarray  # (K,) sum of the counts that follow
    freed: np.ndarray  # (K,) mass that the discounts take from a context and give to the shorter one
    discounts: np.ndarray  # (4,) for counts 0, 1, 2, and 3 or more


class ByteNgram:
    """The n-gram model of some documents; `order` bytes of context (at most 7) predict the next byte."""

    def __init__(self, documents: Iterable[bytes], order: int = 5) -> None:
        if not 0 <= order <= 7:
            raise ValueError(f"order must be from 0 to 7 so that an n-gram fits 64 bits, got {order}")
        self.order = order
        ngrams, counts = np.unique(np.concatenate([self._keys(text) for text in documents]), return_counts=True)
        self.levels = [_level(ngrams, counts)]
        for length in range(order, 0, -1):
            # Dropping the first byte of the distinct longer n-grams leaves one copy per byte that came before.
            ngrams, counts = np.unique(ngrams & np.uint64(256**length - 1), return_counts=True)
            self.levels.append(_level(ngrams, counts))
        self.levels.reverse()

    def _keys(self, text: bytes) -> np.ndarray:
        """The n-gram that ends at each byte of the text and at its end mark, (len(text) + 1,)."""
        if END in text:
            raise ValueError(f"a document contains the byte {END}, which marks ends of documents here")
        padded = np.frombuffer(bytes(self.order) + text + bytes([END]), dtype=np.uint8).astype(np.uint64)
        length = len(text) + 1
        keys = np.zeros(length, dtype=np.uint64)
        for i in range(self.order + 1):
            keys = (keys << np.uint64(8)) | padded[i : i + length]
        return keys

    def probabilities(self, keys: np.ndarray) -> np.ndarray:
        """Probability of the last byte of each n-gram given the bytes before it."""
        p = np.full(len(keys), 1 / 256)
        for length, level in enumerate(self.levels, start=1):
            ngrams = keys & np.uint64(256**length - 1)
            at, known = _find(level.contexts, ngrams >> np.uint64(8))
            place, seen = _find(level.ngrams, ngrams)
            counts = np.where(seen, level.counts[place], 0)
            discounted = counts - level.discounts[np.minimum(counts, 3)]
            interpolated = (discounted + level.freed[at] * p) / level.totals[at]
            p = np.where(known, interpolated, p)
        return p

    def bits(self, text: bytes) -> float:
        """Bits that the model needs for a document and its end mark."""
        return float(-np.log2(self.probabilities(self._keys(text))).sum())


def _level(ngrams: np.ndarray, counts: np.ndarray) -> _Level:
    n1, n2, n3, n4 = (max(1, int((counts == n).sum())) for n in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    estimates = np.array([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    # Clipped so that a tiny corpus, whose counts of counts mean nothing, still gives every byte a probability.
    discounts = np.array([0.0, *np.clip(estimates, 0.1, [0.9, 1.9, 2.9])])
    contexts, first = np.unique(ngrams >> np.uint64(8), return_index=True)
    return _Level(
        ngrams,
        counts,
        contexts,
        totals=np.add.reduceat(counts, first),
        freed=np.add.reduceat(discounts[np.minimum(counts, 3)], first),
        discounts=discounts,
    )


def _find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in a sorted table each key is (or would be), and whether it is there."""
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return at, table[at] == keys
