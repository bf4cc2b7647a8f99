"""A checkpoint of any known format, opened and checked, with its tensors under the names of our models."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigurationError
from ..layers import SigmoidRouter
from ..layers.mixer import FP32_PARAMETERS
from . import mapping
from .equations import Equation, Part, cut, parts_of, shapes_of
from .families.common import KEPT
from .files import read_json
from .formats import Format, detect, format_named
from .io import StoredTensor, Weights, aligned, assemble
from .mapping import EMBEDDING, HEAD

SIDECAR = "mamba2_config.json"
"""Beside a config of another format: the config of our own it was made from, with all that had no place in it."""


@dataclass(frozen=True)
class ModelTensor:
    """A tensor of the model, made of parts of stored ones."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`open_checkpoint` found.

    Attributes:
        folder: where it is.
        format: its entry in ``FORMATS``.
        config: its configuration.
        own: the file of our own that it stands in, or that lies beside one of another format; None for none.
        weights: its files.
        tensors: those of the model, by our names; a tied head is not among them.
        dtype: of most of its values.
    """

    folder: Path
    format: Format
    config: Any
    own: dict[str, Any] | None
    weights: Weights
    tensors: dict[str, ModelTensor]
    dtype: torch.dtype

    def pieces(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """The flat values ``start`` to ``stop`` of a tensor of the model, in pieces; see :meth:`Weights.pieces`."""
        tensor = self.tensors[name]
        for part in cut(tensor.parts, start, math.prod(tensor.shape) if stop is None else stop):
            yield from self.weights.pieces(part.name, part.start, part.stop)

    def state_dict(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every tensor of the model; ``A_log``, ``D`` and ``dt_bias`` in fp32, the others in ``dtype``."""
        return {
            name: assemble(self.pieces(name), tensor.shape, torch.float32 if is_fp32(name) else dtype)
            for name, tensor in self.tensors.items()
        }

    def model(self, dtype: torch.dtype | None = None) -> Any:
        """The model in eval mode, whatever the format; ``A_log``, ``D`` and ``dt_bias`` are fp32 as always."""
        dtype = dtype or self.dtype
        model = self.format.family.model.from_pretrained(
            None, config=self.config, state_dict=self.state_dict(dtype), dtype=dtype
        )
        return model.eval()


def is_fp32(name: str) -> bool:
    """Whether a tensor keeps its precision when a model is cast."""
    return name.rpartition(".")[2] in (*FP32_PARAMETERS, *SigmoidRouter.fp32_parameters)


def open_checkpoint(folder: Path, source: str | None = None) -> Checkpoint:
    """Reads a checkpoint's config and headers and compares them; values are only read where two have to agree.

    Args:
        folder: the checkpoint.
        source: a name of a format, to insist on; None to find out.

    Raises:
        CheckpointError: it is of no known format, incomplete, broken, or its config and weights contradict each other.
        ConfigurationError: it is another kind of model, or uses what its family cannot express.
    """
    entry = format_named(source) if source else detect(folder)
    path = folder / entry.config_file
    raw = read_json(path)
    try:
        fields = entry.read_config(raw)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None
    weights = Weights(folder, entry.weights)
    count = len(weights.tensors)
    own = raw if entry.name == entry.family.name else None
    if (folder / SIDECAR).exists() and entry.write_config is not None and own is None:
        own = fields = _original(folder, entry, fields, count)
    heads = fields.get("num_mtp_layers") and entry.equations is not None
    if heads and not any(name.startswith("mtp.") for name in weights.tensors):
        # Programs that do not know the heads leave them out, and what the config says of them as it was.
        fields = {**fields, "num_mtp_layers": 0}
    try:
        config = entry.family.config(fields, count)
        shapes = mapping.expected_shapes(config)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None
    equations = None if entry.equations is None else entry.equations(config, shapes, weights.tensors.keys())
    stored = _named(entry, weights, config)
    expected = shapes if equations is None else shapes_of(equation.theirs for equation in equations)
    head, embedding = (_stored_name(equations, name) for name in (HEAD, EMBEDDING))
    _compare(stored, expected, config, path, head)
    if config.tie_word_embeddings and head in stored:
        _check_tied(weights, stored[embedding], stored.pop(head), path)
        shapes.pop(HEAD)
    elif config.tie_word_embeddings:
        shapes.pop(HEAD)
    tensors = _of_model(stored, shapes, equations)
    sizes: dict[torch.dtype, int] = {}
    for name, tensor in tensors.items():
        if not is_fp32(name):
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    dtype = max(sizes, key=lambda dtype: sizes[dtype])
    config.dtype = dtype
    return Checkpoint(folder, entry, config, own, weights, tensors, dtype)


def _original(folder: Path, entry: Format, fields: dict[str, Any], most_layers: int) -> dict[str, Any]:
    """The config of the family that a converted one was made from, if that still says the same."""
    assert entry.write_config is not None
    raw = read_json(folder / SIDECAR)
    try:
        original = entry.family.config(raw, most_layers)
        says = entry.read_config(entry.write_config(original))
    except ConfigurationError as error:
        raise ConfigurationError(f"{folder / SIDECAR}: {error}") from None
    if any(says.get(key) != fields.get(key) for key in (says.keys() | fields.keys()) - {mapping.KEPT, KEPT}):
        raise CheckpointError(
            f"{folder / SIDECAR}: says otherwise than {entry.config_file}; delete it, if that one is right"
        )
    return raw


def _named(entry: Format, weights: Weights, config: Any) -> dict[str, StoredTensor]:
    """What the files hold, by our names, or by theirs where there are equations."""
    named: dict[str, StoredTensor] = {}
    for tensor in weights.tensors.values():
        if entry.equations is None:
            name: str | None = entry.keys.ours(tensor.name)
        else:
            name = tensor.name if entry.canonical is None else entry.canonical(config, tensor.name)
        if name is None:
            continue
        if name in named:
            if entry.equations is None or not _equal(weights, named[name], tensor):
                raise CheckpointError(
                    f"{tensor.file}: {named[name].name} and {tensor.name} are two names of one tensor"
                )
            continue
        named[name] = tensor
    return named


def _stored_name(equations: list[Equation] | None, name: str) -> str:
    """Their name of a tensor that they have under another name only."""
    if equations is None:
        return name
    return next((e.theirs[0].name for e in equations if [rows.name for rows in e.ours] == [name]), name)


def _of_model(
    stored: dict[str, StoredTensor], shapes: dict[str, tuple[int, ...]], equations: list[Equation] | None
) -> dict[str, ModelTensor]:
    parts: dict[str, list[Part]]
    if equations is None:
        parts = {name: [Part(name, 0, math.prod(shape))] for name, shape in shapes.items()}
    else:
        parts = parts_of(equations, of_ours=True)
    tensors = {}
    for name, shape in shapes.items():
        dtypes = [stored[part.name].dtype for part in parts[name]]
        tensors[name] = ModelTensor(
            name,
            functools.reduce(torch.promote_types, dtypes),
            shape,
            tuple(Part(stored[part.name].name, part.start, part.stop) for part in parts[name]),
        )
    return tensors


def _compare(
    tensors: dict[str, StoredTensor], expected: dict[str, tuple[int, ...]], config: Any, path: Path, head: str
) -> None:
    files = sorted({tensor.file for tensor in tensors.values()})
    folder = files[0] if len(files) == 1 else path.parent
    if config.tie_word_embeddings and head not in tensors:
        expected = {name: shape for name, shape in expected.items() if name != head}
    if missing := [name for name in expected if name not in tensors]:
        hint = ", and tie_word_embeddings is false" if missing == [head] else ""
        raise CheckpointError(f"{folder}: {missing[0]} is missing{_more(missing)}{hint}; get the complete checkpoint")
    if unknown := [name for name in tensors if name not in expected]:
        shown = tensors[unknown[0]]
        raise CheckpointError(
            f"{shown.file}: {shown.name} is no tensor of a model with the sizes in {path.name}{_more(unknown)}; the "
            "config is another model's, or the model has parts that are not known here"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} has shape {tensor.shape}, and {path.name} makes it {expected[name]}"
            )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _check_tied(weights: Weights, embedding: StoredTensor, head: StoredTensor, path: Path) -> None:
    if not _equal(weights, embedding, head):
        raise CheckpointError(
            f"{head.file}: {head.name} differs from {embedding.name}, and {path.name} says that they are tied; set "
            "tie_word_embeddings (tie_embeddings) to false there"
        )


def _equal(weights: Weights, one: StoredTensor, other: StoredTensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    pairs = aligned(weights.pieces(one.name), weights.pieces(other.name))
    return all(torch.equal(left, right) for left, right in pairs)
