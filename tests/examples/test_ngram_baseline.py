from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
from ngram_baseline import ByteNgram


def keys(context: bytes, following: range) -> np.ndarray:
    return np.array([int.from_bytes(context + bytes([byte]), "big") for byte in following], dtype=np.uint64)


def text(seed: int, length: int = 4000) -> bytes:
    """Letters with structure to find: each is likely to be followed by the next one of the alphabet."""
    rng = random.Random(seed)
    letters = [0]
    for _ in range(length - 1):
        letters.append((letters[-1] + 1) % 7 if rng.random() < 0.7 else rng.randrange(7))
    return bytes(97 + letter for letter in letters)


def spelled_out(documents: list[bytes], order: int, context: bytes, byte: int) -> float:
    """The same smoothing from its definition, with sets and loops."""
    padded = [bytes(order) + document + b"\0" for document in documents]
    full = Counter(p[i : i + order + 1] for p in padded for i in range(len(p) - order))
    counts = {order: full}
    for length in range(order - 1, -1, -1):
        counts[length] = Counter(ngram[1:] for ngram in counts[length + 1])

    def probability(context: bytes) -> float:
        table = counts[len(context)]
        n = [max(1, sum(count == i for count in table.values())) for i in (1, 2, 3, 4)]
        y = n[0] / (n[0] + 2 * n[1])
        raw = [i + 1 - (i + 2) * y * n[i + 1] / n[i] for i in range(3)]
        discount = [0.0, *(min(max(d, 0.1), i + 0.9) for i, d in enumerate(raw))]
        shorter = probability(context[1:]) if context else 1 / 256
        followers = [count for ngram, count in table.items() if ngram[:-1] == context]
        if not followers:
            return shorter
        own = table[context + bytes([byte])]
        kept = own - discount[min(own, 3)]
        return (kept + sum(discount[min(count, 3)] for count in followers) * shorter) / sum(followers)

    return probability(context)


@pytest.mark.parametrize("order", [0, 1, 3, 5])
def test_probabilities_of_all_next_bytes_sum_to_one(order: int) -> None:
    model = ByteNgram([text(0), text(1)], order)
    for context in (b"abcde", b"zzabc", b"\xff" * 5, bytes(5)):
        following = keys(context[len(context) - order :], range(256))
        probabilities = model.probabilities(following)
        assert (probabilities > 0).all()
        assert math.isclose(probabilities.sum(), 1, rel_tol=1e-12)


def test_is_modified_kneser_ney() -> None:
    documents = [text(seed, 300) for seed in range(3)]
    model = ByteNgram(documents, order=3)
    for context, byte in ((b"abc", ord("d")), (b"aaa", ord("b")), (b"gga", 0), (b"zza", ord("b")), (b"zzz", ord("q"))):
        expected = spelled_out(documents, 3, context, byte)
        assert math.isclose(model.probabilities(keys(context, range(byte, byte + 1)))[0], expected, rel_tol=1e-12)


def test_bits_add_up_over_a_document_and_its_end() -> None:
    model = ByteNgram([text(0)], order=2)
    expected = sum(-math.log2(spelled_out([text(0)], 2, c, b)) for c, b in ((b"\0\0", 97), (b"\0a", 98), (b"ab", 0)))
    assert math.isclose(model.bits(b"ab"), expected, rel_tol=1e-12)


def test_context_helps_on_text_that_has_some() -> None:
    bits = [ByteNgram([text(0, 20_000)], order).bits(text(1)) for order in (0, 1, 5)]
    assert bits[1] < 0.8 * bits[0]
    assert bits[2] < 1.1 * bits[1]


def test_refuses_what_it_cannot_count() -> None:
    with pytest.raises(ValueError, match="order must be from 0 to 7"):
        ByteNgram([b"text"], order=8)
    with pytest.raises(ValueError, match="marks ends of documents"):
        ByteNgram([b"a\0b"])
