"""States that prompts go on from: whatever is kept, each request gets what it gets alone, and nothing is read twice."""

from __future__ import annotations

import copy
import functools
from bisect import insort
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from devices import on_each_device
from hybrids import ARCHITECTURES, make_hybrid
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from mamba2_hf import Completion, ContinuousBatch, Mamba2Cache, PrefixCache, Request, generate_batch
from mamba2_hf.errors import ArgumentError, CacheError
from mamba2_hf.models.cache import CacheRow, KeptRow
from mamba2_hf.models.prefix_cache import shared_tokens, text_key

BASE: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
ROOM = 2**30


def tokens(length: int, seed: int) -> list[int]:
    return torch.randint(3, 60, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


def alone(model: Any, request: Request) -> list[int]:
    """What ``generate`` writes."""
    if request.seed is not None:
        torch.manual_seed(request.seed)
    ids = torch.as_tensor(request.input_ids)[None].to(model.device)
    return model.generate(ids, **request.settings)[0, ids.shape[1] :].tolist()


def run(batch: ContinuousBatch, requests: Sequence[Request] = ()) -> list[Completion]:
    """Steps until it is idle; what has ended, by number."""
    for request in requests:
        batch.add(request)
    ended = []
    while not batch.idle:
        ended += batch.step()
        assert batch.prefix_cache.stats.nbytes <= batch.prefix_cache.max_bytes
    return sorted(ended, key=lambda each: each.request)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[tuple[int, ...]]]:
    """Of a model, the shapes of the ids that its forwards get from here on."""

    def watch(model: Any) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        embed = model.backbone._embed
        monkeypatch.setattr(model.backbone, "_embed", lambda ids: shapes.append(tuple(ids.shape)) or embed(ids))
        return shapes

    return watch


@pytest.fixture(scope="module")
def in_fp64(tiny_model: Callable[..., Any]) -> Callable[[str], Any]:
    """A model in fp64, where rounding decides nothing."""

    @functools.cache
    def build(kind: str) -> Any:
        return (tiny_model() if kind == "pure" else make_hybrid(kind)).double()

    return build


@pytest.fixture(scope="module")
def known_alone(in_fp64: Callable[[str], Any]) -> Callable[..., tuple[int, ...]]:
    @functools.cache
    def find(kind: str, ids: tuple[int, ...], new: int) -> tuple[int, ...]:
        return tuple(alone(in_fp64(kind), Request(list(ids), {**BASE, "max_new_tokens": new})))

    return find


@settings(max_examples=40)
@given(data=st.data())
def test_any_order_of_prompts_that_begin_alike(data: st.DataObject, in_fp64: Any, known_alone: Any) -> None:
    """Whatever the budget, whenever they join, are cancelled, or go on from what was written."""
    kind = data.draw(st.sampled_from(["pure", "sliding", "rotary", "parallel", "shared"]))
    model = in_fp64(kind)
    one = PrefixCache(ROOM)
    run(ContinuousBatch(model, slots=1, max_length=99, prefix_cache=one), [Request(tokens(65, 0), BASE)])
    budget = int(one.stats.nbytes / one.stats.states * data.draw(st.sampled_from([0, 1, 2, 3, 5, 100])))
    kept = PrefixCache(budget, min_tokens=data.draw(st.sampled_from([1, 2, 5])))
    batch = ContinuousBatch(model, slots=data.draw(st.integers(1, 4)), max_length=64, prefix_cache=kept)
    if data.draw(st.booleans()):  # as on a GPU
        batch._replays = lambda: True  # type: ignore[method-assign]
    texts = [tokens(length, seed) for seed, length in enumerate((1, 2, 7, 12))]
    requests: dict[int, tuple[list[int], int]] = {}
    ended: dict[int, Completion] = {}
    for _ in range(data.draw(st.integers(1, 10))):
        for _ in range(data.draw(st.integers(0, 4))):
            first = data.draw(st.sampled_from(texts))
            ids = first[: data.draw(st.integers(1, len(first)))]
            ids = ids + tokens(data.draw(st.integers(0, 3)), data.draw(st.integers(0, 2)))
            new = data.draw(st.integers(1, 4))
            requests[batch.add(Request(ids, {**BASE, "max_new_tokens": new}))] = ids, new
        if requests and data.draw(st.integers(0, 4)) == 0:
            batch.cancel(data.draw(st.sampled_from(sorted(requests))))
        ended |= {each.request: each for each in batch.step()}
        texts += [[*requests[number][0], *each.tokens][:40] for number, each in ended.items()][-3:]
        assert kept.stats.nbytes <= budget
    ended |= {each.request: each for each in run(batch)}
    assert ended.keys() == requests.keys()
    for number, each in ended.items():
        expected = known_alone(kind, tuple(requests[number][0]), requests[number][1])
        if each.reason == "cancelled":
            expected = expected[: len(each.tokens)]
        assert tuple(each.tokens) == expected


@on_each_device
@pytest.mark.parametrize("kind", ["pure", *ARCHITECTURES])
def test_what_prompts_begin_with_is_read_once(kind: str, device: str, in_fp64: Any) -> None:
    model = in_fp64(kind).to(device)
    shared = tokens(80, 0)
    requests = [Request([*shared, 3 + number, *tokens(number % 3 * 5, number)], BASE) for number in range(7)]
    kept = PrefixCache(ROOM)
    ended = generate_batch(model, requests, slots=3, prefix_cache=kept)
    assert [each.tokens for each in ended] == [alone(model, request) for request in requests]
    stats = kept.stats
    assert stats.tokens_read == 80 + sum(len(request.input_ids) - 81 for request in requests)
    assert (stats.hits, stats.misses) == (6, 1)
    assert stats.tokens_read + stats.tokens_saved == sum(len(request.input_ids) - 1 for request in requests)
    assert [each.tokens for each in generate_batch(model, requests, prefix_cache=kept)] == [e.tokens for e in ended]
    assert kept.stats.tokens_read == stats.tokens_read
    assert kept.stats.hits == 13


@pytest.mark.parametrize("kind", ["pure", "sliding", "rotary"])
def test_the_next_turn_of_a_chat(kind: str, in_fp64: Any) -> None:
    model, kept = in_fp64(kind), PrefixCache(ROOM, min_tokens=8)
    text: list[int] = []
    for turn in range(4):
        text += tokens(10 + turn, turn)
        before = kept.stats
        request = Request(list(text), BASE)
        (ended,) = generate_batch(model, [request], max_length=99, prefix_cache=kept)
        assert ended.tokens == alone(model, request)
        # What was written was fed but for its last token; a prompt is read but for its last.
        assert kept.stats.tokens_read - before.tokens_read == 10 + turn - (turn == 0)
        text += ended.tokens


def test_the_next_turn_after_one_that_ended_before_others(in_fp64: Any) -> None:
    """Where the next step began before that was known, the state is behind the last token, too."""
    model = in_fp64("pure")
    first, other = tokens(10, 0), Request(tokens(9, 1), {**BASE, "max_new_tokens": 9})
    end = alone(model, Request(first, BASE))[2]
    for overlapping in (False, True):
        kept = PrefixCache(ROOM, min_tokens=8)
        batch = ContinuousBatch(model, slots=2, prefix_cache=kept)
        batch._replays = lambda overlapping=overlapping: overlapping  # type: ignore[method-assign,misc]
        ended, _ = run(batch, [Request(first, {**BASE, "eos_token_id": end}), other])
        before, turn = kept.stats.tokens_read, Request([*first, *ended.tokens, 5, 6, 7], BASE)
        (following,) = run(batch, [turn])
        assert following.tokens == alone(model, turn)
        assert kept.stats.tokens_read - before == 2 + (not overlapping)


def test_a_prompt_that_parts_from_a_text_that_was_read(in_fp64: Any) -> None:
    """The first that begins like it reads on from there, and from the second on it is not read again."""
    model, kept, shared = in_fp64("pure"), PrefixCache(ROOM, min_tokens=8), tokens(20, 0)
    read = []
    for number in range(3):
        before = kept.stats.tokens_read
        generate_batch(model, [Request([*shared, 3 + number, 5], BASE)], prefix_cache=kept)
        read.append(kept.stats.tokens_read - before)
    assert read == [21, 21, 1]


def test_prompts_that_part_again_and_again(in_fp64: Any) -> None:
    """A system prompt, examples behind it and questions behind those: each is read once, whatever else is there."""
    model, kept = in_fp64("pure"), PrefixCache(ROOM, min_tokens=8)
    system = tokens(30, 0)
    examples = [[3 + number, *tokens(20, number)] for number in range(2)]
    requests = [Request([*system, *examples[number % 2], 3 + number // 2, 7], BASE) for number in (0, 3, 1, 2, 5, 4, 6)]
    ended = generate_batch(model, requests, slots=2, prefix_cache=kept)
    assert [each.tokens for each in ended] == [alone(model, request) for request in requests]
    assert kept.stats.tokens_read == 30 + 2 * 21 + 7


def test_a_few_tokens_in_common_are_not_worth_a_state(in_fp64: Any) -> None:
    kept = PrefixCache(ROOM)
    requests = [Request([3, 4, 5, number, *tokens(70, number)], BASE) for number in range(6, 12)]
    generate_batch(in_fp64("pure"), requests, prefix_cache=kept)
    assert kept.stats.hits == kept.stats.tokens_saved == 0
    assert kept.stats.states == 12  # at the ends of prompts and of texts


def test_those_used_least_recently_go_first(in_fp64: Any) -> None:
    model, probe = in_fp64("pure"), PrefixCache(ROOM, min_tokens=8)
    requests = [Request(tokens(20, seed), BASE) for seed in range(4)]
    generate_batch(model, requests[:1], prefix_cache=probe)
    assert probe.stats.states == 2  # at the end of the prompt and of the text
    kept = PrefixCache(2 * probe.stats.nbytes, min_tokens=8)

    def read(number: int) -> int:
        before = kept.stats.tokens_read
        generate_batch(model, [requests[number]], prefix_cache=kept)
        assert kept.stats.nbytes <= kept.max_bytes
        return kept.stats.tokens_read - before

    assert [read(0), read(1), read(0), read(2), read(0), read(1)] == [19, 19, 0, 19, 0, 19]
    assert kept.stats.evicted == 4
    kept.clear()
    assert (kept.stats.states, kept.stats.nbytes) == (0, 0)
    assert read(0) == 19
    state = probe.stats.nbytes // 2
    least = PrefixCache(state, min_tokens=8)
    ended = generate_batch(model, requests, prefix_cache=least)
    assert [each.tokens for each in ended] == [alone(model, request) for request in requests]
    assert (least.stats.states, least.stats.evicted) == (1, 7)
    with pytest.raises(
        ArgumentError, match=rf"max_bytes={state // 2}, and one state of this model takes \d+: make room"
    ):
        generate_batch(model, requests, prefix_cache=PrefixCache(state // 2))


def test_one_that_is_used_outlives_those_that_join_with_it(in_fp64: Any) -> None:
    """However many states of their own they leave."""
    model, shared = in_fp64("pure"), tokens(40, 0)
    requests = [Request([*shared, 3 + number, *tokens(9, number)], BASE) for number in range(30)]
    probe = PrefixCache(ROOM)
    generate_batch(model, [Request(tokens(70, 1), {**BASE, "max_new_tokens": 1})], prefix_cache=probe)
    kept = PrefixCache(6 * probe.stats.nbytes // probe.stats.states, min_tokens=8)
    generate_batch(model, requests, slots=4, prefix_cache=kept)
    assert kept.stats.tokens_read == 40 + 30 * 9
    assert kept.stats.evicted > 0


def test_more_texts_than_there_is_room_for(in_fp64: Any) -> None:
    """Where each would displace the next before it comes again, some stay, and are found."""
    model, probe = in_fp64("pure"), PrefixCache(ROOM, min_tokens=8)
    requests = [Request(tokens(20, seed), BASE) for seed in range(24)]
    expected = [each.tokens for each in generate_batch(model, requests, prefix_cache=probe)]
    kept = PrefixCache(8 * probe.stats.nbytes // probe.stats.states, min_tokens=8)
    hits = []
    for _ in range(4):
        found = [each.tokens for request in requests for each in generate_batch(model, [request], prefix_cache=kept)]
        assert found == expected
        hits.append(kept.stats.hits)
    assert hits[0] == 0
    assert hits[-1] > hits[1]
    assert kept.stats.states == 8
    assert kept.stats.skipped > kept.stats.evicted


def test_all_are_kept_again_once_one_was_found(in_fp64: Any) -> None:
    model, probe = in_fp64("pure"), PrefixCache(ROOM, min_tokens=8)
    requests = [Request(tokens(20, seed), BASE) for seed in range(40)]
    generate_batch(model, requests[:1], prefix_cache=probe)
    kept = PrefixCache(8 * probe.stats.nbytes // probe.stats.states, min_tokens=8)
    generate_batch(model, requests[:12], prefix_cache=kept)
    skipped = kept.stats.skipped
    assert skipped > 0
    while not kept.stats.hits:  # one is kept in the end of those that come twice
        again = requests.pop()
        for _ in range(2):
            generate_batch(model, [again], prefix_cache=kept)
    assert kept.stats.skipped > skipped
    skipped = kept.stats.skipped
    for request in requests[12:15]:
        generate_batch(model, [request], prefix_cache=kept)
    assert kept.stats.skipped == skipped


def test_changed_weights_and_adapters_are_noticed(in_fp64: Any, tiny_model: Any) -> None:
    model, kept = tiny_model(), PrefixCache(ROOM, min_tokens=8)
    request = Request(tokens(20, 0), BASE)

    def is_known() -> bool:
        before = kept.stats.hits
        (ended,) = generate_batch(model, [request], prefix_cache=kept)
        assert ended.tokens == alone(model, request)
        return kept.stats.hits > before

    assert not is_known()
    assert is_known()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.tensor([tokens(20, 0)]), labels=torch.tensor([tokens(20, 0)])).loss.backward()
    optimizer.step()
    assert not is_known()
    assert is_known()
    inject_adapter_in_model(LoraConfig(target_modules=["in_proj"], init_lora_weights=False), model, "first").eval()
    assert not is_known()
    assert is_known()


def test_a_model_that_changes_while_requests_wait(tiny_model: Any) -> None:
    """What was read ahead of its slot is read again, and a text that was begun before is not kept."""
    model, kept = tiny_model(), PrefixCache(ROOM, min_tokens=4)
    batch = ContinuousBatch(model, slots=1, prefix_cache=kept)
    requests = [Request(tokens(9, seed), BASE) for seed in range(4)]
    for request in requests:
        batch.add(request)
    batch.step()
    assert batch.waiting == 3
    with torch.no_grad():
        model.backbone.embeddings.weight.copy_(model.backbone.embeddings.weight.flip(0))
    (_, *others) = run(batch)
    assert [each.tokens for each in others] == [alone(model, request) for request in requests[1:]]


# How prompts are read


@pytest.mark.parametrize("kept", [0, ROOM])
def test_those_that_wait_are_read_in_one_call(kept: int, in_fp64: Any, forwards: Any) -> None:
    model = in_fp64("pure")
    batch = ContinuousBatch(model, slots=4, prefix_cache=PrefixCache(kept))
    shapes = forwards(model)
    requests = [Request(tokens(length, 0), BASE) for length in (5, 9, 1, 20, 3, 7, 12)]
    ended = run(batch, requests)
    reads = [shape for shape in shapes if shape[1] > 1]
    assert len(reads) == 1  # with those that have no slot yet
    assert [each.tokens for each in ended] == [alone(model, request) for request in requests]


def test_calls_hold_so_many_rows_and_tokens(in_fp64: Any, forwards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_fp64("pure")
    monkeypatch.setattr("mamba2_hf.models.prefill.TOKENS_AT_ONCE", 512)
    monkeypatch.setattr("mamba2_hf.models.batching._ROWS_AT_ONCE", (16, 16))
    shapes = forwards(model)
    requests = [Request(tokens(1 + length, 1), {**BASE, "max_new_tokens": 1}) for length in (*range(2, 21), 700, 60)]
    ended = run(ContinuousBatch(model, slots=21), requests)
    assert [shape for shape in shapes if shape[1] > 1] == [(16, 17), (4, 60), (1, 512), (1, 188)]
    assert [each.tokens for each in ended] == [alone(model, request) for request in requests]


@on_each_device
@pytest.mark.parametrize("kind", ["pure", *ARCHITECTURES])
def test_a_call_is_cut_where_memory_is_short(
    kind: str, device: str, in_fp64: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into pieces, of which some rows get nothing but padding."""
    model = in_fp64(kind).to(device)
    monkeypatch.setattr("mamba2_hf.models.prefill.tokens_at_once", lambda *_: 3)
    shared = tokens(11, 0)
    prompts = [[*shared, 5, 6], tokens(1, 1), [*shared, *tokens(9, 2)], tokens(4, 3), shared[:3], [*shared, 9, 5]]
    requests = [Request(ids, BASE) for ids in prompts]
    for kept in (PrefixCache(0), PrefixCache(ROOM, min_tokens=2)):
        ended = generate_batch(model, requests, slots=4, prefix_cache=kept)
        assert [each.tokens for each in ended] == [alone(model, request) for request in requests]


@on_each_device
@pytest.mark.parametrize("kind", ["pure", *ARCHITECTURES])
def test_rows_without_numbers_leave_the_others_alone(kind: str, device: str, tiny_model: Any) -> None:
    """Also those that are read with them, and those whose prompts begin like theirs."""
    model = (tiny_model(tie_word_embeddings=False) if kind == "pure" else make_hybrid(kind)).double().to(device)
    with torch.no_grad():
        model.get_input_embeddings().weight[60] = float("nan")
        if model.lm_head.weight is model.get_input_embeddings().weight:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.nan_to_num())
    sampled, shared = {**BASE, "do_sample": True, "suppress_tokens": [60]}, tokens(6, 0)
    prompts = [[*shared, 4], [*shared, 60, 7, 8], [*shared, 9, 5], [60], [60, 5], tokens(9, 1), tokens(2, 1), [5]]
    requests = [Request(ids, sampled, seed=number) for number, ids in enumerate(prompts)]
    for kept in (PrefixCache(0), PrefixCache(ROOM, min_tokens=2)):
        for slots in (3, 8):
            ended = generate_batch(model, requests, slots=slots, prefix_cache=kept)
            for request, each in zip(requests, ended, strict=True):
                if 60 in request.input_ids:
                    assert (each.reason, each.tokens) == ("nan", [])
                else:
                    assert (each.reason, each.tokens) == ("length", alone(model, request))


def test_an_empty_queue_one_token_and_rows_that_end_as_they_join(in_fp64: Any) -> None:
    for kind in ("pure", "rotary"):
        model = in_fp64(kind)
        batch = ContinuousBatch(model, slots=2, max_length=16, prefix_cache=PrefixCache(ROOM, min_tokens=1))
        assert batch.step() == []
        requests = [Request(ids, {**BASE, "max_new_tokens": 1}) for ids in ([5], [5], [5, 6], [5, 6, 7], [6])]
        assert [each.tokens for each in run(batch, requests)] == [alone(model, request) for request in requests]
        assert batch.step() == []
        numbers = [batch.add(request) for request in requests]
        assert all(batch.cancel(number) for number in numbers)
        assert {each.reason for each in batch.step()} == {"cancelled"}
        assert batch.idle
        end = alone(model, requests[0])[0]
        request = Request([5], {**BASE, "eos_token_id": end})
        (ended,) = run(batch, [request])
        assert (ended.tokens, ended.reason) == ([end], "eos")


def many(count: int, seed: int) -> list[Request]:
    """Requests of random lengths, some of which begin alike, greedy and sampled."""
    draw = torch.Generator().manual_seed(seed)

    def number(most: int) -> int:
        return int(torch.randint(most, (), generator=draw))

    systems = [tokens(length, 9) for length in (0, 0, 8, 25)]
    found = []
    for index in range(count):
        own: dict[str, Any] = {"max_new_tokens": 1 + number(5)}
        if number(2):
            own |= {"do_sample": True, "temperature": 1.3} | ({"top_k": 9} if number(2) else {})
        ids = systems[number(4)] + tokens(1 + number(24), number(50))
        found.append(Request(ids, {**BASE, **own}, seed=index))
    return found


@pytest.mark.parametrize(
    ("kind", "count", "overlapping"),
    [
        ("pure", 200, False),
        ("sliding", 100, True),
        pytest.param("pure", 1000, True, marks=pytest.mark.slow),
        pytest.param("rotary", 1000, False, marks=pytest.mark.slow),
    ],
)
def test_many_requests(kind: str, count: int, overlapping: bool, in_fp64: Any) -> None:
    model, requests = in_fp64(kind), many(count, seed=1)
    batch = ContinuousBatch(model, slots=16, max_length=64, prefix_cache=PrefixCache(10**6, min_tokens=4))
    batch._replays = lambda: overlapping  # type: ignore[method-assign]
    ended: list[Completion] = []
    for number, request in enumerate(requests):
        batch.add(request)
        if number % 7 == 3:
            batch.cancel(number - 2)
        if number % 5 == 0:
            ended += batch.step()
    ended = sorted([*ended, *run(batch)], key=lambda each: each.request)
    assert [each.request for each in ended] == list(range(count))
    for each, request in zip(ended, requests, strict=True):
        expected = alone(model, request)
        assert each.tokens == (expected[: len(each.tokens)] if each.reason == "cancelled" else expected)
    stats = batch.prefix_cache.stats
    assert min(stats.hits, stats.evicted, stats.tokens_saved) > 0


# What is refused


def test_refuses_what_it_cannot_keep(tiny_model: Any) -> None:
    model = tiny_model()
    for given_bytes in (-1, 1.5, True, "8GB"):
        with pytest.raises(ArgumentError, match=r"max_bytes is .*: expected an int of at least 0"):
            PrefixCache(given_bytes)
    with pytest.raises(ArgumentError, match="min_tokens is 0: expected an int of at least 1"):
        PrefixCache(10, min_tokens=0)
    with pytest.raises(ArgumentError, match=r"prefix_cache is 1000: expected a mamba2_hf.PrefixCache"):
        ContinuousBatch(model, prefix_cache=1000)
    kept = PrefixCache(ROOM)
    ContinuousBatch(model, prefix_cache=kept)
    with pytest.raises(ArgumentError, match=r"states of another model.* make a PrefixCache for each"):
        generate_batch(tiny_model(), [], prefix_cache=kept)
    with pytest.raises(ArgumentError, match=r"states of state_dtype=None, .*state_dtype=torch.bfloat16"):
        ContinuousBatch(model, prefix_cache=kept, state_dtype=torch.bfloat16)


def test_gathers_rows_of_different_lengths(in_fp64: Any) -> None:
    model = in_fp64("sliding")
    texts = [tokens(length, 0) for length in (9, 3)]
    one, other = (model.read(torch.tensor([text])) for text in texts)
    cache = Mamba2Cache(model.config)
    rows = [None, CacheRow(one, 0, 9), CacheRow(one, 0, 9), CacheRow(other, 0, 3), None, CacheRow(one, 0, 9)]
    cache.gather(rows)
    assert (cache.batch_size, cache.seen_tokens, cache.padding.tolist()) == (6, 9, [9, 0, 0, 6, 9, 0])
    assert cache.finite_rows() == [True] * 6
    more = tokens(4, 7)
    found = model(torch.tensor([more] * 6), past_key_values=cache).logits
    for row, text in enumerate([[], texts[0], *texts, [], texts[0]]):
        torch.testing.assert_close(found[row], model(torch.tensor([text + more])).logits[0, -4:])
    with pytest.raises(CacheError, match="needs an empty cache"):
        cache.gather([None])


@pytest.mark.parametrize("kind", ["pure", "sliding"])
@given(
    moves=st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(["empty", "row", "kept"]), st.integers(0, 3)), max_size=6
    )
)
@settings(max_examples=20, deadline=None)
def test_rows_move_between_caches_alike_however_states_lie(kind: str, moves: list[Any], in_fp64: Any) -> None:
    """Side by side, where a row of all layers is copied at once, and each on its own."""
    model = in_fp64(kind)
    with torch.no_grad():
        other = model(torch.tensor([tokens(5, 1), tokens(5, 2), tokens(5, 3), tokens(5, 4)])).past_key_values

    def run(side_by_side: bool) -> tuple[Tensor, list[bool]]:
        into = Mamba2Cache(model.config, static=True, max_length=16)
        source = Mamba2Cache(model.config, defer_writes=False)
        if side_by_side:
            into.lay_side_by_side()
            source.lay_side_by_side()
        with torch.no_grad():
            model(torch.tensor([[3], [4], [5]]), past_key_values=into)
            source.gather([CacheRow(other, row, 5) for row in range(4)])
            lengths = [1, 1, 1]
            for row, what, place in moves:
                given = None if what == "empty" else CacheRow(source, place, 5)
                if what == "kept":
                    given = CacheRow(KeptRow(given, model.config, None).cache, 0, 5)
                into.put(row, given)
                lengths[row] = 0 if given is None else 5
            into.set_lengths(lengths)
            logits = model(torch.tensor([[7], [8], [9]]), past_key_values=into).logits
        return logits, [cache.whole("conv", "held") is not None for cache in (into, source)]

    (found, lie), (expected, elsewhere) = run(True), run(False)
    assert torch.equal(found, expected)
    assert lie == [True, True]
    assert elsewhere == [False, False]


def test_a_buffer_that_lies_elsewhere_is_found_there(in_fp64: Any) -> None:
    model = in_fp64("pure")
    with torch.no_grad():
        caches = [Mamba2Cache(model.config, static=True) for _ in range(2)]
        caches[0].lay_side_by_side()
        for cache in caches:
            model(torch.tensor([[3], [4]]), past_key_values=cache)
            cache.layers[-1].replace(held=cache.layers[-1].held.clone())
            cache.put(0, None)
            cache.put(1, model(torch.tensor([[5, 6]])).past_key_values)
        kept = [KeptRow(CacheRow(cache, 1, 2), model.config, None) for cache in caches]
        found, expected = (model(torch.tensor([[7], [8]]), past_key_values=cache).logits for cache in caches)
        assert torch.equal(found, expected)
        assert kept[0].nbytes == kept[1].nbytes == kept[0].cache.nbytes
        again = [model(torch.tensor([[8]]), past_key_values=each.cache).logits for each in kept]
        assert torch.equal(*again)
        torch.testing.assert_close(again[0][0], found[1])
    copied = copy.deepcopy(caches[0])
    assert copied.layers[0].conv.data_ptr() != caches[0].layers[0].conv.data_ptr()


@given(
    texts=st.lists(st.lists(st.sampled_from([0, 1, 256]), max_size=6).map(text_key), max_size=8, unique=True),
    data=st.data(),
)
def test_finds_what_texts_begin_with(texts: list[bytes], data: st.DataObject) -> None:
    """As a search through all of them does."""
    text = text_key(data.draw(st.lists(st.sampled_from([0, 1, 256]), min_size=1, max_size=7)))
    kept = PrefixCache(ROOM, min_tokens=1)
    for number, other in enumerate(texts):
        if other:
            kept._new[other] = SimpleNamespace(cache=number, nbytes=1)
            insort(kept._texts, other)
    found = kept.find(text)
    longest = max((other for other in texts if other and text.startswith(other)), key=len, default=None)
    assert (None if found is None else texts[found.cache]) == longest
    branches = {shared_tokens(text, other) for other in texts if other != text} - {0}
    assert kept.stops(text, 0, sorted(texts)) == [*sorted(branches - {len(text) // 4}), len(text) // 4]


def test_how_much_texts_have_in_common() -> None:
    assert shared_tokens(text_key([1, 2, 3]), text_key([1, 2, 4, 5])) == 2
    assert shared_tokens(text_key([256]), text_key([1])) == shared_tokens(b"", text_key([1])) == 0
    assert shared_tokens(text_key([7, 2**31]), text_key([7, 2**31])) == 2
