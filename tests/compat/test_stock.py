"""transformers' own classes on this package's ops: as on plain PyTorch, and what they could not do there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import TIMEOUT, start
from stock_models import MODELS
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DataCollatorWithFlattening

import mamba2_hf
from mamba2_hf.errors import ArgumentError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT reads it
every = pytest.mark.parametrize("name", MODELS)
FP32 = {"rtol": 0, "atol": 1e-4}
ROWS, TOKENS = 2, 23
IDS = torch.randint(3, 61, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
LENGTHS = [5, 2, 9, 7]
_POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
_BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0).int()
_SEQ_IDX = torch.repeat_interleave(torch.tensor(LENGTHS))[None].int()
_FLASH = {"cu_seq_lens_q": _BOUNDS, "cu_seq_lens_k": _BOUNDS, "max_length_q": 9, "max_length_k": 9}
PACKINGS = {
    "seq_idx": {"seq_idx": _SEQ_IDX},
    "position_ids": {"position_ids": _POSITIONS},
    "cu_seq_lens": _FLASH,
    "all": {"seq_idx": _SEQ_IDX, "position_ids": _POSITIONS, **_FLASH},
}


@pytest.fixture(autouse=True)
def undone() -> Iterator[None]:
    """What a test turned on is off again."""
    yield
    mamba2_hf.use_with_transformers(undo=True)


def padded(side: str) -> Tensor:
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[0, {"none": slice(0), "left": slice(0, 6), "right": slice(-6, None)}[side]] = 0
    return mask


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def close_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm()
        assert error <= 1e-4 * gradient.norm() + 1e-6, (name, error, gradient.norm())


def in_pieces(model: Any, pieces: list[int]) -> Tensor:
    """Logits of tokens that come piece by piece, each continuing the cache."""
    cache, logits, seen = None, [], 0
    key = "cache_params" if model.config.model_type == "mamba2" else "past_key_values"
    for ids in IDS.split(pieces, 1):
        positions = torch.arange(seen, seen + ids.shape[1]).expand(ROWS, -1)
        told = {} if key == "cache_params" else {"position_ids": positions}
        out = model(ids, use_cache=True, **{key: cache}, **told)
        cache, seen = getattr(out, key), seen + ids.shape[1]
        logits.append(out.logits)
    return torch.cat(logits, 1)


@every
def test_logits_and_tokens_are_those_of_plain_pytorch(name: str) -> None:
    model = MODELS[name]()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

    @torch.no_grad()
    def run() -> tuple[list[Tensor], Tensor]:
        logits = [model(IDS, use_cache=False).logits, in_pieces(model, [9, 1, 1, 12])]
        for mask in map(padded, ("left", "right")):
            logits.append(model(IDS, attention_mask=mask, use_cache=False).logits * mask[..., None])
        return logits, model.generate(IDS, attention_mask=padded("left"), **options)

    expected, tokens = run()
    assert mamba2_hf.use_with_transformers()
    found, ours = run()
    for left, right in zip(found, expected, strict=True):
        assert right.std() > 0.1
        torch.testing.assert_close(left, right, **FP32)
    assert torch.equal(ours, tokens)


@every
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_training_is_that_of_plain_pytorch(name: str, side: str) -> None:
    model, mask = MODELS[name]().train(), padded(side)
    arguments = {"attention_mask": mask, "labels": IDS.masked_fill(mask == 0, -100), "use_cache": False}
    expected = model(IDS, **arguments).loss
    wanted = gradients(model, expected)
    mamba2_hf.use_with_transformers()
    loss = model(IDS, **arguments).loss
    torch.testing.assert_close(loss, expected, **FP32)
    close_gradients(gradients(model, loss), wanted)


@every
@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS.keys())
def test_packed_documents_are_as_if_alone(name: str, packing: dict[str, Any]) -> None:
    """In evaluation with a cache and without, and in the gradients of training."""
    model, ids = MODELS[name](), IDS[:1]
    with torch.no_grad():
        expected = torch.cat([model(part, use_cache=False).logits for part in ids.split(LENGTHS, 1)], 1)
    mamba2_hf.use_with_transformers()
    for use_cache in (False, True):
        with torch.no_grad():
            torch.testing.assert_close(model(ids, use_cache=use_cache, **packing).logits, expected, **FP32)
    model.train()
    alone = torch.cat([model(part, use_cache=False).logits for part in ids.split(LENGTHS, 1)], 1)
    weights = torch.randn(alone.shape, generator=torch.Generator().manual_seed(2))
    logits = model(ids, use_cache=False, **packing).logits
    torch.testing.assert_close(logits, alone, **FP32)
    close_gradients(gradients(model, (logits * weights).sum()), gradients(model, (alone * weights).sum()))


@every
def test_what_collators_make_of_documents(name: str) -> None:
    """The loss of a flattened batch is the mean over its documents' tokens."""
    model, parts = MODELS[name]().train(), [part[0].tolist() for part in IDS[:1].split(LENGTHS, 1)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(
        [{"input_ids": part} for part in parts]
    )
    mamba2_hf.use_with_transformers()
    loss = model(**batch, use_cache=False).loss
    alone = [model(torch.tensor([part]), labels=torch.tensor([part]), use_cache=False).loss for part in parts]
    counts = [length - 1 for length in LENGTHS]
    expected = sum(one * count for one, count in zip(alone, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(loss, expected, **FP32)


@every
@torch.no_grad()
def test_positions_of_several_rows(name: str) -> None:
    """Documents start where positions do not go on; where they begin is nothing to an SSD layer."""
    model = MODELS[name]()
    positions = torch.stack([torch.cat([torch.arange(6), torch.arange(17)]), torch.arange(TOKENS)])
    mamba2_hf.use_with_transformers()
    expected = model(IDS, use_cache=False).logits
    expected[0] = torch.cat([model(part, use_cache=False).logits[0] for part in IDS[:1].split([6, 17], 1)])
    torch.testing.assert_close(model(IDS, position_ids=positions, use_cache=False).logits, expected, **FP32)
    later = model(IDS, position_ids=positions[1:] + 100, use_cache=False).logits
    torch.testing.assert_close(later, model(IDS, use_cache=False).logits, **FP32)


@every
def test_packed_rows_with_padding(name: str) -> None:
    model, mask = MODELS[name](), padded("right")
    seq_idx = torch.tensor([[0] * 8 + [1] * 15, [4] * 3 + [2] * 20])
    mamba2_hf.use_with_transformers()
    with torch.no_grad():
        logits = model(IDS, attention_mask=mask, seq_idx=seq_idx, use_cache=False).logits
        for row, columns in ((0, slice(0, 8)), (0, slice(8, 17)), (1, slice(0, 3)), (1, slice(3, 23))):
            alone = model(IDS[row : row + 1, columns], use_cache=False).logits
            torch.testing.assert_close(logits[row, columns], alone[0], **FP32)


def by_bounds(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Attention as flash attention has it: of the documents that ``cu_seq_lens_q`` names, in one row."""
    bounds = kwargs.get("cu_seq_lens_q", torch.tensor([0, query.shape[2]]))
    assert mask is None
    parts = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=kwargs["scaling"], enable_gqa=True)
        for q, k, v in zip(*(t.split(bounds.diff().tolist(), 2) for t in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


@pytest.mark.parametrize("packing", ["seq_idx", "position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("name", ["bamba", "granite", "nemotron", "falcon", "zamba"])
def test_flash_attention_is_told_of_documents(name: str, packing: str) -> None:
    AttentionInterface.register("flash_by_bounds", by_bounds)
    AttentionMaskInterface.register("flash_by_bounds", lambda *args, **kwargs: None)
    model, ids = MODELS[name](), IDS[:1]
    mamba2_hf.use_with_transformers()
    with torch.no_grad():
        expected = torch.cat([model(part, use_cache=False).logits for part in ids.split(LENGTHS, 1)], 1)
        model.config._attn_implementation = "flash_by_bounds"
        torch.testing.assert_close(model(ids, use_cache=False, **PACKINGS[packing]).logits, expected, **FP32)
        with pytest.raises(ArgumentError, match="choose attn_implementation='sdpa'"):
            model(IDS, use_cache=False, seq_idx=_SEQ_IDX.expand(ROWS, -1))


@every
def test_packed_training_with_checkpointing(name: str) -> None:
    """The second forward knows the documents too."""
    model, ids, arguments = MODELS[name]().train(), IDS[:1], {**PACKINGS["seq_idx"], "use_cache": False}
    mamba2_hf.use_with_transformers()
    expected = gradients(model, model(ids, **arguments).logits.square().sum())
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    close_gradients(gradients(model, model(ids, **arguments).logits.square().sum()), expected)


def test_a_cache_cannot_begin_new_documents() -> None:
    model = MODELS["bamba"]()
    mamba2_hf.use_with_transformers()
    cache = model(IDS[:1], use_cache=True).past_key_values
    with pytest.raises(ArgumentError, match="with a cache"):
        model(IDS[:1], past_key_values=cache, seq_idx=_SEQ_IDX)


def test_documents_have_to_fit_the_input() -> None:
    model = MODELS["mamba2"]()
    mamba2_hf.use_with_transformers()
    with pytest.raises(ArgumentError, match="seq_idx has shape"):
        model(IDS[:1], seq_idx=_SEQ_IDX[:, :-1])
    with pytest.raises(ArgumentError, match="with batch 2"):
        model(IDS, cu_seq_lens_q=_BOUNDS)


@every
def test_lora_on_every_linear(name: str) -> None:
    """Adapters get gradients, and training, evaluation and merging agree."""
    peft = pytest.importorskip("peft")
    mamba2_hf.use_with_transformers()
    targets = ["in_proj", "out_proj"] + ([] if name == "zamba" else ["q_proj"])  # zamba's, PEFT merges once per layer
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(MODELS[name](), config)
    adapted = [part for part, _ in model.named_parameters() if "out_proj.lora_B" in part]
    assert adapted
    loss = model.train()(IDS, labels=IDS, use_cache=False).loss
    found = gradients(model, loss)
    assert all(found[part].norm() > 0 for part in adapted)
    with torch.no_grad():
        model.eval()
        torch.testing.assert_close(model(IDS, labels=IDS, use_cache=False).loss, loss.detach(), **FP32)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(IDS, labels=IDS, use_cache=False).loss, loss.detach(), **FP32)


def test_lora_on_the_convolution_stays_refused() -> None:
    peft = pytest.importorskip("peft")
    mamba2_hf.use_with_transformers()
    with pytest.raises(ValueError, match="conv1d"):
        peft.get_peft_model(MODELS["mamba2"](), peft.LoraConfig(target_modules=["conv1d"]))


@every
def test_hooks_on_the_projections_see_every_call(name: str) -> None:
    model, seen = MODELS[name]().train(), []
    mamba2_hf.use_with_transformers()
    projections = [module for part, module in model.named_modules() if part.endswith(("out_proj", "in_proj"))]
    for module in projections:
        module.register_forward_hook(lambda module, args, out: seen.append(module))
    model(IDS, use_cache=False)
    assert set(seen) == set(projections)


@every
def test_another_call_takes_it_back(name: str) -> None:
    model = MODELS[name]()
    module = sys.modules[type(model).__module__]
    names = ["causal_conv1d_fn", "mamba2_chunk_scan", "mamba2_split_conv1d_scan_combined"]
    before = [getattr(module, part) for part in names], type(model).forward
    expected = model(IDS, use_cache=False).logits
    replaced = mamba2_hf.use_with_transformers()
    assert mamba2_hf.use_with_transformers() == []
    assert f"{module.__name__}.mamba2_chunk_scan" in replaced
    assert [getattr(module, part) for part in names] != before[0]
    assert mamba2_hf.use_with_transformers(undo=True) == replaced
    assert ([getattr(module, part) for part in names], type(model).forward) == before
    assert torch.equal(model(IDS, use_cache=False).logits, expected)
    with pytest.raises(ValueError, match="keep packed sequences apart"):
        type(model).base_model_prefix and getattr(model, model.base_model_prefix)(IDS[:1], seq_idx=_SEQ_IDX)


def test_families_are_taken_one_by_one() -> None:
    bamba, falcon = (sys.modules[type(MODELS[name]()).__module__] for name in ("bamba", "falcon"))
    stock = falcon.mamba2_chunk_scan
    assert {part.split(".")[2] for part in mamba2_hf.use_with_transformers("bamba")} == {"bamba"}
    assert falcon.mamba2_chunk_scan is stock
    assert bamba.mamba2_chunk_scan is not stock
    with pytest.raises(ArgumentError, match="'llama'; there are: mamba2, bamba"):
        mamba2_hf.use_with_transformers("llama")


@every
@pytest.mark.slow
def test_one_graph_under_compile(name: str) -> None:
    model, ids = MODELS[name](), IDS[:1]
    mamba2_hf.use_with_transformers()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch.compiler.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph="experts" not in str(type(model.config)))
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, **FP32)


OURS_FIRST = """
import mamba2_hf
from transformers.models.falcon_h1 import modeling_falcon_h1 as untouched
print(hasattr(untouched.mamba2_chunk_scan, "_is_ours"))
print(mamba2_hf.use_with_transformers("bamba"))
from transformers.models.bamba import modeling_bamba as stock
print(stock.mamba2_chunk_scan._is_ours)
"""
THEIRS_FIRST = """
from transformers.models.bamba import modeling_bamba as stock
import mamba2_hf
print(hasattr(stock.mamba2_chunk_scan, "_is_ours"))
print(mamba2_hf.use_with_transformers())
print(stock.mamba2_chunk_scan._is_ours)
"""


@TIMEOUT
def test_families_may_be_imported_after_the_call(tmp_path: Path) -> None:
    """They run on our ops too, and nothing changes without a call."""
    script = tmp_path / "script.py"
    script.write_text(OURS_FIRST, encoding="utf-8")
    well, (said,) = start(script, 1, tmp_path)
    assert well, said
    assert said.splitlines()[-3:] == ["False", "[]", "True"]


def test_families_may_be_imported_before_this_package() -> None:
    done = subprocess.run(
        [sys.executable, "-c", THEIRS_FIRST], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    untouched, replaced, is_ours = done.stdout.splitlines()[-3:]
    assert (untouched, is_ours) == ("False", "True")
    assert "modeling_bamba.mamba2_chunk_scan" in replaced
