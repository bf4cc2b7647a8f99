"""The same bits for a sequence whatever is beside it, however it is cut, and whether tokens are read or stepped."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from devices import on_each_device
from hybrids import ARCHITECTURES, make_hybrid
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from mamba2_hf import (
    ContinuousBatch,
    Mamba2Cache,
    Mamba2HybridForSequenceClassification,
    PrefixCache,
    Request,
    batch_invariant,
    generate_batch,
    ops,
)
from mamba2_hf.errors import ArgumentError, BackendError
from mamba2_hf.ops import dispatch, use_backend
from mamba2_hf.ops.attention.op import attend_one_serves, attention_step_serves
from mamba2_hf.ops.mlp.op import step_serves
from mamba2_hf.ops.runtime import products

KINDS = ("pure", *ARCHITECTURES)
LENGTHS = (23, 9, 1, 16, 5)
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


Build = Callable[..., Any]


@pytest.fixture(scope="session")
def build(tiny_model: Callable[..., Any]) -> Build:
    """Of a kind and a dtype, a model."""

    @functools.cache
    def made(kind: str, dtype: torch.dtype = torch.float32) -> Any:
        return (tiny_model() if kind == "pure" else make_hybrid(kind)).to(dtype)

    return made


def texts(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 61, (length,), generator=draw) for length in lengths]


def logits(model: Any, ids: Tensor, **inputs: Tensor) -> Tensor:
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    found: Tensor = model(ids.to(model.device), **inputs, use_cache=False).logits
    return found


def alone(model: Any, text: Tensor) -> Tensor:
    return logits(model, text[None])[0]


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask ``(B, T)``; what is padding is any token."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.long)
    for row, text in enumerate(rows):
        own = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        ids[row, own], mask[row, own] = text, 1
    return ids, mask


@on_each_device
@each_dtype
@each_kind
@torch.no_grad()
def test_alone_or_with_others(build: Build, kind: str, dtype: torch.dtype, device: str) -> None:
    """In batches of two to five, padded on either side; packed, by positions and by bounds; one after another."""
    model, rows = build(kind, dtype).to(device), texts()
    with batch_invariant():
        expected = [alone(model, text) for text in rows]
        for count in range(2, len(rows) + 1):
            for side in ("left", "right"):
                ids, mask = padded(rows[-count:], side)
                found = logits(model, ids, attention_mask=mask)[mask.bool()].split([len(t) for t in rows[-count:]])
                assert all(map(torch.equal, found, expected[-count:])), (count, side)
        flat, lengths = torch.cat(rows)[None], [len(text) for text in rows]
        position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        for more in ({}, {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}):
            found = logits(model, flat, position_ids=position_ids, **more)[0].split(lengths)
            assert all(map(torch.equal, found, expected)), more.keys()
    model.cpu()


@each_dtype
@each_kind
@settings(max_examples=6)
@given(data=st.data())
@torch.no_grad()
def test_in_pieces(build: Build, kind: str, dtype: torch.dtype, data: st.DataObject) -> None:
    """Of any number and length, single tokens among them, beside another row, through caches of both kinds."""
    model, (text, other) = build(kind, dtype), texts((19, 19), seed=1)
    cuts = sorted(data.draw(st.sets(st.integers(1, 18))))
    pieces = [stop - start for start, stop in zip([0, *cuts], [*cuts, 19], strict=True)]
    options: dict[str, Any] = {"static": True, "max_length": 24} if data.draw(st.booleans()) else {}
    rows = torch.stack([text, other] if data.draw(st.booleans()) else [text])
    with batch_invariant():
        cache = Mamba2Cache(model.config, **options)
        found = [model(piece, past_key_values=cache).logits[0] for piece in rows.split(pieces, 1)]
        assert torch.equal(torch.cat(found), alone(model, text))


@on_each_device
@each_dtype
@each_kind
@torch.no_grad()
def test_read_or_stepped(build: Build, kind: str, dtype: torch.dtype, device: str) -> None:
    """Behind prompts that were padded, token by token, each row goes on as if it had been read whole."""
    model, rows = build(kind, dtype).to(device), texts((9, 4, 6))
    further = torch.stack(texts((5, 5, 5), seed=2)).to(device)
    ids, mask = padded(rows, "left")
    with batch_invariant():
        cache = model.read(ids.to(device), mask.to(device))
        found = torch.cat([model(step, past_key_values=cache).logits for step in further.split(1, 1)], 1)
        for text, more, own in zip(rows, further, found, strict=True):
            assert torch.equal(own, alone(model, torch.cat([text.to(device), more]))[-5:])
    model.cpu()


@torch.no_grad()
def test_shortcuts_of_a_gpu_step_aside() -> None:
    """Kernels that take one token of each row do not serve what has to be as in a prompt, and are not asked to."""
    with FakeTensorMode():
        sizes = ((1, 256), (4, 1, 64), (4, 32, 64))
        stream, queries, keys = (torch.empty(2, *size, device="cuda") for size in sizes)
        with batch_invariant():
            assert not attention_step_serves(stream, keys)
            assert not attend_one_serves(queries, keys)
            assert not step_serves(stream)


def written(batch: ContinuousBatch, requests: Sequence[Request]) -> dict[int, list[Tensor]]:
    """The logits that each request's tokens are chosen by; they say which these are."""
    found: dict[int, list[Tensor]] = {}
    compute = batch._logits

    def watched() -> Tensor:
        scores = compute()  # (slots, 1, V) without drafts
        for running, row in zip(batch._rows, scores[:, -1].clone(), strict=True):
            if running is not None:
                found.setdefault(running.number, []).append(row)
        return scores

    batch._logits = watched  # type: ignore[method-assign]
    for request in requests:
        batch.add(request)
    ended = []
    while not batch.idle:
        ended += batch.step()
    # One that has ended may have taken part once more.
    return {each.request: found[each.request][: len(each.tokens)] for each in ended}


@on_each_device
@each_dtype
@pytest.mark.parametrize("kind", ["pure", "sliding", "experts"])
@torch.no_grad()
def test_rollouts_of_a_running_batch(build: Build, kind: str, dtype: torch.dtype, device: str) -> None:
    """What requests are sampled by, whoever joins and leaves beside them, and whether what they begin with was kept or
    read: it is what one forward over the whole text gives, as a trainer runs it.
    """
    model = build(kind, dtype).to(device)
    shared, *own = texts((11, 3, 8, 1, 5, 8), seed=3)
    prompts = [torch.cat([shared, text]) for text in own]
    sampled = {**GREEDY, "do_sample": True, "temperature": 1.3}
    requests = [
        Request(text, {**sampled, "max_new_tokens": 3 + number}, seed=number) for number, text in enumerate(prompts)
    ]
    kept = PrefixCache(2**24, min_tokens=2)
    options: dict[str, Any] = {"slots": 2, "max_length": 40, "batch_invariant": True}
    ended = generate_batch(model, requests, **options)
    for prefix_cache in (None, kept, kept):
        scores = written(ContinuousBatch(model, **options, prefix_cache=prefix_cache), requests)
        for number, (text, done) in enumerate(zip(prompts, ended, strict=True)):
            with batch_invariant():
                whole = alone(model, torch.cat([text, torch.tensor(done.tokens)]))
            assert torch.equal(torch.stack(scores[number]), whole[len(text) - 1 : -1].float())
    assert kept.stats.hits >= len(requests)
    model.cpu()


@pytest.mark.parametrize("kind", ["pure", "parallel", "experts"])
def test_speculation_is_exact_in_16_bits(build: Build, kind: str) -> None:
    """Guesses are read in blocks and taken back; text and logits are those of plain decoding."""
    model = build(kind, torch.bfloat16)
    ids = torch.cat([texts((6,))[0]] * 3)[None]
    options = {**GREEDY, "max_new_tokens": 20, "batch_invariant": True}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    plain, guessed = (model.generate(ids, **options, **more) for more in ({}, {"prompt_lookup_num_tokens": 4}))
    assert torch.equal(plain.sequences, guessed.sequences)
    assert all(map(torch.equal, plain.logits, guessed.logits))


@torch.no_grad()
def test_generate_takes_it(build: Build) -> None:
    model, rows = build("plain"), texts((7, 3))
    ids, mask = padded(rows, "left")
    options = {**GREEDY, "max_new_tokens": 4, "batch_invariant": True}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    together = model.generate(ids, attention_mask=mask, **options)
    assert not ops.is_batch_invariant()
    for row, text in enumerate(rows):
        single = model.generate(text[None], **options)
        assert torch.equal(together.sequences[row, ids.shape[1] :], single.sequences[0, len(text) :])
        assert all(
            torch.equal(ours[row], theirs[0]) for ours, theirs in zip(together.logits, single.logits, strict=True)
        )


@each_kind
@torch.no_grad()
def test_under_autocast(kind: str, build: Build) -> None:
    model, rows = build(kind), texts((9, 4, 6))
    ids, mask = padded(rows, "left")
    with batch_invariant(), torch.autocast("cpu", torch.bfloat16):
        expected = [alone(model, text) for text in rows]
        assert torch.equal(logits(model, ids, attention_mask=mask)[mask.bool()], torch.cat(expected))
        cache = Mamba2Cache(model.config)
        found = [model(token, past_key_values=cache).logits[0] for token in rows[0][None].split(1, 1)]
        assert torch.equal(torch.cat(found), expected[0])


@torch.no_grad()
def test_classes_of_texts() -> None:
    model = make_hybrid("plain", Mamba2HybridForSequenceClassification, num_labels=3)
    rows = texts()
    ids, mask = padded(rows, "right")
    with batch_invariant():
        single = torch.cat([model(text[None]).logits for text in rows])
        assert torch.equal(model(ids, attention_mask=mask).logits, single)


def test_a_static_cache_compiles_nothing(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = build("plain"), {**GREEDY, "max_new_tokens": 4, "batch_invariant": True}
    monkeypatch.setattr(type(model), "get_compiled_call", None)
    ids = texts((6,))[0][None]
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), model.generate(ids, **options))


@each_kind
@torch.no_grad()
def test_it_computes_the_same_function(build: Build, kind: str) -> None:
    model, text = build(kind, torch.float64), texts((23,))[0]
    expected = alone(model, text)
    with batch_invariant():
        torch.testing.assert_close(alone(model, text), expected, rtol=1e-10, atol=1e-10)
    model.float()


@each_kind
@torch.no_grad()
def test_outside_nothing_changes(build: Build, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are those from before, and none of it runs."""
    model, (text,) = build(kind), texts((12,))
    before = alone(model, text)
    with batch_invariant():
        alone(model, text)
    monkeypatch.setattr(products, "blockwise", None)
    monkeypatch.setitem(dispatch._modules, dispatch.INVARIANT, None)
    assert torch.equal(alone(model, text), before)
    with batch_invariant(), use_backend("torch"):
        assert not ops.is_batch_invariant()
        assert torch.equal(alone(model, text), before)


@pytest.mark.parametrize("packing", ["rows", "seq_idx", "cu_seqlens"])
@torch.no_grad()
def test_ops_keep_their_contracts(packing: str) -> None:
    """In fp64 they give what those of PyTorch do: with states, gates, limits, padding between documents, and slots."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    batch, options = (1, {"cu_seqlens": torch.tensor([0, 4, 4, 9])}) if packing == "cu_seqlens" else (2, {})
    if packing == "seq_idx":
        options = {"seq_idx": torch.tensor([[3, 3, -1, 0, 0, 0, 0, 1, 1, 1, 1], [5] * 10 + [-1]])}
    states, tokens = 3 if packing == "cu_seqlens" else batch, 11
    x, z, maps = normal(batch, tokens, 4, 6), normal(batch, tokens, 4, 6), normal(2, batch, tokens, 2, 5)
    scan = {"D": normal(4, 6), "z": z, "dt_bias": normal(4), "dt_softplus": True, "dt_limit": (0.3, 1.1)}
    scan |= {"initial_states": normal(states, 4, 6, 5), "return_final_states": True, **options}
    dt, A, inputs, weight = normal(batch, tokens, 4), -normal(4).exp(), normal(batch, tokens, 7), normal(7, 4)
    conv = {"activation": "silu", "initial_states": normal(states, 7, 3), "return_final_states": True, **options}
    held, slots = (normal(5, 4, 6, 5), normal(5, 7, 4)), torch.tensor([3, -1])

    def run() -> tuple[Tensor, ...]:
        of_scan, columns = (each.clone() for each in held)
        one = ops.ssd_state_update(of_scan, normal_x, step, A, *normal_maps, D=scan["D"], dt_softplus=True, slots=slots)
        moved = ops.causal_conv1d_update(block, columns, weight, normal_bias, activation="silu", slots=slots)
        scanned = ops.ssd_chunk_scan(x, dt, A, *maps, **scan)
        return *scanned, *ops.causal_conv1d(inputs, weight, normal_bias, **conv), one, of_scan, moved, columns

    normal_x, step, normal_maps, block = normal(2, 4, 6), normal(2, 4), normal(2, 2, 2, 5), normal(2, 3, 7)
    normal_bias = normal(7)
    expected = run()
    with batch_invariant():
        for found, wanted in zip(run(), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_lora_is_read() -> None:
    """Plain adapters are products as any; merged, they are other weights."""
    model = make_hybrid("plain")
    config = LoraConfig(r=3, target_modules=["in_proj", "out_proj", "q_proj", "o_proj", "up_proj"], lora_alpha=5)
    model = inject_adapter_in_model(config, model).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    rows = texts()
    ids, mask = padded(rows, "left")
    plain = alone(model, rows[0])
    with batch_invariant():
        expected = torch.cat([alone(model, text) for text in rows])
        assert torch.equal(logits(model, ids, attention_mask=mask)[mask.bool()], expected)
    torch.testing.assert_close(expected[: len(plain)], plain, rtol=1e-4, atol=1e-4)


class TestRefusals:
    """Before anything ran, or at the first product that cannot be seen."""

    def test_gradients(self, build: Build) -> None:
        with batch_invariant(), pytest.raises(ArgumentError, match=r"gradients: use torch\.no_grad"):
            alone(build("pure"), texts()[0])

    def test_gradients_of_ops(self) -> None:
        x, dt = torch.randn(1, 3, 2, 4, requires_grad=True), torch.rand(1, 3, 2)
        maps = torch.randn(1, 3, 1, 4)
        with batch_invariant(), pytest.raises(BackendError, match=r"no gradients: use torch\.no_grad"):
            ops.ssd_chunk_scan(x, dt, -torch.ones(2), maps, maps)

    @torch.no_grad()
    def test_rounded_states(self, build: Build) -> None:
        model = build("pure")
        cache = Mamba2Cache(model.config, state_dtype=torch.bfloat16)
        with batch_invariant(), pytest.raises(ArgumentError, match=r"state_dtype=torch\.bfloat16"):
            model(texts()[0][None], past_key_values=cache)
        assert cache.seen_tokens == 0
        with pytest.raises(ArgumentError, match=r"state_dtype=torch\.bfloat16"):
            ContinuousBatch(model, state_dtype=torch.bfloat16, batch_invariant=True)
        args = torch.zeros(1, 2, 4), torch.zeros(1, 2), -torch.ones(2), *torch.zeros(2, 1, 1, 4)
        with batch_invariant(), pytest.raises(ArgumentError, match=r"float16.*needs them in torch\.float32"):
            ops.ssd_state_update(torch.zeros(1, 2, 4, 4).half(), *args)

    @torch.no_grad()
    def test_dropout(self) -> None:
        model = make_hybrid("plain", attention_dropout=0.1).train()
        with batch_invariant(), pytest.raises(ArgumentError, match=r"attention_dropout=0\.1 in training mode"):
            alone(model, texts()[0])

    @torch.no_grad()
    def test_attention_matrices(self, build: Build) -> None:
        with batch_invariant(), pytest.raises(ArgumentError, match="output_attentions=True"):
            build("plain")(texts()[0][None], output_attentions=True, use_cache=False)

    @pytest.mark.parametrize("part", ["in_proj", "conv1d", "q_proj", "experts", "latent_in", "lm_head"])
    @torch.no_grad()
    def test_hooked_products(self, part: str) -> None:
        model = make_hybrid("sigmoid")
        module = next(module for name, module in model.named_modules() if name.endswith(part))
        module.register_forward_hook(lambda *_: None)
        with batch_invariant(), pytest.raises(BackendError, match=f"{type(module).__name__} that is .*hooked"):
            alone(model, texts()[0])

    @torch.no_grad()
    def test_other_adapters(self, tiny_model: Callable[..., Any]) -> None:
        config = LoraConfig(r=3, target_modules=["in_proj"], use_dora=True)
        model = inject_adapter_in_model(config, tiny_model()).eval()
        with batch_invariant(), pytest.raises(BackendError, match="merge adapters"):
            alone(model, texts()[0])

    def test_states_of_another_kind(self, build: Build) -> None:
        model, kept = build("pure"), PrefixCache(2**24)
        ContinuousBatch(model, prefix_cache=kept)
        with pytest.raises(ArgumentError, match=r"holds states of batch_invariant=False, and the batch has batch_inv"):
            ContinuousBatch(model, prefix_cache=kept, batch_invariant=True)

    def test_ops_that_it_does_not_have(self) -> None:
        call = torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)
        with (
            batch_invariant(),
            pytest.raises(BackendError, match=r"asked for by batch_invariant\(\), but cannot serve"),
        ):
            ops.attend_one(*call, None, 1.0)


def test_rows_that_a_library_sums_in_other_ways_are_multiplied_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that takes the last row of a block in another order is found out, and its rows are kept apart."""
    multiply, sizes = products._multiply, []

    def uneven(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        sizes.append(len(rows))
        multiply(rows, weight, bias, out)
        if len(rows) > 1:
            out[-1] = multiply(rows[-1:].flip(1), weight.flip(1), bias, out.new_empty(1, len(weight)))[0] + 1e-6
        return out

    monkeypatch.setattr(products, "_multiply", uneven)
    monkeypatch.setattr(products, "_sizes", {})
    rows, weight = torch.randn(20, 33), torch.randn(29, 33)
    with batch_invariant():
        whole = ops.runtime.linear.linear(rows, weight, None)
        parts = torch.cat([ops.runtime.linear.linear(part, weight, None) for part in rows.split([7, 12, 1])])
    assert torch.equal(whole, parts)
    assert sizes[:2] == [16, 1]
    assert set(sizes[2:]) == {1}
    torch.testing.assert_close(whole, nn.functional.linear(rows, weight))


@pytest.mark.parametrize("kind", ["pure", "plain", "sliding"])
@torch.no_grad()
def test_kernels(tiny_model: Callable[..., Any], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of Triton, in its interpreter where there is no GPU: padded, packed, in pieces and token by token."""
    sizes = {"num_heads": 2, "head_dim": 16, "state_size": 16}
    if kind == "pure":
        model = tiny_model(**sizes, hidden_size=16, num_hidden_layers=1)
    else:
        model = make_hybrid(kind, **{f"ssm_{name}": size for name, size in sizes.items()})
    rows = texts((7, 3))
    with batch_invariant():
        of_pytorch = alone(model, rows[0])
    monkeypatch.setattr(dispatch, "_usable", lambda device: (True, "by test"))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    ids, mask = padded(rows, "left")
    with batch_invariant():
        expected = [alone(model, text) for text in rows]
        assert torch.equal(logits(model, ids, attention_mask=mask)[mask.bool()], torch.cat(expected))
        packed = {"position_ids": torch.cat([torch.arange(len(text)) for text in rows])[None]}
        assert torch.equal(logits(model, torch.cat(rows)[None], **packed)[0], torch.cat(expected))
        for options in ({}, {"static": True, "max_length": 12}):
            cache = Mamba2Cache(model.config, **options)
            pieces = rows[0][None].to(model.device).split([3, 1, 2, 1], 1)
            found = torch.cat([model(piece, past_key_values=cache).logits[0] for piece in pieces])
            assert torch.equal(found, expected[0])
    torch.testing.assert_close(expected[0].cpu(), of_pytorch, rtol=1e-4, atol=1e-4)
