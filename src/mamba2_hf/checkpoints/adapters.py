"""PEFT's LoRA adapters of hybrids: from the modules of transformers' own classes to ours, and back.

Where a family joins two of our projections in one, an adapter of the joined one becomes one of each, with the same
``lora_A``; on the way back they are joined again, with the ranks of both where they differ.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, ConfigurationError
from . import mapping
from .checkpoint import Checkpoint, open_checkpoint
from .equations import Equation, Part, parts_of, same
from .families.common import KEPT
from .files import check_free, read_json, whole_folder, write_json
from .formats import FORMATS, HYBRID, Format, format_named
from .hub import local_folder
from .io import Weights

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.weight)?")


@dataclass
class AdapterConversion:
    """What :func:`convert_adapter` did.

    Attributes:
        destination: where the result is.
        source, target: names of the formats whose modules it is for.
        modules: how many modules it adapts.
    """

    destination: Path
    source: str
    target: str
    modules: int


@dataclass
class _Pair:
    """The adapter of one module: ``scale * b @ a``, and DoRA's magnitudes of its rows."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None


def convert_adapter(
    source: str | Path,
    destination: str | Path,
    *,
    base: str | Path,
    to: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
) -> AdapterConversion:
    """Writes an adapter for the same model in another format.

    Args:
        source: a folder, or a Hub id, with ``adapter_config.json``.
        destination: the folder to make.
        base: the model that it was trained on, in any format; only its sizes are read.
        to: the format whose modules the result is for; None for our own, ``"mamba2_hybrid"``.
        overwrite: whether an adapter at the destination may be replaced.
        revision: of a Hub id.

    Raises:
        CheckpointError: the adapter is broken, of another kind than LoRA, or names modules that the model lacks.
        ConfigurationError: the model cannot be expressed in the target format, or the adapter in its modules.
    """
    target = format_named(to or HYBRID.name)
    folder, destination = local_folder(source, revision), Path(destination).expanduser()
    replaceable = frozenset({CONFIG, *WEIGHTS}) if overwrite else None
    check_free(destination.resolve(), replaceable)
    checkpoint = open_checkpoint(local_folder(base, weights=True))
    if checkpoint.format.family is not HYBRID or target.family is not HYBRID or target.write_config is None:
        raise ConfigurationError(f"{target.name}: adapters are converted between formats of hybrids that are written")
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder / CONFIG}: peft_type is {config.get('peft_type')!r}, only LORA is known here")
    weights = Weights(folder, WEIGHTS)
    tensors = {name: weights.read(name) for name in weights.tensors}
    names = [name.removeprefix(_PREFIX) for name in tensors]
    origin = _origin(names, checkpoint)
    target.write_config(checkpoint.config)  # raises where the model has no place there
    ours, saved = _read(folder, config, tensors, _Names(origin, checkpoint))
    theirs, kept = _translated(ours, saved, _Names(target, checkpoint))
    written, patterns = _written(theirs, config)
    written |= {f"{_PREFIX}{name}": tensor for name, tensor in kept.items()}
    config = {
        **config,
        **patterns,
        "base_model_name_or_path": str(base),
        "target_modules": sorted(theirs),
        "modules_to_save": sorted({name.removesuffix(".weight") for name in kept}) or None,
        **dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules")),
    }
    with whole_folder(destination, replaceable=replaceable) as temporary:
        write_json(temporary / CONFIG, json.loads(json.dumps(config)))
        save_file(written, temporary / WEIGHTS[0], metadata={"format": "pt"})
    return AdapterConversion(destination, origin.name, target.name, len(theirs))


class _Names:
    """Names of a format's tensors as its class has them in memory, and which of ours they are."""

    def __init__(self, entry: Format, checkpoint: Checkpoint) -> None:
        self.entry, self.config = entry, checkpoint.config
        shapes = mapping.expected_shapes(self.config)
        self.equations: list[Equation] = (
            [same(name, name, shape) for name, shape in shapes.items()]
            if entry.equations is None
            else entry.equations(self.config, shapes, ())
        )
        self.of_ours = parts_of(self.equations, of_ours=True)
        self.of_theirs = parts_of(self.equations, of_ours=False)
        sides = {rows.name: rows.shape for equation in self.equations for rows in equation.theirs}
        self.widths = {name: math.prod(shape[1:]) for name, shape in {**shapes, **sides}.items()}

    def stored(self, name: str) -> str:
        """The name of a tensor in a checkpoint's file."""
        canonical = self.entry.canonical
        return name if canonical is None else canonical(self.config, name) or name

    def in_memory(self, name: str) -> str:
        """The name of a tensor in transformers' class."""
        return re.sub(r"^backbone\.", "model.", name) if self.entry.name != HYBRID.name else name

    def rows(self, parts: list[Part]) -> list[tuple[str, slice]]:
        """Parts as tensors and their rows."""
        return [(p.name, slice(p.start // self.widths[p.name], p.stop // self.widths[p.name])) for p in parts]


def _origin(names: list[str], checkpoint: Checkpoint) -> Format:
    """The format whose modules an adapter names."""
    if any(re.search(r"backbone\.(layers\.\d+\.blocks|shared_blocks)\.", name) for name in names):
        return FORMATS[HYBRID.name]
    if checkpoint.format.name != HYBRID.name:
        return checkpoint.format
    original = getattr(checkpoint.config, KEPT, None)
    kind = original.get("model_type") if isinstance(original, Mapping) else None
    if kind not in FORMATS:
        raise CheckpointError(
            f"{checkpoint.folder}: the adapter names modules of another class, and this model does not say which; give "
            "the model it was trained on as the base"
        )
    return FORMATS[kind]


def _read(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], names: _Names
) -> tuple[dict[str, _Pair], dict[str, Tensor]]:
    """Adapters of our modules, and whole tensors that were trained."""
    modules: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if (match := _LORA.fullmatch(name)) is not None:
            modules.setdefault(match[1], {})[match[2]] = tensor
        else:
            saved[name] = tensor
    ours: dict[str, _Pair] = {}
    for module, found in modules.items():
        weight = names.stored(f"{module}.weight")
        if ".shared_transformer." in module:
            raise ConfigurationError(
                f"{folder}: {module} is in a block that layers share, where transformers' class has an adapter for "
                "each of its uses, and ours has one"
            )
        if weight not in names.of_theirs or {"lora_A", "lora_B"} - found.keys():
            raise CheckpointError(
                f"{folder}: {module} is no module of the base that LoRA can be for, or half of it is missing"
            )
        rank = found["lora_A"].shape[0]
        pair = _Pair(found["lora_A"], found["lora_B"], _scale(config, module, rank), found.get("lora_magnitude_vector"))
        place = 0
        for own, rows in names.rows(names.of_theirs[weight]):
            count = rows.stop - rows.start
            here = slice(place, place + count)
            place += count
            magnitude = None if pair.magnitude is None else pair.magnitude[here]
            ours[own.removesuffix(".weight")] = _Pair(pair.a, pair.b[here], pair.scale, magnitude)
        if place != pair.b.shape[0]:
            raise CheckpointError(f"{folder}: {module} has an adapter of {pair.b.shape[0]} rows, and the base {place}")
    whole = {}
    for name, tensor in saved.items():
        parts = names.of_theirs.get(names.stored(name), [])
        if len(parts) != 1:
            raise ConfigurationError(f"{folder}: {name} was trained as a whole, and is no single tensor here")
        whole[parts[0].name] = tensor
    return ours, whole


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _translated(
    ours: dict[str, _Pair], saved: dict[str, Tensor], names: _Names
) -> tuple[dict[str, _Pair], dict[str, Tensor]]:
    theirs: dict[str, _Pair] = {}
    kept: dict[str, Tensor] = {}
    for weight, parts in names.of_theirs.items():
        rows = [(own.removesuffix(".weight"), cut) for own, cut in names.rows(parts)]
        if any(module in ours for module, _ in rows):
            module = names.in_memory(weight).removesuffix(".weight")
            if ".shared_transformer." in module:
                raise ConfigurationError(
                    f"{rows[0][0]} is in a block that layers share: transformers' class has an adapter for each of its "
                    "uses, and this is one for all"
                )
            theirs[module] = _joined([(ours.get(own), cut) for own, cut in rows])
        elif len(parts) == 1 and parts[0].name in saved:
            kept[names.in_memory(weight)] = saved[parts[0].name]
    return theirs, kept


def _joined(pairs: list[tuple[_Pair | None, slice]]) -> _Pair:
    """The adapter of a projection that is several, one after the other by rows: the ``a`` that differ on top of each
    other, and each ``b`` in the columns of its own.
    """
    known = [pair for pair, _ in pairs if pair is not None]
    distinct: list[Tensor] = []
    for pair in known:
        if not any(_equal(pair.a, other) for other in distinct):
            distinct.append(pair.a)
    magnitudes = [pair.magnitude[rows] for pair, rows in pairs if pair is not None and pair.magnitude is not None]
    if magnitudes and (len(magnitudes) < len(pairs) or len(distinct) > 1):
        raise ConfigurationError("these DoRA adapters are of projections that are one there: they cannot be joined")
    scale, blocks = known[0].scale, []
    for one, rows in pairs:
        columns = [known[0].b.new_zeros(rows.stop - rows.start, a.shape[0]) for a in distinct]
        if one is not None:
            place = next(place for place, other in enumerate(distinct) if _equal(one.a, other))
            columns[place] = one.b[rows] if one.scale == scale else one.b[rows] * (one.scale / scale)
        blocks.append(torch.cat(columns, 1))
    return _Pair(torch.cat(distinct), torch.cat(blocks), scale, torch.cat(magnitudes) if magnitudes else None)


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)


def _written(modules: dict[str, _Pair], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by PEFT's names, and what the configuration says of ranks and scales."""
    tensors: dict[str, Tensor] = {}
    usual = config.get("r", 8)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, pair in modules.items():
        rank = pair.a.shape[0]
        alpha = pair.scale * (math.sqrt(rank) if config.get("use_rslora") else rank)
        if rank != usual:
            ranks[module] = rank
        if alpha != config.get("lora_alpha"):
            alphas[module] = round(alpha) if math.isclose(alpha, round(alpha)) else alpha
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = pair.a.contiguous().clone()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = pair.b.contiguous().clone()
        if pair.magnitude is not None:
            tensors[f"{_PREFIX}{module}.lora_magnitude_vector"] = pair.magnitude.contiguous().clone()
    return tensors, {"rank_pattern": ranks, "alpha_pattern": alphas}
