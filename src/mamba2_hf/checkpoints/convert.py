"""One checkpoint to another format or dtype, piece by piece, as a whole or not at all."""

from __future__ import annotations

import copy
import errno
import functools
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigurationError
from . import io, mapping, remote_code
from .checkpoint import SIDECAR, Checkpoint, is_fp32, open_checkpoint
from .companions import CARD, TOKENIZERS, WRITTEN, carry, tokenizer_steps
from .equations import Part, parts_of, same, shapes_of
from .families.common import KEPT
from .files import check_free, whole_folder, write_bytes, write_json
from .formats import FORMATS, Format, format_named
from .hub import local_folder
from .mapping import EMBEDDING, HEAD
from .readers import READERS, Verdict, complete, reader_named, refuse, verdict

Progress = Callable[[int, int], None]
"""Is told the bytes written so far and those to be written in all."""


@dataclass
class Conversion:
    """What :func:`convert` did.

    Attributes:
        destination: where the result is.
        source, target: names of the formats.
        dtype: of the weights.
        tensors, parameters, nbytes: how many were written.
        carried: files that travelled along.
        left: files of the source that did not.
        remarks: what a person may want to know.
        readers: which other programs take the result.
    """

    destination: Path
    source: str
    target: str
    dtype: torch.dtype
    tensors: int
    parameters: int
    nbytes: int
    carried: list[str]
    left: list[str]
    remarks: list[str] = field(default_factory=list)
    readers: list[Verdict] = field(default_factory=list)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str | None = None,
    for_reader: str | None = None,
    source_format: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    with_code: bool = False,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Writes a checkpoint in another format, or the same one anew.

    Values pass through in pieces, so that memory stays at a few hundred megabytes for any model. Every value has to be
    finite. The destination appears when all of it is on the disk; an error, a signal or a full disk leaves no trace.

    Args:
        source: a folder, or a Hub id.
        destination: the folder to make.
        to: the name of a format that can be written; None for ``"mamba2"``, or ``"mamba2_hybrid"`` of a model with
            attention or MLPs, or for one that ``for_reader`` reads.
        for_reader: the program that is to read the result, one of ``READERS``: its config is then written as that
            program wants it, and what it would compute wrongly is refused. None for what most of them read.
        source_format: the name of the source's format; None to find out.
        dtype: of the weights, ``torch.float32``, ``bfloat16`` or ``float16``; ``A_log``, ``D`` and ``dt_bias`` are then
            stored in float32. None keeps every tensor as it is.
        max_shard_size: of a file, in bytes or as ``"5GB"``; mamba_ssm reads one file only.
        overwrite: whether a checkpoint at the destination may be replaced; its README.md stays.
        with_code: whether to write the file with which the model runs where this package is not installed.
        tokenizer: a folder or Hub id to take the tokenizer's files from, in place of the source.
        revision: of a Hub id.
        progress: is called as bytes are written.

    Returns:
        What was done.

    Raises:
        CheckpointError: the source is broken, or the destination is in the way or full; see ``open_checkpoint``.
        ConfigurationError: the model is of another kind, or cannot be expressed in the target format.
    """
    target = None if to is None else _writable(to)
    if for_reader is not None:
        reader_named(for_reader)
    if with_code and to not in (None, "mamba2"):
        raise CheckpointError(f"remote code is read by transformers, and {to} is not its format: use mamba2")
    size = _shard_size(max_shard_size)
    destination = Path(destination).expanduser()
    replaceable = WRITTEN if overwrite else None
    check_free(destination.resolve(), replaceable)
    folder = local_folder(source, revision)
    words = local_folder(tokenizer, weights=False) if tokenizer else None
    _keep_apart(folder, destination)
    checkpoint = open_checkpoint(folder, source_format)
    family = checkpoint.format.family
    if target is None:
        target = FORMATS[family.name] if for_reader is None else _format_for(for_reader, checkpoint)
    if target.family is not family:
        raise ConfigurationError(
            f"{folder} is a {family.title} and {target.name} a format of {target.family.title} models: use one of "
            f"{', '.join(name for name, entry in FORMATS.items() if entry.write_config and entry.family is family)}"
        )
    if with_code and target.name != "mamba2":
        raise CheckpointError(f"{target.name}: there is remote code for pure Mamba-2 models only")
    try:
        config, verdicts = _written_config(checkpoint, target, dtype, with_code, for_reader)
        plan = _plan(checkpoint, target, dtype)
        nbytes = sum(tensor.nbytes for tensor in plan if not (tensor.copy_of and target.in_torch_file))
        with whole_folder(destination, replaceable=replaceable) as temporary:
            _check_space(temporary, nbytes)
            advance = _advance(progress, nbytes)
            for name, content in config.items():
                write_json(temporary / name, content)
            carried = carry(folder, words, temporary)
            if (destination / CARD).is_file():  # written by hand or for this place, and never by a conversion
                write_bytes(temporary / CARD, (destination / CARD).read_bytes())
            if with_code:
                write_bytes(temporary / remote_code.FILE, remote_code.source().encode())
            if target.in_torch_file:
                io.write_torch(temporary / "pytorch_model.bin", plan, advance)
            else:
                io.write_safetensors(temporary, plan, size, advance)
            open_checkpoint(temporary, target.name)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CheckpointError(f"{destination}: the disk is full ({error.strerror}); nothing was written") from None
        raise CheckpointError(f"{destination}: cannot be written ({error}); nothing was written") from None
    result = Conversion(
        destination=destination,
        source=checkpoint.format.name,
        target=target.name,
        dtype=dtype or checkpoint.dtype,
        tensors=len(plan),
        parameters=sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()),
        nbytes=nbytes,
        carried=carried,
        left=_left(folder, checkpoint, carried),
        readers=[replace(v, steps=[*v.steps, *tokenizer_steps(v.reader, destination)]) for v in verdicts],
    )
    if not TOKENIZERS & set(carried):
        result.remarks.append(
            "the source has no tokenizer; name one to take along (state-spaces: EleutherAI/gpt-neox-20b)"
        )
    if "tokenizer.model.v3" in carried and "tokenizer.json" not in carried:
        result.remarks.append(
            "tokenizer.model.v3 is Mistral's; AutoTokenizer wants the tokenizer.json of the Hub's copy"
        )
    return result


def _writable(name: str) -> Format:
    entry = format_named(name)
    if entry.write_config is None:
        writable = ", ".join(name for name, entry in FORMATS.items() if entry.write_config)
        raise CheckpointError(f"{name}: this format is only read; those that can be written are {writable}")
    return entry


def _shard_size(size: int | str) -> int | str:
    if isinstance(size, str) and not re.fullmatch(r"[1-9]\d*(\.\d+)?(KB|MB|GB|TB)", size.upper()):
        raise CheckpointError(f"max_shard_size is {size!r}: expected a number of bytes or a size such as '5GB'")
    if isinstance(size, int) and size < 1:
        raise CheckpointError(f"max_shard_size is {size}: expected at least 1 byte")
    return size


def _keep_apart(folder: Path, destination: Path) -> None:
    """The source must outlive the conversion, so neither folder may hold the other."""
    source, target = folder.resolve(), destination.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise CheckpointError(f"{destination}: is, holds or lies in the source; choose a folder apart from it")


def _written_config(
    checkpoint: Checkpoint, target: Format, dtype: torch.dtype | None, with_code: bool, for_reader: str | None
) -> tuple[dict[str, dict[str, Any]], list[Verdict]]:
    """Config files by name, and what other programs make of them.

    Raises:
        ConfigurationError: the format cannot express the model, or the reader does not compute it.
    """
    config = checkpoint.config
    if dtype is not None:
        config.dtype = dtype
    anew = _anew(config, target)
    assert target.write_config is not None
    own = mapping.write_own(config, checkpoint.own)
    written = own if target.name == target.family.name else target.write_config(config)
    written = complete(target.name, written, anew, for_reader)
    verdicts = [verdict(name, target.name, config, written, anew) for name in READERS]
    for found in verdicts:
        if found.reader == for_reader:
            refuse(found)
    if with_code:
        written["auto_map"] = remote_code.AUTO_MAP
    if target.name == target.family.name:
        return {target.config_file: written}, verdicts
    return {target.config_file: written, SIDECAR: own}, verdicts


def _anew(config: Any, target: Format) -> dict[str, Any]:
    """The config of a model as a format has it that came from no file of that format."""
    config = copy.deepcopy(config)
    for name in (KEPT, mapping.KEPT):
        if hasattr(config, name):
            delattr(config, name)
    assert target.write_config is not None
    return target.write_config(config)


def _format_for(reader: str, checkpoint: Checkpoint) -> Format:
    """A format that can express a model and that a program reads: that of the source, or of the file that the model
    once came from, before any other.

    Raises:
        ConfigurationError: there is none; the message says why each is none.
    """
    original = getattr(checkpoint.config, KEPT, None)
    first = [checkpoint.format.name, original.get("model_type") if isinstance(original, dict) else None]
    entries = [entry for entry in FORMATS.values() if entry.write_config and entry.family is checkpoint.format.family]
    reasons = []
    for entry in sorted(entries, key=lambda entry: entry.name not in first):
        if entry.name not in READERS[reader].families:
            continue
        try:
            anew = _anew(checkpoint.config, entry)
            refuse(verdict(reader, entry.name, checkpoint.config, anew, anew))
        except ConfigurationError as error:
            reasons.append(f"{entry.name}: {error}")
        else:
            return entry
    raise ConfigurationError(f"no format that {READERS[reader].title} reads can hold this model. {'. '.join(reasons)}")


def _plan(checkpoint: Checkpoint, target: Format, dtype: torch.dtype | None) -> list[io.PlannedTensor]:
    ours, tied = checkpoint.tensors, checkpoint.config.tie_word_embeddings
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    if tied and target.stores_tied_head:
        shapes[HEAD] = shapes[EMBEDDING]
    if target.equations is None:
        equations = [same(target.keys.theirs(name), name, shape) for name, shape in shapes.items()]
    else:
        equations = target.equations(checkpoint.config, shapes, ())
    theirs = shapes_of(equation.theirs for equation in equations)
    made = parts_of(equations, of_ours=False)
    names = {own.name: equation.theirs[0].name for equation in equations for own in equation.ours}

    def pieces(parts: list[Part]) -> Iterator[Tensor]:
        for part in parts:
            yield from checkpoint.pieces(EMBEDDING if part.name not in ours else part.name, part.start, part.stop)

    plan = []
    for name, shape in theirs.items():
        parts = made[name]
        stored = functools.reduce(torch.promote_types, (ours.get(part.name, ours[EMBEDDING]).dtype for part in parts))
        kind = stored
        if dtype is not None:
            exact = any(is_fp32(part.name) for part in parts)
            kind = torch.promote_types(stored, torch.float32) if exact else dtype
        copied = HEAD not in ours and parts[0].name == HEAD
        plan.append(
            io.PlannedTensor(
                name=name,
                dtype=kind,
                shape=shape,
                pieces=functools.partial(pieces, parts),
                copy_of=names[EMBEDDING] if copied else None,
            )
        )
    return plan


def _check_space(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise CheckpointError(
            f"{folder.parent}: {free / 1e9:.1f} GB free and {nbytes / 1e9:.1f} GB needed; make room or choose another "
            "disk"
        )


def _advance(progress: Progress | None, total: int) -> io.Advance:
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    return advance


def _left(folder: Path, checkpoint: Checkpoint, carried: list[str]) -> list[str]:
    used = {*carried, checkpoint.format.config_file, SIDECAR, *(file.name for file in checkpoint.weights.files)}
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in used and not entry.name.startswith("."))
