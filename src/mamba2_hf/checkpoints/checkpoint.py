"""A checkpoint of any known format, opened and checked, with its tensors under the names of ``mamba2``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, ConfigurationError
from ..layers.mixer import FP32_PARAMETERS
from ..models import Mamba2Config, Mamba2ForCausalLM
from . import mapping
from .files import read_json
from .formats import Format, detect, format_named
from .io import StoredTensor, Weights
from .mapping import EMBEDDING, HEAD

SIDECAR = "mamba2_config.json"
"""Beside a config of another format: the ``mamba2`` config it was made from, with all that had no place in it."""


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`open_checkpoint` found.

    Attributes:
        folder: where it is.
        format: its entry in ``FORMATS``.
        config: its configuration.
        weights: its files.
        tensors: what the files hold for each tensor of the model; a tied head is not among them.
        dtype: of most of its values.
    """

    folder: Path
    format: Format
    config: Mamba2Config
    weights: Weights
    tensors: dict[str, StoredTensor]
    dtype: torch.dtype

    def model(self, dtype: torch.dtype | None = None) -> Mamba2ForCausalLM:
        """The model in eval mode, whatever the format; ``A_log``, ``D`` and ``dt_bias`` are fp32 as always."""
        dtype = dtype or self.dtype
        state = {
            name: self.weights.read(tensor.name, torch.float32 if is_fp32(name) else dtype)
            for name, tensor in self.tensors.items()
        }
        model = Mamba2ForCausalLM.from_pretrained(None, config=self.config, state_dict=state, dtype=dtype)
        return model.eval()


def is_fp32(name: str) -> bool:
    """Whether a tensor keeps its precision when a model is cast."""
    return name.rpartition(".")[2] in FP32_PARAMETERS


def open_checkpoint(folder: Path, source: str | None = None) -> Checkpoint:
    """Reads a checkpoint's config and headers and compares them; values are only read where two have to agree.

    Args:
        folder: the checkpoint.
        source: a name of a format, to insist on; None to find out.

    Raises:
        CheckpointError: it is of no known format, incomplete, broken, or its config and weights contradict each other.
        ConfigurationError: it is another kind of model, or uses what ``mamba2`` cannot express.
    """
    entry = format_named(source) if source else detect(folder)
    path = folder / entry.config_file
    raw = read_json(path)
    try:
        fields = entry.read_config(raw)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None
    weights = Weights(folder, entry.weights)
    tensors = _named(entry, weights)
    if (folder / SIDECAR).exists() and entry.write_config is not None and entry.name != "mamba2":
        fields = _original(folder, entry, fields, len(tensors))
    try:
        config = mapping.mamba2_config(fields, len(tensors))
        expected = mapping.expected_shapes(config)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None
    _compare(tensors, expected, config, path)
    if config.tie_word_embeddings and HEAD in tensors:
        _check_tied(weights, tensors[EMBEDDING], tensors.pop(HEAD), path)
    sizes: dict[torch.dtype, int] = {}
    for name, tensor in tensors.items():
        if not is_fp32(name):
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    dtype = max(sizes, key=lambda dtype: sizes[dtype])
    config.dtype = dtype
    return Checkpoint(folder, entry, config, weights, tensors, dtype)


def _original(folder: Path, entry: Format, fields: dict[str, Any], most_layers: int) -> dict[str, Any]:
    """The ``mamba2`` config that a converted one was made from, if that still says the same."""
    assert entry.write_config is not None
    raw = read_json(folder / SIDECAR)
    try:
        original = mapping.mamba2_config(raw, most_layers)
        says = entry.read_config(entry.write_config(original))
    except ConfigurationError as error:
        raise ConfigurationError(f"{folder / SIDECAR}: {error}") from None
    if {**says, mapping.KEPT: None} != {**fields, mapping.KEPT: None}:
        raise CheckpointError(
            f"{folder / SIDECAR}: says otherwise than {entry.config_file}; delete it, if that one is right"
        )
    return original.to_dict()


def _named(entry: Format, weights: Weights) -> dict[str, StoredTensor]:
    named: dict[str, StoredTensor] = {}
    for tensor in weights.tensors.values():
        name = entry.keys.ours(tensor.name)
        if name in named:
            raise CheckpointError(f"{tensor.file}: {named[name].name} and {tensor.name} are two names of one tensor")
        named[name] = tensor
    return named


def _compare(
    tensors: dict[str, StoredTensor], expected: dict[str, tuple[int, ...]], config: Mamba2Config, path: Path
) -> None:
    files = sorted({tensor.file for tensor in tensors.values()})
    folder = files[0] if len(files) == 1 else path.parent
    if config.tie_word_embeddings and HEAD not in tensors:
        expected = {name: shape for name, shape in expected.items() if name != HEAD}
    if missing := [name for name in expected if name not in tensors]:
        hint = ", and tie_word_embeddings is false" if missing == [HEAD] else ""
        raise CheckpointError(f"{folder}: {missing[0]} is missing{_more(missing)}{hint}; get the complete checkpoint")
    if unknown := [name for name in tensors if name not in expected]:
        shown = tensors[unknown[0]]
        raise CheckpointError(
            f"{shown.file}: {shown.name} is no tensor of a model with the sizes in {path.name}{_more(unknown)}; the "
            "config is another model's, or the model has parts that mamba2 does not"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} has shape {tensor.shape}, and {path.name} makes it {expected[name]}"
            )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _check_tied(weights: Weights, embedding: StoredTensor, head: StoredTensor, path: Path) -> None:
    pairs = zip(weights.pieces(embedding.name), weights.pieces(head.name), strict=True)
    if embedding.dtype != head.dtype or not all(torch.equal(left, right) for left, right in pairs):
        raise CheckpointError(
            f"{head.file}: {head.name} differs from {embedding.name}, and {path.name} says that they are tied; set "
            "tie_word_embeddings (tie_embeddings) to false there"
        )
