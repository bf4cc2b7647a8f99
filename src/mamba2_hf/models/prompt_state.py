"""Prompt states as files: what a model has read, kept for later, and only for that model.

A file is a safetensors file with these tensors:

- ``layers.I.conv`` ``(B, C, K - 1)`` and ``layers.I.ssm`` ``(B, H, P, N)`` of every SSD mixer;
- ``layers.I.keys`` and ``layers.I.values`` ``(B, H, S, D)`` of every attention, each row's own at the right end, and
  ``layers.I.conv`` ``(B, C, K - 1)`` where it has a convolution;
- ``lengths (B,)``, the keys of each row, in a model with attention, and ``padding (B,)`` and ``shift (B,)`` where the
  cache has them, int64.

Its metadata, all text, are ``format``, ``version``, ``model`` (:func:`fingerprint`), ``mixers``, ``tokens`` (seen,
padding included), ``state_dtype``, ``hashed`` and ``hashes`` (:class:`TokenHashes`), and ``digest``: the SHA-256 of all
of this, by which a damaged file is known.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CacheError
from ..layers import Attention, Mamba2Mixer, SSDState
from .pretrained import stored_value

if TYPE_CHECKING:
    from .cache import Mamba2Cache
    from .pretrained import SSDPreTrainedModel

FORMAT, VERSION = "mamba2_hf.prompt_state", "1"

_PIECE = 2**22
"""Elements whose bits are summed at once."""
_SAMPLES = 256
"""Elements of a tensor that are hashed one by one."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NOT_OF_THE_STATE = {
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range", "rescale_prenorm_residual"),
    *("time_step_rank", "time_step_min", "time_step_max", "time_step_floor", "chunk_size", "tie_word_embeddings"),
    *("transformers_version", "architectures", "dtype", "problem_type", "id2label", "label2id", "return_dict"),
    *("output_hidden_states", "is_encoder_decoder", "_name_or_path", "num_labels"),
}
"""Fields of a configuration that change no state."""


def fingerprint(model: SSDPreTrainedModel) -> str:
    """What tells a model's states from another's: a SHA-256, in hex, of the backbone's configuration and weights.

    Of every parameter and saved buffer it takes name, shape, dtype, the sum of all elements read as integers, and 256
    elements spread over it. So every weight is read once (that of a 2.7B model in bf16: 5 GB), a single changed one
    shows, and the device does not matter. The head is left out: no state depends on it. Adapters count by their
    weights.

    Raises:
        CacheError: weights are sharded, or nowhere to be read.
    """
    if model.tensor_group is not None:
        raise CacheError(
            f"{model.tensor_group.size} processes share the model, and each has the states of its own heads: read and "
            "save the text where one process has the whole model"
        )
    config = json.dumps(_relevant(model.config.to_dict()), sort_keys=True)
    digest = hashlib.sha256(f"{model.config.model_type} {config}".encode())
    for name, tensor in _weights(model.base_model):
        integers = tensor.detach().contiguous().flatten().view(_INTEGERS[tensor.element_size()])
        total = sum(int(piece.sum(dtype=torch.int64)) for piece in integers.split(_PIECE))
        places = torch.linspace(0, max(len(integers) - 1, 0), _SAMPLES, dtype=torch.float64).long().unique()
        sample = integers[places.to(integers.device)].tolist() if len(integers) else []
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype), total, sample]).encode())
    return digest.hexdigest()


def _relevant(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _NOT_OF_THE_STATE}


def _weights(backbone: nn.Module) -> Iterator[tuple[str, Tensor]]:
    from torch.distributed.tensor import DTensor

    seen = set()
    for prefix, module in sorted(backbone.named_modules()):
        saved = {*module._buffers} - module._non_persistent_buffers_set
        for name in sorted({*module._parameters} | saved):
            if getattr(module, name) is None or (id(getattr(module, name)) in seen):
                continue
            seen.add(id(getattr(module, name)))
            tensor = stored_value(backbone, f"{prefix}.{name}" if prefix else name)
            if tensor is None or tensor.is_meta or isinstance(tensor, DTensor):
                raise CacheError(
                    f"{prefix}.{name} is {'sharded' if isinstance(tensor, DTensor) else 'nowhere'}: only a model that "
                    "holds its weights can be told from others"
                )
            yield f"{prefix}.{name}", tensor


class TokenHashes:
    """Which tokens a cache has read: a SHA-256 for each row, chained from token to token, so that it can go on.

    Args:
        tokens: how many, padding included.
        rows: the hash of each row's tokens that were no padding.
    """

    def __init__(self, tokens: int, rows: list[bytes]) -> None:
        self.tokens, self.rows = tokens, rows

    @classmethod
    def of(
        cls, input_ids: Tensor, attention_mask: Tensor | None = None, before: TokenHashes | None = None
    ) -> TokenHashes:
        """The hashes after ``input_ids (B, T)``, of which a mask ``(B, T)`` may leave out some, behind those before."""
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [b""] * len(input_ids) if before is None else list(before.rows)
        for row, (ids, kept) in enumerate(zip(input_ids.tolist(), (keep != 0).tolist(), strict=True)):
            for token in (token for token, counts in zip(ids, kept, strict=True) if counts):
                rows[row] = hashlib.sha256(rows[row] + token.to_bytes(8, "little", signed=True)).digest()
        return cls(input_ids.shape[1] + (0 if before is None else before.tokens), rows)

    def select(self, indices: Tensor) -> TokenHashes:
        """Those of the rows at ``indices``."""
        return TokenHashes(self.tokens, [self.rows[row] for row in indices.tolist()])

    def _of_the_first(self, input_ids: Tensor, attention_mask: Tensor | None) -> TokenHashes:
        mask = None if attention_mask is None else attention_mask[:, : self.tokens]
        return TokenHashes.of(input_ids[:, : self.tokens], mask)

    def fit(self, input_ids: Tensor, attention_mask: Tensor | None) -> bool:
        """Whether these, and no others, are the tokens of ``input_ids (B, T)``."""
        found = self._of_the_first(input_ids, attention_mask)
        return input_ids.shape[1] == self.tokens and found.rows == self.rows

    def check(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Compares the first tokens of ``input_ids (B, >= tokens)`` with those that were read.

        Raises:
            CacheError: a row holds others.
        """
        found = self._of_the_first(input_ids, attention_mask)
        if found.tokens < self.tokens or found.rows != self.rows:
            pairs = zip(found.rows, self.rows, strict=False)
            row = next((row for row, (ours, theirs) in enumerate(pairs) if ours != theirs), 0)
            raise CacheError(
                f"the cache has read {self.tokens} tokens, and input_ids of row {row} does not start with them: pass "
                "the ids that it read, in front of the new ones, or an empty cache"
            )


def save(cache: Mamba2Cache, path: Path, model: SSDPreTrainedModel) -> None:
    """Writes a cache; see :meth:`Mamba2Cache.save`."""
    if cache.seen_tokens == 0:
        raise CacheError("the cache is empty: let the model read something before it is saved")
    if cache.soft_tokens:
        raise CacheError(
            f"{cache.soft_tokens} soft tokens of what wraps the model are in the cache, and a file could not tell what "
            "wrapped it: save the state of a text that the model read alone"
        )
    _check_replaceable(path)
    tensors: dict[str, Tensor | None] = {"padding": cache.padding}
    counts = cache.key_counts
    if counts is not None:
        lengths = torch.full((cache.batch_size,), counts.width) if counts.lengths is None else counts.lengths
        tensors |= {"lengths": lengths, "shift": counts.shift}
    for index, layer in enumerate(cache.layers):
        tensors[f"layers.{index}.conv"] = layer.conv
        if isinstance(layer, SSDState):
            tensors[f"layers.{index}.ssm"] = layer.ssm
        else:
            tensors[f"layers.{index}.keys"], tensors[f"layers.{index}.values"] = layer.own_keys(lengths)
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}
    known = cache.token_hashes
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": fingerprint(model),
        "mixers": " ".join(model.config.mixer_kinds),
        "tokens": str(cache.seen_tokens),
        "state_dtype": "" if cache.state_dtype is None else str(cache.state_dtype).removeprefix("torch."),
        "hashed": str(0 if known is None else known.tokens),
        "hashes": "" if known is None else " ".join(row.hex() for row in known.rows),
    }
    metadata["digest"] = _digest(metadata, kept)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(descriptor)
    try:
        save_file(kept, temporary, metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def load(
    cls: type[Mamba2Cache], path: Path, model: SSDPreTrainedModel, static: bool, max_length: int | None
) -> Mamba2Cache:
    """Reads a cache; see :meth:`Mamba2Cache.load`."""
    metadata, tensors = _read(path)
    kinds = model.config.mixer_kinds
    if metadata["mixers"] != " ".join(kinds) or metadata["model"] != fingerprint(model):
        raise CacheError(
            f"{path}: the state of another model, or of other weights or another dtype of this one. A state only means "
            "something to the model that made it: load that model, or let this one read the text"
        )
    tokens, hashed = _count(path, metadata, "tokens"), _count(path, metadata, "hashed")
    _check_tensors(path, model, tensors, tokens)
    dtype = metadata["state_dtype"]
    if dtype not in ("", "float16", "bfloat16", "float32", "float64"):
        raise _broken(path, f"state_dtype is {dtype!r:.40}")
    cache = cls(
        model.config, state_dtype=getattr(torch, dtype) if dtype else None, static=static, max_length=max_length
    )
    tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    lengths, counts = tensors.get("lengths"), cache.key_counts
    if lengths is not None and counts is not None:
        counts.width = int(lengths.max())
        if counts.capacity is not None and counts.width > counts.capacity:
            raise CacheError(f"{path}: holds {counts.width} tokens, more than max_length={max_length}: raise it")
        uneven = counts.capacity is not None or not bool((lengths == counts.width).all())
        counts.replace(lengths=lengths if uneven else None, shift=tensors.get("shift"))
    for index, layer in enumerate(cache.layers):
        conv = tensors.get(f"layers.{index}.conv")
        if isinstance(layer, SSDState):
            assert conv is not None  # it was checked
            layer.allocate(conv, tensors[f"layers.{index}.ssm"])
            layer.started = True
        else:
            layer.restore(tensors[f"layers.{index}.keys"], tensors[f"layers.{index}.values"], lengths)
            layer.replace(conv=None if conv is None else conv.clone())
    cache.seen_tokens, cache.padding = tokens, tensors.get("padding")
    if hashed:
        try:
            rows = [bytes.fromhex(row) for row in metadata["hashes"].split(" ")]
        except ValueError:
            rows = []
        if len(rows) != cache.batch_size or hashed > tokens:
            raise _broken(path, "its token hashes do not fit its rows")
        cache.token_hashes = TokenHashes(hashed, rows)
    return cache


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file that is whole."""
    if not path.is_file():
        raise CacheError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CacheError(f"{path}: a safetensors file, but no prompt state: Mamba2Cache.save writes those")
            if metadata.get("version") != VERSION:
                raise CacheError(
                    f"{path}: a prompt state of version {metadata.get('version')!r:.40}, and this package reads "
                    f"{VERSION}: update it, or let the model read the text again"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, CacheError):
            raise
        raise _broken(path, str(error)) from None
    if {"model", "mixers", "tokens", "state_dtype", "hashed", "hashes", "digest"} - metadata.keys():
        raise _broken(path, "its metadata is incomplete")
    if metadata["digest"] != _digest({key: metadata[key] for key in metadata if key != "digest"}, tensors):
        raise _broken(path, "its content is not what was written")
    return metadata, tensors


def _broken(path: Path, why: str) -> CacheError:
    return CacheError(f"{path}: broken or no prompt state ({why}): let the model read the text again")


def _digest(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _count(path: Path, metadata: dict[str, str], name: str) -> int:
    text = metadata[name]
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise _broken(path, f"{name} is {text!r:.40}")
    return int(text)


def _check_tensors(path: Path, model: SSDPreTrainedModel, tensors: dict[str, Tensor], tokens: int) -> None:
    """A digest says that a file is as it was written, not that what wrote it meant well."""
    rows = next((tensor.shape[0] for tensor in tensors.values() if tensor.dim()), 0)
    width = 0
    counts = [name for name in ("padding", "shift", "lengths") if name in tensors]
    for name in counts:
        tensor = tensors[name]
        if tensor.dtype != torch.int64 or tensor.shape != (rows,) or rows == 0:
            raise _broken(path, f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}")
        if name != "shift" and not bool(((tensor >= 0) & (tensor <= tokens)).all()):
            raise _broken(path, f"{name} is not between 0 and the {tokens} tokens seen")
    if "lengths" in counts:
        width = int(tensors["lengths"].max())
    expected: dict[str, tuple[int, ...]] = {}
    mixer = next((module for module in model.modules() if isinstance(module, Mamba2Mixer)), None)
    attention = next((module for module in model.modules() if isinstance(module, Attention)), None)
    for index, kind in enumerate(model.config.mixer_kinds):
        if kind == "ssd":
            assert mixer is not None
            expected[f"layers.{index}.conv"] = (rows, mixer.conv_size, mixer.conv_kernel - 1)
            expected[f"layers.{index}.ssm"] = (rows, mixer.num_heads, mixer.head_dim, mixer.state_size)
        else:
            assert attention is not None
            held = width if kind == "attention" else min(width, model.config.sliding_window - 1)
            for part in ("keys", "values"):
                expected[f"layers.{index}.{part}"] = (
                    rows,
                    attention.sizes[1] // attention.head_dim,
                    held,
                    attention.head_dim,
                )
            if attention.conv_kernel is not None:
                expected[f"layers.{index}.conv"] = (rows, sum(attention.sizes), attention.conv_kernel - 1)
    if tensors.keys() != expected.keys() | set(counts) or ("lengths" in counts) != (attention is not None):
        raise _broken(path, "it holds other tensors than the states of this model")
    for part, shape in expected.items():
        if tuple(tensors[part].shape) != shape or not tensors[part].dtype.is_floating_point:
            raise _broken(path, f"{part} is {tensors[part].dtype} of shape {tuple(tensors[part].shape)}")


def _check_replaceable(path: Path) -> None:
    if path.exists() or path.is_symlink():
        try:
            with safe_open(path, framework="pt") as file:
                ours = (file.metadata() or {}).get("format") == FORMAT
        except (SafetensorError, OSError, ValueError):
            ours = False
        if not ours:
            raise CacheError(f"{path}: exists and is no prompt state; choose another name, or move it away")
