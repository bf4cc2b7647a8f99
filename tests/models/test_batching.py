"""Continuous batching: whoever joins and leaves, each request gets what it gets alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hybrids import ARCHITECTURES, make_hybrid
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mamba2_hf import Completion, ContinuousBatch, Mamba2Cache, Request, generate_batch
from mamba2_hf.errors import ArgumentError, CacheError

BASE: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LENGTHS = (5, 1, 17, 9, 2, 12, 1)


def build(kind: str, tiny_model: Callable[..., Any]) -> Any:
    return tiny_model() if kind == "pure" else make_hybrid(kind)


def prompt(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 61, (length,), generator=torch.Generator().manual_seed(100 * seed + length))


def alone(model: Any, request: Request) -> list[int]:
    """What ``generate`` writes."""
    if request.seed is not None:
        torch.manual_seed(request.seed)
    ids = torch.as_tensor(request.input_ids)[None]
    return model.generate(ids, **request.settings)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("kind", ["pure", *ARCHITECTURES])
def test_each_gets_what_it_gets_alone(kind: str, tiny_model: Callable[..., Any]) -> None:
    """More requests than slots, of all lengths, greedy and sampled, so that rows are filled again and again."""
    model = build(kind, tiny_model)
    requests = []
    for number, length in enumerate(LENGTHS):
        own: dict[str, Any] = {"max_new_tokens": 3 + number}
        if number % 2:
            own |= {"do_sample": True, "temperature": 1.5, "top_p": 0.9}
        if number == 4:
            own |= {"repetition_penalty": 1.3, "top_k": 7}
        requests.append(Request(prompt(length), {**BASE, **own}, seed=number))
    ended = generate_batch(model, requests, slots=3)
    assert [each.request for each in ended] == list(range(len(LENGTHS)))
    assert {each.reason for each in ended} == {"length"}
    assert [each.tokens for each in ended] == [alone(model, request) for request in requests]


@settings(max_examples=15)
@given(data=st.data())
def test_whenever_they_join_and_leave(data: st.DataObject, tiny_model: Callable[..., Any]) -> None:
    model = build(data.draw(st.sampled_from(["pure", "sliding", "rotary"])), tiny_model)
    batch = ContinuousBatch(model, slots=data.draw(st.integers(1, 3)), max_length=32)
    requests: dict[int, Request] = {}
    ended: dict[int, Completion] = {}
    for _ in range(data.draw(st.integers(1, 12))):
        if data.draw(st.booleans()):
            own = {**BASE, "max_new_tokens": data.draw(st.integers(1, 6))}
            request = Request(prompt(data.draw(st.integers(1, 20))), own)
            requests[batch.add(request)] = request
        if requests and data.draw(st.integers(0, 5)) == 0:
            batch.cancel(data.draw(st.sampled_from(sorted(requests))))
        ended |= {each.request: each for each in batch.step()}
    while not batch.idle:
        ended |= {each.request: each for each in batch.step()}
    assert ended.keys() == requests.keys()
    for number, each in ended.items():
        expected = alone(model, requests[number])
        if each.reason == "cancelled":
            assert each.tokens == expected[: len(each.tokens)]
        else:
            assert each.tokens == expected


def test_buffers_stay_where_they_are(tiny_model: Callable[..., Any]) -> None:
    """So that a captured step can be replayed for the life of a batch."""
    for model in (tiny_model(), make_hybrid("rotary"), make_hybrid("sliding")):
        batch = ContinuousBatch(model, slots=2, max_length=32)
        layers = batch.cache.layers

        def addresses(layers: Any = layers, cache: Any = batch.cache) -> list[int]:
            held = [value for layer in layers for value in vars(layer).values() if isinstance(value, Tensor)]
            if cache.key_counts is not None:
                held.append(cache.key_counts.lengths)
            return [tensor.data_ptr() for tensor in held]

        before = addresses()
        for length in LENGTHS:
            batch.add(Request(prompt(length), BASE))
        while not batch.idle:
            batch.step()
            assert addresses() == before


def test_ends_at_the_models_eos_token_and_at_others(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    free = alone(model, Request(prompt(6), BASE))
    for end in (free[3], [free[3], free[1]]):
        request = Request(prompt(6), {**BASE, "eos_token_id": end})
        (ended,) = generate_batch(model, [request])
        assert ended.reason == "eos"
        assert ended.tokens == alone(model, request)
    model.generation_config.eos_token_id = free[2]
    own = {name: value for name, value in BASE.items() if name != "eos_token_id"}
    (ended,) = generate_batch(model, [Request(prompt(6), own)])
    assert ended.tokens == free[: free.index(free[2]) + 1]


def test_tokens_are_streamed_as_they_come(tiny_model: Callable[..., Any]) -> None:
    model, order = tiny_model(), []
    requests = [
        Request(prompt(length), BASE, on_token=lambda token, length=length: order.append((length, token)))
        for length in (4, 7)
    ]
    ended = generate_batch(model, requests)
    assert [length for length, _ in order] == [4, 7] * 8
    for length, each in zip((4, 7), ended, strict=True):
        assert [token for of, token in order if of == length] == each.tokens


def test_goes_on_after_a_callback_that_fails(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()

    def fail(_: int) -> None:
        raise RuntimeError("the client went away")

    batch = ContinuousBatch(model, slots=2)
    batch.add(Request(prompt(5), BASE))
    batch.add(Request(prompt(3), {**BASE, "max_new_tokens": 1}, on_token=fail))
    with pytest.raises(RuntimeError, match="went away"):
        batch.step()
    ended = []
    while not batch.idle:
        ended += batch.step()
    assert [each.request for each in ended] == [1, 0]
    assert ended[1].tokens == alone(model, Request(prompt(5), BASE))


def test_takes_from_an_iterable_when_there_is_room(tiny_model: Callable[..., Any]) -> None:
    taken = []

    def stream() -> Iterator[Request]:
        for length in LENGTHS:
            taken.append(length)
            yield Request(prompt(length), BASE, on_token=lambda _: seen.append(len(taken)))

    seen: list[int] = []
    ended = generate_batch(tiny_model(), stream(), slots=2)
    assert len(ended) == len(LENGTHS)
    assert seen[0] == 2
    assert generate_batch(tiny_model(), []) == []
    assert generate_batch(make_hybrid(), []) == []


def test_seeds(tiny_model: Callable[..., Any]) -> None:
    """Every request has random numbers of its own, which PyTorch's seed governs where it names none."""
    model = tiny_model()
    sampled = {**BASE, "do_sample": True, "temperature": 2.0}

    def run(*seeds: int | None) -> list[list[int]]:
        return [each.tokens for each in generate_batch(model, [Request(prompt(5), sampled, seed=s) for s in seeds])]

    first, second, again = run(1, 2, 1)
    assert first == again != second
    torch.manual_seed(0)
    drawn = run(None, None)
    torch.manual_seed(0)
    assert drawn == run(None, None)
    assert drawn[0] != drawn[1]


def test_a_bf16_state_and_any_mode(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    with torch.inference_mode():
        batch = ContinuousBatch(model, slots=2, state_dtype=torch.bfloat16)
        batch.add(Request(prompt(5), BASE))
        batch.step()
    assert batch.cache.layers[0].ssm.dtype == torch.bfloat16
    while not batch.idle:
        (*_, last) = batch.step() or [None]
    assert len(last.tokens) == 8


# What is refused


def test_refuses_requests_by_name(tiny_model: Callable[..., Any]) -> None:
    batch = ContinuousBatch(tiny_model(), slots=2, max_length=20)
    for own, message in (
        ({"num_beams": 2}, "beam_search"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
        ({"stop_strings": ["x"]}, "stop_strings"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0"),
        ({"max_new_tokens": 0}, "must be greater than 0"),
        ({"max_new_tokens": 16}, "5 tokens and max_new_tokens=16 are more than max_length=20"),
        ({"temprature": 1.0}, "temprature is no setting"),
    ):
        with pytest.raises(ValueError, match=message):
            batch.add(Request(prompt(5), {**BASE, **own}))
    with pytest.raises(ArgumentError, match="say how many tokens"):
        batch.add(Request(prompt(5)))
    for ids, message in (
        ([], r"shape \(0,\)"),
        ([[3, 4]], "expected"),
        ([3, 61], "expected 0 to 60"),
        ([0.5], "float"),
    ):
        with pytest.raises(ArgumentError, match=message):
            batch.add(Request(ids, BASE))
    assert batch.idle
    assert not batch.cancel(0)


def test_refuses_batches_and_rows_that_do_not_fit(tiny_model: Callable[..., Any]) -> None:
    model, hybrid = tiny_model(), make_hybrid()
    with pytest.raises(ArgumentError, match="slots is 0"):
        ContinuousBatch(model, slots=0)
    with pytest.raises(ArgumentError, match="expected a language model"):
        ContinuousBatch(model.backbone)
    with pytest.raises(CacheError, match="needs max_length"):
        ContinuousBatch(hybrid)
    with pytest.raises(ArgumentError, match=r"mamba2_hf.generate_batch"):
        model.generate_batch([[3, 4, 5]])
    growing = hybrid.read(prompt(9)[None])
    with pytest.raises(CacheError, match="needs a static cache"):
        growing.put(0, growing)
    cache = ContinuousBatch(hybrid, slots=2, max_length=8).cache
    with pytest.raises(CacheError, match="needs a static cache that holds such a row"):
        cache.put(2, None)
    with pytest.raises(CacheError, match="holds 9 keys, more than the 8"):
        cache.put(0, growing)
    with pytest.raises(CacheError, match="does not hold one sequence"):
        cache.put(0, hybrid.read(prompt(9).expand(2, -1)))
    with pytest.raises(CacheError, match="does not hold one sequence of the same model"):
        cache.put(0, Mamba2Cache(hybrid.config))
