"""Whole models on the Triton backend, chosen as on a GPU: its kernels run in the interpreter where there is none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrids import make_hybrid
from test_captured_decoding import CHANGES, prompts, pure
from torch import Tensor

from mamba2_hf import ContinuousBatch, Mamba2Cache, PrefixCache, Request, generate_batch
from mamba2_hf.ops import dispatch, use_backend
from mamba2_hf.ops.runtime import tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"num_heads": 4, "head_dim": 16}  # a program per head: the fewer, the faster the interpreter
ONE_LAYER = {"num_hidden_layers": 1, "num_heads": 2, "hidden_size": 16}
STATE_CHANGES = ("reordered", "selected, fewer", "repeated", "a row replaced", "tokens taken back", "a block")
STATE_CHANGES += ("to its own device", "inference mode left", "reset", "every buffer")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets Triton serve the CPU, and lists the ops that it served."""
    monkeypatch.setattr(dispatch, "_usable", torch.compiler.assume_constant_result(lambda device: (True, "by test")))
    triton, ops = dispatch.backend_module("triton"), []
    supports = triton.supports

    def noted(op: str, **call: Any) -> tuple[bool, str]:
        ops.append(op)
        return supports(op, **call)

    monkeypatch.setattr(triton, "supports", noted)
    return ops


@pytest.fixture
def tokens() -> Tensor:
    """``(2, 13)``."""
    return torch.randint(3, 61, (2, 13), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def on_both(run: Callable[[], Any]) -> tuple[Any, Any]:
    with use_backend("torch"):
        expected = run()
    return expected, run()


@pytest.mark.parametrize("packing", ["plain", "padded", "packed"])
def test_loss_and_gradients(tiny_model: Callable[..., Any], tokens: Tensor, served: list[str], packing: str) -> None:
    model = tiny_model(**SIZES).to(DEVICE).train()
    inputs = {
        "plain": {},
        "padded": {"attention_mask": (torch.arange(13) >= torch.tensor([[4], [0]])).long().to(DEVICE)},
        "packed": {"seq_idx": torch.arange(13).div(5, rounding_mode="floor").expand(2, 13).to(DEVICE)},
    }[packing]

    def run() -> tuple[Tensor, ...]:
        loss = model(tokens, labels=tokens, **inputs).loss
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    for expected, actual in zip(*on_both(run), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert set(served) == {"gated_rms_norm", "linear_cross_entropy", "mamba2_layer"}


def test_generation_steps_through_the_cache(tiny_model: Callable[..., Any], tokens: Tensor, served: list[str]) -> None:
    model = tiny_model(**SIZES).to(DEVICE)
    mask = (torch.arange(13) >= torch.tensor([[4], [0]])).long().to(DEVICE)

    def run() -> tuple[Any, ...]:
        out = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        states = [(layer.conv, layer.ssm) for layer in out.past_key_values.layers]
        return out.sequences, torch.stack(out.logits), *(state for pair in states for state in pair)

    for expected, actual in zip(*on_both(run), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert set(served) == {"gated_rms_norm", "mamba2_layer", "mamba2_layer_step"}


def test_sequences_that_guess_ahead(tiny_model: Callable[..., Any], tokens: Tensor, served: list[str]) -> None:
    model = tiny_model(**SIZES).to(DEVICE)
    ids = torch.cat([tokens, tokens], 1)

    def run() -> tuple[Any, ...]:
        out = model.generate(
            ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, prompt_lookup_num_tokens=2
        )
        states = [(layer.conv, layer.ssm) for layer in out.past_key_values.layers]
        return out.sequences, *(state for pair in states for state in pair)

    for expected, actual in zip(*on_both(run), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert set(served) == {"gated_rms_norm", "mamba2_layer", "mamba2_layer_step", "mamba2_step"}


@pytest.mark.parametrize("name", ["plain", "parallel", "sigmoid"])
def test_hybrids(name: str, tokens: Tensor, served: list[str]) -> None:
    """Padded and packed, then a step through the cache; the mixers' variants of gate, norm and multipliers included."""
    model = make_hybrid(name, ssm_num_heads=2, ssm_head_dim=16, ssm_state_size=16).to(DEVICE)
    inputs = {
        "attention_mask": (torch.arange(13) >= torch.tensor([[4], [0]])).long().to(DEVICE),
        "seq_idx": torch.arange(13).div(5, rounding_mode="floor").expand(2, 13).to(DEVICE),
    }

    def run() -> tuple[Tensor, ...]:
        loss = model(tokens, labels=tokens, use_cache=False, **inputs).loss
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        with torch.no_grad():
            out = model(tokens, **inputs)
            step = model(tokens[:, :1], past_key_values=out.past_key_values).logits
        return loss, step, *(gradient for gradient in gradients if gradient is not None)

    for expected, actual in zip(*on_both(run), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert set(served) >= {"gated_rms_norm", "mamba2_layer", "mamba2_layer_step"}


@pytest.mark.slow
def test_one_graph(tiny_model: Callable[..., Any], tokens: Tensor, served: list[str]) -> None:
    """A training step and a cached step compile without a break, the backend found while tracing."""
    model = tiny_model(**SIZES).to(DEVICE)

    def train() -> Tensor:
        return model(tokens, labels=tokens, use_cache=False).loss

    expected = torch.autograd.grad(train(), list(model.parameters()))
    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(), list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(a, b)

    with torch.no_grad():
        caches = [model(tokens, use_cache=True).past_key_values for _ in range(2)]
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            logits = [
                m(tokens[:, :1], past_key_values=cache).logits for m, cache in zip((model, step), caches, strict=True)
            ]
            torch.testing.assert_close(*logits)
    assert {"gated_rms_norm", "mamba2_layer", "mamba2_layer_step"} <= set(served)


class TestDeferredWrites:
    """States that are written once in some tokens, after every operation on a cache that they cannot tell from others.

    The ring is short here, so that few steps go around it more than once, and serves few sequences.
    """

    @pytest.fixture(autouse=True)
    def _few_and_short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tables, "RING", 16 if torch.cuda.is_available() else 4)
        monkeypatch.setattr(tables, "RING_ROWS", {4: 2, 2: 2})

    @pytest.mark.parametrize("way", STATE_CHANGES)
    @torch.no_grad()
    def test_a_cache_is_changed_between_steps(self, way: str) -> None:
        """The same states and logits as without, in the middle of the ring and after it has come around again."""
        model, change = pure(**ONE_LAYER).to(DEVICE), CHANGES[way][0]
        draw = torch.Generator().manual_seed(0)
        states = [torch.randn(3, *shape, generator=draw).to(DEVICE) for shape in ((64, 3), (2, 16, 16))]

        def run(defer_writes: bool) -> tuple[Tensor, ...]:
            cache = Mamba2Cache(model.config, static=True, max_length=64, defer_writes=defer_writes)
            cache.layers[0].update(*states)  # of a prompt, which takes the interpreter long
            cache.seen_tokens = 9
            assert (cache.layers[0].clock is not None) == defer_writes
            logits = []
            for token in range(3, 6):
                logits.append(model(torch.full((3, 1), token, device=DEVICE), past_key_values=cache).logits)
            change(cache, model)
            for token in range(4, 8):
                rows = torch.full((cache.batch_size, 1), token, device=DEVICE)
                rows[0] += 9
                logits.append(model(rows, past_key_values=cache).logits)
            return *logits, cache.layers[0].ssm, cache.layers[0].conv

        with use_backend("torch"):
            expected = run(False)
        for found, wanted in zip(run(True), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)

    @torch.no_grad()
    def test_states_are_saved_copied_and_moved_in_the_middle(self, tmp_path: Path) -> None:
        """Those that go on and those that were kept do so with the same bits."""
        model, steps = pure(**ONE_LAYER).to(DEVICE), prompts(2, "cpu")["input_ids"].to(DEVICE)
        cache = Mamba2Cache(model.config)
        for part in steps.split([3, *[1] * 6], 1):
            model(part, past_key_values=cache)
        copied = copy.deepcopy(cache)
        cache.save(tmp_path / "state.safetensors", model)
        loaded = Mamba2Cache.load(tmp_path / "state.safetensors", model)
        with use_backend("torch"):
            whole = model(torch.cat([steps, steps], 1)).logits[:, 9:]
        parts = [[model(part, past_key_values=kept).logits for part in steps.split(1, 1)] for kept in (cache, loaded)]
        assert torch.equal(torch.cat(parts[0], 1), torch.cat(parts[1], 1))
        parts.append([model(part, past_key_values=copied.to(DEVICE)).logits for part in steps.split(1, 1)])
        for found in parts:
            torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-5, rtol=1e-4)

    @torch.no_grad()
    def test_other_ways_through_a_layer_find_settled_states(self) -> None:
        """A block, a hooked mixer, another backend and gradients, each between steps that defer writes."""
        model, steps = pure(**ONE_LAYER).to(DEVICE), prompts(2, "cpu")["input_ids"].to(DEVICE)
        cache, parts = Mamba2Cache(model.config), []

        def feed(*pieces: Tensor) -> None:
            parts.extend(model(piece, past_key_values=cache).logits.detach() for piece in pieces)

        text = torch.cat([steps, steps, steps], 1)
        pieces = text.split([2, 1, 1, 1, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 7], 1)
        feed(*pieces[:7])
        handle = model.backbone.layers[0].mixer.in_proj.register_forward_hook(lambda *_: None)
        feed(*pieces[7:9])
        handle.remove()
        feed(*pieces[9:11])
        with use_backend("torch"):
            feed(*pieces[11:13])
        feed(pieces[13])
        with torch.enable_grad():
            feed(pieces[14])
        feed(*pieces[15:])
        with use_backend("torch"):
            whole = model(text).logits
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)

    @pytest.mark.slow
    @torch.no_grad()
    def test_steps_are_compiled(self) -> None:
        """In one graph, with a ring that was made before; a compiled prompt makes none."""
        model, ids = pure(**ONE_LAYER).to(DEVICE), prompts(2, "cpu")["input_ids"].to(DEVICE)
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
        caches = [model(ids[:, :3]).past_key_values for _ in range(2)]
        for part in ids[:, 3:].split(1, 1):
            logits = [run(part, past_key_values=kept).logits for run, kept in zip((model, step), caches, strict=True)]
            torch.testing.assert_close(*logits)
        torch.testing.assert_close(*(kept.layers[0].ssm for kept in caches))
        prompt = Mamba2Cache(model.config)
        torch.testing.assert_close(step(ids, past_key_values=prompt).logits, model(ids).logits)
        assert prompt.layers[0].clock is None

    def test_batches_that_requests_join_and_leave(self) -> None:
        """Each row has a clock of its own; prompts go on from states of rows that are in the middle of theirs."""
        model = pure(**ONE_LAYER, eos_token_id=None).to(DEVICE)
        draw = torch.Generator().manual_seed(0)
        shared = torch.randint(2, 97, (6,), generator=draw)
        requests = []
        for new in (9, 4, 12, 6):
            own = torch.randint(2, 97, (new % 5,), generator=draw)
            requests.append(Request(torch.cat([shared, own]), {"max_new_tokens": new, "do_sample": False}))
        kept = PrefixCache(2**24, min_tokens=1)
        ended = generate_batch(model, requests, slots=2, prefix_cache=kept)
        assert kept.stats.hits
        further = [[*request.input_ids.tolist(), *done.tokens] for request, done in zip(requests, ended, strict=True)]
        more = [Request(text, {"max_new_tokens": 3, "do_sample": False}) for text in further]
        again = generate_batch(model, more, slots=2, prefix_cache=kept)
        with use_backend("torch"):
            for request, done in zip([*requests, *more], [*ended, *again], strict=True):
                ids = torch.as_tensor(request.input_ids)[None].to(DEVICE)
                alone = model.generate(ids, **request.settings)[0, ids.shape[1] :].tolist()
                assert done.tokens == alone

    @pytest.mark.parametrize("deferred", [True, False])
    def test_batches_may_write_at_every_step(self, deferred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        model, rings = pure(**ONE_LAYER, eos_token_id=None).to(DEVICE), []
        make = dispatch.backend_module("triton").new_ring
        monkeypatch.setattr(dispatch.backend_module("triton"), "new_ring", lambda *of: rings.append(of) or make(*of))
        requests = [Request([5, 7, 9], {"max_new_tokens": 2, "do_sample": False}) for _ in range(2)]
        options = {} if deferred else {"defer_writes": False}
        first, second = generate_batch(model, requests, slots=2, **options)
        assert first.tokens == second.tokens
        assert bool(rings) is deferred
        state = ContinuousBatch(model, slots=2, **options).cache.layers[0]
        assert (state.clock is not None) is deferred

    def test_beams(self) -> None:
        model = pure(**ONE_LAYER).to(DEVICE)
        options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "min_new_tokens": 8}
        found, expected = on_both(lambda: model.generate(**prompts(1, DEVICE), **options))
        assert torch.equal(found, expected)

    @torch.no_grad()
    def test_hybrids(self) -> None:
        model = make_hybrid("plain", ssm_num_heads=2, ssm_head_dim=16, ssm_state_size=16).to(DEVICE)
        ids = prompts(2, "cpu")["input_ids"].to(DEVICE) % 61
        caches = [model(ids[:, :2]).past_key_values for _ in range(2)]
        assert any(getattr(layer, "clock", None) is not None for layer in caches[0].layers)
        for part in ids[:, 2:].split(1, 1):
            found = model(part, past_key_values=caches[0]).logits
            with use_backend("torch"):
                torch.testing.assert_close(found, model(part, past_key_values=caches[1]).logits, atol=1e-5, rtol=1e-4)
