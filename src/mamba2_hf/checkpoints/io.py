"""Tensors of a checkpoint, read and written piece by piece, so that memory does not grow with the model.

Names, shapes and dtypes come from the headers before any value is read. Files are mapped, and mapped anew every
``REOPEN`` bytes: pages of a mapping count as memory of the process for as long as it lives.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .files import check_regular, plain_name, read_json, synchronize, write_json

PIECE = 2**24
"""Elements that are in memory at once."""
REOPEN = 2**28
"""Bytes after which a file is mapped anew."""

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
_PICKLE_LIMIT = 64 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: its name there, its dtype and shape, and the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class Weights:
    """The weights of a checkpoint folder, in one file or several, safetensors or pickled by torch.

    Args:
        folder: the checkpoint.
        candidates: file names to look for, in order; a name that ends in ``.index.json`` names the files itself.

    Raises:
        CheckpointError: a file is missing, broken, unsafe or not what it says; the message names it.
    """

    def __init__(self, folder: Path, candidates: Iterable[str]) -> None:
        self.files = weight_files(folder, candidates)
        self.tensors: dict[str, StoredTensor] = {}
        self._readers: dict[Path, _Reader] = {}
        index = self.files[0] if self.files[0].name.endswith(".index.json") else None
        shards = self.files[1:] if index else self.files
        for file in shards:
            self._readers[file] = _SafetensorsReader(file) if file.suffix == ".safetensors" else _TorchReader(file)
            for name, tensor in self._readers[file].tensors.items():
                if name in self.tensors:
                    raise CheckpointError(f"{file}: {name} stands in {self.tensors[name].file.name} too; remove one")
                self.tensors[name] = tensor
        if index:
            self._compare(index)

    def _compare(self, index: Path) -> None:
        places = read_json(index)["weight_map"]
        for name, file in places.items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise CheckpointError(f"{index}: weight_map puts {name} into {file}, where it is not")
        if left := sorted(self.tensors.keys() - places.keys()):
            raise CheckpointError(
                f"{index}: weight_map does not name {left[0]}, which {self.tensors[left[0]].file.name} holds"
            )

    def pieces(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """The values of a tensor in order, as flat tensors of up to ``PIECE`` elements each.

        Args:
            name: of the tensor.
            start, stop: the range of its flat values; all of them by default.

        Raises:
            CheckpointError: a value is NaN or infinite.
        """
        tensor = self.tensors[name]
        for reader in self._readers.values():
            if reader.file != tensor.file:
                reader.close()
        for piece in self._readers[tensor.file].pieces(tensor, start, stop):
            if not bool(torch.isfinite(piece).all()):
                raise CheckpointError(
                    f"{tensor.file}: {name} holds NaN or Inf. The file is damaged or was saved after training "
                    "diverged: get it again, or take an earlier checkpoint"
                )
            yield piece

    def read(self, name: str) -> Tensor:
        """A whole tensor; raises as :meth:`pieces`."""
        tensor = self.tensors[name]
        return assemble(self.pieces(name), tensor.shape, tensor.dtype)


def assemble(pieces: Iterable[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of its flat values, which come in order."""
    out = torch.empty(shape, dtype=dtype)
    flat, start = out.view(-1), 0
    for piece in pieces:
        flat[start : start + len(piece)] = piece
        start += len(piece)
    return out


def weight_files(folder: Path, candidates: Iterable[str]) -> list[Path]:
    """The files that hold the weights, the index first if there is one.

    Raises:
        CheckpointError: there are none, or the index is broken or leads elsewhere.
    """
    candidates = tuple(candidates)
    found = next((folder / name for name in candidates if (folder / name).exists()), None)
    if found is None:
        raise CheckpointError(f"{folder}: holds none of {', '.join(candidates)}; get the complete checkpoint")
    if not found.name.endswith(".index.json"):
        return [found]
    places = read_json(found).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{found}: weight_map is {places!r:.80}, expected an object that names a file per tensor")
    shards = dict.fromkeys(folder / plain_name(name, found) for name in places.values())
    for shard in shards:
        if not shard.exists():
            raise CheckpointError(
                f"{found}: weight_map names {shard.name}, which is not there; get the complete checkpoint"
            )
        if shard.suffix != Path(found.stem).with_suffix("").suffix:
            raise CheckpointError(f"{found}: weight_map names {shard.name}, a file of another kind")
    return [found, *shards]


class _Reader:
    """One file of tensors."""

    def __init__(self, file: Path) -> None:
        check_regular(file)
        self.file = file
        self.tensors: dict[str, StoredTensor] = {}
        self._opened: Any = None
        self._budget = 0

    def _open(self) -> Any:
        raise NotImplementedError

    def _slice(self, opened: Any, tensor: StoredTensor, rows: slice) -> Tensor:
        raise NotImplementedError

    def _check_dtype(self, name: str, dtype: torch.dtype | None, shown: object) -> torch.dtype:
        if dtype not in _DTYPE_NAMES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPE_NAMES)
            raise CheckpointError(f"{self.file}: {name} has dtype {shown}; weights are {known}: dequantize it first")
        assert dtype is not None
        return dtype

    def close(self) -> None:
        """Lets go of the mapping, as far as no piece of it is in use."""
        self._opened = None

    def pieces(self, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """See :meth:`Weights.pieces`, without the check."""
        count = math.prod(tensor.shape)
        stop = count if stop is None else stop
        if start >= stop:
            return
        rows = tensor.shape[0] if tensor.shape else 1
        width = count // rows
        step = max(1, PIECE // width)
        for row in range(start // width, -(-stop // width), step):
            end = min(row + step, -(-stop // width))
            self._budget -= (end - row) * width * tensor.dtype.itemsize
            if self._opened is None or self._budget < 0:
                self._opened, self._budget = None, REOPEN
                self._opened = self._open()
            block = self._slice(self._opened, tensor, slice(row, end)).reshape(-1)
            block = block[max(start - row * width, 0) : stop - row * width]
            yield from block.split(PIECE)
            del block


class _SafetensorsReader(_Reader):
    def __init__(self, file: Path) -> None:
        super().__init__(file)
        opened = self._open()
        for name in opened.keys():  # noqa: SIM118 (it is no mapping)
            tensor = opened.get_slice(name)
            dtype = self._check_dtype(name, SAFETENSORS_DTYPES.get(tensor.get_dtype()), tensor.get_dtype())
            self.tensors[name] = StoredTensor(name, dtype, tuple(tensor.get_shape()), file)

    def _open(self) -> Any:
        try:
            return safe_open(self.file, framework="pt")
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            with self.file.open("rb") as file:
                start = file.read(2)
            hint = "; it is a pickle under a wrong name" if start == b"PK" or start[:1] == b"\x80" else ""
            raise CheckpointError(f"{self.file}: not a complete safetensors file ({_line(error)}){hint}") from None

    def _slice(self, opened: Any, tensor: StoredTensor, rows: slice) -> Tensor:
        return opened.get_slice(tensor.name)[rows] if tensor.shape else opened.get_tensor(tensor.name)


class _TorchReader(_Reader):
    """What ``torch.save`` writes, read with ``weights_only=True``: a zip of a restricted pickle and raw storages."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        records = self._records()
        opened = self._open()
        if not isinstance(opened, dict):
            raise CheckpointError(f"{file}: holds a {type(opened).__name__}, expected a dictionary of tensors")
        storages: dict[int, int] = {}
        for name, tensor in opened.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise CheckpointError(
                    f"{file}: {name!r:.80} is a {type(tensor).__name__}, expected a tensor with a name"
                )
            plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
            if not plain or tensor.device.type != "cpu" or tensor.is_quantized:
                raise CheckpointError(f"{file}: {name} is no plain tensor of the CPU; save it again as one")
            dtype = self._check_dtype(name, tensor.dtype, tensor.dtype)
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            if math.prod(tensor.shape) * dtype.itemsize > storage.nbytes():
                raise CheckpointError(f"{file}: {name} has shape {tuple(tensor.shape)}, more than its stored values")
            self.tensors[name] = StoredTensor(name, dtype, tuple(tensor.shape), file)
        # torch takes the sizes from the pickle: a storage that reaches into the next record would go unnoticed.
        if wrong := Counter(size for size in storages.values() if size) - records:
            raise CheckpointError(
                f"{file}: a tensor claims {next(iter(wrong))} bytes, and no record in it has that size"
            )

    def _records(self) -> Counter[int]:
        """Sizes of the records with values, after a look at what the archive claims to be."""
        try:
            with zipfile.ZipFile(self.file) as archive:
                entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
                for entry in entries:
                    self._check_entry(entry)
                    if entry.filename.endswith("data.pkl"):
                        archive.read(entry)  # compares the checksum, which torch does not
                self._check_places(archive, entries)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
            raise CheckpointError(
                f"{self.file}: not a complete file of torch.save in its zip format ({_line(error)}); if it is older "
                "than PyTorch 1.6, load it in PyTorch and save it again"
            ) from None
        return Counter(entry.file_size for entry in entries if "/data/" in entry.filename)

    def _check_entry(self, entry: zipfile.ZipInfo) -> None:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise CheckpointError(f"{self.file}: {entry.filename} is compressed, which torch.save never does")
        if entry.flag_bits & 1:
            raise CheckpointError(f"{self.file}: {entry.filename} is encrypted, which torch.save never does")
        if entry.filename.endswith("data.pkl") and entry.file_size > _PICKLE_LIMIT:
            raise CheckpointError(f"{self.file}: {entry.filename} has {entry.file_size} bytes, too many for names")

    def _check_places(self, archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> None:
        """Records lie end to end. A header whose lengths are off would shift the values behind it unnoticed."""
        ends = [*(entry.header_offset for entry in entries[1:]), archive.start_dir]
        with self.file.open("rb") as file:
            for entry, end in zip(entries, ends, strict=True):
                file.seek(entry.header_offset)
                name, extra = struct.unpack("<26xHH", file.read(30))
                after = end - (entry.header_offset + 30 + name + extra + entry.file_size)
                if after not in ((12, 16, 20, 24) if entry.flag_bits & 8 else (0,)):
                    raise CheckpointError(f"{self.file}: {entry.filename} does not end where the next record begins")

    def _open(self) -> Any:
        try:
            return torch.load(self.file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{self.file}: its pickle asks for more than tensors, and was not run ({_reason(error)}). Only take it "
                "from a source you trust, and have that source save it as safetensors"
            ) from None
        except Exception as error:  # torch and pickle raise what comes to hand on broken files
            raise CheckpointError(f"{self.file}: not a complete file of torch.save ({_line(error)})") from None

    def _slice(self, opened: Any, tensor: StoredTensor, rows: slice) -> Tensor:
        stored = opened[tensor.name].detach()
        return stored[rows] if tensor.shape else stored


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _reason(error: BaseException) -> str:
    """The line of torch's long message that names what was asked for."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), _line(error))[:200]


def aligned(left: Iterable[Tensor], right: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Two flat tensors of the same length side by side, whatever pieces they come in."""
    sides = iter(left), iter(right)
    one, other = (next(side, None) for side in sides)
    while one is not None and other is not None:
        length = min(len(one), len(other))
        yield one[:length], other[:length]
        one = one[length:] if length < len(one) else next(sides[0], None)
        other = other[length:] if length < len(other) else next(sides[1], None)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: its name, dtype and shape, and where its values come from, in flat pieces."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]
    copy_of: str | None = None  # the name of a tensor with the same values, where a format can store them once

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


Advance = Callable[[int], None]
"""Is told the bytes that were written."""


def write_safetensors(folder: Path, plan: list[PlannedTensor], max_shard_size: int | str, advance: Advance) -> None:
    """Writes ``model.safetensors``, or shards and ``model.safetensors.index.json``, under the names of transformers."""
    split = split_state_dict_into_shards_factory(
        {tensor.name: tensor for tensor in plan},
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    planned = {tensor.name: tensor for tensor in plan}
    for file, names in split.filename_to_tensors.items():
        _write_shard(folder / file, [planned[name] for name in names], advance)
    if split.is_sharded:
        places = {name: split.tensor_to_filename[name] for name in sorted(planned)}
        write_json(folder / "model.safetensors.index.json", {"metadata": split.metadata, "weight_map": places})


def _write_shard(path: Path, tensors: list[PlannedTensor], advance: Advance) -> None:
    tensors = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))  # so that values are aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        dtype = _DTYPE_NAMES[tensor.dtype]
        header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            _write_values(file, tensor, advance)
        file.flush()
        synchronize(file.fileno())


def _write_values(file: Any, tensor: PlannedTensor, advance: Advance) -> None:
    written = 0
    for piece in tensor.pieces():
        values = piece.to(tensor.dtype).contiguous()
        if values.dtype != piece.dtype and not bool(torch.isfinite(values).all()):
            name = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{tensor.name}: a value is too large for {name}; choose bfloat16 or float32")
        file.write(values.view(torch.uint8).numpy().data)
        written += values.nbytes
        advance(values.nbytes)
    if written != tensor.nbytes:
        raise CheckpointError(f"{tensor.name}: {written} bytes came where {tensor.nbytes} were expected")


def write_torch(path: Path, plan: list[PlannedTensor], advance: Advance) -> None:
    """Writes what ``torch.save`` writes of a dictionary of tensors, which reads a file that is larger than memory.

    Source: ``torch.serialization``; the values are aligned to 64 bytes as there.
    """
    stored = [tensor for tensor in plan if tensor.copy_of is None]
    keys = {tensor.name: str(number) for number, tensor in enumerate(stored)}
    with path.open("xb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            archive.writestr(_entry("data.pkl"), _pickled(plan, keys))
            archive.writestr(_entry("byteorder"), "little")
            for tensor in stored:
                entry = _entry(f"data/{keys[tensor.name]}")
                # 30 bytes of header, 20 of the zip64 field that force_zip64 adds, 4 of the padding's own header
                before = file.tell() + 30 + len(entry.filename) + 20 + 4
                entry.extra = b"FB" + (-before % 64).to_bytes(2, "little") + b"Z" * (-before % 64)
                with archive.open(entry, "w", force_zip64=True) as record:
                    _write_values(record, tensor, advance)
            archive.writestr(_entry("version"), "3\n")
        file.flush()
        synchronize(file.fileno())


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"pytorch_model/{name}")


@dataclass(frozen=True)
class _Storage:
    """Stands for the values of a tensor while its description is pickled."""

    key: str
    tensor: PlannedTensor


def _pickled(plan: list[PlannedTensor], keys: dict[str, str]) -> bytes:
    planned = {tensor.name: tensor for tensor in plan}

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if not isinstance(obj, _Storage):
                return None
            return ("storage", _STORAGES[obj.tensor.dtype], obj.key, "cpu", math.prod(obj.tensor.shape))

        def reducer_override(self, obj: Any) -> Any:
            if not isinstance(obj, PlannedTensor):
                return NotImplemented
            storage = _Storage(keys[obj.copy_of or obj.name], planned[obj.copy_of or obj.name])
            strides = torch.empty(obj.shape, device="meta").stride()
            return torch._utils._rebuild_tensor_v2, (storage, 0, obj.shape, strides, False, OrderedDict())

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(OrderedDict((tensor.name, tensor) for tensor in plan))
    return buffer.getvalue()
