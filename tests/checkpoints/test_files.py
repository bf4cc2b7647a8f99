"""A folder appears as a whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from subprocess import PIPE

import layouts
import pytest
from layouts import contents

from mamba2_hf.checkpoints import convert
from mamba2_hf.checkpoints.files import whole_folder
from mamba2_hf.errors import CheckpointError

# For each line of arguments: a process that runs the command with them and stops in the middle of it, says so, and
# waits to be ended; then how it ended. They are forks of one that has imported what the command does.
STOPPING = """
import json, os, signal, sys, time
from mamba2_hf.checkpoints import io
from mamba2_hf.cli import main

values = io._write_values

def wait(*given):
    values(*given)
    print(os.getpid(), flush=True)
    time.sleep(60)

io._write_values = wait
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.argv[1:] = ["convert", "--overwrite", *json.loads(line)]
        sys.exit(main())
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# Converts with no more than so many bytes to a file, as a full disk would have it.
LIMITED = """
import resource, signal, sys
from mamba2_hf.checkpoints import convert
from mamba2_hf.errors import CheckpointError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    convert(sys.argv[1], sys.argv[2], overwrite=True)
except CheckpointError as error:
    print(error)
"""


@pytest.fixture(name="source")
def _source(tmp_path: Path) -> Path:
    layouts.stock(tmp_path / "source")
    layouts.add_companions(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture(params=["new", "replaced"], name="destination")
def _destination(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A place for the result, empty or with a checkpoint in it."""
    (tmp_path / "place").mkdir()
    if request.param == "replaced":
        layouts.stock(tmp_path / "place/out", use_bias=True)
    return tmp_path / "place/out"


def state(destination: Path) -> tuple[list[str], dict[str, bytes]]:
    return sorted(path.name for path in destination.parent.iterdir()), contents(destination)


@pytest.mark.slow
def test_being_stopped_leaves_the_destination_as_it_was(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STOPPING]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        for number, code, old in ((signal.SIGINT, 130, True), (signal.SIGTERM, 143, False), (signal.SIGHUP, 129, True)):
            destination = tmp_path / number.name / "out"
            destination.parent.mkdir()
            if old:
                layouts.stock(destination, use_bias=True)
            before = state(destination)
            print(json.dumps([str(source), str(destination)]), file=server.stdin, flush=True)
            process = int(server.stdout.readline())
            assert len(list(destination.parent.iterdir())) == len(before[0]) + 1  # it is in the middle of it
            os.kill(process, number)
            assert int(server.stdout.readline()) == code, number
            assert state(destination) == before, number


@pytest.mark.slow
def test_a_full_disk_leaves_the_destination_as_it_was(source: Path, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    destination = tmp_path / "place/out"
    layouts.stock(destination, use_bias=True)
    before = state(destination)
    run = [sys.executable, "-c", LIMITED, str(source), str(destination)]
    completed = subprocess.run(run, capture_output=True, text=True, check=True)
    assert f"{destination}: the disk is full" in completed.stdout
    assert state(destination) == before


def test_too_little_room_is_known_before_anything_is_written(
    source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(destination)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match="GB free and"):
        convert(source, destination, overwrite=True)
    assert state(destination) == before


def test_an_error_at_the_last_moment_restores_what_was_there(
    source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(destination)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise PermissionError(13, "no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert(source, destination, overwrite=True)
    assert state(destination) == before


def test_a_signal_waits_while_folders_are_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        os.kill(os.getpid(), signal.SIGINT)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out", replaceable=frozenset()) as folder:
        (folder / "x").touch()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["out", "out/x"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_existing_destination_is_refused_unless_told_otherwise(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    before = state(tmp_path / "out")
    with pytest.raises(CheckpointError, match="out: exists"):
        convert(source, tmp_path / "out")
    assert state(tmp_path / "out") == before
    convert(source, tmp_path / "out", max_shard_size="20KB", overwrite=True)
    assert not (tmp_path / "out/model.safetensors").exists()
    assert state(tmp_path / "out")[0] == before[0]


def test_what_is_no_checkpoint_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"home: holds thesis\.tex"):
        convert(source, tmp_path / "home", overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file: is a file"):
        convert(source, tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("name", ["data.bin", "training_args.bin", "adapter_model.safetensors", "notes.md"])
def test_files_of_other_kinds_are_no_checkpoint(source: Path, tmp_path: Path, name: str) -> None:
    convert(source, tmp_path / "out")
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(CheckpointError, match=f"holds {name}, which is no part of a checkpoint"):
        convert(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_a_card_survives_being_overwritten(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    (tmp_path / "out/README.md").write_text("# By hand")
    convert(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/README.md").read_text() == "# By hand"


def test_source_and_destination_are_apart(source: Path) -> None:
    before = contents(source)
    for place in (source, source / "inside", source.parent):
        with pytest.raises(CheckpointError, match=r"choose a folder apart from it|is no part of a checkpoint"):
            convert(source, place, overwrite=True)
    assert contents(source) == before


def test_a_link_to_a_folder_stays_one(source: Path, tmp_path: Path) -> None:
    layouts.stock(tmp_path / "disk/real")
    (tmp_path / "out").symlink_to(tmp_path / "disk/real")
    convert(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "out/tokenizer.json").exists()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


def test_permissions_are_those_of_any_new_folder(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    (tmp_path / "other").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_conversion_works_in_a_thread(source: Path, tmp_path: Path) -> None:
    thread = threading.Thread(target=convert, args=(source, tmp_path / "out"))
    thread.start()
    thread.join()
    assert (tmp_path / "out/model.safetensors").exists()


# Converts in pieces of a few megabytes, and prints by how many bytes memory grew at most. (What getrusage says of a new
# process begins with its parent's size.)
MEASURED = """
import re, sys, torch
from pathlib import Path
from mamba2_hf.checkpoints import convert, io

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

io.PIECE, io.REOPEN = 2**20, 2**24
small, source, out = sys.argv[1:]
convert(small, out + "/first")
before = peak()
convert(source, out + "/half", dtype=torch.float16)
convert(source, out + "/torch", to="mamba_ssm")
convert(out + "/torch", out + "/back")
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Nearly all of it is two tensors of 154 MB, of which no more than some pieces are ever in memory."""
    sizes = {"hidden_size": 256, "num_heads": 8, "head_dim": 64, "num_hidden_layers": 1}
    layouts.stock(tmp_path / "source", vocab_size=150_000, **sizes)
    layouts.stock(tmp_path / "small")
    tensor = 150_000 * 256 * 4
    assert (tmp_path / "source/model.safetensors").stat().st_size > 2 * tensor
    run = [sys.executable, "-c", MEASURED, *(str(tmp_path / name) for name in ("small", "source", "out"))]
    completed = subprocess.run(run, capture_output=True, text=True, check=True)
    assert int(completed.stdout) < tensor / 2
