"""Against transformers' own classes: the same numbers where they are right, and the recurrence's where they are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
from hybrid_families import CASES, stock
from torch import Tensor

from mamba2_hf import Mamba2Cache, Mamba2HybridForCausalLM, Mamba2HybridForSequenceClassification, Mamba2HybridModel
from mamba2_hf.errors import CheckpointError, ConfigurationError

FP32 = {"rtol": 0, "atol": 1e-4}
ROWS, TOKENS = 2, 21
IDS = torch.randint(3, 61, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
every = pytest.mark.parametrize("name", CASES)
Pair = Callable[[str], tuple[Any, Any]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Stock's model, and ours read from the folder that it was saved to."""
    made: dict[str, tuple[Any, Any]] = {}

    def get(name: str) -> tuple[Any, Any]:
        if name not in made:
            theirs, folder = stock(CASES[name]), tmp_path_factory.mktemp(name)
            theirs.save_pretrained(folder)
            made[name] = theirs, Mamba2HybridForCausalLM.from_pretrained(folder)
        return made[name]

    return get


def left_padded() -> tuple[Tensor, Tensor]:
    """A mask, and the positions that ``generate`` makes of it."""
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[0, :6] = 0
    return mask, (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def token_by_token(model: Any, *, positions: bool) -> Tensor:
    """Logits of every token, each continuing the cache. Stock bamba rotates every token as if it were the first, unless
    it is told the position.
    """
    cache, logits = None, []
    for column in range(TOKENS):
        told = {"position_ids": torch.full((ROWS, 1), column)} if positions else {}
        out = model(IDS[:, [column]], past_key_values=cache, use_cache=True, **told)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


@every
@torch.no_grad()
def test_full_forward(pair: Pair, name: str) -> None:
    theirs, ours = pair(name)
    expected = theirs(IDS, labels=IDS, use_cache=False)
    out = ours(IDS, labels=IDS)
    assert expected.logits.std() > 0.1
    torch.testing.assert_close(out.logits, expected.logits, **FP32)
    torch.testing.assert_close(out.loss, expected.loss, **FP32)


@every
def test_token_by_token(pair: Pair, name: str) -> None:
    """Where stock clamps step sizes in the full forward and not in decoding, its two disagree; ours never do."""
    theirs, ours = pair(name)
    with torch.no_grad():
        full = theirs(IDS, use_cache=False).logits
    torch.testing.assert_close(token_by_token(ours, positions=False), full, **FP32)
    stock_decoded = token_by_token(theirs, positions=True)
    if CASES[name].decodes:
        torch.testing.assert_close(stock_decoded, full, **FP32)
    else:
        assert (stock_decoded - full).abs().max() > 0.01, "stock decodes right now: say so in the case"


@torch.no_grad()
def test_stock_bamba_decodes_wrongly_without_positions(pair: Pair) -> None:
    theirs, ours = pair("bamba")
    full = theirs(IDS, use_cache=False).logits
    assert (token_by_token(theirs, positions=False) - full).abs().max() > 0.01, "stock counts positions now"
    torch.testing.assert_close(token_by_token(ours, positions=False), full, **FP32)


@every
@torch.no_grad()
def test_left_padded_batch(pair: Pair, name: str) -> None:
    """With biases in in_proj, stock's padding enters the convolution; there each row alone is the reference."""
    theirs, ours = pair(name)
    mask, positions = left_padded()
    stock_logits = theirs(IDS, attention_mask=mask, position_ids=positions, use_cache=False).logits
    out = ours(IDS, attention_mask=mask)
    alone = [theirs(ids[keep][None], use_cache=False).logits[0] for ids, keep in zip(IDS, mask.bool(), strict=True)]
    worst = 0.0
    for row, expected in enumerate(alone):
        keep = mask[row].bool()
        torch.testing.assert_close(out.logits[row, keep], expected, **FP32)
        worst = max(worst, float((stock_logits[row, keep] - expected).abs().max()))
    assert (worst > 0.01) == CASES[name].biases, f"stock is off by {worst}"
    following = torch.full((ROWS, 1), 7)
    after = ours(following, past_key_values=out.past_key_values).logits[:, 0]
    for row, keep in enumerate(mask.bool()):
        expected = theirs(torch.cat([IDS[row, keep], following[row]])[None], use_cache=False).logits[0, -1]
        torch.testing.assert_close(after[row], expected, **FP32)


@pytest.mark.parametrize("name", ["bamba", "granite-experts", "nemotron-experts", "falcon", "zamba"])
def test_generate(pair: Pair, name: str) -> None:
    theirs, ours = pair(name)
    mask, _ = left_padded()
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(IDS, **options), theirs.generate(IDS, **options))


@every
@torch.no_grad()
def test_bf16_is_as_close_to_fp32_as_stock_s(pair: Pair, name: str, tmp_path: Path) -> None:
    theirs, _ = pair(name)
    exact = theirs(IDS, use_cache=False).logits
    theirs.save_pretrained(tmp_path)
    ours = Mamba2HybridForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    stock_half = type(theirs).from_pretrained(tmp_path, dtype=torch.bfloat16)
    noise, stock_noise = (
        (model(IDS, use_cache=False).logits - exact).square().mean().sqrt() for model in (ours, stock_half)
    )
    assert noise < 1.5 * stock_noise
    assert noise < 0.1 * exact.std()


@torch.no_grad()
def test_router_logits_and_balancing_loss(pair: Pair) -> None:
    theirs, ours = pair("granite-experts")
    expected = theirs(IDS, labels=IDS, output_router_logits=True, use_cache=False)
    out = ours(IDS, labels=IDS, output_router_logits=True)
    assert len(out.router_logits) == len(expected.router_logits) == 3
    for left, right in zip(out.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(left, right, **FP32)
    torch.testing.assert_close(out.aux_loss, expected.aux_loss, **FP32)
    torch.testing.assert_close(out.loss, expected.loss, **FP32)
    theirs, ours = pair("nemotron-experts")
    for left, right in zip(
        ours(IDS, output_router_logits=True).router_logits,
        theirs(IDS, output_router_logits=True, use_cache=False).router_logits,
        strict=True,
    ):
        torch.testing.assert_close(left, right, **FP32)


class TestDirectLoading:
    def test_every_class_and_option(self, tmp_path: Path) -> None:
        stock(CASES["granite-experts"]).save_pretrained(tmp_path)
        classifier = Mamba2HybridForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
        assert classifier.score.weight.shape == (5, 32)
        base, info = Mamba2HybridModel.from_pretrained(
            tmp_path, dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True
        )
        assert not info["missing_keys"]
        assert (base.dtype, base.config._attn_implementation) == (torch.bfloat16, "eager")
        assert base.layers[0].blocks[0].mixer.A_log.dtype == torch.float32

    def test_what_comes_along(self, tmp_path: Path) -> None:
        theirs = stock(CASES["bamba"])
        theirs.generation_config.eos_token_id = [2, 7]
        theirs.save_pretrained(tmp_path)
        model = Mamba2HybridForCausalLM.from_pretrained(tmp_path)
        assert model.generation_config.eos_token_id == [2, 7]
        assert not model.training

    def test_auto_classes_keep_building_stock(self, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        theirs = stock(CASES["falcon"])
        theirs.save_pretrained(tmp_path)
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(theirs)

    def test_saved_anew_it_is_ours(self, tmp_path: Path) -> None:
        stock(CASES["zamba"]).save_pretrained(tmp_path / "theirs")
        model = Mamba2HybridForCausalLM.from_pretrained(tmp_path / "theirs")
        model.save_pretrained(tmp_path / "ours")
        again = Mamba2HybridForCausalLM.from_pretrained(tmp_path / "ours")
        with torch.no_grad():
            assert torch.equal(again(IDS).logits, model(IDS).logits)

    def test_other_models_are_refused(self, tmp_path: Path) -> None:
        from transformers import LlamaConfig, Mamba2Config, Mamba2ForCausalLM

        LlamaConfig().save_pretrained(tmp_path / "llama")
        with pytest.raises(CheckpointError, match="model_type 'llama'"):
            Mamba2HybridForCausalLM.from_pretrained(tmp_path / "llama")
        sizes = {"num_heads": 8, "head_dim": 8, "hidden_size": 32, "num_hidden_layers": 1, "n_groups": 1}
        Mamba2ForCausalLM(Mamba2Config(**sizes, vocab_size=61)).save_pretrained(tmp_path / "pure")
        with pytest.raises(CheckpointError, match="a Mamba-2, and no hybrid; load it with Mamba2ForCausalLM"):
            Mamba2HybridForCausalLM.from_pretrained(tmp_path / "pure")
        theirs = stock(CASES["bamba"])
        theirs.config.hidden_act = "gelu"
        theirs.save_pretrained(tmp_path / "gelu")
        with pytest.raises(ConfigurationError, match="hidden_act is 'gelu'"):
            Mamba2HybridForCausalLM.from_pretrained(tmp_path / "gelu")


@torch.no_grad()
def test_heads_are_blocks_of_theirs_between_projection_and_norm(tmp_path: Path) -> None:
    """transformers' class has no heads that predict further tokens, but the layers that they are made of."""
    theirs = layouts.nemotron_3(tmp_path, heads=2)
    ours = Mamba2HybridForCausalLM.from_pretrained(tmp_path)
    stored = layouts.stored(tmp_path)
    states = ours.backbone(IDS, use_cache=False).last_hidden_state

    def normed(x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], stored[name], theirs.config.layer_norm_epsilon)

    for depth, head in enumerate(ours.mtp_heads, 1):
        following = theirs.model.embeddings(IDS[:, depth:])
        states = states[:, : following.shape[1]]
        first, last = (f"mtp.layers.{2 * (depth - 1) + place}" for place in (0, 1))
        fused = torch.cat([normed(following, f"{first}.enorm.weight"), normed(states, f"{first}.hnorm.weight")], -1)
        expected = fused @ stored[f"{first}.eh_proj.weight"].T
        for layer in theirs.model.layers[len(ours.backbone.layers) :][2 * (depth - 1) : 2 * depth]:
            expected = layer(expected)
        expected = normed(expected, f"{last}.final_layernorm.weight")
        states = head(following, states, Mamba2Cache(ours.config.get_mtp_config()))
        torch.testing.assert_close(states, expected, **FP32)
