"""Long prompts are read in pieces that fit the memory, and the text is the same."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hybrids import make_hybrid
from torch import Tensor

from mamba2_hf.errors import CacheError
from mamba2_hf.models import prefill

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
