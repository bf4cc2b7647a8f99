"""Prompt states as files: what goes on from a file is what would have gone on, and nothing else is let in."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import on_each_device
from hybrids import ARCHITECTURES, make_hybrid
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mamba2_hf import Mamba2Cache
from mamba2_hf.errors import CacheError
from mamba2_hf.models.prompt_state import fingerprint

IDS = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(1))
SEEN = 13
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


def build(kind: str, tiny_model: Callable[..., Any]) -> Any:
    return tiny_model() if kind == "pure" else make_hybrid(kind)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model()


@torch.no_grad()
def read(model: Any, cache: Mamba2Cache | None = None, mask: Tensor | None = None, ids: Tensor = IDS) -> Mamba2Cache:
    """A cache that has seen the first tokens."""
    mask = None if mask is None else mask[:, :SEEN].to(model.device)
    return model(
        ids[:, :SEEN].to(model.device), attention_mask=mask, past_key_values=cache, use_cache=True
    ).past_key_values


@torch.no_grad()
def go_on(model: Any, cache: Mamba2Cache) -> Tensor:
    """Logits of a block and of single tokens behind it."""
    ids = IDS.to(model.device)
    logits = [model(ids[:, SEEN : SEEN + 4], past_key_values=cache).logits]
    logits += [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(SEEN + 4, IDS.shape[1])]
    return torch.cat(logits, 1)


@on_each_device
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("kind", ["pure", *ARCHITECTURES])
def test_a_loaded_state_goes_on_bit_for_bit(
    kind: str, static: bool, padded: bool, device: str, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model, mask = build(kind, tiny_model).to(device), torch.ones_like(IDS)
    if padded:
        mask[0, :3] = 0
        mask[1, 6:8] = 0
    options = {"static": static, "max_length": 24 if static else None}
    cache = read(model, Mamba2Cache(model.config, **options), mask)
    cache.save(tmp_path / "states" / "prompt", model, IDS[:, :SEEN], mask[:, :SEEN])
    loaded = Mamba2Cache.load(tmp_path / "states" / "prompt", model, **options)
    assert (loaded.seen_tokens, loaded.batch_size, loaded.static) == (SEEN, 2, static)
    # The file does not tell how a cache is held: the other kind goes on from it as well, as close as it ever is.
    other = {"static": not static, "max_length": None if static else 24}
    changed = go_on(model, Mamba2Cache.load(tmp_path / "states" / "prompt", model, **other))
    expected = go_on(model, cache)
    assert torch.equal(go_on(model, loaded), expected)
    torch.testing.assert_close(changed, expected, rtol=0, atol=1e-5)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, torch.float64])
def test_every_dtype_of_model_and_state(
    tiny_model: Callable[..., Any], tmp_path: Path, dtype: torch.dtype, state_dtype: torch.dtype | None, device: str
) -> None:
    model = tiny_model().to(device, dtype)
    cache = read(model, Mamba2Cache(model.config, state_dtype=state_dtype))
    cache.save(tmp_path / "state", model)
    loaded = Mamba2Cache.load(tmp_path / "state", model)
    assert [layer.ssm.dtype for layer in loaded.layers] == [layer.ssm.dtype for layer in cache.layers]
    assert torch.equal(go_on(model, loaded), go_on(model, cache))
    loaded.reset()
    assert read(model, loaded, ids=IDS[:1]).layers[0].ssm.dtype == cache.layers[0].ssm.dtype


@on_each_device
def test_many_questions_about_one_document(device: str, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """With all ids, with the new ones alone, and in turns that are saved again."""
    model, ids = tiny_model().to(device), IDS.to(device)
    document, path = ids[:1, :SEEN], tmp_path / "document"
    read(model, ids=ids[:1]).save(path, model, document)
    for question in (ids[1:, :3], ids[1:, 3:8]):
        everything = torch.cat([document, question], 1)
        expected = model.generate(everything, **GREEDY)
        cache = Mamba2Cache.load(path, model)
        assert torch.equal(model.generate(everything, past_key_values=cache, **GREEDY), expected)
        cache = Mamba2Cache.load(path, model)
        new = model.generate(question, attention_mask=torch.ones_like(everything), past_key_values=cache, **GREEDY)
        assert torch.equal(new, expected[:, SEEN:])
    cache = Mamba2Cache.load(path, model)
    with torch.no_grad():
        model(question, past_key_values=cache)
    cache.save(path, model, question)  # only what is new since it was loaded
    cache = Mamba2Cache.load(path, model)
    longer = torch.cat([everything, ids[:1, :2]], 1)
    assert torch.equal(model.generate(longer, past_key_values=cache, **GREEDY), model.generate(longer, **GREEDY))


def test_refuses_to_go_on_behind_other_tokens(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "state"
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0
    read(model, mask=mask).save(path, model, IDS[:, :SEEN], mask[:, :SEEN])
    other = IDS.clone()
    other[1, 5] += 1
    with pytest.raises(CacheError, match="has read 13 tokens, and input_ids of row 1 does not start with them"):
        model.generate(other, attention_mask=mask, past_key_values=Mamba2Cache.load(path, model), **GREEDY)
    padding = IDS.clone()
    padding[1, :2] = 0  # what stands where nothing counts is no difference
    same = model.generate(padding, attention_mask=mask, past_key_values=Mamba2Cache.load(path, model), **GREEDY)
    assert torch.equal(same[:, -6:], model.generate(IDS, attention_mask=mask, **GREEDY)[:, -6:])
    swapped = Mamba2Cache.load(path, model)
    swapped.batch_select_indices(torch.tensor([1, 0, 1]))
    order = [1, 0, 1]
    out = model.generate(IDS[order], attention_mask=mask[order], past_key_values=swapped, **GREEDY)
    assert torch.equal(out, model.generate(IDS, attention_mask=mask, **GREEDY)[order])
    with pytest.raises(CacheError, match="input_ids holds 5 tokens and the cache has seen 13"):
        read(model).save(tmp_path / "new", model, IDS[:, :5])


# Whose state it is


def test_refuses_another_models_state(model: Any, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "state"
    read(model).save(path, model)
    others = {
        "seed": tiny_model(seed=1),
        "layers": tiny_model(num_hidden_layers=3),
        "dtype": tiny_model().bfloat16(),
        "eps": tiny_model(layer_norm_epsilon=1e-6),
        "hybrid": make_hybrid(),
    }
    for other in others.values():
        with pytest.raises(CacheError, match="the state of another model"):
            Mamba2Cache.load(path, other)
    assert Mamba2Cache.load(path, model.backbone).seen_tokens == SEEN


@settings(max_examples=30)
@given(data=st.data())
def test_one_changed_weight_is_another_model(data: st.DataObject, model: Any) -> None:
    before = fingerprint(model)
    name, parameter = data.draw(st.sampled_from(list(model.backbone.named_parameters())))
    at = data.draw(st.integers(0, parameter.numel() - 1))
    flat = parameter.data.view(-1)
    kept = flat[at].clone()
    flat[at] = torch.nextafter(kept, kept + 1)
    assert fingerprint(model) != before, name
    flat[at] = kept
    assert fingerprint(model) == before


def test_the_head_and_the_way_it_is_used_do_not_matter(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model()
    before = fingerprint(model)
    model.lm_head.weight.data.add_(1)
    model.config.use_cache = False
    model.train()
    assert fingerprint(model) == before == fingerprint(model.backbone)
    model.save_pretrained(tmp_path)
    assert fingerprint(type(model).from_pretrained(tmp_path)) == before
    model.to("meta")
    with pytest.raises(CacheError, match="is nowhere"):
        fingerprint(model)


# Files


def test_only_states_are_replaced_and_nothing_is_left_behind(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, path = read(model), tmp_path / "state"
    with pytest.raises(CacheError, match="the cache is empty"):
        Mamba2Cache(model.config).save(path, model)
    path.write_text("a diary")
    with pytest.raises(CacheError, match="exists and is no prompt state"):
        cache.save(path, model)
    assert path.read_text() == "a diary"
    path.unlink()
    cache.save(path, model)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    later = read(model, ids=IDS.flip(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            later.save(path, model)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["state"]
    later.save(path, model)
    assert path.read_bytes() != before


@pytest.mark.parametrize("kind", ["pure", "sliding"])
def test_takes_no_more_than_the_states(kind: str, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = build(kind, tiny_model)
    cache = read(model)
    cache.save(tmp_path / "state", model)
    assert (tmp_path / "state").stat().st_size < cache.nbytes + 4096


def test_refuses_files_that_are_missing_or_something_else(model: Any, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no such file"):
        Mamba2Cache.load(tmp_path / "none", model)
    with pytest.raises(CacheError, match="not a regular file"):
        Mamba2Cache.load(tmp_path, model)
    save_file({"weight": torch.ones(2)}, tmp_path / "weights")
    with pytest.raises(CacheError, match="a safetensors file, but no prompt state"):
        Mamba2Cache.load(tmp_path / "weights", model)
    with pytest.raises(CacheError, match="exists and is no prompt state"):
        read(model).save(tmp_path / "weights", model)


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_file_is_refused(data: st.DataObject, model: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("damaged") / "state"
    read(model).save(path, model, IDS[:, :SEEN])
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= 1 << data.draw(st.integers(0, 7))
        if json_of(content) == json_of(path.read_bytes()) and content[8:] == path.read_bytes()[8:]:
            return  # a space more or less around the header says the same
    path.write_bytes(content)
    with pytest.raises(CacheError):
        Mamba2Cache.load(path, model)


def json_of(content: bytes) -> Any:
    """The header of a safetensors file."""
    (size,) = struct.unpack("<Q", content[:8])
    try:
        return json.loads(content[8 : 8 + min(size, len(content))])
    except ValueError:
        return None


HOSTILE: dict[str, Callable[[dict[str, Any], dict[str, str]], None]] = {
    "another shape": lambda tensors, _: tensors.update({"layers.1.ssm": tensors["layers.1.ssm"][..., :3].contiguous()}),
    "integers": lambda tensors, _: tensors.update({"layers.1.conv": tensors["layers.1.conv"].long()}),
    "one tensor less": lambda tensors, _: tensors.pop("layers.1.ssm"),
    "one tensor more": lambda tensors, _: tensors.update(more=torch.ones(2)),
    "no keys' lengths": lambda tensors, _: tensors.pop("lengths"),
    "lengths past the end": lambda tensors, _: tensors["lengths"].fill_(99),
    "negative lengths": lambda tensors, _: tensors["lengths"].fill_(-1),
    "shorter lengths": lambda tensors, _: tensors["lengths"].fill_(5),
    "padding of another batch": lambda tensors, _: tensors.update(padding=torch.zeros(5, dtype=torch.long)),
    "more padding than tokens": lambda tensors, _: tensors.update(padding=torch.full((2,), 14)),
    "negative tokens": lambda _, metadata: metadata.update(tokens="-3"),
    "a huge number": lambda _, metadata: metadata.update(tokens="9" * 5000),
    "another version": lambda _, metadata: metadata.update(version="2"),
    "another dtype": lambda _, metadata: metadata.update(state_dtype="Tensor"),
    "hashes of another batch": lambda _, metadata: metadata.update(hashed="3", hashes="00"),
    "hashes that are none": lambda _, metadata: metadata.update(hashed="3", hashes="zz zz"),
    "nothing said": lambda _, metadata: metadata.pop("mixers"),
    "too many hashed": lambda _, metadata: metadata.update(hashed="14"),
}


@pytest.mark.parametrize("change", HOSTILE)
def test_a_file_that_was_made_up_is_refused(change: str, tmp_path: Path) -> None:
    """Also where its digest is right."""
    from mamba2_hf.models import prompt_state

    model, path = make_hybrid("sliding"), tmp_path / "state"
    read(model).save(path, model, IDS[:, :SEEN])
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        metadata = {key: value for key, value in file.metadata().items() if key != "digest"}
    HOSTILE[change](tensors, metadata)
    metadata["digest"] = prompt_state._digest(metadata, tensors)
    save_file(tensors, path, metadata)
    with pytest.raises(CacheError, match=str(path)):
        Mamba2Cache.load(path, model)


def test_a_static_cache_has_to_have_room(tmp_path: Path) -> None:
    model = make_hybrid()
    read(model).save(tmp_path / "state", model)
    with pytest.raises(CacheError, match="holds 13 tokens, more than max_length=12"):
        Mamba2Cache.load(tmp_path / "state", model, static=True, max_length=12)
