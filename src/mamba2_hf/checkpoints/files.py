"""Files of a checkpoint folder: read with limits, written as a whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

JSON_LIMIT = 64 * 2**20
"""Most bytes of a config or an index; published ones have a few thousand."""
DEPTH_LIMIT = 32
"""Most objects and lists inside one another."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it is no regular file, too large, no JSON or no object, nested too deeply, or names a key
            twice.
    """
    check_regular(path)
    if (size := path.stat().st_size) > JSON_LIMIT:
        raise CheckpointError(f"{path}: {size} bytes, more than the {JSON_LIMIT} that are read as JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: the key {twice!r} stands there twice; remove one")
        return found

    try:
        content = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=once)
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError(f"{path}: nested too deeply to be a config or an index") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if _depth(content) > DEPTH_LIMIT:
        raise CheckpointError(f"{path}: nested too deeply to be a config or an index")
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: holds a JSON {type(content).__name__}, expected an object with names and values"
        )
    return content


def _depth(content: Any) -> int:
    depth, level = 0, [content]
    while level := [inner for item in level if isinstance(item, (dict, list)) for inner in _inside(item)]:
        depth += 1
    return depth


def _inside(item: Any) -> list[Any]:
    return list(item.values()) if isinstance(item, dict) else item


def check_regular(path: Path) -> None:
    """Raises CheckpointError unless ``path`` is a file, possibly through a link: never a pipe or a device."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: not a regular file")


def plain_name(name: object, source: Path) -> str:
    """A file name that an index gives, if it stays in the folder.

    Raises:
        CheckpointError: it leads elsewhere.
    """
    ok = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0:")
    if not ok:
        raise CheckpointError(
            f"{source}: names the file {name!r:.80}, which is not in the same folder; nothing was read"
        )
    assert isinstance(name, str)
    return name


def stays_inside(path: Path, folder: Path) -> bool:
    """Whether a file is in ``folder`` once links are followed, or in the blobs of the Hub cache that holds it."""
    real, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"
    return real.is_relative_to(home) or (home.parent.name == "snapshots" and real.is_relative_to(blobs))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with path.open("xb") as file:
        file.write(content)
        synchronize(file.fileno())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an object the way transformers does: two spaces, sorted, a line feed at the end."""
    write_bytes(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def synchronize(descriptor: int) -> None:
    """fsync: the data is on the disk, not only on its way there."""
    os.fsync(descriptor)


def synchronize_folder(path: Path) -> None:
    """fsync of a folder's entries, where the platform has it."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def whole_folder(destination: Path, *, replaceable: frozenset[str] | None) -> Iterator[Path]:
    """A temporary folder beside ``destination`` that takes its place when the block ends, or vanishes if it raises.

    SIGINT, SIGTERM and SIGHUP raise inside the block, so that being stopped cleans up like any error.

    Args:
        destination: where the folder goes; its parents are made, and removed again on failure.
        replaceable: the names that an existing folder may hold if it is to be replaced; None to refuse it.

    Raises:
        CheckpointError: the destination exists and may not be replaced.
    """
    destination = Path(os.path.realpath(destination))
    check_free(destination, replaceable)
    with _Stops() as stops:
        made = [parent for parent in destination.parents if not parent.exists()]
        temporary = None
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            with stops.held():
                name = tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".partial", dir=destination.parent)
                temporary = Path(name)
            temporary.chmod(0o777 & ~_umask())
            yield temporary
            synchronize_folder(temporary)
            with stops.held():
                check_free(destination, replaceable)  # again: writing took a while
                _put_in_place(temporary, destination)
        except BaseException:
            with stops.held():
                if temporary is not None:
                    shutil.rmtree(temporary, ignore_errors=True)
                for parent in made:
                    with suppress(OSError):
                        parent.rmdir()
            raise


def check_free(destination: Path, replaceable: frozenset[str] | None) -> None:
    """Raises CheckpointError unless a folder may be put at ``destination``; see :func:`whole_folder`."""
    if not destination.exists() and not destination.is_symlink():
        return
    if replaceable is None:
        raise CheckpointError(f"{destination}: exists; choose another destination, or ask for it to be overwritten")
    if not destination.is_dir():
        raise CheckpointError(f"{destination}: is a file, not a folder that could be replaced")
    for entry in sorted(destination.iterdir()):
        if entry.name not in replaceable and not _is_weights(entry.name):
            raise CheckpointError(
                f"{destination}: holds {entry.name}, which is no part of a checkpoint and would be lost; move it away"
            )


def _is_weights(name: str) -> bool:
    stem = r"(model|pytorch_model|consolidated)(-\d+-of-\d+)?"
    return re.fullmatch(stem + r"\.(safetensors|bin)(\.index\.json)?", name) is not None


def _put_in_place(temporary: Path, destination: Path) -> None:
    if not destination.exists():
        temporary.rename(destination)
    else:
        before = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".replaced", dir=destination.parent))
        destination.rename(before / "was")
        try:
            temporary.rename(destination)
        except BaseException:
            (before / "was").rename(destination)
            before.rmdir()
            raise
        shutil.rmtree(before, ignore_errors=True)
    synchronize_folder(destination.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class _Stops:
    """Signals that end a process, raised as exceptions: KeyboardInterrupt, or SystemExit with the code a shell expects
    (128 + the signal's number). They wait while :meth:`held`, where stopping would leave something behind.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._holding = False
        self._pending: int | None = None

    def __enter__(self) -> _Stops:
        if threading.current_thread() is threading.main_thread():
            # A handler that was installed knows better what to do, and nohup's ignoring is meant.
            for name, default in (("SIGINT", signal.default_int_handler), ("SIGTERM", None), ("SIGHUP", None)):
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) == (default or signal.SIG_DFL):
                    self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _: Any) -> None:
        if self._holding:
            self._pending = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A moment that is not interrupted; a signal that came meanwhile is raised at its end."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._pending is not None:
            number, self._pending = self._pending, None
            self._stop(number, None)
