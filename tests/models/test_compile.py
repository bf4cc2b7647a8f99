"""``torch.compile`` and ``torch.export``: one graph, few of them, and the same numbers as eager."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hybrids import make_hybrid
from torch import Tensor, nn
from torch.export import Dim

from mamba2_hf import Mamba2Cache, Mamba2ForSequenceClassification
from mamba2_hf.errors import ArgumentError, CacheError

TOKENS = 12
CLOSE = {"rtol": 0, "atol": 1e-5}


class Graphs:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def small(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model(num_hidden_layers=1)


def tokens(rows: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 61, (rows, count), generator=torch.Generator().manual_seed(seed))


def random_mask(rows: int, count: int, seed: int = 0) -> Tensor:
    return (torch.rand(rows, count, generator=torch.Generator().manual_seed(seed)) > 0.3).long()


def documents(rows: int, count: int, seed: int = 0) -> Tensor:
    starts = torch.rand(rows, count, generator=torch.Generator().manual_seed(seed)) > 0.8
    return starts.long().cumsum(1)


def same_states(ours: Mamba2Cache, theirs: Mamba2Cache) -> None:
    assert ours.seen_tokens == theirs.seen_tokens
    for left, right in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(left.conv, right.conv, **CLOSE)
        torch.testing.assert_close(left.ssm, right.ssm, **CLOSE)


LAYOUTS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "plain": lambda ids: {},
    "mask": lambda ids: {"attention_mask": random_mask(*ids.shape)},
    "seq_idx": lambda ids: {"seq_idx": documents(*ids.shape)},
    "position_ids": lambda ids: {"position_ids": (torch.arange(ids.shape[1]) % 5).expand(ids.shape)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_prefill_is_one_graph(model: Any, layout: str) -> None:
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    ids = tokens(2, TOKENS)
    arguments = LAYOUTS[layout](ids)
    ours, theirs = compiled(ids, **arguments), model(ids, **arguments)
    torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
    same_states(ours.past_key_values, theirs.past_key_values)
    assert graphs.count == 1


@torch.no_grad()
def test_flat_batches_are_one_graph(model: Any) -> None:
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    arguments = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 7, "max_length_k": 7}
    compiled = torch.compile(model, fullgraph=True, backend=Graphs())
    ids = tokens(1, TOKENS)
    for mask in (None, torch.ones(1, TOKENS), random_mask(1, TOKENS)):
        ours, theirs = (run(ids, attention_mask=mask, **arguments) for run in (compiled, model))
        torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
        same_states(ours.past_key_values, theirs.past_key_values)


@pytest.mark.parametrize("layout", ["seq_idx", "position_ids"])
@torch.no_grad()
def test_padding_among_documents_of_unknown_number_is_refused(small: Any, layout: str) -> None:
    ids = tokens(2, TOKENS)
    with pytest.raises(ArgumentError, match="name them by cu_seq_lens"):
        export(small, ids, strict=False, attention_mask=random_mask(*ids.shape), **LAYOUTS[layout](ids))


@pytest.mark.parametrize("layout", ["plain", "mask"])
@torch.no_grad()
def test_one_graph_serves_every_length_and_batch(small: Any, layout: str) -> None:
    graphs = Graphs()
    compiled = torch.compile(small, fullgraph=True, backend=graphs)
    for rows, count in [(2, 12), (3, 100), (4, 64), (5, 3), (2, 128), (3, 1100), (2, 65), (7, 63)]:
        ids = tokens(rows, count)
        arguments = LAYOUTS[layout](ids)
        ours = compiled(ids, **arguments, use_cache=False).logits
        torch.testing.assert_close(ours, small(ids, **arguments, use_cache=False).logits, **CLOSE)
    assert graphs.count == 2  # the first shape, and all others


@torch.no_grad()
def test_decode_compiles_twice_at_most(model: Any) -> None:
    """Once for the first step, once more when the count of seen tokens turns out to change; then never again."""
    graphs = Graphs()
    step = torch.compile(model, fullgraph=True, backend=graphs)
    ids = tokens(2, TOKENS)
    expected = model(ids, use_cache=False).logits
    for start in (3, 5, 1):  # three conversations, each with its own cache
        cache = model(ids[:, :start]).past_key_values
        addresses = [layer.ssm.data_ptr() for layer in cache.layers]
        for position in range(start, TOKENS):
            out = step(ids[:, position : position + 1], past_key_values=cache)
            torch.testing.assert_close(out.logits[:, 0], expected[:, position], **CLOSE)
            assert out.past_key_values is cache
            assert cache.seen_tokens == position + 1
        assert [layer.ssm.data_ptr() for layer in cache.layers] == addresses
    assert graphs.count <= 2


@torch.no_grad()
def test_decode_of_models_of_several_sizes(tiny_model: Callable[..., Any]) -> None:
    """The second model's graph leaves open what differs from the first's."""
    for sizes in ({}, {"num_heads": 4, "head_dim": 16}):
        model = tiny_model(num_hidden_layers=1, **sizes)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        caches = [model(tokens(2, TOKENS), use_cache=True).past_key_values for _ in range(2)]
        logits = [
            run(tokens(2, 1), past_key_values=cache).logits
            for run, cache in zip((model, compiled), caches, strict=True)
        ]
        torch.testing.assert_close(*logits, **CLOSE)


@torch.no_grad()
def test_segments_continue_a_cache_in_one_graph(small: Any) -> None:
    compiled = torch.compile(small, fullgraph=True, backend=Graphs())
    ids, mask = tokens(3, 30), random_mask(3, 30)
    expected = small(ids, attention_mask=mask)
    cache, logits = Mamba2Cache(small.config), []
    for start, stop in [(0, 8), (8, 20), (20, 30)]:
        out = compiled(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected.logits, **CLOSE)
    same_states(cache, expected.past_key_values)


def train(model: Any, forward: Any, ids: Tensor, **arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = forward(ids, labels=ids, **arguments).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def same_training(model: Any, compiled: Any, ids: Tensor, **arguments: Any) -> None:
    loss, gradients = train(model, compiled, ids, **arguments)
    expected, wanted = train(model, model, ids, **arguments)
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_step(tiny_model: Callable[..., Any], layout: str) -> None:
    model = tiny_model(num_hidden_layers=1).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = tokens(2, TOKENS)
    same_training(model, compiled, ids, **LAYOUTS[layout](ids))


def test_training_with_many_lengths(tiny_model: Callable[..., Any]) -> None:
    model, graphs = tiny_model(num_hidden_layers=1).train(), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for count in (12, 100, 64, 3, 200):
        same_training(model, compiled, tokens(2, count))
    assert graphs.count == 2


def test_training_with_gradient_checkpointing(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(num_hidden_layers=2).train()
    # Renamed between the supported versions of transformers.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    same_training(model, torch.compile(model, fullgraph=True, backend="aot_eager"), tokens(2, TOKENS))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of the compiler itself
def test_inductor(tiny_model: Callable[..., Any]) -> None:
    """The default backend, in training and for a decoded token."""
    model = tiny_model(num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True)
    ids = tokens(2, TOKENS)
    same_training(model.train(), compiled, ids)
    model.eval()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache = model(ids[:, :-1]).past_key_values
        out = compiled(ids[:, -1:], past_key_values=cache)
        torch.testing.assert_close(out.logits[:, 0], expected[:, -1], **CLOSE)


GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}


@torch.no_grad()
def test_prompt_lookup_with_a_compiled_forward(small: Any) -> None:
    """It cannot look at a mask's values, and would take one that leaves nothing out for padding."""
    model, ids = copy.deepcopy(small), tokens(1, 4).repeat(1, 2)
    ones = torch.ones_like(ids)
    expected = model.generate(ids, prompt_lookup_num_tokens=1, **GREEDY)
    model.forward = torch.compile(model.forward, backend=Graphs(), dynamic=True)
    cache = model.read(ids[:, :5], ones[:, :5])
    text = model.generate(ids, attention_mask=ones, past_key_values=cache, prompt_lookup_num_tokens=1, **GREEDY)
    assert torch.equal(text, expected)
    cache = model.read(ids[:, :5], ones[:, :5])
    cache.activate_past_recording()
    with pytest.raises(CacheError, match="A compiled forward takes every attention_mask for padding"):
        model(ids[:, 5:], attention_mask=ones, past_key_values=cache)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pure", "sliding"])
def test_generation_with_a_compiled_forward(kind: str, tiny_model: Callable[..., Any]) -> None:
    attention = {"layer_blocks": ["sliding_attention", "attention"], "num_hidden_layers": 2}
    model = tiny_model(num_hidden_layers=1) if kind == "pure" else make_hybrid(kind, **attention)
    ids = tokens(1, 4).repeat(1, 2)
    padded = torch.ones_like(ids).index_fill(1, torch.arange(2), 0)
    ways: list[dict[str, Any]] = [
        {"prompt_lookup_num_tokens": 1},
        {"attention_mask": padded, "prompt_lookup_num_tokens": 1},
        {"attention_mask": padded, "prefill_chunk_size": 5},
    ]
    expected = [model.generate(ids, **way, **GREEDY) for way in ways]
    model.forward = torch.compile(model.forward, backend=Graphs(), dynamic=True)
    with torch._dynamo.config.patch(recompile_limit=64):
        for way, theirs in zip(ways, expected, strict=True):
            assert torch.equal(model.generate(ids, **way, **GREEDY), theirs)


# Export


def export(model: nn.Module, ids: Tensor, strict: bool, shape: Any = None, **arguments: Any) -> nn.Module:
    shapes = None if shape is None else {"input_ids": shape, **dict.fromkeys(arguments, shape), "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(
            model, (), {"input_ids": ids, **arguments, "use_cache": False}, dynamic_shapes=shapes, strict=strict
        )
    return program.module()


@pytest.mark.parametrize("strict", [False, True], ids=["trace", "strict"])
@torch.no_grad()
def test_exports_a_fixed_shape(model: Any, strict: bool) -> None:
    program = export(model, tokens(2, TOKENS), strict)
    ids = tokens(2, TOKENS, seed=1)
    out = program(input_ids=ids, use_cache=False)
    torch.testing.assert_close(out.logits, model(ids).logits, **CLOSE)
    assert out.past_key_values is None


OPEN = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
NAMED = {0: Dim("batch", max=64), 1: Dim("tokens", max=65536)}


@pytest.mark.parametrize(
    ("layout", "strict", "shape"),
    [("plain", False, NAMED), ("plain", True, NAMED), ("mask", False, OPEN), ("seq_idx", False, OPEN)],
    ids=["plain", "strict", "mask", "seq_idx"],
)
@torch.no_grad()
def test_exports_open_batch_and_length(small: Any, layout: str, strict: bool, shape: Any) -> None:
    example = tokens(2, 100)
    program = export(small, example, strict, shape, **LAYOUTS[layout](example))
    for rows, count in [(3, 9), (2, 64), (5, 128), (2, 1100), (3, 3)]:
        ids = tokens(rows, count)
        arguments = LAYOUTS[layout](ids)
        out = program(input_ids=ids, **arguments, use_cache=False)
        torch.testing.assert_close(out.logits, small(ids, **arguments).logits, **CLOSE)


@torch.no_grad()
def test_exports_the_other_models(tiny_model: Callable[..., Any]) -> None:
    classifier = tiny_model(Mamba2ForSequenceClassification, num_hidden_layers=1)
    for model in (classifier, classifier.backbone):
        ids = tokens(2, TOKENS)
        program = export(model, ids, strict=False)
        ours, theirs = program(input_ids=ids, use_cache=False), model(ids, use_cache=False)
        torch.testing.assert_close(ours[0], theirs[0], **CLOSE)


@torch.no_grad()
def test_an_exported_program_can_be_saved(small: Any, tmp_path: Any) -> None:
    ids = tokens(2, TOKENS)
    program = torch.export.export(small, (ids,), {"use_cache": False}, strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(ids, use_cache=False).logits, small(ids).logits, **CLOSE)
