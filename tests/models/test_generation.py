"""``generate``: whatever the options, each row gets the tokens that plain full forwards would give it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hybrids import make_hybrid
from torch import Tensor
from transformers import CompileConfig, DynamicCache, StoppingCriteriaList, TextIteratorStreamer
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from mamba2_hf import Mamba2Cache, Mamba2ForCausalLM
from mamba2_hf.errors import ArgumentError, CacheError

NEW = 8
LENGTHS = (12, 7, 4)
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def make_writer(tiny_model: Callable[..., Any]) -> Any:
    """A model whose next token depends on tokens far back, and which, as a trained one, never writes padding."""
    model = tiny_model(seed=3)
    with torch.no_grad():
        for block in model.backbone.layers:
            block.mixer.out_proj.weight *= 2
            block.mixer.A_log -= 2
        model.lm_head.weight[model.config.pad_token_id] = 0
    return model


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any]) -> Mamba2ForCausalLM:
    return make_writer(tiny_model)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 61, (3, LENGTHS[0]), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def expected(model: Any, ids: Tensor) -> Tensor:
    """Greedy tokens from full forwards alone: no cache, no ``generate``."""
    for _ in range(NEW):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert len(set(ids[:, -NEW:].flatten().tolist())) > NEW  # no row repeats one token
    return ids


def padded(ids: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Rows cut to LENGTHS, with their padding on one side, and the mask."""
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        where = {"left": slice(-length, None), "right": slice(length), "middle": slice(length - 2)}[side]
        mask[row, where] = 1
        if side == "middle":
            mask[row, -2:] = 1
    tokens = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        tokens[row, mask[row].bool()] = ids[row, :length]
    return tokens, mask


def alone(model: Any, ids: Tensor, **options: Any) -> list[Tensor]:
    """New tokens of each row, run by itself and without padding."""
    return [
        model.generate(ids[row : row + 1, :length], **{**GREEDY, **options})[:, length:]
        for row, length in enumerate(LENGTHS)
    ]


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 5},
    "chunks of one": {"prefill_chunk_size": 1},
    "static cache": {"cache_implementation": "static"},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "static and chunked": {"cache_implementation": "static", "prefill_chunk_size": 5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_greedy_is_argmax_of_the_full_forward(model: Any, ids: Tensor, expected: Tensor, options: Any) -> None:
    assert torch.equal(model.generate(ids, **GREEDY, **options), expected)
    if options.get("use_cache", True) and "prefill_chunk_size" not in options:
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY, **options), expected[:, ids.shape[1] :])


@pytest.mark.parametrize("side", ["left", "right", "middle"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_padded_batches_equal_single_runs(model: Any, ids: Tensor, side: str, options: Any) -> None:
    tokens, mask = padded(ids, side)
    new = model.generate(tokens, attention_mask=mask, **GREEDY, **options)
    assert torch.equal(new[:, : ids.shape[1]], tokens)  # the prompt comes back as it was given
    single = torch.cat(alone(model, ids))
    assert torch.equal(new[:, ids.shape[1] :], single)
    if options.get("use_cache", True) and "prefill_chunk_size" not in options:
        embeds = model.get_input_embeddings()(tokens)
        assert torch.equal(model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY, **options), single)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("returned", [1, 3])
def test_beam_search(model: Any, ids: Tensor, side: str, returned: int) -> None:
    beams = {"num_beams": 3, "num_return_sequences": returned}
    tokens, mask = padded(ids, side)
    cached = model.generate(tokens, attention_mask=mask, **GREEDY, **beams)[:, ids.shape[1] :]
    assert torch.equal(cached, torch.cat(alone(model, ids, **beams)))
    assert torch.equal(cached, torch.cat(alone(model, ids, **beams, use_cache=False)))
    chunked = model.generate(tokens, attention_mask=mask, prefill_chunk_size=5, **GREEDY, **beams)
    assert torch.equal(chunked[:, ids.shape[1] :], cached)


def test_beam_search_that_ends_early(model: Any, ids: Tensor, expected: Tensor) -> None:
    end = int(expected[0, ids.shape[1] + 3])
    options = {**GREEDY, "eos_token_id": end, "num_beams": 4, "num_return_sequences": 2}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, use_cache=False))


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.7, "temperature": 2.0}, {"num_beams": 2}])
def test_sampling_draws_the_same_with_and_without_a_cache(model: Any, ids: Tensor, options: Any) -> None:
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        arguments = {**GREEDY, "do_sample": True, "num_return_sequences": 2, **options}
        drawn.append(model.generate(ids, use_cache=use_cache, **arguments))
    assert torch.equal(*drawn)


def test_rows_end_on_their_own(model: Any, ids: Tensor, expected: Tensor) -> None:
    start = ids.shape[1]
    end = int(expected[0, start + 2])
    out = model.generate(ids, **{**GREEDY, "eos_token_id": end})
    for row in range(3):
        stops = (expected[row, start:] == end).nonzero()
        stop = start + (int(stops[0]) + 1 if len(stops) else NEW)
        assert torch.equal(out[row, :stop], expected[row, :stop])
        assert not out[row, stop:].any()  # padding from there on


# Continuation


@pytest.mark.parametrize("name", ["past_key_values", "cache_params"])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 2}], ids=["whole", "chunked"])
def test_continues_from_its_own_cache(model: Any, ids: Tensor, expected: Tensor, name: str, options: Any) -> None:
    first = model.generate(ids, **{**GREEDY, "max_new_tokens": 3}, return_dict_in_generate=True)
    cache = first.past_key_values
    assert cache.seen_tokens == first.sequences.shape[1] - 1  # the last token was not fed
    twin = copy.deepcopy(cache)
    arguments = {**GREEDY, **options, "max_new_tokens": NEW - 3}
    full = model.generate(first.sequences, **{name: cache}, **arguments)
    assert torch.equal(full, expected)
    only_new = model.generate(
        first.sequences[:, -1:], attention_mask=torch.ones_like(first.sequences), **{name: twin}, **arguments
    )
    assert torch.equal(only_new, expected[:, -(NEW - 3) - 1 :])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 3}], ids=["whole", "chunked"])
@pytest.mark.parametrize("only_new", [False, True], ids=["full ids", "new ids"])
def test_padded_turns_of_a_conversation(model: Any, ids: Tensor, side: str, options: Any, only_new: bool) -> None:
    """Two turns, each padded: every row equals its own unpadded conversation, run in one go."""
    tokens, mask = padded(ids, side)
    first = model.generate(tokens, attention_mask=mask, **GREEDY, **options, return_dict_in_generate=True)
    answered = torch.cat([mask, torch.ones(3, NEW, dtype=torch.long)], 1)
    turn, turn_mask = padded(ids.flip(1), side)
    history = torch.cat([first.sequences, turn], 1)
    history_mask = torch.cat([answered, turn_mask], 1)
    given = history[:, first.past_key_values.seen_tokens :] if only_new else history
    second = model.generate(
        given, attention_mask=history_mask, past_key_values=first.past_key_values, **GREEDY, **options
    )
    for row in range(3):
        conversation = history[row, history_mask[row].bool()][None]
        single = model.generate(conversation, **GREEDY)
        assert torch.equal(second[row, -NEW:], single[0, -NEW:])


def test_continues_a_cache_that_a_forward_made(model: Any, ids: Tensor, expected: Tensor) -> None:
    with torch.no_grad():
        cache = model(ids[:, :5]).past_key_values
    twins = [copy.deepcopy(cache) for _ in range(2)]
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)
    embeds = model.get_input_embeddings()(ids)
    new = model.generate(inputs_embeds=embeds, past_key_values=twins[0], **GREEDY)
    assert torch.equal(new, expected[:, ids.shape[1] :])
    twins[1].batch_repeat_interleave(3)
    beams = {"num_beams": 3, **GREEDY}
    assert torch.equal(model.generate(ids, past_key_values=twins[1], **beams), model.generate(ids, **beams))


def test_one_prompt_serves_many_continuations(model: Any, ids: Tensor) -> None:
    """The documented way to reuse a long prefix: deep copies of its cache."""
    with torch.no_grad():
        prefix = model(ids[:1, :6], past_key_values=DynamicCache(config=model.config)).past_key_values
    for row in range(3):
        prompt = torch.cat([ids[:1, :6], ids[row : row + 1, 6:]], 1)
        out = model.generate(prompt, past_key_values=copy.deepcopy(prefix), **GREEDY)
        assert torch.equal(out, model.generate(prompt, **GREEDY))


def test_the_user_chooses_the_cache(model: Any, ids: Tensor, expected: Tensor) -> None:
    half = Mamba2Cache(model.config, state_dtype=torch.bfloat16)
    out = model.generate(ids, past_key_values=half, **GREEDY, return_dict_in_generate=True)
    assert out.past_key_values is half
    assert half.layers[0].ssm.dtype == torch.bfloat16
    assert out.sequences.shape == expected.shape
    stock = DynamicCache(config=model.config)
    assert torch.equal(model.generate(ids, past_key_values=stock, **GREEDY), expected)
    assert isinstance(stock, Mamba2Cache)
    assert stock.seen_tokens == expected.shape[1] - 1


@pytest.mark.parametrize("count", [5, 12], ids=["fewer than seen", "all seen"])
def test_refuses_ids_without_anything_new(model: Any, ids: Tensor, count: int) -> None:
    with torch.no_grad():
        cache = model(ids).past_key_values
    with pytest.raises(
        CacheError, match=rf"has seen 12 tokens, the input holds {count} and the attention mask {count}"
    ):
        model.generate(ids[:, :count], past_key_values=cache, **GREEDY)
    assert cache.seen_tokens == 12


def test_refuses_ids_that_fit_no_mask(model: Any, ids: Tensor) -> None:
    with torch.no_grad():
        cache = model(ids[:, :4]).past_key_values
    mask = torch.ones_like(ids)
    with pytest.raises(CacheError, match="seen 4 tokens, the input holds 2 and the attention mask 12"):
        model.generate(ids[:, -2:], attention_mask=mask, past_key_values=cache, **GREEDY)


def test_refuses_another_mask_for_the_tokens_seen(model: Any, ids: Tensor, expected: Tensor) -> None:
    """A row that ended early was fed padding to the end of the batch: its state has seen it, whatever a mask says."""
    end = int(expected[0, ids.shape[1] + 2])
    out = model.generate(ids, **{**GREEDY, "eos_token_id": end}, return_dict_in_generate=True)
    mask = (out.sequences != 0).long()
    assert not mask.all()
    history = torch.cat([out.sequences, ids], 1)
    with pytest.raises(CacheError, match="row 0, but 0 were left out when it saw them and a state cannot forget"):
        model.generate(
            history,
            attention_mask=torch.cat([mask, torch.ones_like(ids)], 1),
            past_key_values=out.past_key_values,
            **GREEDY,
        )
    tokens, mask = padded(ids, "left")
    with torch.no_grad():
        cache = model(tokens, attention_mask=mask).past_key_values
    longer = torch.cat([tokens, ids], 1)
    with pytest.raises(CacheError, match="leaves out 0 of the 12 tokens that the cache saw in row 1, but 5"):
        model.generate(longer, attention_mask=torch.ones_like(longer), past_key_values=cache, **GREEDY)


def test_refuses_a_row_without_a_token(model: Any, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[1] = 0
    with pytest.raises(ArgumentError, match="row without any new token"):
        model.generate(ids, attention_mask=mask, **GREEDY)


# Outputs


def test_everything_that_can_be_returned(model: Any, ids: Tensor, expected: Tensor) -> None:
    out = model.generate(
        ids,
        **GREEDY,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
    )
    assert torch.equal(out.sequences, expected)
    assert isinstance(out.past_key_values, Mamba2Cache)
    with torch.no_grad():
        full = model(expected[:, :-1], output_hidden_states=True, use_cache=False)
    logits = torch.stack(out.logits, 1)
    torch.testing.assert_close(logits, full.logits[:, -NEW:], rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.stack(out.scores, 1), logits, rtol=0, atol=0)
    assert len(out.hidden_states) == NEW
    for layer, hidden in enumerate(full.hidden_states):
        steps = torch.cat([step[layer] for step in out.hidden_states], 1)
        torch.testing.assert_close(steps, hidden, rtol=0, atol=1e-5)
    beams = model.generate(ids, **GREEDY, num_beams=2, return_dict_in_generate=True, output_scores=True)
    assert beams.sequences_scores.shape == (3,)
    assert model.compute_transition_scores(beams.sequences, beams.scores, beams.beam_indices).shape == (3, NEW)


def test_attention_matrices_only_without_a_cache(model: Any, ids: Tensor) -> None:
    options = {**GREEDY, "return_dict_in_generate": True, "output_attentions": True, "max_new_tokens": 2}
    with pytest.raises(ArgumentError, match=r"output_attentions=True.*use_cache=False"):
        model.generate(ids, **options)
    steps = model.generate(ids, **options, use_cache=False).attentions
    assert [matrix.shape for matrix in steps[-1]] == [(3, 8, 13, 13)] * 2


class Collect(BaseStreamer):
    """Keeps what is streamed."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


class StopAt(StoppingCriteria):
    """Stops when a length is reached."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_streams_and_stops(model: Any, ids: Tensor, expected: Tensor) -> None:
    streamer = Collect()
    stop = StoppingCriteriaList([StopAt(ids.shape[1] + 5)])
    out = model.generate(ids[:1], streamer=streamer, stopping_criteria=stop, **GREEDY)
    assert torch.equal(out, expected[:1, : ids.shape[1] + 5])
    assert streamer.tokens == out[0].tolist()
    assert streamer.ended
    assert issubclass(TextIteratorStreamer, BaseStreamer)


def test_starts_from_the_bos_token(model: Any) -> None:
    start = torch.tensor([[model.config.bos_token_id]])
    assert torch.equal(model.generate(**GREEDY), model.generate(start, **GREEDY))


# Modes of autograd and training


def test_training_goes_on_after_generation(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = make_writer(tiny_model).train()
    model(ids, labels=ids).loss.backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with torch.inference_mode():
        out = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    model.generate(ids, **GREEDY)
    assert model.training
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, before[name], rtol=0, atol=0)
    # A cache from inference mode goes on outside of it, in generate and in training.
    more = model.generate(out.sequences, past_key_values=copy.deepcopy(out.past_key_values), **GREEDY)
    assert torch.equal(more, model.generate(out.sequences, **GREEDY))
    model(ids, past_key_values=out.past_key_values, labels=ids).loss.backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_generates_under_any_mode(model: Any, ids: Tensor, expected: Tensor, mode: Any) -> None:
    with mode():
        out = model.generate(ids, **GREEDY)
    assert torch.equal(out, expected)
    assert not out.requires_grad


@pytest.mark.parametrize("side", ["left", "right"])
def test_embeddings_are_read_in_pieces_too(model: Any, ids: Tensor, side: str) -> None:
    tokens, mask = padded(ids, side)
    embeds = model.get_input_embeddings()(tokens)
    expected = model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY)
    for size in (1, 5, 12):
        chunked = model.generate(inputs_embeds=embeds, attention_mask=mask, prefill_chunk_size=size, **GREEDY)
        assert torch.equal(chunked, expected)


# What is refused


UNAVAILABLE = ["offloaded", "quantized", "offloaded_static", "sliding_window", "hybrid_chunked"]


@pytest.mark.parametrize("kind", UNAVAILABLE)
def test_refuses_caches_that_mean_nothing_here(model: Any, ids: Tensor, kind: str) -> None:
    """What is said of the cache is true of the model, and memory is spoken of where memory was meant."""
    states = "SSM states, whose size is constant, so that there is little to offload"
    keys = "keys and values of attention on the device and in the dtype of their layer.*with a window slide already"
    for each, about in ((model, states), (make_hybrid("sliding"), keys)):
        with pytest.raises(ArgumentError, match=f"cache_implementation='{kind}'.*{about}.*'static'") as refused:
            each.generate(ids, cache_implementation=kind, **GREEDY)
        assert ("state_dtype=torch.bfloat16" in str(refused.value)) == (kind not in UNAVAILABLE[-2:])


def test_refuses_contradictions(model: Any, ids: Tensor) -> None:
    cache = Mamba2Cache(model.config)
    for options in ({"cache_implementation": "static"}, {"use_cache": False}):
        with pytest.raises(ArgumentError, match=f"{next(iter(options))}=.* and a cache were both given"):
            model.generate(ids, past_key_values=cache, **options, **GREEDY)
    with pytest.raises(ArgumentError, match="prefill_chunk_size=3 needs a cache"):
        model.generate(ids, prefill_chunk_size=3, use_cache=False, **GREEDY)
    refused = r"two different caches|Both .cache_params. and .cache. are set"  # by transformers itself from 5.24 on
    with pytest.raises((CacheError, FutureWarning), match=refused):
        model.generate(ids, past_key_values=cache, cache_params=Mamba2Cache(model.config), **GREEDY)
    with pytest.raises(CacheError, match="the cache is of type tuple"):
        model.generate(ids, past_key_values=((ids, ids),), **GREEDY)


def test_refuses_packed_prompts(model: Any, ids: Tensor) -> None:
    seq_idx = (torch.arange(12) > 4).long().expand(3, -1)
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(3, -1)
    packed = {"seq_idx": seq_idx, "position_ids": positions, "cu_seq_lens_q": torch.tensor([0, 5, 12])}
    for name, value in packed.items():
        rows = ids[:1] if name == "cu_seq_lens_q" else ids
        with pytest.raises(ArgumentError, match=f"{name} packs several documents"):
            model.generate(rows, **{name: value}, **GREEDY)
    plain = torch.arange(12).expand(3, -1)
    assert torch.equal(model.generate(ids, position_ids=plain, **GREEDY), model.generate(ids, **GREEDY))


# Compiled decoding


def test_a_static_cache_compiles_the_decode_step(tiny_model: Callable[..., Any], ids: Tensor, expected: Tensor) -> None:
    model = make_writer(tiny_model)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compile_config = CompileConfig(fullgraph=True, mode=None, backend=backend)
    compile_config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compile_config, **GREEDY}
    assert torch.equal(model.generate(ids, **options), expected)
    made = len(graphs)
    assert 1 <= made <= 2  # one step, and one in which the number of seen tokens is no longer a constant
    for _ in range(2):  # other caches of the same model
        assert torch.equal(model.generate(ids, **options), expected)
    tokens, mask = padded(ids, "right")
    new = model.generate(tokens, attention_mask=mask, **options)[:, ids.shape[1] :]
    assert torch.equal(new, torch.cat(alone(model, ids)))
    assert len(graphs) == made
