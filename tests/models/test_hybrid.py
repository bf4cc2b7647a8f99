"""Hybrids: every token sees its own document and nothing else, however it is padded, packed, split or run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hybrids import ARCHITECTURES, make_config, make_hybrid
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache, masking_utils
from transformers.integrations import flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mamba2_hf import (
    Mamba2Cache,
    Mamba2HybridForCausalLM,
    Mamba2HybridForSequenceClassification,
    Mamba2HybridModel,
    ops,
)
from mamba2_hf.errors import ArgumentError, CacheError, CheckpointError

ROWS, TOKENS = 3, 13
EXACT = {"rtol": 0, "atol": 1e-9}  # fp64: only the order of the sums differs
CLOSE = {"rtol": 0, "atol": 2e-5}
every = pytest.mark.parametrize("name", ARCHITECTURES)

_models: dict[str, Any] = {}


def exact(name: str) -> Any:
    """A model in fp64, made once."""
    if name not in _models:
        _models[name] = make_hybrid(name).double()
    return _models[name]


def tokens(rows: int = ROWS, count: int = TOKENS, seed: int = 1) -> Tensor:
    return torch.randint(3, 61, (rows, count), generator=torch.Generator().manual_seed(seed))


def ragged(rows: int = ROWS, count: int = TOKENS, seed: int = 2) -> Tensor:
    mask = (torch.rand(rows, count, generator=torch.Generator().manual_seed(seed)) > 0.3).long()
    mask[:, -1] = 1
    return mask


def documents_of(mask: Tensor, names: Tensor, cuts: list[int]) -> list[tuple[int, list[int]]]:
    """Row and columns of each document: a new one starts where the name changes, but not at the start of a segment,
    which continues what the row had before.
    """
    found: list[tuple[int, list[int]]] = []
    for row in range(len(mask)):
        columns: list[int] = []
        for start, stop in pairwise([0, *cuts, mask.shape[1]]):
            before = None
            for column in range(start, stop):
                if not mask[row, column]:
                    continue
                if before is not None and names[row, column] != before:
                    found.append((row, columns))
                    columns = []
                columns.append(column)
                before = int(names[row, column])
        if columns:
            found.append((row, columns))
    return found


@every
@settings(max_examples=8)
@given(data=st.data())
@torch.no_grad()
def test_padding_documents_and_splits_change_nothing(name: str, data: st.DataObject) -> None:
    model, ids = exact(name), tokens()
    bits = st.lists(st.booleans(), min_size=ROWS * TOKENS, max_size=ROWS * TOKENS)
    kind = data.draw(st.sampled_from(["neither", "padded", "packed", "both"]))
    mask, names = torch.ones_like(ids), torch.zeros_like(ids)
    if kind in ("padded", "both"):
        mask = torch.tensor(data.draw(bits)).view_as(ids).long()
    if kind in ("packed", "both"):
        names = (torch.tensor(data.draw(bits)).view_as(ids)).long().cumsum(1) // 2
    cuts = sorted(data.draw(st.sets(st.integers(1, TOKENS - 1), max_size=4)))
    static = data.draw(st.booleans())
    cache = Mamba2Cache(model.config, static=static, max_length=TOKENS + 1 if static else None)
    logits = []
    for start, stop in pairwise([0, *cuts, TOKENS]):
        arguments: dict[str, Any] = {}
        if kind in ("padded", "both"):
            arguments["attention_mask"] = mask[:, :stop]
        if kind in ("packed", "both"):
            arguments["seq_idx"] = names[:, start:stop]
        logits.append(model(ids[:, start:stop], past_key_values=cache, **arguments).logits)
    logits = torch.cat(logits, 1)
    following = model(torch.full((ROWS, 1), 7), past_key_values=cache).logits[:, 0]
    last: dict[int, Tensor] = {row: torch.tensor([7]) for row in range(ROWS)}
    for row, columns in documents_of(mask, names, cuts):
        expected = model(ids[row, columns][None], use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, columns], expected, **EXACT)
        last[row] = torch.cat([ids[row, columns], torch.tensor([7])])
    for row, document in last.items():
        expected = model(document[None], use_cache=False).logits[0, -1]
        torch.testing.assert_close(following[row], expected, **EXACT)
    assert cache.get_seq_length() == TOKENS + 1


@every
def test_gradients_of_a_padded_packed_batch(name: str) -> None:
    model, ids, mask = exact(name), tokens(), ragged()
    names = (torch.arange(TOKENS) // 5).expand_as(ids)
    weights = torch.randn(ROWS, TOKENS, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    parameters = list(model.parameters())
    together = (model(ids, attention_mask=mask, seq_idx=names, use_cache=False).logits * weights).sum()
    alone = torch.zeros((), dtype=torch.float64)
    for row, columns in documents_of(mask, names, []):
        alone = alone + (model(ids[row, columns][None], use_cache=False).logits[0] * weights[row, columns]).sum()
    pairs = (torch.autograd.grad(total, parameters, allow_unused=True) for total in (together, alone))
    for ours, theirs in zip(*pairs, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["rotary", "sliding", "shared"])
@torch.no_grad()
def test_flat_documents(name: str) -> None:
    """As transformers' collator lays them out: bounds, and positions that start anew."""
    model, ids = exact(name), tokens(1, 15)
    bounds = torch.tensor([0, 4, 9, 15], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in bounds.diff()])[None]
    for arguments in (
        {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 6, "max_length_k": 6},
        {"position_ids": positions},
        {"cu_seq_lens_q": bounds, "position_ids": positions},
    ):
        logits = model(ids, use_cache=False, **arguments).logits[0]
        for start, stop in pairwise(bounds.tolist()):
            expected = model(ids[:, start:stop], use_cache=False).logits[0]
            torch.testing.assert_close(logits[start:stop], expected, **EXACT)


@torch.no_grad()
def test_rotary_positions_are_taken_as_given_and_counted_on_from_there() -> None:
    """Rotary attention knows distances only: a document whose positions start late is the same document, and a cache
    goes on from its last position.
    """
    model, ids = exact("rotary"), tokens(2, 10)
    expected = model(ids, use_cache=False).logits
    late = (torch.arange(10) + 37).expand(2, -1)
    torch.testing.assert_close(model(ids, position_ids=late, use_cache=False).logits, expected, **EXACT)
    cache = model(ids[:, :6], position_ids=late[:, :6]).past_key_values
    torch.testing.assert_close(model(ids[:, 6:], past_key_values=cache).logits, expected[:, 6:], **EXACT)
    with pytest.raises(ArgumentError, match="position_ids goes from"):
        model(ids, position_ids=late * 2, use_cache=False)


class TestAttentionImplementations:
    @pytest.fixture
    def flash(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """A kernel with flash attention's contract: no masks, causal from the lower right, bounds of documents."""
        calls: list[Any] = []

        def attend(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float, dropout: float,
            sliding_window: int | None, cu_seq_lens_q: Any = None, cu_seq_lens_k: Any = None,
            max_length_q: Any = None, max_length_k: Any = None,
        ) -> tuple[Tensor, None]:  # fmt: skip
            assert mask is None
            calls.append(cu_seq_lens_q)
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)

            def one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                places = torch.arange(key.shape[2]) - (key.shape[2] - query.shape[2])
                columns = torch.arange(query.shape[2])[:, None]
                seen = places <= columns
                if sliding_window is not None:
                    seen &= places > columns - sliding_window
                scores = (query @ key.mT * scaling).masked_fill(~seen, float("-inf"))
                return scores.softmax(-1) @ value

            if cu_seq_lens_q is None:
                return one(query, key, value).transpose(1, 2), None
            assert max_length_q == int(cu_seq_lens_q.diff().max())
            assert max_length_k == int(cu_seq_lens_k.diff().max())
            assert (cu_seq_lens_q[-1], cu_seq_lens_k[-1]) == (query.shape[2], key.shape[2])
            documents = zip(pairwise(cu_seq_lens_q.tolist()), pairwise(cu_seq_lens_k.tolist()), strict=True)
            out = [one(query[:, :, a:b], key[:, :, c:d], value[:, :, c:d]) for (a, b), (c, d) in documents]
            return torch.cat(out, 2).transpose(1, 2), None

        monkeypatch.setitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, "flash_attention_2", attend)
        return calls

    @pytest.mark.parametrize("name", ["rotary", "sliding", "parallel"])
    @pytest.mark.parametrize("implementation", ["eager", "flash_attention_2"])
    @pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
    @torch.no_grad()
    def test_all_give_the_same(self, flash: list[Any], name: str, implementation: str, static: bool) -> None:
        reference, model = exact(name), copy.deepcopy(exact(name))
        model.config._attn_implementation_internal = implementation
        assert reference.config._attn_implementation == "sdpa"
        ids, mask = tokens(), ragged()
        mask[0] = 1
        mask[1, :4] = 0
        names = (torch.arange(TOKENS) // 3).expand_as(ids)
        caches = [Mamba2Cache(model.config, static=static, max_length=TOKENS + 2 if static else None) for _ in "ab"]
        for start, stop, arguments in (
            (0, 5, {"attention_mask": mask[:, :5]}),
            (5, 6, {}),
            (6, 11, {"seq_idx": names[:, 6:11], "attention_mask": torch.cat([mask[:, :5], mask[:, 5:11]], 1)}),
            (11, 12, {}),
            (12, 13, {}),
        ):
            ours, theirs = (
                run(ids[:, start:stop], past_key_values=cache, **arguments).logits
                for run, cache in zip((model, reference), caches, strict=True)
            )
            torch.testing.assert_close(ours, theirs, **EXACT)
        plain = model(ids, use_cache=False).logits
        torch.testing.assert_close(plain, reference(ids, use_cache=False).logits, **EXACT)
        if implementation != "eager":
            assert any(call is None for call in flash)
            assert any(call is not None for call in flash)

    @pytest.mark.parametrize("name", ["sliding", "parallel"])
    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    @torch.no_grad()
    def test_flex(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its kernels are run uncompiled here: what is compiled for a CPU is not the same kernel anyway."""
        make, run = masking_utils.create_block_mask, flex_attention.flex_attention
        monkeypatch.setattr(
            masking_utils, "create_block_mask", lambda **options: make(**{**options, "_compile": False})
        )
        uncompiled = lambda *tensors, training, **options: run(*tensors, **options)  # noqa: E731
        monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", uncompiled)
        reference, model = make_hybrid(name), make_hybrid(name)
        model.set_attn_implementation("flex_attention")
        ids, mask = tokens(), ragged()
        names = (torch.arange(TOKENS) // 3).expand_as(ids)
        for arguments in ({}, {"attention_mask": mask}, {"attention_mask": mask, "seq_idx": names}):
            ours, theirs = (one(ids, **arguments) for one in (model, reference))
            torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
            for following in (ids[:, :3], ids[:, :1]):
                ours, theirs = (
                    one(following, past_key_values=out.past_key_values)
                    for one, out in ((model, ours), (reference, theirs))
                )
                torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)

    @torch.no_grad()
    def test_one_that_takes_no_masks_is_refused(self) -> None:
        model = make_hybrid()
        model.config._attn_implementation_internal = "unheard_of"
        with pytest.raises(ArgumentError, match="attn_implementation='unheard_of' takes no masks"):
            model(tokens())


class TestGeneration:
    @pytest.fixture(params=ARCHITECTURES)
    def model(self, request: pytest.FixtureRequest) -> Any:
        model = make_hybrid(request.param)
        model.generation_config.eos_token_id = None
        return model

    @pytest.fixture
    def prompt(self) -> dict[str, Tensor]:
        mask = torch.ones(ROWS, 9, dtype=torch.long)
        mask[0, :4], mask[1, -2:] = 0, 0
        return {"input_ids": tokens(count=9), "attention_mask": mask}

    def test_every_way_is_the_one_without_a_cache(self, model: Any, prompt: dict[str, Tensor]) -> None:
        left = {**prompt, "attention_mask": prompt["attention_mask"].sort(1).values}
        left["input_ids"] = prompt["input_ids"].gather(1, prompt["attention_mask"].argsort(dim=1, stable=True))
        expected = model.generate(**left, max_new_tokens=6, do_sample=False, use_cache=False)[:, 9:]
        for options in (
            {},
            {"prefill_chunk_size": 4},
            {"cache_implementation": "static", "disable_compile": True},
        ):
            out = model.generate(**prompt, max_new_tokens=6, do_sample=False, **options)[:, 9:]
            assert torch.equal(out, expected), options

    def test_beams_follow_their_keys(self, model: Any, prompt: dict[str, Tensor]) -> None:
        options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
        left = {"input_ids": prompt["input_ids"]}
        assert torch.equal(model.generate(**left, **options), model.generate(**left, **options, use_cache=False))

    def test_a_conversation_goes_on_with_all_ids(self, model: Any, prompt: dict[str, Tensor]) -> None:
        first = {"input_ids": prompt["input_ids"], "attention_mask": prompt["attention_mask"].sort(1).values}
        out = model.generate(**first, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, tokens(count=3, seed=8)], 1)
        mask = torch.cat([first["attention_mask"], torch.ones(ROWS, 7, dtype=torch.long)], 1)
        options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
        again = model.generate(ids, past_key_values=out.past_key_values, **options)
        assert torch.equal(again, model.generate(ids, use_cache=False, **options))


def test_layers_that_are_not_split_are_those_that_there_are() -> None:
    """Policies of FSDP look each of them up, and fail where one is not there."""
    assert make_hybrid("plain")._no_split_modules == {"Mamba2HybridLayer"}
    assert make_hybrid("shared")._no_split_modules == {"Mamba2HybridLayer", "SharedBlock"}


class TestStepsOfAttention:
    """One op a layer, which a GPU's kernels serve; here PyTorch does."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        found: list[Any] = []
        step = ops.attention_step
        monkeypatch.setattr(ops, "attention_step", lambda call: found.append(call) or step(call))
        monkeypatch.setattr(
            "mamba2_hf.layers.attention.attention_step_serves",
            lambda stream, _: stream.shape[1] == 1 and len(stream) < 9,
        )
        return found

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("name", "served"), [("plain", 1), ("sliding", 1), ("parallel", 1), ("experts", 1), ("rotary", 0)]
    )
    def test_are_those_of_modules(self, calls: list[Any], name: str, served: int) -> None:
        """Behind prompts of their own lengths, which a buffer holds from its left; a window and a convolution are for
        modules, and so is what somebody hooks.
        """
        model, ids, mask = exact(name), tokens(), ragged()
        cache = Mamba2Cache(model.config, static=True, max_length=TOKENS + 3)
        model(ids, attention_mask=mask, past_key_values=cache)
        twin, following = copy.deepcopy(cache), tokens(count=3, seed=8)
        found = [model(token, past_key_values=cache).logits for token in following.split(1, 1)]
        assert len(calls) == 3 * served
        hooks = [m.register_forward_hook(lambda *_: None) for m in model.modules() if type(m).__name__ == "Attention"]
        expected = [model(token, past_key_values=twin).logits for token in following.split(1, 1)]
        assert len(calls) == 3 * served
        assert hooks
        torch.testing.assert_close(torch.cat(found), torch.cat(expected), **EXACT)

    @torch.no_grad()
    def test_not_of_what_is_recorded_or_grows(self, calls: list[Any]) -> None:
        model, ids = exact("plain"), tokens()
        growing, static = Mamba2Cache(model.config), Mamba2Cache(model.config, static=True, max_length=TOKENS + 2)
        for cache in (growing, static):
            model(ids, past_key_values=cache)
            cache.activate_past_recording()
            model(ids[:, :1], past_key_values=cache)
        assert not calls


class TestCache:
    @torch.no_grad()
    def test_selecting_and_repeating(self) -> None:
        for name in ("rotary", "sliding", "shared"):
            model, ids, mask = exact(name), tokens(), ragged()
            for static in (False, True):
                cache = Mamba2Cache(model.config, static=static, max_length=TOKENS + 3)
                model(ids, attention_mask=mask, past_key_values=cache)
                twin = copy.deepcopy(cache)
                order = torch.tensor([2, 0, 2])
                twin.reorder_cache(order)
                twin.batch_repeat_interleave(2)
                following = torch.full((6, 1), 9)
                expected = model(following[:3], past_key_values=cache).logits[order].repeat_interleave(2, 0)
                torch.testing.assert_close(model(following, past_key_values=twin).logits, expected, **EXACT)

    @torch.no_grad()
    def test_reset_starts_anew_in_the_same_buffers(self) -> None:
        model, ids = exact("sliding"), tokens()
        cache = Mamba2Cache(model.config, static=True, max_length=TOKENS)
        first = model(ids, past_key_values=cache).logits
        addresses = [layer.keys.data_ptr() for layer in cache.layers if hasattr(layer, "keys")]
        cache.reset()
        assert not cache.is_initialized
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, first, **EXACT)
        assert [layer.keys.data_ptr() for layer in cache.layers if hasattr(layer, "keys")] == addresses

    @torch.no_grad()
    def test_sizes(self) -> None:
        """A window bounds what is kept, and padding is not kept at all."""
        model = make_hybrid("sliding")
        cache = model(tokens(1, 40)).past_key_values
        sliding, _, full = cache.layers
        assert (sliding.keys.shape[2], full.keys.shape[2]) == (3, 40)
        held = sum(
            tensor.nbytes for layer in cache.layers for tensor in vars(layer).values() if isinstance(tensor, Tensor)
        )
        assert cache.nbytes == held
        mask = torch.ones(2, 40, dtype=torch.long)
        mask[:, 5:30] = 0
        assert model(tokens(2, 40), attention_mask=mask).past_key_values.layers[2].keys.shape[2] == 15

    @torch.no_grad()
    def test_what_does_not_fit_is_refused(self) -> None:
        model, ids = make_hybrid(), tokens()
        with pytest.raises(CacheError, match="static=True needs max_length"):
            Mamba2Cache(model.config, static=True)
        with pytest.raises(CacheError, match="max_length is 0"):
            Mamba2Cache(model.config, static=True, max_length=0)
        cache = Mamba2Cache(model.config, static=True, max_length=TOKENS)
        model(ids, past_key_values=cache)
        with pytest.raises(CacheError, match=f"room for {TOKENS} tokens, it holds up to {TOKENS} and 1 more"):
            model(ids[:, :1], past_key_values=cache)
        for cache in (model(ids).past_key_values, Mamba2Cache(model.config, static=True, max_length=50)):
            model(ids, past_key_values=cache)
            with pytest.raises(CacheError, match="holds 3 sequences and the input has 2"):
                model(ids[:2, :1], past_key_values=cache)
        with pytest.raises(CacheError, match="another model's"):
            model(ids, past_key_values=make_hybrid("sliding")(ids).past_key_values)

    @torch.no_grad()
    def test_an_empty_cache_of_transformers_becomes_ours(self) -> None:
        model, ids = exact("plain"), tokens()
        expected = model(ids, use_cache=False).logits
        for cache in (
            DynamicCache(),
            DynamicCache(config=model.config),
            StaticCache(config=model.config, max_cache_len=TOKENS),
        ):
            logits = [model(ids[:, [column]], past_key_values=cache).logits for column in range(TOKENS)]
            torch.testing.assert_close(torch.cat(logits, 1), expected, **EXACT)
            assert isinstance(cache, Mamba2Cache)
        filled = DynamicCache()
        filled.update(torch.zeros(3, 2, 4, 10), torch.zeros(3, 2, 4, 10), 0)
        with pytest.raises(CacheError, match="the DynamicCache is not empty"):
            model(ids, past_key_values=filled)

    @pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
    def test_made_in_inference_mode_and_continued_with_gradients(self, static: bool) -> None:
        model, ids = exact("rotary"), tokens()
        cache = Mamba2Cache(model.config, static=static, max_length=TOKENS)
        with torch.inference_mode():
            model(ids[:, :6], past_key_values=cache)
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits[:, 6:]
        logits = [model(ids[:, [column]], past_key_values=cache).logits for column in range(6, TOKENS)]
        torch.testing.assert_close(torch.cat(logits, 1), expected, **EXACT)
        torch.cat(logits, 1).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        model.zero_grad()


class TestOutputs:
    @every
    @torch.no_grad()
    def test_attentions(self, name: str) -> None:
        """Each mixer's, in order; softmax weights sum to one over what may be seen, and padding sees nothing."""
        model, ids, mask = exact(name), tokens(), ragged()
        out = model(ids, attention_mask=mask, output_attentions=True, use_cache=False)
        kinds = model.config.mixer_kinds
        assert len(out.attentions) == len(kinds)
        pairs = mask[:, None, :, None] * mask[:, None, None, :]
        for kind, matrix in zip(kinds, out.attentions, strict=True):
            heads = model.config.ssm_num_heads if kind == "ssd" else model.config.num_attention_heads
            assert matrix.shape == (ROWS, heads, TOKENS, TOKENS)
            assert (matrix * (1 - pairs)).abs().max() == 0
            assert torch.equal(matrix, matrix.tril())
            if kind != "ssd":
                sums = matrix.sum(-1)
                torch.testing.assert_close(sums, mask[:, None].expand_as(sums).to(sums), **EXACT)
        torch.testing.assert_close(out.logits, model(ids, attention_mask=mask).logits, **EXACT)
        with pytest.raises(ArgumentError, match="output_attentions=True with a cache of"):
            model(ids, past_key_values=model(ids).past_key_values, output_attentions=True)

    @torch.no_grad()
    def test_hidden_states_and_tuples(self) -> None:
        model, ids = exact("shared"), tokens()
        out = model(ids, output_hidden_states=True)
        assert len(out.hidden_states) == model.config.num_hidden_layers + 1
        torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits, **EXACT)
        logits, _ = model(ids, return_dict=False)
        torch.testing.assert_close(logits, out.logits, **EXACT)

    @torch.no_grad()
    def test_logits_are_scaled_and_kept(self) -> None:
        ids = tokens()
        plain = make_hybrid(logits_scaling=None)
        logits = plain(ids).logits
        torch.testing.assert_close(make_hybrid(logits_scaling=4.0)(ids).logits, logits / 4)
        torch.testing.assert_close(make_hybrid(lm_head_multiplier=0.25)(ids).logits, logits / 4)
        torch.testing.assert_close(plain(ids, logits_to_keep=2).logits, logits[:, -2:])

    @torch.no_grad()
    def test_embeddings_given_directly_are_scaled_too(self) -> None:
        model, ids = exact("parallel"), tokens()
        given = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        torch.testing.assert_close(given, model(ids).logits, **EXACT)

    @torch.no_grad()
    def test_a_classifier_reads_the_last_token_that_counts(self) -> None:
        model = make_hybrid("rotary", Mamba2HybridForSequenceClassification, num_labels=3)
        ids, mask = tokens(), ragged()
        logits = model(ids, attention_mask=mask).logits
        for row in range(ROWS):
            alone = model(ids[row, mask[row].bool()][None]).logits[0]
            torch.testing.assert_close(logits[row], alone, **CLOSE)


class TestExperts:
    @pytest.mark.parametrize("name", ["experts", "sigmoid"])
    def test_every_implementation_gives_the_same(self, name: str) -> None:
        results = []
        for implementation in ("eager", "batched_mm", "grouped_mm"):
            model = make_hybrid(name)
            model.set_experts_implementation(implementation)
            out = model(tokens(), labels=tokens(), attention_mask=ragged())
            out.loss.backward()
            results.append([out.logits.detach(), *(parameter.grad for parameter in model.parameters())])
        for others in results[1:]:
            for ours, theirs in zip(others, results[0], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_a_token_gets_its_best_experts_weighed(self) -> None:
        """The mixture, written for one token at a time."""
        model = exact("experts")
        moe = model.backbone.layers[0].blocks[1].moe
        x = torch.randn(1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        out, logits = moe(x)
        for token, routed, scores in zip(x[0], out[0], logits[0].double(), strict=True):
            best = scores.argsort(descending=True)[:2]
            expected = moe.shared(token)
            for expert, weight in zip(best, scores[best].softmax(-1), strict=True):
                gate, up = (moe.experts.gate_up_proj[expert] @ token).chunk(2)
                inner = torch.nn.functional.silu(gate) * up
                expected = expected + weight * (moe.experts.down_proj[expert] @ inner)
            torch.testing.assert_close(routed, expected, rtol=0, atol=1e-6)

    def test_the_loss_balances_the_experts(self) -> None:
        model, ids, mask = make_hybrid("experts"), tokens(), ragged()
        plain = model(ids, attention_mask=mask, labels=ids)
        out = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
        assert plain.router_logits is None
        assert plain.aux_loss is None
        assert [tuple(logits.shape) for logits in out.router_logits] == [(ROWS * TOKENS, 4)] * 2
        logits = torch.stack(out.router_logits)[:, mask.flatten().bool()].flatten(0, 1)
        chosen = torch.zeros_like(logits).scatter(1, logits.topk(2, -1).indices, 1.0)
        expected = 4 * (chosen.mean(0) * logits.softmax(-1).mean(0)).sum()
        torch.testing.assert_close(out.aux_loss, expected)
        torch.testing.assert_close(out.loss, plain.loss + 0.001 * expected)
        out.aux_loss.backward()
        assert model.backbone.layers[0].blocks[1].moe.router.weight.grad.abs().max() > 0

    @torch.no_grad()
    def test_the_balancing_bias_chooses_but_does_not_weigh(self) -> None:
        model = make_hybrid("sigmoid")
        router = model.backbone.layers[1].blocks[0].moe.router
        x = torch.randn(7, 32, generator=torch.Generator().manual_seed(4))
        router.e_score_correction_bias.zero_()
        router.e_score_correction_bias[5] = 100.0
        logits, weights, index = router(x)
        assert (index == 5).any(1).all()
        scores = logits.sigmoid().gather(1, index)
        torch.testing.assert_close(weights, 1.5 * scores / scores.sum(-1, keepdim=True))


class TestDtypesAndFiles:
    def test_what_stays_in_fp32(self) -> None:
        for cast in (lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16), lambda m: m.half()):
            model = cast(make_hybrid("sigmoid"))
            kept = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.dtype == torch.float32}
            assert kept == {"A_log", "D", "dt_bias"}
            assert model.backbone.layers[1].blocks[0].moe.router.e_score_correction_bias.dtype == torch.float32
        rotary = make_hybrid("rotary").bfloat16().backbone.rotary
        assert rotary.inv_freq.dtype == torch.float32

    @every
    def test_saved_and_loaded(self, name: str, tmp_path: Any) -> None:
        model, ids = make_hybrid(name), tokens()
        fields = set(vars(make_config())) - {"architectures", "dtype", "_name_or_path", "transformers_version"}
        model.save_pretrained(tmp_path)
        loaded = Mamba2HybridForCausalLM.from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model(ids).logits)
        saved, read = ({k: v for k, v in m.config.to_dict().items() if k in fields} for m in (model, loaded))
        assert read == {**saved, "rescale_prenorm_residual": False}
        half = Mamba2HybridForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        for module in half.modules():
            for parameter in ("A_log", "e_score_correction_bias", "inv_freq"):
                assert getattr(module, parameter, torch.zeros(())).dtype == torch.float32
        with torch.no_grad():
            noise = (half(ids).logits - model(ids).logits).abs().max() / model(ids).logits.abs().max()
        assert noise < 0.1

    def test_a_part_that_is_missing_is_refused(self, tmp_path: Any) -> None:
        model = make_hybrid()
        state = {name: tensor for name, tensor in model.state_dict().items() if "k_proj.weight" not in name}
        model.save_pretrained(tmp_path, state_dict=state)
        with pytest.raises(CheckpointError, match=r"k_proj\.weight is missing"):
            Mamba2HybridForCausalLM.from_pretrained(tmp_path)

    @every
    def test_new_weights_write_little_to_the_stream(self, name: str) -> None:
        model = Mamba2HybridModel(make_config(name))
        blocks = sum(map(len, model.config.blocks))
        for inner, linear in model.layers.named_modules():
            if inner.rpartition(".")[2] in ("out_proj", "o_proj", "down_proj") and hasattr(linear, "in_features"):
                bound = (blocks * linear.in_features) ** -0.5
                assert 0.5 * bound < linear.weight.abs().max() <= bound, inner


# Compiled


class Graphs:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


compiled_ones = pytest.mark.parametrize("name", ["sliding", "sigmoid", "shared"])


def to_compile(name: str) -> Any:
    """As small as can be, so that tracing is quick: two layers share one block."""
    few = {"layer_blocks": ["shared>ssd", "shared>ssd"], "num_shared_blocks": 1}
    return make_hybrid(name, **(few if name == "shared" else {}))


@pytest.mark.usefixtures("_fresh_compiler")
class TestCompiled:
    @compiled_ones
    @torch.no_grad()
    def test_prefill(self, name: str) -> None:
        model, graphs, ids, mask = to_compile(name), Graphs(), tokens(), ragged()
        compiled = torch.compile(model, fullgraph=True, backend=graphs)
        ours, theirs = (run(ids, attention_mask=mask) for run in (compiled, model))
        torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
        ours, theirs = (
            run(ids[:, :2], past_key_values=out.past_key_values).logits for run, out in ((model, ours), (model, theirs))
        )
        torch.testing.assert_close(ours, theirs, **CLOSE)
        assert graphs.count == 1

    @compiled_ones
    @pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
    @torch.no_grad()
    def test_decode_compiles_twice_at_most(self, name: str, static: bool) -> None:
        model, graphs, ids = to_compile(name), Graphs(), tokens()
        step = torch.compile(model, fullgraph=True, backend=graphs)
        expected = model(ids, use_cache=False).logits
        cache = Mamba2Cache(model.config, static=static, max_length=TOKENS)
        model(ids[:, :4], past_key_values=cache)
        buffers = [layer.keys for layer in cache.layers if hasattr(layer, "keys")] if static else []
        for column in range(4, TOKENS):
            logits = step(ids[:, [column]], past_key_values=cache).logits[:, 0]
            torch.testing.assert_close(logits, expected[:, column], **CLOSE)
        assert graphs.count <= 2
        kept = [layer.keys for layer in cache.layers if hasattr(layer, "keys")] if static else []
        assert all(before is after for before, after in zip(buffers, kept, strict=True))

    @compiled_ones
    def test_training(self, name: str) -> None:
        model, ids, mask = to_compile(name).train(), tokens(), ragged()
        results = []
        for run in (torch.compile(model, fullgraph=True, backend="aot_eager"), model):
            model.zero_grad()
            loss = run(ids, attention_mask=mask, labels=ids).loss
            loss.backward()
            results.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    @compiled_ones
    @torch.no_grad()
    def test_export(self, name: str) -> None:
        model = to_compile(name)
        shapes = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "use_cache": None}
        program = torch.export.export(
            model, (), {"input_ids": tokens(2, 20), "use_cache": False}, dynamic_shapes=shapes, strict=False
        )
        for rows, count in [(3, 9), (2, 33)]:
            ids = tokens(rows, count)
            logits = program.module()(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(logits, model(ids, use_cache=False).logits, **CLOSE)


class TestOnAGPU:
    """The same as on a CPU, with kernels and implementations that are others, for a padded and packed batch."""

    pytestmark = pytest.mark.gpu

    @every
    def test_logits_losses_and_gradients(self, name: str) -> None:
        """As far from fp64 as fp32 is on a CPU, and not much further."""
        results = {}
        for device, dtype in (("cpu", torch.float64), ("cpu", torch.float32), ("cuda", torch.float32)):
            model = make_hybrid(name).to(device, dtype).train()
            ids, mask = tokens().to(device), ragged().to(device)
            names = (torch.arange(TOKENS, device=device) // 5).expand_as(ids)
            out = model(ids, attention_mask=mask, seq_idx=names, labels=ids, return_logits=True)
            out.loss.backward()
            grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            results[device, dtype] = [each.detach().cpu().double() for each in (out.logits, out.loss, torch.cat(grads))]
        expected, on_cpu, on_gpu = results.values()
        for exactly, there, here in zip(expected, on_cpu, on_gpu, strict=True):
            error, usual = ((found - exactly).norm() / exactly.norm() for found in (here, there))
            assert error <= 4 * usual + 1e-6, f"{error:.1e} and {usual:.1e} on a CPU"

    @every
    def test_captured_steps_write_the_same_text(self, name: str) -> None:
        mask = torch.ones(ROWS, 9, dtype=torch.long)
        mask[0, :4] = 0
        given = {"input_ids": tokens(count=9), "attention_mask": mask}
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
        expected = make_hybrid(name).generate(**given, **options).sequences
        out = make_hybrid(name).cuda().generate(**{k: v.cuda() for k, v in given.items()}, **options)
        assert out.past_key_values.graph.is_captured
        assert torch.equal(out.sequences.cpu(), expected)

    @every
    @torch.no_grad()
    def test_any_split_of_the_tokens(self, name: str) -> None:
        model, ids = make_hybrid(name).cuda(), tokens().cuda()
        expected = model(ids, use_cache=False).logits
        for static in (False, True):
            cache = Mamba2Cache(model.config, static=static, max_length=TOKENS if static else None)
            logits = [model(part, past_key_values=cache).logits for part in ids.split([5, 1, 1, 4, 2], 1)]
            torch.testing.assert_close(torch.cat(logits, 1), expected, **CLOSE)


@every
def test_gradient_checkpointing(name: str) -> None:
    model, ids, mask = make_hybrid(name).train(), tokens(), ragged()
    # Renamed between the supported versions of transformers.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    results = []
    for _ in range(2):
        model.zero_grad()
        out = model(ids, attention_mask=mask, labels=ids)
        out.loss.backward()
        results.append([out.loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        enable()
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


class Reads(TorchDispatchMode):
    """Notes whether values are read back, for which the CPU would wait on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["plain", "rotary", "sliding"])
def test_a_training_step_on_packed_documents_reads_no_value(name: str) -> None:
    """Then it can be captured as a CUDA graph, as documentation says."""
    model = make_hybrid(name).train()
    ids, names = tokens(), torch.tensor([[0] * 5 + [1] * 8, [0] * 13, [0] + [1] * 12])
    with Reads() as reads:
        model(ids, seq_idx=names, labels=ids).loss.backward()
    assert not reads.found
