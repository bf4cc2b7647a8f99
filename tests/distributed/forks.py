"""Runs programs as scripts, each in a fork of one process that has imported what takes longest."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import torch

SERVER = """
import json, os, sys

for line in sys.stdin:
    program, folder, *files = json.loads(line)
    child = os.fork()
    if child == 0:
        for descriptor, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
        os.chdir(folder)
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextmanager
def forks(imports: str, *options: str, environment: dict[str, str] | None = None) -> Iterator[Callable[..., str]]:
    """Gives what runs a program and returns what it printed.

    Args:
        imports: modules that programs may find imported.
        options: the interpreter's.
        environment: in the place of this process's.
    """

    def check(status: int, printed: str, errors: str) -> str:
        assert status == 0, errors
        return printed

    def start(program: str, folder: Path | str = ".") -> str:
        command = [sys.executable, *options, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
        return check(done.returncode, done.stdout, done.stderr)

    if torch.cuda.is_available():  # a fork has no use of a GPU that the process before it has looked for
        yield start
        return
    command = [sys.executable, *options, "-c", f"import {imports}\n{SERVER}"]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, env=environment) as server:

        def fork(program: str, folder: Path | str = ".") -> str:
            with tempfile.TemporaryDirectory() as written:
                files = [Path(written, name) for name in ("printed", "errors")]
                print(json.dumps([program, *map(str, [folder, *files])]), file=server.stdin, flush=True)
                return check(int(server.stdout.readline()), *(file.read_text() for file in files))

        yield fork
