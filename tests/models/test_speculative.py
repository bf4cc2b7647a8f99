"""Taking tokens back, and decoding that guesses ahead: the text is the same as without."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import on_each_device
from hybrids import ARCHITECTURES, make_hybrid
from hypothesis import given, settings
from hypothesis import strategies as st
from test_captured_decoding import AddressCheck
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from mamba2_hf import ContinuousBatch, Mamba2Cache, Mamba2ForCausalLM, Request, batch_invariant, generate_batch
from mamba2_hf.errors import ArgumentError, CacheError
from mamba2_hf.models import mtp
from mamba2_hf.models.speculation import TextLookup
from mamba2_hf.pretrained import shipped_model_path

NEW = 16
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
KINDS = ["pure", *ARCHITECTURES]


HEADS = {
    "plain": ["attention", "mlp"],
    "rotary": ["attention", "ssd"],
    "sliding": ["sliding_attention", "ssd"],
    "parallel": ["ssd+attention mlp"],
    "experts": ["attention", "moe"],
    "sigmoid": ["moe"],
}
"""Layers of heads that predict further tokens, for models with layers of every kind."""


def build(kind: str, tiny_model: Callable[..., Any], seed: int = 0) -> Any:
    if kind == "heads":
        return with_heads("sliding", 2, seed)
    return tiny_model(seed=seed) if kind == "pure" else make_hybrid(kind, seed=seed)


def with_heads(kind: str, count: int = 1, seed: int = 0, **changes: Any) -> Any:
    return make_hybrid(kind, seed=seed, num_mtp_layers=count, mtp_layer_blocks=HEADS[kind], **changes)


def prompt(seed: int, length: int = 16) -> Tensor:
    """A text that repeats itself, so that there is something to look up."""
    ids = torch.randint(3, 61, (1, length), generator=torch.Generator().manual_seed(seed))
    return torch.cat([ids, ids[:, : length // 2]], 1)


# The cache


def read_padded(data: st.DataObject, model: Any, ids: Tensor, *caches: Mamba2Cache) -> None:
    """Has a model read rows behind each cache, the first of them with some padding."""
    if ids.shape[1]:
        mask = torch.ones_like(ids)
        mask[0, : data.draw(st.integers(0, ids.shape[1] - 1))] = 0
        for cache in caches:
            model(ids, attention_mask=mask, past_key_values=cache)


@settings(max_examples=40)
@given(data=st.data())
def test_removed_tokens_leave_no_trace(data: st.DataObject, tiny_model: Callable[..., Any]) -> None:
    """Whatever was seen before, however the recorded tokens came, and however many go: the rest goes on as if alone."""
    model = build(data.draw(st.sampled_from(KINDS)), tiny_model)
    static = data.draw(st.booleans())
    rows, past = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 6))
    ids = torch.randint(3, 61, (rows, 40), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9))))
    cache = Mamba2Cache(model.config, static=static, max_length=40 if static else None)
    twin = copy.deepcopy(cache)
    kept = []
    with torch.no_grad():
        read_padded(data, model, ids[:, :past], cache, twin)
        cache.activate_past_recording()
        for _ in range(data.draw(st.integers(1, 2))):
            blocks = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
            seen = cache.seen_tokens
            for block in blocks:
                model(ids[:, cache.seen_tokens : cache.seen_tokens + block], past_key_values=cache)
            gone = data.draw(st.integers(0, sum(blocks)))
            cache.crop(-gone)
            kept.append((seen, cache.seen_tokens))
            assert cache.seen_tokens == seen + sum(blocks) - gone
        cache.stop_recording()
        for start, stop in kept:
            if stop > start:
                model(ids[:, start:stop], past_key_values=twin)
        assert cache.seen_tokens == twin.seen_tokens
        for block in (1, 3, 1):
            following = ids[:, 30 : 30 + block].flip(1)
            ours, theirs = model(following, past_key_values=cache), model(following, past_key_values=twin)
            torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=2e-5)


def test_only_recorded_tokens_can_be_removed(tiny_model: Callable[..., Any]) -> None:
    model, ids = tiny_model(), prompt(0)
    with torch.no_grad():
        cache = model(ids[:, :8]).past_key_values
        with pytest.raises(CacheError, match=r"crop\(-1\): 0 tokens were recorded.*activate_past_recording"):
            cache.crop(-1)
        cache.activate_past_recording()
        assert cache.is_croppable
        model(ids[:, 8:12], past_key_values=cache)
        for tokens in (-5, 1):
            with pytest.raises(CacheError, match="4 tokens were recorded"):
                cache.crop(tokens)
        cache.crop(-1)
        with pytest.raises(CacheError, match="0 tokens were recorded"):  # what stayed is settled
            cache.crop(-1)
        for duplicate in (copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))):
            model(ids[:, 11:12], past_key_values=cache)
            cache.crop(0)
            assert duplicate(cache).seen_tokens == cache.seen_tokens
        with pytest.raises(CacheError, match="padding or packed documents"):
            model(ids[:, :4], attention_mask=torch.tensor([[0, 1, 1, 1]]), past_key_values=cache)
    cache.stop_recording()
    assert not cache.is_croppable


@settings(max_examples=30)
@given(data=st.data())
def test_guesses_leave_no_trace(data: st.DataObject, tiny_model: Callable[..., Any]) -> None:
    """Whatever was seen before, in blocks or not, and whatever the guesses were: the rest goes on as if alone."""
    model = build(data.draw(st.sampled_from(KINDS)), tiny_model)
    room = data.draw(st.sampled_from([{}, {"static": True}, {"captured": True}]))
    rows, past = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 6))
    ids = torch.randint(3, 61, (rows, 40), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9))))
    cache, twin = (Mamba2Cache(model.config, **room, max_length=60 if room else None) for _ in range(2))
    for each in (cache, twin) if "captured" in room else ():
        each.graph = AddressCheck()
    with torch.no_grad():
        read_padded(data, model, ids[:, :past], cache, twin)
        if in_blocks := past > 0 and data.draw(st.booleans()):
            for each in (cache, twin):
                each.activate_past_recording(4)
                model(ids[:, past : past + 3], past_key_values=each)
                each.crop(torch.arange(rows) - 2)
        for _ in range(2):
            cache.start_guessing()
            for block in data.draw(st.lists(st.integers(1, 4), max_size=3)):
                model(ids[:, 20 : 20 + block], past_key_values=cache)
                cache.start_guessing()  # they are guesses already
            cache.forget_guesses()
            assert cache.seen_tokens == twin.seen_tokens
            assert cache.recording == in_blocks
        for block in (1, 3, 1):
            following = ids[:, 30 : 30 + block].flip(1)
            ours, theirs = model(following, past_key_values=cache), model(following, past_key_values=twin)
            torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=2e-5)


def test_recording_keeps_little(tiny_model: Callable[..., Any]) -> None:
    """Of a block of tokens, what the states depend on; the states once; and nothing after it is settled."""
    model = tiny_model()
    with torch.no_grad():
        cache = model(prompt(0)).past_key_values
        cache.activate_past_recording()
        for _ in range(3):
            model(prompt(1)[:, :2], past_key_values=cache)
        layer = cache.layers[0]
        assert [{tuple(part.shape[:2]) for part in block} for block in layer.recorded] == [{(1, 2)}] * 3
        cache.crop(-2)
    assert layer.recorded == []
    assert layer._before is None


# Greedy


@on_each_device
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_lookup_writes_the_greedy_text(kind: str, device: str, tiny_model: Callable[..., Any]) -> None:
    for seed in range(3):
        model, ids = build(kind, tiny_model, seed).to(device), prompt(seed).to(device)
        expected = model.generate(ids, **GREEDY)
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **GREEDY), expected)


@on_each_device
@pytest.mark.parametrize("helper", ["itself", "another", "hybrid", "llama"])
@pytest.mark.parametrize("kind", ["pure", "sliding", "rotary"])
def test_an_assistant_writes_the_greedy_text(
    kind: str, helper: str, device: str, tiny_model: Callable[..., Any]
) -> None:
    for seed in range(2 if helper == "another" else 1):
        model, ids = build(kind, tiny_model, seed).to(device), prompt(seed).to(device)
        assistant = {
            "itself": lambda model=model: model,
            "another": lambda seed=seed: tiny_model(seed=seed + 5),
            "hybrid": lambda seed=seed: make_hybrid("parallel", seed=seed + 5),
            "llama": lambda: llama(),
        }[helper]().to(device)
        expected = model.generate(ids, **GREEDY)
        assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), expected)
        if helper == "another":
            close = copy.deepcopy(model)  # right most of the time, so that part of a block stays
            with torch.no_grad():
                close.lm_head.weight.add_(torch.randn_like(close.lm_head.weight), alpha=0.05)
            assert torch.equal(model.generate(ids, assistant_model=close, **GREEDY), expected)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            **{"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        )
    ).eval()


def test_assists_models_of_other_families(tiny_model: Callable[..., Any]) -> None:
    target, ids = llama(), prompt(0)
    expected = target.generate(ids, **GREEDY)
    for kind in ("pure", "sliding"):
        assert torch.equal(target.generate(ids, assistant_model=build(kind, tiny_model), **GREEDY), expected)


def test_fewer_calls_where_the_guesses_are_right(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    ids = torch.cat([prompt(0)] * 2, 1)
    text = model.generate(ids, **{**GREEDY, "max_new_tokens": 60})
    sizes: list[int] = []
    forward = type(model).forward

    def counted(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        sizes.append(input_ids.shape[1])
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    again = model.generate(text, prompt_lookup_num_tokens=8, **GREEDY)
    assert sizes[0] == text.shape[1] - 1  # the prompt, and then blocks
    assert max(sizes[1:]) == 9
    assert len(sizes) < NEW
    monkeypatch.undo()
    assert torch.equal(again, model.generate(text, **GREEDY))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {"prompt_lookup_num_tokens": 3}) for kind in ("pure", "sliding")),
        *((kind, {"assistant_model": None}) for kind in ("pure", "sliding")),
        ("heads", {"use_mtp": True, "assistant_confidence_threshold": 0.0}),
    ],
)
def test_padding_chunks_and_given_caches(kind: str, options: dict[str, Any], tiny_model: Callable[..., Any]) -> None:
    model, ids = build(kind, tiny_model), prompt(3)
    if "assistant_model" in options:
        options = {"assistant_model": build(kind, tiny_model, seed=7)}
    expected = model.generate(ids, **GREEDY)[:, ids.shape[1] :]
    for pads in (1, 5):
        tokens = torch.cat([torch.zeros(1, pads, dtype=torch.long), ids], 1)
        mask = (torch.arange(tokens.shape[1]) >= pads).long()[None]
        out = model.generate(tokens, attention_mask=mask, **options, **GREEDY)
        assert torch.equal(out[:, tokens.shape[1] :], expected)
    out = model.generate(ids, prefill_chunk_size=5, **options, **GREEDY)
    assert torch.equal(out[:, ids.shape[1] :], expected)
    cache = model.read(ids[:, :9])
    out = model.generate(ids, past_key_values=cache, **options, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(out.sequences[:, ids.shape[1] :], expected)
    assert out.past_key_values is cache
    assert not cache.recording
    # What comes back goes on as any cache does.
    longer = torch.cat([out.sequences, ids[:, :3]], 1)
    assert torch.equal(model.generate(longer, past_key_values=cache, **GREEDY), model.generate(longer, **GREEDY))
    one = torch.tensor([[0, 0, 7]])
    out = model.generate(one, attention_mask=torch.tensor([[0, 0, 1]]), **options, **GREEDY)
    assert torch.equal(out[:, 3:], model.generate(one[:, 2:], **GREEDY)[:, 1:])


def test_stops_at_the_end_of_the_text(tiny_model: Callable[..., Any]) -> None:
    model, ids = tiny_model(), prompt(2)
    end = int(model.generate(ids, **GREEDY)[0, ids.shape[1] + 7])
    options = {**GREEDY, "eos_token_id": end}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_model=model, **options), expected)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=5, **options), expected)


# Heads that predict further tokens


@on_each_device
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", HEADS)
def test_own_heads_write_the_greedy_text(kind: str, count: int, device: str) -> None:
    model = with_heads(kind, count).to(device)
    for length in (1, 16):
        ids = prompt(count, length).to(device)
        expected = model.generate(ids, **GREEDY)
        for options in ({}, {"num_assistant_tokens": 4, "assistant_confidence_threshold": 0.0}):
            assert torch.equal(model.generate(ids, use_mtp=True, **options, **GREEDY), expected)


@on_each_device
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", HEADS)
def test_own_heads_write_the_greedy_text_of_a_batch(
    kind: str, count: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows accept different numbers of tokens and end apart, whichever side their padding is on."""
    kept: list[Tensor] = []
    crop = Mamba2Cache.crop

    def counted(self: Any, tokens: Any) -> None:
        kept.extend([tokens] if isinstance(tokens, Tensor) else [])
        crop(self, tokens)

    monkeypatch.setattr(Mamba2Cache, "crop", counted)
    ids, mask, _ = uneven(1, "right" if kind == "rotary" else "left")
    ids, mask = ids.remainder(5).to(device), mask.to(device)
    guess = {"use_mtp": True, "num_assistant_tokens": 4, "assistant_confidence_threshold": 0.0}
    for seed, ends in ((0, None), (1, 4)):
        model = with_heads(kind, count, seed, vocab_size=5).to(device)  # so few that heads are right at times
        options = {**GREEDY, "eos_token_id": ends, "attention_mask": mask}
        expected = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, **guess, **options), expected)
        assert torch.equal(model.generate(ids, use_mtp=True, **options), expected)
    assert any(len(set(each.tolist())) > 1 for each in kept)


@torch.no_grad()
def foretold(model: Any, ids: Tensor, most: int) -> Tensor:
    """Logits ``(most, vocab)`` of a draft behind a text, with nothing kept: each head reads all of it at once."""
    embed, last = model.get_input_embeddings(), len(model.mtp_heads)
    read = after = model.backbone(ids[:, :-1], use_cache=False).last_hidden_state
    found: list[Tensor] = []
    for depth in range(1, most + 1):
        place = min(depth, last)
        read = after if depth <= last else torch.cat([read, after[:, -1:]], 1)  # the last one goes on by itself
        after = model.mtp[place - 1](embed(ids[:, place:]), read, Mamba2Cache(model.config.get_mtp_config()))
        found.append(model.lm_head(after[0, -1]))
        ids = torch.cat([ids, found[-1].argmax().view(1, 1)], 1)
    return torch.stack(found)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("kind", ["rotary", "sliding", "experts"])
def test_what_heads_kept_of_guesses_is_taken_back(kind: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draft is the one that they make of the text alone."""
    model, ids = with_heads(kind, count).double(), prompt(count, 2)
    drafts: list[tuple[Tensor, Tensor]] = []
    draft = mtp.HeadCandidates.get_candidates

    def kept(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        found = draft(self, input_ids, **kwargs)
        drafts.append((input_ids, found[1]))
        return found

    monkeypatch.setattr(mtp.HeadCandidates, "get_candidates", kept)
    model.generate(ids, use_mtp=True, num_assistant_tokens=6, assistant_confidence_threshold=0.0, **GREEDY)
    assert len(drafts) > 5
    for text, scores in drafts:
        if scores is not None:  # the last token needs no guess
            torch.testing.assert_close(scores[0], foretold(model, text, scores.shape[1]).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "count"), [("rotary", 1), ("rotary", 4), ("sliding", 2), ("experts", 4)])
def test_heads_draft_for_each_row_what_they_draft_for_it_alone(
    kind: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the others are padded, whatever they have accepted, and also where they have ended."""
    model, (ids, mask, texts) = with_heads(kind, count).double(), uneven(1)
    written = [text.tolist() for text in texts]
    accept, foretell = mtp.HeadDrafts.accept, mtp.HeadDrafts.foretell
    compared: list[int] = []
    runs: list[bool] = []

    def accepting(self: Any, tokens: list[list[int]]) -> None:
        accept(self, tokens)
        for text, new in zip(written, tokens, strict=True):
            text += new
        runs[:] = map(bool, tokens)

    def foretelling(self: Any, drafted: Tensor) -> Tensor | None:
        found = foretell(self, drafted)
        for row in [row for row, goes_on in enumerate(runs) if goes_on and found is not None]:
            alone = foretold(model, torch.tensor([written[row]]), drafted.shape[1] + 1)
            torch.testing.assert_close(found[row], alone[-1], rtol=1e-5, atol=1e-5)
            compared.append(row)
        return found

    monkeypatch.setattr(mtp.HeadDrafts, "accept", accepting)
    monkeypatch.setattr(mtp.HeadDrafts, "foretell", foretelling)
    options = {"use_mtp": True, "num_assistant_tokens": 6, "assistant_confidence_threshold": 0.0}
    ends = {"eos_token_id": [7, 11, 13, 17, 19, 23, 29]}
    model.generate(ids, attention_mask=mask, prefill_chunk_size=4, **options, **{**GREEDY, **ends})
    assert set(compared) == set(range(len(texts)))
    assert len(compared) > 6 * len(texts)


@pytest.mark.parametrize("kind", ["rotary", "sliding", "experts"])
def test_heads_draft_for_requests_what_they_draft_for_a_text_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which come and go, and are read in one call."""
    model = with_heads(kind, 2).double()
    model.generation_config.update(num_assistant_tokens=4, assistant_confidence_threshold=0.0)
    draft, compared = ContinuousBatch._draft, list[int]()

    def drafting(self: Any, guesser: Any) -> None:
        draft(self, guesser)
        for running in self._rows:
            text = [] if running is None else [*running.ids, *running.tokens]
            if len(text) > 1 and running.draft:  # before there are two tokens heads can read none
                found = foretold(model, torch.tensor([text]), len(running.draft)).argmax(-1)
                assert running.draft == found.tolist()
                compared.append(len(running.draft))

    monkeypatch.setattr(ContinuousBatch, "_draft", drafting)
    requests = [
        Request(prompt(seed, length)[0], {**GREEDY, "max_new_tokens": 4 + 2 * seed})
        for seed, length in enumerate((5, 1, 17, 9, 2, 12, 3))
    ]
    ended = generate_batch(model, requests, slots=3, use_mtp=True)
    for request, done in zip(requests, ended, strict=True):
        ids = torch.as_tensor(request.input_ids)[None]
        assert done.tokens == model.generate(ids, **request.settings)[0, ids.shape[1] :].tolist()
    assert len(compared) > 20
    assert max(compared) == 4


def test_heads_that_are_right_save_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = with_heads("plain"), prompt(0)
    torch.nn.init.zeros_(model.backbone.norm_f.weight)  # so that all of them write token 0
    torch.nn.init.zeros_(model.mtp[0].final_layernorm.weight)
    sizes: list[int] = []
    forward = type(model).forward

    def counted(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        sizes.append(input_ids.shape[1])
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    options = {"use_mtp": True, "assistant_confidence_threshold": 0.0, **GREEDY}
    out = model.generate(ids, num_assistant_tokens=7, **options)
    assert out[0, ids.shape[1] :].tolist() == [0] * NEW
    assert sizes == [ids.shape[1] - 1, 8, 8]
    del sizes[:]
    model.generate(ids, **{**options, "assistant_confidence_threshold": 0.4})  # none of 61 tokens is that likely
    assert sizes == [ids.shape[1] - 1, *[2] * 8]


def test_refuses_what_heads_cannot_guess(tiny_model: Callable[..., Any]) -> None:
    model, ids = with_heads("plain"), prompt(0)
    guess = {"use_mtp": True, **GREEDY}
    for without in (tiny_model(), make_hybrid("plain")):
        with pytest.raises(ArgumentError, match="this model has no heads that predict further tokens"):
            without.generate(ids, **guess)
    with pytest.raises(ArgumentError, match="prompt_lookup_num_tokens=2 both guess ahead"):
        model.generate(ids, prompt_lookup_num_tokens=2, **guess)
    with pytest.raises(ArgumentError, match="assistant_model both guess ahead"):
        model.generate(ids, assistant_model=tiny_model(), **guess)
    with pytest.raises(ArgumentError, match="num_assistant_tokens is 0"):
        model.generate(ids, num_assistant_tokens=0, **guess)
    with pytest.raises(ArgumentError, match="no inputs_embeds"):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), **guess)
    with pytest.raises(ValueError, match="use_cache=True"):
        model.generate(ids, use_cache=False, **guess)
    several = ids.expand(2, -1)
    with pytest.raises(ArgumentError, match=r"output_logits=True: several sequences.*use_mtp"):
        model.generate(several, return_dict_in_generate=True, output_logits=True, **guess)
    with pytest.raises(ArgumentError, match=r"batch_invariant does not go with drafts.*use_mtp"):
        model.generate(several, batch_invariant=True, **guess)


@torch.no_grad()
def logits_in_blocks(model: Any, ids: Tensor, size: int) -> Tensor:
    cache = Mamba2Cache(model.config)
    return torch.cat([model(block, past_key_values=cache).logits[0] for block in ids.split(size, 1)])


def test_in_bf16_only_near_ties_are_decided_otherwise() -> None:
    """Blocks and steps round differently. Where the texts part, the two best logits are closer than that difference."""
    model = Mamba2ForCausalLM.from_pretrained(shipped_model_path(), dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(shipped_model_path())
    torch.manual_seed(0)
    with torch.no_grad():  # every token gets a twin, so that there are near ties at all
        head = model.lm_head.weight.clone()
        head[1::2] = (head[:-1:2].float() * (1 + 0.01 * torch.randn(head[:-1:2].shape))).bfloat16()
    model.lm_head.weight = torch.nn.Parameter(head)
    options = {**GREEDY, "max_new_tokens": 32, "repetition_penalty": 1.0}
    parted = 0
    for text in (
        "def read_json(path):\n",
        "class Stack:\n    def __init__(self):\n",
    ):
        ids = tokenizer(text, return_tensors="pt").input_ids
        plain = model.generate(ids, **options)
        guessed = model.generate(ids, assistant_model=model, **options)
        if torch.equal(plain, guessed):
            continue
        parted += 1
        at = int((plain != guessed).nonzero()[0, 1])
        steps = logits_in_blocks(model, plain[:, :at], 1)
        error = max((logits_in_blocks(model, plain[:, :at], size) - steps).abs().max() for size in (2, 5, 21))
        best = steps[-1].topk(2)
        assert best.values[0] - best.values[1] <= 2 * error
        assert {int(plain[0, at]), int(guessed[0, at])} == set(best.indices.tolist())
    assert parted


# Sampling


@pytest.mark.parametrize("own", [False, True], ids=["assistant", "heads"])
def test_samples_by_the_models_own_distribution(own: bool, tiny_model: Callable[..., Any]) -> None:
    """The first two tokens of many samples, with a bad assistant or heads, against their exact probabilities."""
    guess: dict[str, Any]
    if own:
        model, guess = with_heads("plain", 2, seed=3, vocab_size=5), {"use_mtp": True}
    else:
        model = tiny_model(seed=3, vocab_size=5, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        guess = {"assistant_model": tiny_model(seed=4, vocab_size=5)}
    ids = torch.tensor([[3, 4, 1]])
    options = {"do_sample": True, "max_new_tokens": 2, "eos_token_id": None, "pad_token_id": 0, "top_k": 0}
    options["temperature"] = 3.0
    torch.manual_seed(0)
    draws = 250
    counts = torch.zeros(5, 5)
    for _ in range(draws):
        out = model.generate(ids, **guess, **options)
        counts[out[0, 3], out[0, 4]] += 1
    with torch.no_grad():
        first = (model(ids).logits[0, -1] / 3).softmax(-1)
        both = torch.stack(
            [p * (model(torch.cat([ids, t.view(1, 1)], 1)).logits[0, -1] / 3).softmax(-1) for t, p in enumerate_(first)]
        )
    expected = both * draws
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 52  # 24 degrees of freedom: one run in a thousand is above


def enumerate_(values: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(torch.tensor(index), value) for index, value in enumerate(values)]


def test_returns_what_generate_returns(tiny_model: Callable[..., Any]) -> None:
    model, ids = tiny_model(), prompt(1)
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    plain = model.generate(ids, **options)
    guessed = model.generate(ids, assistant_model=tiny_model(seed=1), **options)
    assert torch.equal(plain.sequences, guessed.sequences)
    torch.testing.assert_close(torch.stack(guessed.logits), torch.stack(plain.logits), rtol=0, atol=1e-4)
    assert guessed.past_key_values.seen_tokens == plain.past_key_values.seen_tokens


def test_sampling_with_prompt_lookup_is_seeded(tiny_model: Callable[..., Any]) -> None:
    model, ids = tiny_model(), prompt(0)
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        drawn.append(model.generate(ids, prompt_lookup_num_tokens=3, **{**GREEDY, "do_sample": True}))
    assert torch.equal(*drawn)


def letters(text: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each of these characters, in their order."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *text])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.mark.parametrize("chunk", [None, 5], ids=["at once", "in chunks"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
@pytest.mark.parametrize("kind", ["pure", "sliding"])
def test_an_assistant_with_another_tokenizer_reads_the_prompt_as_it_is(
    kind: str, tied: bool, chunk: int | None, tiny_model: Callable[..., Any]
) -> None:
    """transformers cuts its head to the tokens that both know, and wraps its embedding to map what it proposes."""
    text = "abcdefgh. "
    tokenizer, others = letters(text), letters("#%@" + text[::-1])
    vocabulary = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": tied}
    make = tiny_model if kind == "pure" else functools.partial(make_hybrid, kind)
    model = make(vocab_size=len(tokenizer), **vocabulary)
    assistant = make(vocab_size=len(others) + 7, **vocabulary)  # padded
    assistant.generation_config.prefill_chunk_size = chunk
    read: list[Tensor] = []
    assistant.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0]))
    options = {**GREEDY, "do_sample": True, "assistant_model": assistant}
    for prompt in ("bad cabbage face. a", "face. a bad cab"):  # "a" and "b" are beyond what the cut head has
        del read[:]
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, tokenizer=tokenizer, assistant_tokenizer=others, **options)
        assert out.shape[1] == ids.shape[1] + NEW
        expected = others(prompt, return_tensors="pt").input_ids
        assert torch.equal(torch.cat(read, 1)[:, : expected.shape[1]], expected)


# Several sequences


LENGTHS = (1, 5, 9, 3)


def uneven(seed: int, side: str = "left") -> tuple[Tensor, Tensor, list[Tensor]]:
    """A batch of texts that repeat themselves, one of them a single token; its mask; and the texts."""
    texts = [prompt(seed + number, length)[0] for number, length in enumerate(LENGTHS)]
    width = max(map(len, texts))
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[width - len(text) if side == "left" else 0 :][: len(text)] = text
    return ids, (ids != 0).long(), texts


@on_each_device
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_looks_up_writes_the_greedy_text(
    kind: str, device: str, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows accept different numbers of tokens, and end apart."""
    model = build(kind, tiny_model).to(device)
    kept: list[Tensor] = []
    crop = Mamba2Cache.crop

    def counted(self: Any, tokens: Tensor) -> None:
        kept.append(tokens)
        crop(self, tokens)

    monkeypatch.setattr(Mamba2Cache, "crop", counted)
    ids, mask, _ = (each if isinstance(each, list) else each.to(device) for each in uneven(1))
    for ends in (None, [7, 11, 13, 17, 19, 23, 29]):
        options = {**GREEDY, "eos_token_id": ends, "max_new_tokens": 40}
        expected = model.generate(ids, attention_mask=mask, **options)
        for most in (1, 6):
            out = model.generate(ids, attention_mask=mask, prompt_lookup_num_tokens=most, **options)
            assert torch.equal(out, expected)
    assert any(len(set(each.tolist())) > 1 for each in kept)


@pytest.mark.parametrize("kind", ["pure", "sliding", "rotary"])
def test_a_batch_with_an_assistant_writes_the_greedy_text(kind: str, tiny_model: Callable[..., Any]) -> None:
    model = build(kind, tiny_model)
    close = copy.deepcopy(model)  # right most of the time, so that part of a block stays
    torch.manual_seed(0)
    with torch.no_grad():
        close.lm_head.weight.add_(torch.randn_like(close.lm_head.weight), alpha=0.05)
    ids, mask, _ = uneven(2)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    for assistant, threshold in ((model, 0.0), (close, 0.0), (close, 0.4), (make_hybrid("parallel", seed=5), 0.0)):
        assistant.generation_config.assistant_confidence_threshold = threshold
        assert torch.equal(model.generate(ids, attention_mask=mask, assistant_model=assistant, **GREEDY), expected)


def test_a_right_padded_batch(tiny_model: Callable[..., Any]) -> None:
    model = build("rotary", tiny_model)
    ids, mask, texts = uneven(3, "right")
    for options in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": model}):
        out = model.generate(ids, attention_mask=mask, **options, **GREEDY)
        for row, text in zip(out, texts, strict=True):
            assert torch.equal(row[ids.shape[1] :], model.generate(text[None], **GREEDY)[0, len(text) :])


def test_a_batch_with_processors_and_criteria(tiny_model: Callable[..., Any]) -> None:
    """What looks at a text sees the same as without drafts: as many tokens, its own row, and those before only."""
    model = tiny_model()
    ids, mask, _ = uneven(4)

    class Odd(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            last = input_ids[:, -1:]
            row = torch.arange(len(input_ids), device=input_ids.device)[:, None]
            return scores.scatter_add(1, (last + row + input_ids.shape[1]) % 61, torch.full_like(scores[:, :1], 3.0))

    class Lucky(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return (input_ids[:, -2:].sum(1) % 11 == 0) & (input_ids.shape[1] > ids.shape[1] + 4)

    base = {**GREEDY, "attention_mask": mask}
    for options in (
        {"repetition_penalty": 1.05, "no_repeat_ngram_size": 5},
        {"min_new_tokens": 6, "eos_token_id": list(range(3, 40))},
        {"logits_processor": LogitsProcessorList([Odd()])},
        {"max_new_tokens": 1},
    ):
        expected = model.generate(ids, **{**base, **options})
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **{**base, **options}), expected)
    ends = {"stopping_criteria": StoppingCriteriaList([Lucky()]), "eos_token_id": 2, "max_new_tokens": 40}
    expected = model.generate(ids, **{**base, **ends})
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **{**base, **ends}), expected)


@pytest.mark.parametrize("kind", ["pure", "sliding", "rotary", "heads"])
def test_the_cache_of_a_batch_goes_on(kind: str, tiny_model: Callable[..., Any]) -> None:
    model = build(kind, tiny_model)
    ids, mask, _ = uneven(5)
    look = {"prompt_lookup_num_tokens": 4, **GREEDY}
    if kind == "heads":
        look = {"use_mtp": True, "assistant_confidence_threshold": 0.0, **GREEDY}
    cache = model.read(ids[:, :9], mask[:, :9])
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, **look, return_dict_in_generate=True)
    assert out.past_key_values is cache
    assert not cache.recording
    assert cache.on_hidden_states is None
    assert cache.seen_tokens == out.sequences.shape[1] - 1
    assert torch.equal(out.sequences, model.generate(ids, attention_mask=mask, **GREEDY))
    longer = torch.cat([out.sequences, ids[:, -3:].clamp(min=3)], 1)
    every = torch.cat([mask, torch.ones(len(ids), longer.shape[1] - ids.shape[1], dtype=torch.long)], 1)
    expected = model.generate(longer, attention_mask=every, **GREEDY)
    for options in (GREEDY, look):
        held = copy.deepcopy(cache)
        assert torch.equal(model.generate(longer, attention_mask=every, past_key_values=held, **options), expected)


def test_rows_that_ended_before_go_on_too(tiny_model: Callable[..., Any]) -> None:
    """Their states have seen their own tokens and no padding, which plain decoding feeds them."""
    model = tiny_model()
    ids, mask, _ = uneven(1)
    for end in model.generate(ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] + 3].tolist():
        look = {**GREEDY, "prompt_lookup_num_tokens": 2, "eos_token_id": [end, end + 1, end + 2, end + 3]}
        out = model.generate(ids, attention_mask=mask, **look, return_dict_in_generate=True)
        new = out.sequences[:, ids.shape[1] :]
        ends = torch.isin(new, torch.tensor(look["eos_token_id"]))
        counts = (ends.cumsum(1) - ends.long() == 0).long()  # up to the first of them
        assert len(set(counts.sum(1).tolist())) > 1
        every = torch.cat([mask, counts, torch.ones(len(ids), 2, dtype=torch.long)], 1)
        longer = torch.cat([out.sequences, ids[:, -2:].clamp(min=3)], 1)
        expected = model.generate(longer, attention_mask=every, **GREEDY)
        again = model.generate(longer, attention_mask=every, past_key_values=out.past_key_values, **GREEDY)
        assert torch.equal(again, expected)


@settings(max_examples=20)
@given(data=st.data())
def test_rows_remove_tokens_of_their_own(data: st.DataObject, tiny_model: Callable[..., Any]) -> None:
    """In blocks and in any other way: each row goes on as if alone."""
    model = build(data.draw(st.sampled_from(KINDS)), tiny_model)
    static, rows = data.draw(st.booleans()), 3
    ids = torch.randint(3, 61, (rows, 40), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9))))
    cache = Mamba2Cache(model.config, static=static, max_length=40 if static else None)
    twins = [Mamba2Cache(model.config) for _ in range(rows)]
    past = data.draw(st.integers(0, 5))
    with torch.no_grad():
        if past:
            for own, each in ((ids, cache), *zip(ids[:, None], twins, strict=True)):
                model(own[:, :past], past_key_values=each)
        in_blocks = data.draw(st.booleans())
        cache.activate_past_recording(5 if in_blocks else None)
        place, texts = past, [row[:past].tolist() for row in ids]
        for _ in range(data.draw(st.integers(1, 3))):
            sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=1 if in_blocks else 2))
            total = sum(sizes)
            for size in sizes:
                model(ids[:, place : place + size], past_key_values=cache)
                place += size
            kept = data.draw(st.lists(st.integers(0, total), min_size=rows, max_size=rows))
            cache.crop(torch.tensor(kept) - total)
            for text, row, count in zip(texts, ids, kept, strict=True):
                text += row[place - total :][:count].tolist()
        assert cache.seen_tokens == max(map(len, texts))
        cache.stop_recording()
        following = ids[:, 36:40]
        logits = model(following, past_key_values=cache).logits
        for row, (text, twin) in enumerate(zip(texts, twins, strict=True)):
            rest = torch.tensor([text[past:] + following[row].tolist()])
            expected = model(rest, past_key_values=twin).logits[0, -4:]
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("source", ["lookup", "assistant", "heads"])
def test_batches_sample_by_the_models_own_distribution(source: str, tiny_model: Callable[..., Any]) -> None:
    """The first two tokens of many rows against their exact probabilities."""
    model = tiny_model(seed=3, vocab_size=5, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ids, rows = torch.tensor([[3, 4, 1, 3, 4, 1, 3, 4]]), 1000
    guess: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if source == "assistant":
        guess = {"assistant_model": tiny_model(seed=4, vocab_size=5)}
    elif source == "heads":
        model = with_heads("plain", 2, seed=3, vocab_size=5)
        guess = {"use_mtp": True, "assistant_confidence_threshold": 0.0, "num_assistant_tokens": 3}
    options = {**GREEDY, "do_sample": True, "max_new_tokens": 2, "top_k": 0, "temperature": 3.0}
    torch.manual_seed(0)
    out = model.generate(ids.expand(rows, -1), **guess, **options)[:, ids.shape[1] :]
    counts = torch.zeros(5, 5)
    counts.index_put_((out[:, 0], out[:, 1]), torch.ones(rows), accumulate=True)
    with torch.no_grad():
        first = (model(ids).logits[0, -1] / 3).softmax(-1)
        texts = torch.cat([ids.expand(5, -1), torch.arange(5)[:, None]], 1)
        expected = first[:, None] * (model(texts).logits[:, -1] / 3).softmax(-1) * rows
    assert float(((counts - expected) ** 2 / expected).sum()) < 52  # 24 degrees of freedom: one run in a thousand


def test_a_text_is_looked_up_from_its_beginning() -> None:
    lookup = TextLookup([5, 6, 7, 8, 5, 6], 2)
    assert lookup.draft(3) == [7, 8, 5]
    lookup.extend([7, 8, 5, 6, 9, 8])
    assert lookup.draft(9) == [5, 6, 7, 8, 5, 6, 9, 8]  # the last token alone
    lookup.extend([4])
    assert lookup.draft(3) == []
    assert TextLookup([3], 2).draft(3) == []
    assert TextLookup([3, 3], 2).draft(3) == [3]
    assert lookup.draft(-1) == []


def test_guesses_are_short_while_they_are_wrong() -> None:
    lookup = TextLookup([3, 4, 5, 6, 7, 8, 9, 3], 1)
    lengths = []
    for right in (0, 0, 1, 2, 4, 3, 3):
        draft = lookup.draft(6)
        lengths.append(len(draft))
        lookup.extend([*draft[:right], 50 + len(lengths), 3])  # and 3 again
    assert lengths == [6, 1, 1, 2, 4, 6, 3]


def test_a_captured_batch_writes_the_greedy_text(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of one width and single steps are replayed, with all buffers where they were when they were captured."""
    widths: list[int] = []
    layers: set[int] = set()

    class Replays(AddressCheck):
        def _replay(self, run: Any, cache: Mamba2Cache, *args: Any) -> None:
            widths.append(self._ids.shape[1])
            layers.add(len(cache.layers))
            super()._replay(run, cache, *args)

    monkeypatch.setattr("mamba2_hf.models.cache.DecodeGraph", Replays)
    heads = {"use_mtp": True, "num_assistant_tokens": 3, "assistant_confidence_threshold": 0.0}
    assistant = make_hybrid("plain", seed=5, layer_blocks=["ssd", "attention mlp", "ssd mlp"], num_hidden_layers=3)
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.assistant_confidence_threshold = 0.0
    for kind in ("pure", "plain", "sliding", "heads"):
        model = with_heads("plain", 2) if kind == "heads" else build(kind, tiny_model)
        ids, mask, _ = uneven(6)
        options = {**GREEDY, "attention_mask": mask, "max_new_tokens": 30}
        expected = model.generate(ids, **options)
        guess = heads if kind == "heads" else {"prompt_lookup_num_tokens": 3}
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "_may_capture", lambda *_: True)
            assert torch.equal(model.generate(ids, **guess, **options), expected)
            assert (4 in widths) == (kind != "sliding")
            if kind == "plain":  # an assistant that is never right, and one that always is
                patch.setattr(type(assistant), "_may_capture", lambda *_: True)
                assert torch.equal(model.generate(ids, assistant_model=assistant, **options), expected)
                assert 3 in layers
                del widths[:]
                model.generation_config.update(num_assistant_tokens=3, assistant_confidence_threshold=0.0)
                assert torch.equal(model.generate(ids, assistant_model=model, **options), expected)
                assert {1, 4} <= set(widths)
        del widths[:]


def test_refuses_what_a_batch_cannot_guess(tiny_model: Callable[..., Any]) -> None:
    model, (ids, mask, _) = tiny_model(), uneven(0)
    read: list[Any] = []
    model.backbone.register_forward_hook(lambda *_: read.append(1))
    base = {**GREEDY, "attention_mask": mask, "prompt_lookup_num_tokens": 2}
    helped = {**base, "prompt_lookup_num_tokens": None, "assistant_model": tiny_model(seed=1)}

    class Streamer(BaseStreamer):
        def put(self, value: Tensor) -> None:
            """Takes anything."""

        def end(self) -> None:
            """Does nothing."""

    for options, message in (
        ({**base, "streamer": Streamer()}, "streamer: several sequences"),
        ({**base, "use_cache": False}, "requires use_cache=True"),
        ({**base, "cache_implementation": "static"}, "cache_implementation"),
        ({**base, "max_matching_ngram_size": 0}, "max_matching_ngram_size is 0"),
        ({**base, "return_dict_in_generate": True, "output_logits": True}, "output_logits=True: several sequences"),
        ({**base, "assistant_model": tiny_model(seed=1)}, "prompt_lookup_num_tokens=2 both guess ahead"),
        ({**helped, "assistant_model": llama()}, "assistant_model is a LlamaForCausalLM"),
        ({**helped, "assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight"),
        (
            {**helped, "assistant_model": tiny_model(vocab_size=9), "tokenizer": 0, "assistant_tokenizer": 0},
            "assistant_tokenizer: an assistant of several sequences",
        ),
        ({**base, "pad_token_id": None, "max_time": 9.0}, "MaxTimeCriteria may end rows apart: pass pad_token_id"),
    ):
        with pytest.raises(ArgumentError, match=message):
            model.generate(ids, **options)
    with batch_invariant(), pytest.raises(ArgumentError, match="does not go with drafts for several sequences"):
        model.generate(ids, **base)
    with pytest.raises(ArgumentError, match="no inputs_embeds"):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), **base)
    cache = model.read(ids[:, :9], mask[:, :9])
    del read[:]
    with pytest.raises(ArgumentError, match="an assistant needs the ids of the whole text"):
        model.generate(ids[:, 9:], past_key_values=cache, **helped)
    assert not read
    cache.activate_past_recording()
    with pytest.raises(CacheError, match="holds 4 sequences and the input has 2"):
        cache.crop(torch.tensor([0, 0]))


# What is refused


def test_refuses_what_cannot_be_taken_back(tiny_model: Callable[..., Any]) -> None:
    model, ids = tiny_model(), prompt(0)
    look = {"prompt_lookup_num_tokens": 2, **GREEDY}
    cache = model.read(ids[:, :9])
    with pytest.raises(ArgumentError, match="needs the ids of the whole text, and got 5 where the cache has seen 9"):
        model.generate(ids[:, 9:14], attention_mask=torch.ones(1, 14), past_key_values=cache, **look)
    with pytest.raises(ArgumentError, match="no inputs_embeds"):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), **look)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    with pytest.raises(ArgumentError, match="with padding on the left"):
        model.generate(ids, attention_mask=mask, **look)
    with pytest.raises(ArgumentError, match="assistant_early_exit"):
        model.generate(ids, assistant_early_exit=1, **GREEDY)
    with pytest.raises((ValueError, RuntimeError), match=r"use_cache=True|requires a cache"):
        model.generate(ids, use_cache=False, **look)
