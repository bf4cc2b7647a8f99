"""``generate`` through a CUDA graph: the same tokens as without, and a reason where there is none."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import BaseTorchDispatchMode

from mamba2_hf import Mamba2Cache, Mamba2Config, Mamba2ForCausalLM, Mamba2HybridConfig, Mamba2HybridForCausalLM
from mamba2_hf.models.graphs import DecodeGraph, why_not
from mamba2_hf.models.outputs import Mamba2CausalLMOutput, step_output
from mamba2_hf.ops.runtime import tables

LENGTHS = {"max_new_tokens": 12, "min_new_tokens": 12}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "beams": {"num_beams": 3},
    "beam samples": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}
SIZES = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "pad_token_id": 0, "eos_token_id": 1}


def pure(**changes: Any) -> Mamba2ForCausalLM:
    torch.manual_seed(0)
    return Mamba2ForCausalLM(
        Mamba2Config(**({"num_heads": 6, "head_dim": 16, "n_groups": 1, "state_size": 16} | SIZES | changes))
    ).eval()


def hybrid(**changes: Any) -> Mamba2HybridForCausalLM:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "layer_blocks": ["ssd mlp", "attention", "ssd"],
        "ssm_num_heads": 6,
        "ssm_head_dim": 16,
        "ssm_state_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    }
    return Mamba2HybridForCausalLM(Mamba2HybridConfig(**(options | SIZES | changes))).eval()


MODELS = {
    "pure": pure,
    "groups": lambda: pure(n_groups=2),
    "hybrid": hybrid,
    "rotary": lambda: hybrid(rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "window": lambda: hybrid(layer_blocks=["ssd", "sliding_attention", "ssd"], sliding_window=7),
}


def prompts(rows: int, device: str) -> dict[str, Tensor]:
    ids = torch.randint(2, 97, (rows, 9), generator=torch.Generator().manual_seed(rows)).to(device)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


class AddressCheck(DecodeGraph):
    """Stands in for a graph on a machine without a GPU: a replay runs the step, if all buffers are where they were."""

    def _capture(self, run: Any, input_ids: Tensor, cache: Mamba2Cache) -> None:
        cache.leave_inference_mode()
        with torch.inference_mode(False):
            self._ids = input_ids.clone()
        replay = functools.partial(self._replay, run, cache, addresses(cache), torch.is_inference_mode_enabled())
        self._graph = SimpleNamespace(replay=replay)

    def _replay(self, run: Any, cache: Mamba2Cache, places: list[int | None], inference: bool) -> None:
        assert addresses(cache) == places
        with torch.inference_mode(inference), torch.no_grad():  # kernels write wherever they are told to
            outputs = run(self._ids)
        with torch.inference_mode(False):
            self._outputs = self._outputs or tuple(output.clone() for output in outputs)
        for held, output in zip(self._outputs, outputs, strict=True):
            held.copy_(output)
        cache.advance(-self._ids.shape[1])  # a replay does not count


def addresses(cache: Mamba2Cache) -> list[int | None]:
    held = [getattr(buffers, name) for buffers in cache._buffers for name in buffers.names]
    return [None if buffer is None else buffer.data_ptr() for buffer in held]


def block(tokens: int, **options: Any) -> Any:
    def feed(cache: Mamba2Cache, model: Any) -> None:
        ids = torch.arange(7, 7 + cache.batch_size * tokens, device=model.device).view(cache.batch_size, tokens)
        model(ids, past_key_values=cache, **{name: value.to(ids.device) for name, value in options.items()})

    return feed


def put(cache: Mamba2Cache, model: Any) -> None:
    cache.put(1, model.read(torch.tensor([[5, 9, 4, 8]], device=model.device)))
    cache.set_lengths([cache.seen_tokens, 4, cache.seen_tokens])


def taken_back(cache: Mamba2Cache, model: Any) -> None:
    cache.activate_past_recording()
    block(4)(cache, model)
    cache.crop(-3)
    cache.stop_recording()


def start_again(rows: int) -> Any:
    def start(cache: Mamba2Cache, model: Any) -> None:
        cache.reset()
        model(torch.arange(20, 20 + 4 * rows, device=model.device).view(rows, 4), past_key_values=cache)

    return start


def replaced(cache: Mamba2Cache, model: Any) -> None:
    for buffers in cache._buffers:
        for name in buffers.names:
            buffer = getattr(buffers, name)
            buffers.replace(**{name: None if buffer is None else buffer.clone()})


CHANGES: dict[str, tuple[Any, Any]] = {
    "reordered": (lambda cache, model: cache.reorder_cache(torch.tensor([2, 0, 0])), False),
    "selected, as many": (lambda cache, model: cache.batch_select_indices(torch.tensor([1, 1, 0])), False),
    "selected, fewer": (lambda cache, model: cache.batch_select_indices(torch.tensor([2, 0])), True),
    "repeated": (lambda cache, model: cache.batch_repeat_interleave(2), True),
    "a row replaced": (put, False),
    "lengths told": (lambda cache, model: cache.set_lengths([3, 9, 5]), False),
    "tokens taken back": (taken_back, False),
    "a block": (block(3), False),
    "a block with padding": (block(3, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1], [1, 0, 1]])), False),
    "a block at given positions": (block(2, position_ids=torch.tensor([[30, 31]])), "rotary"),
    "more room": (lambda cache, model: cache.reserve(60), "attention"),
    "room enough": (lambda cache, model: cache.reserve(20), False),
    "to its own device": (lambda cache, model: cache.to(model.device), False),
    "inference mode left": (lambda cache, model: cache.leave_inference_mode(), False),
    "reset": (start_again(3), False),
    "reset, other rows": (start_again(2), True),
    "every buffer": (replaced, True),
}
"""What may happen to a cache between steps, and whether buffers move: always, never, or in which models."""


@torch.no_grad()
def check_change(make: Any, way: str, graph: DecodeGraph, device: str, inference: bool = False) -> None:
    """A captured cache, changed and decoded on, against one without a graph."""
    model, (change, moves) = make().to(device), CHANGES[way]
    cache = Mamba2Cache(model.config, static=True, captured=True, max_length=30)
    cache.graph = graph
    given = {name: value.to(device) for name, value in prompts(3, "cpu").items()}
    with torch.inference_mode(inference), torch.no_grad():
        model(**given, past_key_values=cache)
        for token in (3, 4, 5):
            model(torch.full((3, 1), token, device=device), past_key_values=cache)
    assert graph.is_captured
    twin = copy.deepcopy(cache)
    assert not twin.graph.is_captured
    twin.graph = None
    before = [getattr(buffers, name) for buffers in cache._buffers for name in buffers.names]  # kept from being freed
    places = addresses(cache)
    for each in (cache, twin):
        change(each, model)
    attends = cache.key_counts is not None
    if not inference:
        rotary = attends and model.config.rope_parameters is not None
        moved = {"rotary": rotary, "attention": "attention" in model.config.mixer_kinds}.get(moves, moves)
        assert (addresses(cache) != places) == moved
    assert graph.is_captured == (addresses(cache) == places)
    del before
    for token in (6, 7, 8):
        ids = torch.full((cache.batch_size, 1), token, device=device)
        ids[0] += 9
        found = model(ids, past_key_values=cache).logits
        torch.testing.assert_close(found, model(ids, past_key_values=twin).logits, atol=2e-5, rtol=1e-4)
    assert graph.is_captured


class TestOnAGPU:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("rows", [1, 3, 6])
    @pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
    def test_tokens_are_those_without_a_graph(self, make: Any, rows: int, way: str) -> None:
        model = make().cuda()
        found = []
        for disabled in (True, False):
            torch.manual_seed(1)
            options = {**WAYS[way], **LENGTHS, "disable_compile": disabled, "return_dict_in_generate": True}
            found.append(model.generate(**prompts(rows, "cuda"), **options))
        assert torch.equal(found[0].sequences, found[1].sequences)
        assert found[0].past_key_values.graph is None
        assert found[1].past_key_values.graph.is_captured

    @pytest.mark.parametrize("make", [pure, hybrid])
    def test_logits_are_those_of_the_whole_sequence(self, make: Any) -> None:
        model = make().cuda()
        out = model.generate(**prompts(2, "cuda"), **LENGTHS, return_dict_in_generate=True, output_logits=True)
        mask = torch.ones_like(out.sequences)
        mask[:, :9] = prompts(2, "cuda")["attention_mask"]
        whole = model(out.sequences, attention_mask=mask).logits[:, 8:-1]
        torch.testing.assert_close(torch.stack(out.logits, 1), whole, atol=2e-5, rtol=1e-4)

    @pytest.mark.parametrize("make", [pure, hybrid])
    def test_a_conversation_goes_on_past_the_first_reservation(self, make: Any) -> None:
        model = make().cuda()
        first = model.generate(**prompts(1, "cuda"), **LENGTHS, return_dict_in_generate=True)
        more = torch.cat([first.sequences, prompts(1, "cuda")["input_ids"]], 1)
        going_on = model.generate(more, past_key_values=first.past_key_values, **LENGTHS)
        assert torch.equal(going_on, model.generate(more, **LENGTHS, disable_compile=True))

    def test_any_cache_of_a_pure_model_will_do(self) -> None:
        model = pure().cuda()
        cache = Mamba2Cache(model.config)
        out = model.generate(**prompts(2, "cuda"), **LENGTHS, past_key_values=cache)
        assert cache.graph.is_captured
        assert torch.equal(out, model.generate(**prompts(2, "cuda"), **LENGTHS, disable_compile=True))

    @pytest.mark.parametrize("inference", [False, True], ids=["", "inference mode"])
    @pytest.mark.parametrize("way", CHANGES)
    @pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
    def test_a_changed_cache_is_decoded_on(self, make: Any, way: str, inference: bool) -> None:
        check_change(make, way, DecodeGraph(), "cuda", inference)

    @pytest.mark.parametrize("make", [pure, hybrid])
    @torch.no_grad()
    def test_a_cache_waits_elsewhere(self, make: Any) -> None:
        model = make().cuda()
        ids = prompts(3, "cuda")["input_ids"]
        cache = Mamba2Cache(model.config, captured=True, max_length=30)
        parts = [model(part, past_key_values=cache).logits for part in ids[:, :7].split([4, 1, 1, 1], 1)]
        assert cache.graph.is_captured
        cache.to("cpu")
        assert not cache.graph.is_captured
        cache.to("cuda")
        parts += [model(part, past_key_values=cache).logits.clone() for part in ids[:, 7:].split(1, 1)]
        torch.testing.assert_close(torch.cat(parts, 1)[:, -2:], model(ids).logits[:, -2:], atol=2e-5, rtol=1e-4)
        assert cache.graph.is_captured

    @pytest.mark.parametrize("way", CHANGES)
    @pytest.mark.parametrize("make", [pure, hybrid])
    def test_a_changed_cache_that_defers_writes_is_decoded_on(
        self, make: Any, way: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tables, "RING_ROWS", {4: 2})
        check_change(make, way, DecodeGraph(), "cuda")

    @pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
    @torch.no_grad()
    def test_deferred_writes_come_to_the_same_for_as_long_as_it_goes(self, state_dtype: torch.dtype | None) -> None:
        model, ids = pure().cuda(), torch.randint(2, 97, (16, 300), device="cuda")
        caches = [Mamba2Cache(model.config, state_dtype=state_dtype, captured=captured) for captured in (False, True)]
        for cache in caches:
            model(ids[:, :4], past_key_values=cache)
        assert all(layer.clock is not None for layer in caches[0].layers)
        for token in ids[:, 4:].split(1, 1):
            found = [model(token, past_key_values=cache).logits for cache in caches]
            assert torch.equal(*found)
        assert caches[1].graph.is_captured
        assert all(torch.equal(a.ssm, b.ssm) for a, b in zip(caches[0].layers, caches[1].layers, strict=True))

    def test_speculation_goes_without(self) -> None:
        model = pure().cuda()
        given = {**prompts(1, "cuda"), **LENGTHS}
        assert torch.equal(model.generate(**given, prompt_lookup_num_tokens=3), model.generate(**given))

    def test_a_copied_cache_goes_its_own_way(self) -> None:
        model = pure().cuda()
        first = model.generate(**prompts(1, "cuda"), **LENGTHS, return_dict_in_generate=True)
        branch = copy.deepcopy(first.past_key_values)
        for cache in (first.past_key_values, branch):
            more = torch.cat([first.sequences, prompts(1, "cuda")["input_ids"]], 1)
            assert torch.equal(model.generate(more, past_key_values=cache, **LENGTHS), model.generate(more, **LENGTHS))

    @pytest.mark.parametrize("make", [pure, hybrid])
    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT reads it
    def test_adapters_are_part_of_it_and_may_change_between_calls(self, make: Any) -> None:
        model = get_peft_model(make(), LoraConfig(target_modules="all-linear", init_lora_weights=False)).cuda().eval()
        given = {**prompts(2, "cuda"), **LENGTHS}
        adapted = model.generate(**given)
        assert torch.equal(adapted, model.generate(**given, disable_compile=True))
        with model.disable_adapter():
            plain = model.generate(**given)
            assert torch.equal(plain, model.generate(**given, disable_compile=True))
        assert not torch.equal(adapted, plain)
        assert torch.equal(adapted, model.merge_and_unload().generate(**given))

    def test_weights_may_change_between_calls(self) -> None:
        model = pure().cuda()
        given = {**prompts(2, "cuda"), **LENGTHS}
        before = model.generate(**given)
        with torch.no_grad():
            model.backbone.embeddings.weight.copy_(model.backbone.embeddings.weight.flip(0))
        after = model.generate(**given)
        assert not torch.equal(before, after)
        assert torch.equal(after, model.generate(**given, disable_compile=True))

    def test_hooks_run_at_every_step(self) -> None:
        model, calls = pure().cuda(), []
        model.backbone.layers[1].register_forward_hook(lambda *_: calls.append(1))
        model.generate(**prompts(1, "cuda"), **LENGTHS)
        assert len(calls) == 12

    def test_what_cannot_be_captured_goes_on_without(self) -> None:
        model = pure().cuda()
        norm = model.backbone.norm_f
        run = type(norm).forward

        class Syncing(type(norm)):
            def forward(self, x: Tensor) -> Tensor:
                assert bool(torch.isfinite(x).all())
                return run(self, x)

        given = {**prompts(1, "cuda"), **LENGTHS}
        expected = model.generate(**given)
        norm.__class__ = Syncing
        out = model.generate(**given, return_dict_in_generate=True)
        assert torch.equal(out.sequences, expected)
        assert "cannot be captured" in out.past_key_values.graph.reason
        torch.randn(3, device="cuda")  # a capture that failed holds no generator back


class Recorder(DecodeGraph):
    """Stands in for a graph on a machine without a GPU: steps run as they are, and are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.drops, self.captured = 0, 0, False

    def step(self, run: Any, input_ids: Tensor, cache: Mamba2Cache) -> Tensor:
        self.steps += 1
        self.captured = True
        return run(input_ids)

    def fits(self, input_ids: Tensor) -> bool:
        return self.steps > 0

    def drop(self) -> None:
        self.drops += self.captured
        self.captured = False


class TestAnywhere:
    @pytest.mark.parametrize("way", CHANGES)
    @pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
    def test_a_graph_lives_as_long_as_the_buffers_it_writes_to(self, make: Any, way: str) -> None:
        check_change(make, way, AddressCheck(), "cpu")

    @pytest.mark.parametrize("way", CHANGES)
    @pytest.mark.parametrize("make", [pure, MODELS["rotary"]])
    def test_and_no_longer_than_they_may_be_written(self, make: Any, way: str) -> None:
        """Buffers of inference mode are made anew by the first call outside of it that writes them itself."""
        check_change(make, way, AddressCheck(), "cpu", inference=True)

    @pytest.mark.parametrize("make", [pure, hybrid])
    def test_buffers_that_leave_their_device_are_told_of(self, make: Any) -> None:
        model = make()
        for move in (lambda cache: cache.to("meta"), lambda cache: cache.layers[1].to("meta")):
            cache = Mamba2Cache(model.config, captured=True, max_length=30)
            cache.graph = graph = AddressCheck()
            with torch.no_grad():
                for ids in prompts(2, "cpu")["input_ids"].split([7, 1, 1], 1):
                    model(ids, past_key_values=cache)
            assert graph.is_captured
            move(cache)
            assert not graph.is_captured

    @pytest.mark.parametrize("make", [pure, hybrid])
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
    def test_copies_have_a_graph_of_their_own(self, make: Any, duplicate: Any) -> None:
        """It is theirs that is dropped when their buffers move, and the original keeps its own."""
        model = make()
        cache = Mamba2Cache(model.config, captured=True, max_length=30)
        ids = prompts(2, "cpu")["input_ids"]
        with torch.no_grad():
            model(ids[:, :7], past_key_values=cache)
        twin = duplicate(cache)
        assert twin.graph is not cache.graph
        assert all(buffers.on_move.__self__ is twin.graph for buffers in twin._buffers)
        graphs = cache.graph, twin.graph
        for graph in graphs:
            graph._graph = graph  # as if it were captured
        twin.batch_select_indices(torch.tensor([1]))
        assert [graph.is_captured for graph in graphs] == [True, False]
        twin.graph = None
        cache.batch_select_indices(torch.tensor([1]))
        assert not graphs[0].is_captured
        layer = copy.deepcopy(cache.layers[0])  # and a layer by itself drags no cache along
        assert layer.on_move.__self__ is not cache.graph

    def test_a_cache_is_freed_with_the_last_reference(self) -> None:
        model = hybrid()
        cache = Mamba2Cache(model.config, captured=True, max_length=30)
        with torch.no_grad():
            model(prompts(2, "cpu")["input_ids"], past_key_values=cache)
        state = weakref.ref(cache.layers[0].conv)
        gc.disable()
        try:
            del cache
            assert state() is None
        finally:
            gc.enable()

    @pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
    def test_buffers_stay_where_they_are(self, make: Any) -> None:
        """Between steps, also of a beam search; they move where the number of sequences changes."""
        model = make()
        cache = Mamba2Cache(model.config, captured=True, max_length=20)
        given = prompts(3, "cpu")
        with torch.no_grad():
            model(**given, past_key_values=cache)
            expected = model(given["input_ids"][:, :1], past_key_values=copy.deepcopy(cache)).logits
            places = buffers(cache)
            order = torch.tensor([2, 0, 0])
            cache.reorder_cache(order)
            assert buffers(cache) == places
            found = model(given["input_ids"][order, :1], past_key_values=cache).logits
        torch.testing.assert_close(found, expected[order])
        assert buffers(cache) == places

    @pytest.mark.parametrize("make", [pure, hybrid, MODELS["window"]])
    def test_room_grows_with_the_tokens(self, make: Any) -> None:
        model = make()
        cache = Mamba2Cache(model.config, captured=True, max_length=4)
        cache.graph = graph = Recorder()
        ids = prompts(2, "cpu")["input_ids"]
        with torch.no_grad():
            parts = [model(part, past_key_values=cache).logits for part in ids.split([3, 1, 1, 2, 1, 1], 1)]
            whole = model(ids).logits
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)
        assert graph.steps == 4
        assert graph.drops == {pure: 0, hybrid: 2}.get(make, 1)  # a window has its full size after the first time

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
    def test_the_loop_around_it_changes_nothing(self, make: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of ``generate`` with its shorter ways, for rows with padding."""
        model, options = make(), {**WAYS[way], **LENGTHS, "return_dict_in_generate": True}
        torch.manual_seed(1)
        expected = model.generate(**prompts(3, "cpu"), **options)
        monkeypatch.setattr("mamba2_hf.models.cache.DecodeGraph", Recorder)
        monkeypatch.setattr(type(model), "_may_capture", lambda *_: True)
        torch.manual_seed(1)
        out = model.generate(**prompts(3, "cpu"), **options)
        assert torch.equal(out.sequences, expected.sequences)
        assert out.past_key_values.graph.steps == 11

    def test_inputs_of_a_step_are_those_of_any_other(self) -> None:
        model, ids = pure(), prompts(2, "cpu")["input_ids"]
        cache = Mamba2Cache(model.config, captured=True)
        cache.graph = graph = Recorder()
        given: dict[str, Any] = {
            "past_key_values": cache,
            "next_sequence_length": 1,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(9).expand_as(ids),
            "logits_to_keep": 1,
            "use_cache": True,
        }
        for more in ({}, {"output_hidden_states": True}, {"token_type_ids": ids}, {"return_logits": None}):
            graph.steps = 0
            expected = model.prepare_inputs_for_generation(ids, **given, **more)
            graph.steps = 1
            found = model.prepare_inputs_for_generation(ids, **given, **more)
            assert found.keys() == expected.keys()
            tensors = [name for name, value in expected.items() if isinstance(value, Tensor)]
            assert all(torch.equal(found.pop(name), expected.pop(name)) for name in tensors)
            assert found == expected

    def test_an_output_made_in_haste_is_an_output(self) -> None:
        cache, logits = Mamba2Cache(pure().config), torch.ones(1, 1, 97)
        made, expected = step_output(logits, cache), Mamba2CausalLMOutput(logits=logits, past_key_values=cache)
        assert type(made) is type(expected)
        assert vars(made) == vars(expected)
        assert list(made.items()) == list(expected.items())
        assert made.to_tuple() == expected.to_tuple()

    def test_only_plain_steps_are_captured(self) -> None:
        model = pure()
        ids = prompts(2, "cpu")["input_ids"]

        def steps(**options: Any) -> int:
            cache = Mamba2Cache(model.config, captured=True)
            cache.graph = graph = Recorder()
            model(ids, past_key_values=cache)
            out = model(ids[:, :1], past_key_values=cache, **options)
            assert out.past_key_values is cache or not options.get("use_cache", True)
            return graph.steps

        with torch.no_grad():
            assert steps() == 1
            assert steps(output_hidden_states=True) == 0
            assert steps(attention_mask=torch.tensor([[1] * 10, [0] + [1] * 9])) == 1
            assert steps(attention_mask=torch.tensor([[1] * 10, [1] * 9 + [0]])) == 0
            assert steps(labels=ids[:, :1]) == 0
            with torch.autocast("cpu"):
                assert steps() == 0
            with BaseTorchDispatchMode():
                assert steps() == 0
            hook = register_module_forward_hook(lambda *_: None)
            assert steps() == 0
            hook.remove()
            assert steps() == 1
            model.train()
            assert steps(use_cache=True) == 0
            model.eval()
        assert steps() == 0  # gradients may be wanted

    @pytest.mark.parametrize("make", [pure, hybrid])
    @pytest.mark.parametrize("name", ["past_key_values", "cache_params", "cache"])
    def test_by_whatever_name_a_cache_comes(self, name: str, make: Any) -> None:
        """transformers passes it as ``cache`` from 5.24 on."""
        model, ids = make(), prompts(2, "cpu")["input_ids"]
        cache = Mamba2Cache(model.config, captured=True, max_length=20)
        cache.graph = graph = Recorder()
        with torch.no_grad():
            model(ids, **{name: cache})
            model(ids[:, :1], **{name: cache})
        assert graph.steps == 1

    def test_a_reason_is_given(self) -> None:
        model = pure()
        assert why_not(model) == "the model is on cpu, not on one GPU"

    @pytest.mark.gpu
    def test_a_hook_for_all_modules_is_one(self) -> None:
        model, modules = pure().cuda(), []
        assert why_not(model) is None
        hook = register_module_forward_hook(lambda module, *_: modules.append(module))
        try:
            assert why_not(model) == "hooks are registered for all modules, which a graph would skip"
            model.generate(**prompts(1, "cuda"), **LENGTHS)
        finally:
            hook.remove()
        assert modules.count(model.backbone.layers[0].mixer.conv1d) == 12

    def test_generate_uses_no_graph_on_a_cpu(self) -> None:
        out = pure().generate(**prompts(1, "cpu"), **LENGTHS, return_dict_in_generate=True)
        assert out.past_key_values.graph is None


def buffers(cache: Mamba2Cache) -> list[int]:
    held = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
    if cache.key_counts is not None and cache.key_counts.lengths is not None:
        held.append(cache.key_counts.lengths)
    return [tensor.data_ptr() for tensor in held]
