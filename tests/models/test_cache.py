"""The cache: any split of the tokens gives the full forward, and nothing else leaks between calls."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hybrids import make_hybrid
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, StaticCache

from mamba2_hf import Mamba2Cache, Mamba2ForCausalLM, Mamba2Model, Request, generate_batch
from mamba2_hf.errors import ArgumentError, CacheError

TOKENS = 24


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any]) -> Mamba2ForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 61, (3, TOKENS), generator=torch.Generator().manual_seed(1))


def segments(cuts: Sequence[int], tokens: int = TOKENS) -> list[tuple[int, int]]:
    return list(pairwise([0, *sorted(set(cuts)), tokens]))


@torch.no_grad()
def run(model: Any, ids: Tensor, cuts: Sequence[int], mask: Tensor | None = None, cache: Any = None) -> Any:
    """Logits of the segments between the cuts, joined, and the cache."""
    logits = []
    for start, stop in segments(cuts, ids.shape[1]):
        seen = None if mask is None else mask[:, :stop]
        out = model(ids[:, start:stop], attention_mask=seen, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1), cache


def states(cache: Mamba2Cache) -> list[Tensor]:
    return [buffer for layer in cache.layers for buffer in (layer.conv, layer.ssm)]


def same_states(left: Mamba2Cache, right: Mamba2Cache, **tolerance: float) -> None:
    for ours, theirs in zip(states(left), states(right), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


CUTS = st.lists(st.integers(1, TOKENS - 1), max_size=6)


@settings(max_examples=25)
@given(cuts=CUTS)
def test_any_split_is_the_full_forward(model: Any, ids: Tensor, cuts: list[int]) -> None:
    full, whole = run(model, ids, [])
    logits, cache = run(model, ids, cuts)
    torch.testing.assert_close(logits, full, rtol=0, atol=1e-5)
    same_states(cache, whole, rtol=0, atol=1e-5)
    assert cache.get_seq_length() == cache.seen_tokens == TOKENS


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_token_by_token_and_in_blocks_in_fp64(tiny_model: Callable[..., Any], ids: Tensor, step: int) -> None:
    model = tiny_model().double()
    full, _ = run(model, ids, [])
    logits, cache = run(model, ids, range(step, TOKENS, step))
    torch.testing.assert_close(logits, full, rtol=0, atol=1e-10)
    assert {layer.ssm.dtype for layer in cache.layers} == {torch.float64}


@settings(max_examples=25)
@given(cuts=CUTS, data=st.data())
def test_padded_segments_continue_each_row_from_its_own_tokens(
    model: Any, ids: Tensor, cuts: list[int], data: st.DataObject
) -> None:
    """Padding may be left, right, in the middle, or a whole row of a segment: each row is as if run alone."""
    kinds = st.sampled_from(["none", "left", "right", "middle", "whole"])
    mask = torch.ones_like(ids)
    for start, stop in segments(cuts):
        for row in range(len(ids)):
            kind, size = data.draw(kinds), data.draw(st.integers(1, stop - start))
            if kind == "whole":
                mask[row, start:stop] = 0
            elif kind == "left":
                mask[row, start : start + size] = 0
            elif kind == "right":
                mask[row, stop - size : stop] = 0
            elif kind == "middle":
                mask[row, start + 1 : start + 1 + size] = 0
    logits, cache = run(model, ids, cuts, mask)
    assert cache.seen_tokens == TOKENS
    following = torch.full((len(ids), 1), 7)
    with torch.no_grad():
        after = model(following, past_key_values=cache).logits
    for row, keep in enumerate(mask.bool()):
        alone = torch.cat([ids[row, keep], following[row]])[None]
        with torch.no_grad():
            expected = model(alone, use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, keep], expected[:-1], rtol=0, atol=1e-5)
        torch.testing.assert_close(after[row], expected[-1:], rtol=0, atol=1e-5)


def test_both_names_go_in_and_come_out(model: Any, ids: Tensor) -> None:
    with torch.no_grad():
        out = model(ids[:, :9])
        assert isinstance(out.past_key_values, Mamba2Cache)
        assert out.cache_params is out.past_key_values
        base = model.backbone(ids[:, :9])
        assert base.cache_params is base.past_key_values
        twin = copy.deepcopy(out.past_key_values)
        first = model(ids[:, 9:], past_key_values=out.past_key_values)
        second = model(ids[:, 9:], cache_params=twin)
        assert second.past_key_values is twin
        model(ids[:, :1], past_key_values=twin, cache_params=twin)
    torch.testing.assert_close(first.logits, second.logits, rtol=0, atol=0)
    with pytest.raises(CacheError, match="two different caches"):
        model(ids, past_key_values=Mamba2Cache(model.config), cache_params=Mamba2Cache(model.config))
    with pytest.raises(CacheError, match="two different caches"):
        model(ids, cache_params=Mamba2Cache(model.config), cache=Mamba2Cache(model.config))


def test_a_cache_is_made_when_asked_for(model: Any, ids: Tensor, tiny_model: Callable[..., Any]) -> None:
    with torch.no_grad():
        assert model(ids).past_key_values.seen_tokens == TOKENS
        assert model(ids, use_cache=False).past_key_values is None
        assert tiny_model(use_cache=False)(ids).past_key_values is None
        given = Mamba2Cache(model.config)
        assert model(ids, past_key_values=given, use_cache=False).past_key_values is None
        assert given.seen_tokens == TOKENS  # a cache that is passed is used, whether or not it is returned
        training = tiny_model().train()
        assert training(ids).past_key_values is None
        assert training(ids, use_cache=True).past_key_values.seen_tokens == TOKENS
        legacy = model(ids, return_dict=False)
    assert isinstance(legacy[1], Mamba2Cache)


def test_describes_itself(model: Any, ids: Tensor) -> None:
    cache = Mamba2Cache(model.config)
    assert (len(cache), cache.batch_size, cache.get_seq_length(), cache.is_initialized) == (2, -1, 0, False)
    assert not cache.has_previous_state()
    run(model, ids, [5], cache=cache)
    assert (cache.batch_size, cache.is_initialized, cache.has_previous_state()) == (3, True, True)
    assert cache.get_mask_sizes(4, 0) == (TOKENS + 4, 0)
    assert cache.get_max_length() == -1
    assert not cache.is_compileable
    assert repr(cache) == f"Mamba2Cache(layers=2, batch=3, tokens={TOKENS})"


@pytest.mark.parametrize("method", ["reorder_cache", "batch_select_indices"])
def test_selects_and_reorders_sequences(model: Any, ids: Tensor, method: str) -> None:
    _, cache = run(model, ids[:, :10], [])
    order = torch.tensor([2, 0, 0, 1])
    getattr(cache, method)(order)
    assert cache.batch_size == 4
    logits, _ = run(model, ids[order, 10:], [3], cache=cache)
    expected, _ = run(model, ids[order], [])
    torch.testing.assert_close(logits, expected[:, 10:], rtol=0, atol=1e-5)


def test_repeats_sequences(model: Any, ids: Tensor) -> None:
    fresh = Mamba2Cache(model.config)
    fresh.batch_repeat_interleave(2)  # nothing to repeat yet
    _, cache = run(model, ids[:, :10], [])
    cache.batch_repeat_interleave(2)
    twice = ids.repeat_interleave(2, 0)
    logits, _ = run(model, twice[:, 10:], [], cache=cache)
    torch.testing.assert_close(logits, run(model, twice, [])[0][:, 10:], rtol=0, atol=1e-5)


def test_reset_starts_over_also_with_another_batch(model: Any, ids: Tensor) -> None:
    expected, _ = run(model, ids, [])
    _, cache = run(model, ids.flip(1), [4])
    addresses = [state.data_ptr() for state in states(cache)]
    cache.reset()
    assert (cache.seen_tokens, cache.batch_size, cache.is_initialized) == (0, -1, False)
    logits, _ = run(model, ids, [6], cache=cache)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert [state.data_ptr() for state in states(cache)] == addresses
    cache.reset()
    logits, _ = run(model, ids[:1], [6], cache=cache)
    torch.testing.assert_close(logits, expected[:1], rtol=0, atol=1e-5)
    assert cache.batch_size == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_are_independent(model: Any, ids: Tensor, duplicate: Callable[[Any], Any]) -> None:
    _, cache = run(model, ids[:, :10], [])
    twin = duplicate(cache)
    assert (type(twin), twin.seen_tokens, twin.static) == (Mamba2Cache, 10, False)
    run(model, ids.flip(1), [1, 2], cache=cache)  # must not reach the twin
    logits, _ = run(model, ids[:, 10:], [1], cache=twin)
    torch.testing.assert_close(logits, run(model, ids, [])[0][:, 10:], rtol=0, atol=1e-5)


def test_moves_between_devices(model: Any, ids: Tensor) -> None:
    _, cache = run(model, ids, [])
    assert cache.to("cpu") is cache
    assert {state.device.type for state in states(cache.to("meta"))} == {"meta"}


def test_refuses_another_batch_and_stays_usable(model: Any, ids: Tensor) -> None:
    _, cache = run(model, ids[:, :10], [])
    for segment in (ids[:2, 10:], ids[:1, 10:11]):
        with pytest.raises(CacheError, match=r"holds 3 sequences and the input has .*batch_repeat_interleave"):
            model(segment, past_key_values=cache)
    logits, _ = run(model, ids[:, 10:], [], cache=cache)
    torch.testing.assert_close(logits, run(model, ids, [])[0][:, 10:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [DynamicCache, StaticCache], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["past_key_values", "cache_params"])
def test_an_empty_cache_of_transformers_becomes_ours(model: Any, ids: Tensor, make: Any, name: str) -> None:
    """Generic code makes one for any model, keeps hold of it, and passes it again."""
    sizes = {"max_cache_len": 64} if make is StaticCache else {}
    cache = make(config=model.config, **sizes)
    with torch.no_grad():
        first = model(ids[:, :10], **{name: cache})
        assert first.past_key_values is cache
        assert cache.get_seq_length() == 10
        second = model(ids[:, 10:], **{name: cache})
    expected, _ = run(model, ids, [])
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected, rtol=0, atol=1e-5)
    assert isinstance(cache, Mamba2Cache)
    assert cache.is_compileable == (make is StaticCache)
    logits, _ = run(model, ids, [2], cache=DynamicCache())
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_refuses_caches_of_another_kind(model: Any, ids: Tensor) -> None:
    attention = LlamaConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4)
    filled = DynamicCache(config=model.config)
    filled.update_conv_state(torch.zeros(3, 5, 4), 0)
    filled.update_conv_state(torch.zeros(3, 5, 4), 1)
    states, keys = "SSM states, whose size is constant", "keys and values of attention on the device"
    hybrid = make_hybrid("plain")
    keyed = DynamicCache()
    keyed.update(torch.zeros(1, 2, 3, 10), torch.zeros(1, 2, 3, 10), 0)
    wrong = [
        (model, DynamicCache(config=attention), "the DynamicCache is made for another model"),
        (hybrid, DynamicCache(config=LlamaConfig(num_hidden_layers=5)), "the DynamicCache is made for another model"),
        (model, filled, "the DynamicCache is not empty"),
        (hybrid, keyed, "the DynamicCache is not empty"),
        (model, DynamicCache(offloading=True), rf"DynamicCache\(offloading=True\): .*{states}"),
        (hybrid, DynamicCache(offloading=True), rf"DynamicCache\(offloading=True\): .*{keys}"),
        (
            hybrid,
            StaticCache(config=hybrid.config, max_cache_len=9, offloading=True),
            rf"StaticCache\(offloading=True\): .*{keys}",
        ),
        (model, EncoderDecoderCache(DynamicCache(), DynamicCache()), "type EncoderDecoderCache, which has no place"),
        (hybrid, (torch.zeros(1), torch.zeros(1)), "type tuple, which has no place for SSM states"),
    ]
    for each, cache, reason in wrong:
        for name in ("past_key_values", "cache_params"):
            with pytest.raises(CacheError, match=rf"{reason}.*; pass a mamba2_hf.Mamba2Cache\(model.config\), or"):
                each(ids, **{name: cache})


def test_state_dtype_is_an_option(model: Any, ids: Tensor) -> None:
    expected, exact = run(model, ids, [])
    assert {layer.ssm.dtype for layer in exact.layers} == {torch.float32}
    half = Mamba2Cache(model.config, state_dtype=torch.bfloat16)
    logits, _ = run(model, ids, range(8, TOKENS), cache=half)
    assert {layer.ssm.dtype for layer in half.layers} == {torch.bfloat16}
    error = (logits - expected).abs()
    assert error[:, :8].max() <= 1e-5  # nothing was read back yet
    assert 1e-5 < error.max() < 0.02 * expected.abs().max()  # rounded, by bf16's 3 digits
    with pytest.raises(CacheError, match="int64"):
        Mamba2Cache(model.config, state_dtype=torch.int64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_an_fp32_state(
    tiny_model: Callable[..., Any], ids: Tensor, dtype: torch.dtype
) -> None:
    model = tiny_model().to(dtype)
    expected, _ = run(model, ids, [])
    logits, cache = run(model, ids, [1, 2, 3, 9, 17])
    assert {(layer.conv.dtype, layer.ssm.dtype) for layer in cache.layers} == {(dtype, torch.float32)}
    reference, _ = run(tiny_model(), ids, [])
    noise = (expected - reference).abs().max()  # of the dtype itself
    assert (logits - reference).abs().max() < 2 * noise


def gradients(model: Any, logits: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits.square().mean().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("step", [1, 5], ids=["token", "block"])
def test_gradients_of_a_cached_segment(tiny_model: Callable[..., Any], ids: Tensor, train: bool, step: int) -> None:
    """They are those of the segment from a constant state, also after later segments have overwritten the state."""
    model = tiny_model().double().train(train)
    names = [name for name, _ in model.named_parameters()]
    found, cache = [], None
    losses = []
    for start in range(0, 2 * step + 1, step):
        out = model(ids[:, start : start + step], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        assert not any(state.requires_grad for state in states(cache))
        losses.append(out.logits)
    for logits in losses:  # only now, when the buffers hold the last state
        found.append(gradients(model, logits))
    for index, ours in enumerate(found):
        start = index * step
        with torch.no_grad():
            past = None if start == 0 else model(ids[:, :start], use_cache=True).past_key_values
        expected = gradients(model, model(ids[:, start : start + step], past_key_values=past).logits)
        assert set(ours) == set(expected) == set(names)
        for name in names:
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-8, atol=1e-10)


def test_gradients_of_a_cached_segment_are_those_of_its_positions(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    """Checked against a full forward: embeddings of the segment only reach its own logits."""
    model = tiny_model().double()
    embeds = model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        cache = model(inputs_embeds=embeds[:, :10], use_cache=True).past_key_values
    tail = embeds[:, 10:].clone().requires_grad_()
    model(inputs_embeds=tail, past_key_values=cache).logits.square().sum().backward()
    whole = embeds.clone().requires_grad_()
    model(inputs_embeds=whole, use_cache=False).logits[:, 10:].square().sum().backward()
    torch.testing.assert_close(tail.grad, whole.grad[:, 10:], rtol=1e-9, atol=1e-10)


def graph_size(tensor: Tensor) -> int:
    graph, seen = [tensor.grad_fn], set()
    while graph:
        node = graph.pop()
        if node is not None and node not in seen:
            seen.add(node)
            graph.extend(parent for parent, _ in node.next_functions)
    return len(seen)


def test_no_graph_grows_through_the_cache(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model()
    out = model(ids[:, :5])
    sizes = set()
    for position in range(5, 12):
        out = model(ids[:, position : position + 1], past_key_values=out.past_key_values)
        assert all(state.grad_fn is None for state in states(out.past_key_values))
        sizes.add(graph_size(out.logits))
    assert len(sizes) == 1


def test_a_cache_made_in_inference_mode_serves_everywhere(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model()
    expected, _ = run(model, ids, [])
    with torch.inference_mode():
        out = model(ids[:, :6])
    cache = out.past_key_values
    twin, other = copy.deepcopy(cache), copy.deepcopy(cache)
    logits, _ = run(model, ids[:, 6:], [1, 2], cache=cache)
    torch.testing.assert_close(logits, expected[:, 6:], rtol=0, atol=1e-5)
    with_graph = model(ids[:, 6:], past_key_values=twin).logits
    torch.testing.assert_close(with_graph, expected[:, 6:], rtol=0, atol=1e-5)
    assert gradients(model, with_graph)
    other.reset()
    other.reorder_cache(torch.tensor([0, 0, 1]))
    logits, _ = run(model, ids, [], cache=other)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    with torch.inference_mode():  # and back
        model(ids[:, :1], past_key_values=other)


def checkpoint(model: Any, reentrant: bool = False) -> Any:
    """In training mode, with gradient checkpointing on; it was renamed between the supported versions."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    return model.train()


def test_gradient_checkpointing_refuses_a_cache_where_gradients_are_recorded(
    tiny_model: Callable[..., Any], ids: Tensor
) -> None:
    """Its backward runs every layer again, which would write the cache a second time."""
    model = tiny_model().train()
    expected = gradients(model, model(ids).logits)
    empty = Mamba2Cache(model.config)
    _, filled = run(model.eval(), ids, [])
    checkpoint(model)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"use_cache": True}, "use_cache=True"),
        ({"past_key_values": empty}, "a cache of 0 tokens"),
        ({"past_key_values": filled, "use_cache": False}, "a cache of 24 tokens"),
    ]
    for arguments, named in refused:
        with pytest.raises(CacheError, match=rf"{named} in training mode with gradient checkpointing.*torch.no_grad"):
            model(ids, **arguments)
    assert (empty.seen_tokens, filled.seen_tokens) == (0, 24)
    out = model(ids)
    assert out.past_key_values is None
    for name, gradient in gradients(model, out.logits).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["pure", "sliding"])
def test_gradient_checkpointing_keeps_caches_where_none_are(
    kind: str, mode: Any, reentrant: bool, tiny_model: Callable[..., Any], ids: Tensor
) -> None:
    model = tiny_model() if kind == "pure" else make_hybrid(kind)
    greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    requests = [Request(row.tolist(), greedy) for row in ids]

    def results() -> list[Any]:
        with mode():
            out = model(ids[:, :9], use_cache=True)
            return [
                out.logits,
                model(ids[:, 9:], past_key_values=out.past_key_values, use_cache=True).logits,
                model.generate(ids, **greedy),
                model.generate(ids[:1], prompt_lookup_num_tokens=2, **greedy),
                model.generate(ids, past_key_values=model.read(ids[:, :9]), **greedy),
                torch.tensor([done.tokens for done in generate_batch(model, requests)]),
            ]

    expected = results()
    checkpoint(model, reentrant)
    for ours, theirs in zip(results(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_packed_rows_continue_their_first_document(model: Any, ids: Tensor) -> None:
    """With documents inside a segment, the cached state goes to the first and the last leaves the next."""
    seq_idx = torch.tensor([[0] * 6 + [1] * 5, [0] * 11, [0] * 1 + [5] * 3 + [1] * 7])
    _, cache = run(model, ids[:, :10], [])
    with torch.no_grad():
        out = model(ids[:, 10:21], seq_idx=seq_idx, past_key_values=cache)
        following = model(ids[:, 21:], past_key_values=cache).logits
        for row, cuts in enumerate(([0, 16, 24], [0, 24], [0, 11, 14, 24])):
            alone = [model(ids[row : row + 1, start:stop]).logits[0] for start, stop in pairwise(cuts)]
            expected = torch.cat(alone)
            torch.testing.assert_close(out.logits[row], expected[10:21], rtol=0, atol=1e-5)
            torch.testing.assert_close(following[row], expected[21:], rtol=0, atol=1e-5)


def test_attention_matrices_need_the_whole_sequence(model: Any, ids: Tensor) -> None:
    _, cache = run(model, ids[:, :10], [])
    with pytest.raises(ArgumentError, match="cache of 10 tokens"):
        model(ids[:, 10:], past_key_values=cache, output_attentions=True)
    with torch.no_grad():
        assert model(ids, output_attentions=True).past_key_values.seen_tokens == TOKENS


def test_the_base_model_caches_too(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    base = tiny_model(Mamba2Model)
    with torch.no_grad():
        expected = base(ids, output_hidden_states=True)
        first = base(ids[:, :7])
        second = base(ids[:, 7:], past_key_values=first.past_key_values, output_hidden_states=True)
    torch.testing.assert_close(second.last_hidden_state, expected.last_hidden_state[:, 7:], rtol=0, atol=1e-5)
    for ours, whole in zip(second.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, whole[:, 7:], rtol=0, atol=1e-5)
