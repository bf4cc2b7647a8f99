"""Checkpoints on the Hugging Face Hub: fetching one, and sending one up."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from ..errors import CheckpointError
from .checkpoint import open_checkpoint
from .companions import CARD, companions
from .formats import FORMATS

SECONDS = 10
"""How long to wait for the Hub to say that it is there."""


def local_folder(source: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a checkpoint: ``source`` itself, or where the Hub's files were downloaded to.

    Of the weights, one set is downloaded: that of the first format the repository offers, safetensors before pickles;
    none with ``weights=False``.

    Raises:
        CheckpointError: there is no such folder, or the Hub cannot be asked or has no such repository.
    """
    path = Path(source).expanduser()
    if path.exists() or isinstance(source, Path):
        return path
    if source.startswith((".", "/", "~")) or source.count("/") != 1 or (os.sep != "/" and os.sep in source):
        raise CheckpointError(f"{path}: no such folder; give a folder that exists, or a Hub id such as owner/name")
    if not is_reachable(source):
        try:
            return Path(snapshot_download(source, revision=revision, local_files_only=True))
        except Exception:
            raise CheckpointError(
                f"{source}: no such folder here, it is not in the Hub's cache, and the Hub cannot be reached; check "
                "the id and the connection"
            ) from None
    try:
        names = HfApi().list_repo_files(source, revision=revision)
        return Path(snapshot_download(source, revision=revision, allow_patterns=wanted_files(names, weights=weights)))
    except Exception as error:  # the Hub's client, its HTTP library and the network each have their own
        raise CheckpointError(
            f"{source}: no such folder here, and it cannot be had from the Hub ({_line(error)}); check the id and the "
            "connection"
        ) from None


def is_reachable(repository: str) -> bool:
    """Whether the Hub answers, whatever it says of ``repository``: one look of at most ``SECONDS``. Its client would
    try for a minute to load a file that may be in the cache.
    """
    try:
        HfApi().model_info(repository, timeout=SECONDS)
    except HfHubHTTPError:
        return True
    except Exception:  # the network's, those of whichever HTTP library the client has, and offline mode
        return False
    return True


def wanted_files(names: list[str], *, weights: bool = True) -> list[str]:
    """Which of a repository's files make up one checkpoint, or all of it but the weights."""
    top = [name for name in names if "/" not in name]
    small = [name for name in top if not name.endswith(_LARGE)]
    templates = [name for name in names if name.startswith("additional_chat_templates/")]
    offered = [file for entry in FORMATS.values() if entry.config_file in top for file in entry.weights if file in top]
    chosen: list[str] = []
    if weights and offered:
        stem, _, kind = offered[0].removesuffix(".index.json").rpartition(".")
        shards = [name for name in top if name.startswith(f"{stem}-") and name.endswith(f".{kind}")]
        chosen = shards if offered[0].endswith(".index.json") else offered[:1]
    return [*small, *templates, *chosen]


_LARGE = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".zip", ".tar", ".gz")


@dataclass(frozen=True)
class Upload:
    """What :func:`push` sends, or would send.

    Attributes:
        repository: the Hub id.
        files: sizes in bytes by name, in the order of the names.
        left: files of the folder that stay behind.
        url: of the commit; None if nothing was sent.
    """

    repository: str
    files: dict[str, int]
    left: list[str]
    url: str | None = None


def push(
    folder: str | Path,
    repository: str,
    *,
    dry_run: bool = True,
    private: bool = False,
    message: str = "Upload a Mamba-2 checkpoint",
) -> Upload:
    """Sends a checkpoint's weights, config, tokenizer, license and card to the Hub, after reading every value once.

    Args:
        folder: the checkpoint, with its card as ``README.md``.
        repository: where to: ``owner/name``. It is made if it does not exist.
        dry_run: whether to stop before anything is sent.
        private: whether a repository that is made is private.
        message: of the commit.

    Raises:
        CheckpointError: the checkpoint is broken or has no card, or the Hub refuses.
        ConfigurationError: it is no Mamba-2.
    """
    folder = Path(folder).expanduser()
    checkpoint = open_checkpoint(folder)
    for tensor in checkpoint.weights.tensors:
        for _ in checkpoint.weights.pieces(tensor):
            pass  # raises where a value is not finite
    if not (folder / CARD).is_file():
        raise CheckpointError(f"{folder}: has no {CARD}; write the card first (mamba2-hf card {folder} --write)")
    names = {file.name for file in checkpoint.weights.files}
    names |= {checkpoint.format.config_file, *companions(folder, with_code=True)}
    upload = Upload(
        repository,
        {name: (folder / name).stat().st_size for name in sorted(names)},
        sorted(
            entry.name for entry in folder.iterdir() if entry.name not in {name.partition("/")[0] for name in names}
        ),
    )
    if dry_run:
        return upload
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in upload.files],
            commit_message=message,
        )
    except Exception as error:
        raise CheckpointError(f"{repository}: the Hub did not take it ({_line(error)}); nothing was changed") from None
    return Upload(repository, upload.files, upload.left, str(getattr(commit, "commit_url", commit)))


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
