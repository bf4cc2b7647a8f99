"""Continuous batching: whoever joins and leaves, each request gets what it gets alone."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from devices import on_each_device
from hybrids import ARCHITECTURES, make_hybrid
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from test_captured_decoding import AddressCheck
from torch import Tensor, nn

from mamba2_hf import Completion, ContinuousBatch, Mamba2Cache, PrefixCache, Request, generate_batch
from mamba2_hf.errors import ArgumentError, CacheError
from mamba2_hf.models.batching import _Launched
from mamba2_hf.models.graphs import ModelWatch

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
    ids = torch.as_tensor(request.input_ids)[None].to(model.device)
    return model.generate(ids, **request.settings)[0, ids.shape[1] :].tolist()


def run(batch: ContinuousBatch) -> list[Completion]:
    """Steps until it is idle; what has ended, by number."""
    ended = []
    while not batch.idle:
        ended += batch.step()
    return sorted(ended, key=lambda each: each.request)


@on_each_device
@pytest.mark.parametrize("kind", ["pure", *ARCHITECTURES])
def test_each_gets_what_it_gets_alone(kind: str, device: str, tiny_model: Callable[..., Any]) -> None:
    """More requests than slots, of all lengths, greedy and sampled, so that rows are filled again and again."""
    model = build(kind, tiny_model).to(device)
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


def helper(kind: str, tiny_model: Callable[..., Any], tokens: int) -> Any:
    """An assistant, which guesses so many tokens whatever it thinks of them."""
    model = tiny_model(seed=1) if kind == "pure" else make_hybrid(kind, seed=1)
    model.generation_config.update(num_assistant_tokens=tokens, assistant_confidence_threshold=0.0)
    return model


def with_heads(kind: str, tokens: int) -> Any:
    """A model that has heads, which guess so many tokens whatever they think of them."""
    model = make_hybrid(kind, num_mtp_layers=2, mtp_layer_blocks=["attention", "ssd"])
    model.generation_config.update(num_assistant_tokens=tokens, assistant_confidence_threshold=0.0)
    return model


@on_each_device
@pytest.mark.parametrize(
    ("kind", "source", "kept"),
    [
        *((kind, "lookup", 0) for kind in ("pure", *ARCHITECTURES)),
        *(("pure", "lookup", 2**24), ("sliding", "lookup", 2**24)),
        *(("pure", "pure", 2**24), ("pure", "sliding", 0), ("sliding", "pure", 0), ("rotary", "rotary", 2**24)),
        *(("sliding", "heads", 2**24), ("experts", "heads", 0)),
    ],
)
def test_rows_that_guess_ahead_write_what_they_write_alone(
    kind: str, source: str, kept: int, device: str, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They join and leave while others do; what is sampled is the same too, as random numbers belong to places."""
    model, requests, widths = build(kind, tiny_model).to(device), [], []
    for number, length in enumerate(LENGTHS):
        own: dict[str, Any] = {"max_new_tokens": 6 + 3 * number, "max_matching_ngram_size": 1 + number % 3}
        if number % 2:
            own |= {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
        if number == 4:
            own |= {"do_sample": True, "repetition_penalty": 1.1, "top_k": 7}
        if number == 5:
            own |= {"eos_token_id": [7, 11, 13, 17]}
        requests.append(Request(prompt(length).repeat(2), {**BASE, **own}, seed=number))
    tokens = ContinuousBatch._tokens

    def counted(self: Any, logits: Tensor) -> Any:
        widths.append(logits.shape[1])
        return tokens(self, logits)

    monkeypatch.setattr(ContinuousBatch, "_tokens", counted)
    heard: list[int] = []
    requests[2] = dataclasses.replace(requests[2], on_token=heard.append)
    prefix_cache = PrefixCache(kept, min_tokens=1)
    guess: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
    if source == "heads":
        model, guess = with_heads(kind, 4).to(device), {"use_mtp": True}
    elif source != "lookup":
        guess = {"assistant_model": helper(source, tiny_model, 4).to(device)}
    ended = generate_batch(model, requests, slots=3, **guess, prefix_cache=prefix_cache)
    assert [each.tokens for each in ended] == [alone(model, request) for request in requests]
    assert heard == ended[2].tokens
    assert max(widths) == 5
    if kept:  # states behind what was written are those behind kept tokens
        again = [
            Request([*map(int, request.input_ids), *done.tokens, 5], BASE)
            for request, done in zip(requests, ended, strict=True)
        ]
        found = generate_batch(model, again, slots=3, **guess, prefix_cache=prefix_cache)
        assert found == generate_batch(model, again, slots=1)
        assert prefix_cache.stats.hits >= len(again)


@pytest.mark.parametrize("source", [None, "lookup", "pure", "plain", "heads"])
def test_steps_and_blocks_are_replayed(
    source: str | None, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all buffers where they were when they were captured, while requests come and go."""
    replayed: set[tuple[int, int]] = set()  # layers, tokens

    class Replays(AddressCheck):
        def _replay(self, run: Any, cache: Mamba2Cache, *args: Any) -> None:
            replayed.add((len(cache.layers), self._ids.shape[1]))
            super()._replay(run, cache, *args)

    monkeypatch.setattr("mamba2_hf.models.batching.DecodeGraph", Replays)
    monkeypatch.setattr("mamba2_hf.models.batching.why_not", lambda model: None)
    model = with_heads("plain", 3) if source == "heads" else build("plain", tiny_model)
    ways: dict[str | None, dict[str, Any]] = {None: {}, "lookup": {"prompt_lookup_num_tokens": 3}}
    ways["heads"] = {"use_mtp": True}
    helped = helper(source, tiny_model, 3) if source in ("pure", "plain") else None
    guess = ways[source] if helped is None else {"assistant_model": helped}
    requests = [
        Request(prompt(length).repeat(2), {**BASE, "max_new_tokens": 6 + 3 * number})
        for number, length in enumerate(LENGTHS)
    ]
    ended = generate_batch(model, requests, slots=3, **guess)
    assert [each.tokens for each in ended] == [alone(model, request) for request in requests]
    layers = len(model.config.mixer_kinds)
    assert (layers, 4 if guess else 1) in replayed
    if helped is not None:
        assert (len(helped.config.mixer_kinds), 1) in replayed


def test_guesses_that_are_right_save_steps(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    ids = model.generate(prompt(9)[None], **{**BASE, "max_new_tokens": 80})[0]
    twin = copy.deepcopy(model)
    twin.generation_config.update(num_assistant_tokens=6, assistant_confidence_threshold=0.0)
    steps = []
    for guess in ({}, {"prompt_lookup_num_tokens": 6}, {"assistant_model": twin}):
        batch = ContinuousBatch(model, slots=2, **guess)
        batch.add(Request(ids, {**BASE, "max_new_tokens": 40}))
        steps.append(0)
        while not batch.idle:
            batch.step()
            steps[-1] += 1
    assert steps[0] >= 40
    assert max(steps[1:]) < 20


@on_each_device
def test_those_who_choose_alike_choose_together(device: str, tiny_model: Callable[..., Any]) -> None:
    """By one call for all of them, and with the random numbers of each."""
    model = tiny_model().to(device)
    ways: list[dict[str, Any]] = [
        {"temperature": 1.7, "top_k": 20, "top_p": 0.8},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.8},
        {"min_p": 0.05},
        {"typical_p": 0.9, "repetition_penalty": 1.5},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.8},
        {"do_sample": False, "no_repeat_ngram_size": 2},
    ]
    requests = [
        Request(prompt(5 + number), {**BASE, "do_sample": True, **own}, seed=number) for number, own in enumerate(ways)
    ]
    ended = generate_batch(model, requests, slots=len(ways))
    assert [each.tokens for each in ended] == [alone(model, request) for request in requests]


@pytest.mark.parametrize("own", [{}, {"do_sample": True, "temperature": 1.5, "top_k": 9}], ids=["greedy", "sampled"])
def test_rows_that_choose_alike_run_no_python_of_their_own(own: Any, tiny_model: Callable[..., Any]) -> None:
    """Beyond reading a list of tokens."""
    model = tiny_model()

    def calls(rows: int) -> int:
        batch, count = ContinuousBatch(model, slots=rows), 0
        for seed in range(rows):
            batch.add(Request(prompt(4, seed), {**BASE, **own}, seed=seed))
        batch.step()
        logits = batch._logits()
        batch._tokens(logits)

        def see(frame: Any, event: str, _: Any) -> None:
            nonlocal count
            count += event == "call"

        sys.setprofile(see)
        try:
            batch._tokens(logits)
        finally:
            sys.setprofile(None)
        return count

    assert calls(9) == calls(2)


@on_each_device
@pytest.mark.parametrize("ahead", [None, "lookup", "assistant"])
def test_a_row_without_numbers_ends_and_the_others_go_on(
    ahead: str | None, device: str, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(tie_word_embeddings=False).to(device)
    with torch.no_grad():
        model.backbone.embeddings.weight[60] = float("nan")
    guess = {"lookup": {"prompt_lookup_num_tokens": 3}, "assistant": {"assistant_model": model}, None: {}}[ahead]
    sampled = {**BASE, "do_sample": True}
    fine = Request(prompt(5), sampled, seed=3)
    requests = [Request([5, 60, 7], sampled), fine, Request([60], sampled), fine]
    ended = generate_batch(model, requests, slots=2, **guess)
    found = [(each.reason, len(each.tokens)) for each in ended]
    assert found == [("nan", 0), ("length", 8), ("nan", 0), ("length", 8)]
    assert ended[1].tokens == ended[3].tokens == alone(model, fine)
    assert generate_batch(model, requests[:2], slots=2, **guess) == ended[:2]  # its row stays free


@settings(max_examples=15)
@given(data=st.data())
def test_whenever_they_join_and_leave(data: st.DataObject, tiny_model: Callable[..., Any]) -> None:
    model = build(data.draw(st.sampled_from(["pure", "sliding", "rotary"])), tiny_model)
    guess: dict[str, Any] = {}
    if (source := data.draw(st.sampled_from([None, "lookup", "heads", "pure", "sliding"]))) == "lookup":
        guess = {"prompt_lookup_num_tokens": 2}
    elif source == "heads":
        model, guess = with_heads("rotary", 2), {"use_mtp": True}
    elif source is not None:
        guess = {"assistant_model": helper(source, tiny_model, 2)}
    batch = ContinuousBatch(model, slots=data.draw(st.integers(1, 3)), max_length=32, **guess)
    if data.draw(st.booleans()):  # as on a GPU
        batch._replays = lambda: True  # type: ignore[method-assign]
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


@pytest.mark.parametrize("own", [{}, {"repetition_penalty": 1.3}], ids=["by scores", "by text"])
@pytest.mark.parametrize("kind", ["pure", "rotary"])
def test_steps_overlap_with_what_python_makes_of_the_last_one(
    kind: str, own: Any, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for rows whose next token depends on that. They end by their lengths and by a token, and others join."""
    model, order = build(kind, tiny_model), []
    monkeypatch.setattr(ContinuousBatch, "_replays", lambda self: True)
    for owner, name in ((ContinuousBatch, "_logits"), (_Launched, "fetch")):
        run = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, run=run, name=name: order.append(name) or run(self))
    heard: list[int] = []
    requests = [
        Request(prompt(length), {**BASE, **own, "max_new_tokens": 3 + number % 4}, seed=number, on_token=heard.append)
        for number, length in enumerate(LENGTHS)
    ]
    end = alone(model, requests[3])[2]
    requests[3] = dataclasses.replace(requests[3], settings={**requests[3].settings, "eos_token_id": end})
    requests[4] = dataclasses.replace(requests[4], settings={**requests[4].settings, "do_sample": True})
    order.clear()
    ended = generate_batch(model, requests, slots=3)
    assert [each.tokens for each in ended] == [alone(model, request) for request in requests]
    assert sorted(heard) == sorted(token for each in ended for token in each.tokens)
    under_way = list(itertools.accumulate({"_logits": 1, "fetch": -1}[name] for name in order))
    assert max(under_way) == (1 if own else 2)
    assert own or under_way.count(2) > len(under_way) / 3  # half, but where all end together
    assert under_way[-1] == 0  # no step is for nobody


@on_each_device
def test_buffers_stay_where_they_are(device: str, tiny_model: Callable[..., Any]) -> None:
    """So that a captured step can be replayed for the life of a batch."""
    for model in (tiny_model(), make_hybrid("rotary"), make_hybrid("sliding")):
        batch = ContinuousBatch(model.to(device), slots=2, max_length=32)
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


@pytest.mark.parametrize("kind", ["pure", "plain"])
def test_a_length_with_the_prompt_wins_over_the_models_own(kind: str, tiny_model: Callable[..., Any]) -> None:
    model = build(kind, tiny_model)
    model.generation_config.max_new_tokens = 3
    own = {name: value for name, value in BASE.items() if name != "max_new_tokens"}
    found = generate_batch(model, [Request(prompt(length), {**own, "max_length": 12}) for length in (4, 9)])
    assert [len(ended.tokens) for ended in found] == [8, 3]
    assert found[0].tokens == alone(model, Request(prompt(4), BASE))
    assert len(generate_batch(model, [Request(prompt(4), own)])[0].tokens) == 3
    with pytest.raises(ArgumentError, match="max_length=9 leaves no room behind a prompt of 9 tokens"):
        generate_batch(model, [Request(prompt(9), {**own, "max_length": 9})])


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

    def drawn_with(*seeds: int | None) -> list[list[int]]:
        return [each.tokens for each in generate_batch(model, [Request(prompt(5), sampled, seed=s) for s in seeds])]

    first, second, again = drawn_with(1, 2, 1)
    assert first == again != second
    torch.manual_seed(0)
    drawn = drawn_with(None, None)
    torch.manual_seed(0)
    assert drawn == drawn_with(None, None)
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


# What is captured


def adapted(model: Any) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(target_modules=["in_proj", "out_proj"], init_lora_weights=False)
    return inject_adapter_in_model(config, model, "first").eval()


def switch(model: Any, on: bool) -> None:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(on)


def rescale(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.scaling["first"] *= 2


def flip(model: Any) -> None:
    """Other weights where the former were."""
    with torch.no_grad():
        model.backbone.embeddings.weight.copy_(model.backbone.embeddings.weight.flip(0))


def replace(model: Any) -> None:
    """Other weights somewhere else."""
    model.backbone.embeddings.weight.data = model.backbone.embeddings.weight.data.flip(0)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "weights moved": replace,
    "the same weights elsewhere": lambda model: setattr(
        model.lm_head, "weight", nn.Parameter(model.lm_head.weight.detach().clone())
    ),
    "another dtype": lambda model: model.to(torch.bfloat16),
    "an adapter": adapted,
    "an adapter off": lambda model: switch(adapted(model), False),
    "an adapter scaled": lambda model: rescale(adapted(model)),
    "a hook": lambda model: model.backbone.layers[1].register_forward_hook(lambda *_: None),
    "a forward": lambda model: setattr(model.backbone.norm_f, "forward", lambda x: x),
    "a part": lambda model: setattr(model, "lm_head", nn.Linear(32, 61, bias=False).to(model.device)),
    "a setting": lambda model: setattr(model.backbone.norm_f, "eps", 0.5),
    "training": lambda model: model.train(),
}


class TestModelWatch:
    def test_a_model_in_use_does_not_change(self, tiny_model: Callable[..., Any]) -> None:
        model = adapted(tiny_model())
        watch = ModelWatch(model)
        assert watch.changed()
        model.generate(prompt(4)[None], **BASE)
        flip(model)
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "lora_A" in name).mul_(2)
        assert not watch.moved()
        assert not watch.changed()

    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    def test_sees_what_a_graph_would_miss(self, change: Any, tiny_model: Callable[..., Any]) -> None:
        model = tiny_model()
        watch = ModelWatch(model)
        watch.changed()
        change(model)
        assert watch.changed()
        assert not watch.changed()

    def test_sees_what_adapters_are_set_to(self, tiny_model: Callable[..., Any]) -> None:
        model = adapted(tiny_model())
        watch = ModelWatch(model)
        watch.changed()
        for change in (lambda: switch(model, False), lambda: switch(model, True), lambda: rescale(model)):
            change()
            assert watch.changed()
            assert not watch.changed()

    def test_tells_apart_that_weights_were_written(self, tiny_model: Callable[..., Any]) -> None:
        model = tiny_model()
        watch = ModelWatch(model)
        watch.changed()
        for write, written in ((flip, True), (lambda model: model(prompt(4)[None]), False)):
            write(model)
            assert not watch.changed()
            assert watch.written == written

    def test_sees_at_once_that_weights_moved(self, tiny_model: Callable[..., Any]) -> None:
        model = tiny_model()
        watch = ModelWatch(model)
        watch.changed()
        replace(model)
        assert watch.moved()


def test_says_why_it_goes_without(tiny_model: Callable[..., Any]) -> None:
    def reason(model: Any, **options: Any) -> str | None:
        batch = ContinuousBatch(model, **options)
        assert batch.why_not_captured == ("it was asked for" if options else None)
        batch.add(Request(prompt(3), BASE))
        assert len(run(batch)) == 1
        return batch.why_not_captured

    assert reason(tiny_model()) == "the model is on cpu, not on one GPU"
    assert reason(tiny_model(), captured=False) == "it was asked for"


class TestOnAGPU:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("kind", ["pure", *ARCHITECTURES])
    def test_free_rows_those_that_leave_and_those_that_join(self, kind: str, tiny_model: Callable[..., Any]) -> None:
        model = build(kind, tiny_model).cuda()
        batch = ContinuousBatch(model, slots=4, max_length=64)
        requests = {}
        for length, most in ((3, 40), (9, 5)):  # two rows stay free
            request = Request(prompt(length), {**BASE, "max_new_tokens": most})
            requests[batch.add(request)] = request
        ended = [each for _ in range(12) for each in batch.step()]
        assert batch.cache.graph.is_captured
        graph = batch.cache.graph._graph
        for length in (17, 1, 20, 4, 2):
            request = Request(prompt(length), BASE)
            requests[batch.add(request)] = request
        batch.step()
        assert batch.cancel(3)
        ended += run(batch)
        assert batch.cache.graph._graph is graph
        assert batch.why_not_captured is None
        assert sorted(each.request for each in ended) == list(range(7))
        for each in ended:
            expected = alone(model, requests[each.request])
            assert each.tokens == expected[: len(each.tokens)]
            assert (each.request, each.reason) in ((3, "cancelled"), (each.request, "length"))

    @pytest.mark.parametrize("kind", ["pure", "sliding"])
    def test_a_bf16_state(self, kind: str, tiny_model: Callable[..., Any]) -> None:
        """Its rounding hides no other: the same as without a graph, bit for bit."""
        found = []
        for captured in (True, False):
            model = build(kind, tiny_model).cuda()
            batch = ContinuousBatch(model, slots=2, max_length=64, state_dtype=torch.bfloat16, captured=captured)
            for length in LENGTHS:
                batch.add(Request(prompt(length), BASE))
            found.append(run(batch))
            assert (batch.cache.graph is not None and batch.cache.graph.is_captured) == captured
        assert found[0] == found[1]

    @pytest.mark.parametrize("change", [flip, *CHANGES.values()], ids=["other weights", *CHANGES])
    def test_the_model_changes_between_requests(self, change: Any, tiny_model: Callable[..., Any]) -> None:
        found = []
        for captured in (True, False):
            model = tiny_model().cuda()
            batch = ContinuousBatch(model, slots=2, captured=captured)
            for length in (4, 6, 5):
                batch.add(Request(prompt(length), BASE))
            before, graph = run(batch), batch.cache.graph
            torch.manual_seed(2)
            change(model)
            for length in (4, 6, 5):
                batch.add(Request(prompt(length), BASE))
            found.append([before, run(batch)])
            if captured:
                assert graph.is_captured
                assert (batch.cache.graph is graph) == (change is flip)
                hooked = change in (CHANGES["a hook"], CHANGES["training"], CHANGES["a forward"])
                assert (batch.why_not_captured is not None) == hooked
                assert hooked or batch.cache.graph.is_captured
        assert found[0] == found[1]

    def test_weights_that_move_between_two_steps_are_found(self, tiny_model: Callable[..., Any]) -> None:
        found = []
        for captured in (True, False):
            model = tiny_model().cuda()
            batch = ContinuousBatch(model, slots=2, captured=captured)
            batch.add(Request(prompt(4), {**BASE, "max_new_tokens": 24}))
            for step in range(12):
                batch.step()
                if step == 5:
                    model.lm_head.weight.data = model.lm_head.weight.data.flip(0)
            found.append(run(batch)[0].tokens)
            assert (batch.cache.graph is not None) == captured
        assert found[0] == found[1]

    def test_goes_through_a_graph_again_once_a_hook_is_gone(self, tiny_model: Callable[..., Any]) -> None:
        model, calls = tiny_model().cuda(), []
        batch = ContinuousBatch(model, slots=2)
        handle = model.backbone.layers[1].register_forward_hook(lambda *_: calls.append(1))
        batch.add(Request(prompt(1), BASE))
        run(batch)
        assert len(calls) == 8
        assert batch.why_not_captured == "backbone.layers.1 is hooked, which a graph would skip"
        handle.remove()
        batch.add(Request(prompt(1), BASE))
        run(batch)
        assert len(calls) == 8
        assert batch.cache.graph.is_captured

    def test_a_model_that_trains_between_steps(self, tiny_model: Callable[..., Any]) -> None:
        """As a policy does between rollouts: its weights change in place, and steps in training mode go one by one."""
        model = tiny_model().cuda()
        batch = ContinuousBatch(model, slots=2)
        batch.add(Request(prompt(4), {**BASE, "max_new_tokens": 30}))
        for _ in range(4):
            batch.step()
        graph = batch.cache.graph._graph
        assert graph is not None
        model.train()
        batch.step()
        model.eval()
        (ended,) = run(batch)
        assert batch.cache.graph._graph is graph
        assert ended.tokens == alone(model, Request(prompt(4), {**BASE, "max_new_tokens": 30}))

    def test_waits_for_nothing_but_the_tokens_however_many_rows_sample(self, tiny_model: Callable[..., Any]) -> None:
        model = tiny_model().cuda()
        own = ({"temperature": 2.0, "top_p": 0.9}, {"top_k": 9}, {"repetition_penalty": 1.2}, {"min_p": 0.1})

        def waits(rows: int) -> int:
            batch = ContinuousBatch(model, slots=4)
            for settings_of_one in own[:rows]:
                batch.add(Request(prompt(4), {**BASE, "do_sample": True, **settings_of_one, "max_new_tokens": 20}))
            for _ in range(4):
                batch.step()
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                batch.step()
                torch.cuda.set_sync_debug_mode("default")
            return sum("called a synchronizing" in str(warning.message) for warning in found)

        assert waits(4) == waits(1) == 0  # events are not counted, and there is one a step


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
    with pytest.raises(ArgumentError, match="prompt_lookup_num_tokens is 0"):
        ContinuousBatch(tiny_model(), prompt_lookup_num_tokens=0)
    with pytest.raises(ArgumentError, match="prompt_lookup_num_tokens=2 and batch_invariant=True"):
        ContinuousBatch(tiny_model(), prompt_lookup_num_tokens=2, batch_invariant=True)
    with pytest.raises(ArgumentError, match="use_mtp=True: this model has no heads"):
        ContinuousBatch(model, use_mtp=True)
    with pytest.raises(ArgumentError, match="use_mtp=True and prompt_lookup_num_tokens=2 both guess ahead"):
        ContinuousBatch(with_heads("plain", 2), max_length=9, use_mtp=True, prompt_lookup_num_tokens=2)
    with pytest.raises(ArgumentError, match="use_mtp=True and batch_invariant=True"):
        ContinuousBatch(with_heads("plain", 2), max_length=9, use_mtp=True, batch_invariant=True)
    with pytest.raises(ArgumentError, match="assistant_model and batch_invariant=True"):
        ContinuousBatch(model, assistant_model=tiny_model(seed=1), batch_invariant=True)
    with pytest.raises(ArgumentError, match="assistant_model and prompt_lookup_num_tokens=2 both guess ahead"):
        ContinuousBatch(model, assistant_model=tiny_model(seed=1), prompt_lookup_num_tokens=2)
    with pytest.raises(ArgumentError, match="assistant_model knows 70 tokens and the model 61"):
        ContinuousBatch(model, assistant_model=tiny_model(vocab_size=70))
    with pytest.raises(ArgumentError, match=r"num_assistant_tokens of .* that guesses is 0: at least 1"):
        ContinuousBatch(model, assistant_model=helper("pure", tiny_model, 0))
    with pytest.raises(ArgumentError, match="assistant_model is a Linear"):
        ContinuousBatch(model, assistant_model=nn.Linear(2, 2))
    with pytest.raises(CacheError, match="needs max_length"):
        ContinuousBatch(model, assistant_model=hybrid)
    with pytest.raises(ArgumentError, match="assistant_model or use_mtp to the batch"):
        ContinuousBatch(tiny_model()).add(Request([5], {**BASE, "prompt_lookup_num_tokens": 2}))
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
