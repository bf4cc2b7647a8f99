"""Files that are written piece by piece are those that the libraries write and read."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import layouts
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mamba2_hf.checkpoints import io
from mamba2_hf.checkpoints.io import PlannedTensor, Weights

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    names = draw(
        st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), min_size=1, max_size=6, unique=True)
    )
    names = [name for name in names if name != "__metadata__"] or ["a"]
    shape = st.lists(st.integers(0, 7), max_size=3)
    return {name: torch.randn(draw(shape)).to(draw(st.sampled_from(DTYPES))) for name in names}


def planned(tensors: dict[str, Tensor], piece: int = 5) -> list[PlannedTensor]:
    def pieces(tensor: Tensor) -> Iterator[Tensor]:
        return iter(tensor.reshape(-1).split(piece)) if tensor.numel() else iter(())

    return [
        PlannedTensor(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: pieces(tensor))  # type: ignore[misc]
        for name, tensor in tensors.items()
    ]


def read(folder: Path, name: str) -> dict[str, Tensor]:
    weights = Weights(folder, [name])
    return {name: weights.read(name) for name in weights.tensors}


@given(tensors(), st.sampled_from([1, 40, "5GB"]))
def test_safetensors_is_what_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, Tensor], size: int | str
) -> None:
    folder = tmp_path_factory.mktemp("io")
    io.write_safetensors(folder, planned(content), size, lambda _: None)
    shards = sorted(folder.glob("*.safetensors"))
    found = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert layouts.same(found, content)
    if len(shards) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == content.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in content.values())
        assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    else:
        assert [shard.name for shard in shards] == ["model.safetensors"]
    with safe_open(shards[0], "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert layouts.same(read(folder, shards[0].name if len(shards) == 1 else "model.safetensors.index.json"), content)


@given(tensors())
def test_a_torch_file_is_what_torch_reads(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Tensor]) -> None:
    folder = tmp_path_factory.mktemp("io")
    path = folder / "pytorch_model.bin"
    io.write_torch(path, planned(content), lambda _: None)
    for mmap in (False, True):
        found = torch.load(path, weights_only=True, mmap=mmap)
        assert list(found) == list(content)
        assert layouts.same(found, content)
        assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values() if tensor.numel() and mmap)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # torch itself does not look at the checksums
    assert layouts.same(read(folder, path.name), content)


@given(tensors())
def test_what_the_libraries_write_is_read(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Tensor]) -> None:
    folder = tmp_path_factory.mktemp("io")
    save_file(content, folder / "model.safetensors")
    torch.save(content, folder / "pytorch_model.bin")
    assert layouts.same(read(folder, "model.safetensors"), content)
    assert layouts.same(read(folder, "pytorch_model.bin"), content)


def test_views_and_parameters_in_torch_files_are_read_as_tensors(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    content = {"view": base[1:3], "turned": base.T, "parameter": torch.nn.Parameter(base), "again": base}
    torch.save(content, tmp_path / "pytorch_model.bin")
    found = read(tmp_path, "pytorch_model.bin")
    assert all(torch.equal(found[name], tensor) for name, tensor in content.items())
    assert not any(tensor.requires_grad for tensor in found.values())


def test_large_tensors_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "PIECE", 10)
    monkeypatch.setattr(io, "REOPEN", 100)
    content = {
        "rows": torch.randn(50, 3),
        "wide": torch.randn(2, 35),
        "flat": torch.randn(101),
        "one": torch.tensor(3.0),
    }
    save_file(content, tmp_path / "model.safetensors")
    torch.save(content, tmp_path / "pytorch_model.bin")
    for name in ("model.safetensors", "pytorch_model.bin"):
        weights = Weights(tmp_path, [name])
        for key, tensor in content.items():
            pieces = list(weights.pieces(key))
            assert max(map(len, pieces)) <= 10
            assert torch.equal(torch.cat(pieces), tensor.reshape(-1))
