"""Long prompts are read in pieces that fit the memory, and the text is the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hybrids import make_hybrid
from torch import Tensor

from mamba2_hf import ContinuousBatch, Mamba2ForCausalLM, Mamba2HybridForCausalLM, Request, generate_batch
from mamba2_hf.errors import ArgumentError, CacheError
from mamba2_hf.models import prefill
from mamba2_hf.models.outputs import CACHE

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
IDS = torch.randint(3, 61, (2, 700), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Tokens, and tokens with logits, of every call of a language model."""
    from mamba2_hf.models.causal_lm import SSDForCausalLM

    found: list[tuple[int, int]] = []
    run = SSDForCausalLM._run

    def counted(self: Any, *, input_ids: Tensor, **kwargs: Any) -> Any:
        out = run(self, input_ids=input_ids, **kwargs)
        found.append((input_ids.shape[1], out.logits.shape[1]))
        return out

    monkeypatch.setattr(SSDForCausalLM, "_run", counted)
    return found


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", ["pure", "sliding"])
def test_long_prompts_are_read_in_pieces(
    kind: str,
    padded: bool,
    tiny_model: Callable[..., Any],
    calls: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model() if kind == "pure" else make_hybrid(kind)
    mask = torch.ones_like(IDS)
    if padded:
        mask[1, -260:] = 0
    expected = model.generate(IDS, attention_mask=mask, **GREEDY)
    assert calls == [(700, 1)] + [(1, 1)] * 3
    calls.clear()
    monkeypatch.setattr(prefill, "TOKENS_AT_ONCE", 512)
    assert torch.equal(model.generate(IDS, attention_mask=mask, **GREEDY), expected)
    assert calls == [(256, 1), (256, 1), (188, 1)] + [(1, 1)] * 3
    calls.clear()
    assert torch.equal(model.generate(IDS, attention_mask=mask, prefill_chunk_size=400, **GREEDY), expected)
    assert calls[:2] == [(400, 1), (300, 1)]


def test_reads_into_a_cache(
    tiny_model: Callable[..., Any], calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    expected = model.generate(IDS, **GREEDY)
    monkeypatch.setattr(prefill, "TOKENS_AT_ONCE", 512)
    calls.clear()
    cache = model.read(IDS[:, :300])
    assert model.read(IDS[:, 300:650], past_key_values=cache) is cache
    assert calls == [(256, 1), (44, 1), (256, 1), (94, 1)]
    assert cache.seen_tokens == 650
    assert torch.equal(model.generate(IDS, past_key_values=cache, **GREEDY), expected)
    with pytest.raises(CacheError, match="another model"):
        model.read(IDS, past_key_values=make_hybrid("sliding").read(IDS))


def test_hidden_states_of_the_prompt_stay_whole(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "TOKENS_AT_ONCE", 512)
    options = {**GREEDY, "return_dict_in_generate": True, "output_hidden_states": True}
    assert tiny_model().generate(IDS, **options).hidden_states[0][0].shape[1] == 700


def test_pieces_follow_free_memory(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(model: Any, gib: float, rows: int = 1, tokens: int = 2**20, unused: int = 0) -> int:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(gib * 2**30), 80 * 2**30))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: unused)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
        stand_in = SimpleNamespace(
            device=torch.device("cuda", 0),
            **{name: getattr(model, name) for name in ("config", "backbone", "modules", "dtype")},
        )
        return prefill.tokens_at_once(stand_in, rows, tokens, 0)

    pure, hybrid = tiny_model(), make_hybrid("plain")
    # 16 bytes for each of the 32 + 168 channels of in_proj; half of the memory.
    assert at_once(pure, 1) == 2**30 // (2 * 16 * 200) // 256 * 256
    assert at_once(pure, 1, unused=2**30) == 2**31 // (2 * 16 * 200) // 256 * 256
    assert at_once(pure, 1, rows=4) == pytest.approx(at_once(pure, 1) / 4, abs=256)
    assert at_once(pure, 0) == 256
    # The keys of every token have to fit too, and a mask of every token to every key.
    assert at_once(hybrid, 64, tokens=2**10) > at_once(hybrid, 64, tokens=2**20) > at_once(hybrid, 64, tokens=2**22)
    plenty = at_once(hybrid, 64, tokens=2**20)
    hybrid.set_attn_implementation("eager")
    assert at_once(hybrid, 64, tokens=2**20) < plenty / 16


# Whatever wraps the model, pieces give what one call gives


class SoftPrompt:
    """Puts three soft tokens in front of a text, as an override of ``prepare_inputs_for_generation``."""

    def prepare_inputs_for_generation(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        if not inputs[CACHE].seen_tokens:
            embeds = self.get_input_embeddings()(inputs.pop("input_ids"))
            soft = torch.linspace(-1, 1, 3 * embeds.shape[2]).view(1, 3, -1).expand(len(embeds), -1, -1)
            inputs["inputs_embeds"] = torch.cat([soft, embeds], 1)
            if inputs.get("attention_mask") is not None:
                mask = inputs["attention_mask"]
                inputs["attention_mask"] = torch.cat([mask.new_ones(len(mask), 3), mask], 1)
        return inputs


class FromTheEnd:
    """Counts from the last token of a call, as adapters that act by position do."""

    def forward(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        embeds = self.get_input_embeddings()(input_ids)
        embeds = embeds * torch.arange(embeds.shape[1], 0, -1)[:, None].log1p()
        return super().forward(inputs_embeds=embeds, **kwargs)  # type: ignore[misc]


def wrapped(kind: str, wrapper: type, tiny_model: Callable[..., Any]) -> Any:
    """A model whose class comes behind the wrapper's."""
    if kind == "pure":
        return tiny_model(type("Wrapped", (wrapper, Mamba2ForCausalLM), {"__module__": __name__}))
    return make_hybrid(kind, type("Wrapped", (wrapper, Mamba2HybridForCausalLM), {"__module__": __name__}))


def logits(model: Any, mask: Tensor, **options: Any) -> Tensor:
    out = model.generate(
        IDS, attention_mask=mask, **options, **GREEDY, return_dict_in_generate=True, output_logits=True
    )
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("wrapper", [SoftPrompt, FromTheEnd])
@pytest.mark.parametrize("kind", ["pure", "sliding"])
def test_overrides_make_the_same_of_pieces(
    kind: str, wrapper: type, padded: bool, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped(kind, wrapper, tiny_model)
    mask = torch.ones_like(IDS)
    if padded:
        mask[1, :260] = 0
    expected = logits(model, mask)
    if kind != "pure":  # which forgets what came so long ago
        assert (expected - logits(make_hybrid(kind), mask)).abs().max() > 2e-3
    torch.testing.assert_close(logits(model, mask, prefill_chunk_size=100), expected, rtol=0, atol=1e-5)
    monkeypatch.setattr(prefill, "TOKENS_AT_ONCE", 512)
    torch.testing.assert_close(logits(model, mask), expected, rtol=0, atol=1e-5)


def test_soft_tokens_are_no_tokens_of_the_text(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """They are counted apart, so that a cache which has read them is continued behind the right token, or refused."""
    model = wrapped("pure", SoftPrompt, tiny_model)
    expected = model.generate(IDS, **GREEDY)
    cache = model.read(IDS[:, :300])
    assert (cache.seen_tokens, cache.soft_tokens) == (303, 3)
    out = model.generate(IDS, past_key_values=cache, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    more = torch.cat([expected, IDS[:, :5]], 1)
    assert torch.equal(
        model.generate(more, past_key_values=out.past_key_values, **GREEDY), model.generate(more, **GREEDY)
    )
    with pytest.raises(CacheError, match="3 soft tokens of what wraps the model"):
        cache.save(tmp_path / "state", model)
    with pytest.raises(ArgumentError, match=r"3 soft tokens of what wraps the model.*generate without an assistant"):
        model.generate(IDS[:1], prompt_lookup_num_tokens=2, **GREEDY)
    with pytest.raises(ArgumentError, match="makes 4 tokens of one: a row of a batch has no place"):
        ContinuousBatch(model)
    cache.reset()
    assert cache.soft_tokens == 0


def test_what_a_batch_feeds_goes_through_an_override(tiny_model: Callable[..., Any]) -> None:
    class Scaled(Mamba2ForCausalLM):
        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return {**super().prepare_inputs_for_generation(*args, **kwargs), "scale": 0.2}

        def forward(self, input_ids: Tensor, scale: float = 1.0, **kwargs: Any) -> Any:
            return super().forward(inputs_embeds=self.get_input_embeddings()(input_ids) * scale, **kwargs)

    model = tiny_model(Scaled)
    expected = model.generate(IDS[:, :9], **GREEDY)
    assert not torch.equal(expected, tiny_model().generate(IDS[:, :9], **GREEDY))
    found = generate_batch(model, [Request(row, GREEDY) for row in IDS[:, :9]])
    assert [done.tokens for done in found] == expected[:, 9:].tolist()


@pytest.mark.parametrize("name", ["", "backbone.layers.0", "backbone.layers.1.mixer"])
def test_hooks_see_the_whole_prompt(
    name: str, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They may act by position; those of PyTorch and its kin, which move or shard, do not hold pieces up."""
    model, seen = tiny_model(), []
    monkeypatch.setattr(prefill, "TOKENS_AT_ONCE", 512)

    def look(module: Any, args: Any, kwargs: Any) -> None:
        given = args[0] if args else kwargs["input_ids"]
        seen.append(given.shape[1])

    handle = model.get_submodule(name).register_forward_pre_hook(look, with_kwargs=True)
    model.generate(IDS, **GREEDY)
    assert seen == [700, 1, 1, 1]
    seen.clear()
    monkeypatch.setattr(logging.getLogger("mamba2_hf"), "propagate", True)
    model.generate(IDS, prefill_chunk_size=99, **GREEDY)
    assert seen == [700, 1, 1, 1]
    assert "700 tokens is read in one call, not in pieces of 99" in caplog.text
    handle.remove()
    look.__module__ = "torch.distributed.somewhere"
    model.get_submodule(name).register_forward_pre_hook(look, with_kwargs=True)
    seen.clear()
    model.generate(IDS, **GREEDY)
    assert seen == [256, 256, 188, 1, 1, 1]


def test_unknown_arguments_of_every_token_are_not_cut(tiny_model: Callable[..., Any]) -> None:
    class Scaled(Mamba2ForCausalLM):
        def forward(self, input_ids: Tensor, scales: Tensor | None = None, **kwargs: Any) -> Any:
            scale = 1 if scales is None or input_ids.shape[1] == 1 else scales[..., None]
            return super().forward(inputs_embeds=self.get_input_embeddings()(input_ids) * scale, **kwargs)

    model, scales = tiny_model(Scaled), torch.linspace(0.5, 2, 1400).view(2, 700)
    expected = model.generate(IDS, scales=scales, **GREEDY)
    assert torch.equal(model.generate(IDS, scales=scales, prefill_chunk_size=100, **GREEDY), expected)
