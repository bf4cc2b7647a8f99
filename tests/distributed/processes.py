"""Starts processes that run the checks of a worker's file, and says how each went in each of them.

They are forks of a server that has imported what workers import, which takes longer than most checks.
"""

from __future__ import annotations

import ast
import json
import multiprocessing
import os
import runpy
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from filelock import FileLock

Check = Callable[[Path], None]
Found = dict[str, list[str]]
ON_GPUS = "TEST_ON_GPUS"
"""The variable by which every process has a GPU."""

IDLE = 180
"""Seconds without any work in any process after which they are taken to wait for each other. A deadline would count the
seconds of a busy machine.
"""
TIMEOUT = pytest.mark.timeout(1500)
"""For tests that start processes, in the place of the suite's."""
IMPORTED = ["mamba2_hf", "accelerate", "datasets", "peft", "torch.distributed.fsdp", "transformers.trainer"]


def checks(worker: Path, mark: str = "check") -> list[str]:
    """Names of the functions that the worker runs and marks so, read without importing it."""
    functions = [node for node in ast.parse(worker.read_text()).body if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if mark in map(ast.unparse, f.decorator_list)]


def start(
    worker: Path, world: int, folder: Path, *arguments: object, environment: Mapping[str, str] | None = None
) -> tuple[bool, list[str]]:
    """Runs a file in so many processes, as torchrun would, until all end or wait for each other.

    Args:
        worker: the file.
        world: how many processes.
        folder: for what they say.
        arguments: theirs.
        environment: in the place of this process's.

    Returns:
        Whether all ended well, and what each said.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**(environment or os.environ), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    # What the server imports may have looked for GPUs, which forks could not use then.
    forks = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    multiprocessing.set_forkserver_preload(IMPORTED)
    processes, outputs = [], []
    for rank in range(world):
        outputs.append(folder / f"{rank}.txt")
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        given = (worker, [str(argument) for argument in arguments], own, outputs[-1])
        processes.append(forks.Process(target=_run, args=given))
        processes[-1].start()
    try:
        _wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return not any(process.exitcode for process in processes), [output.read_text() for output in outputs]


def _run(worker: Path, arguments: list[str], environment: dict[str, str], output: Path) -> None:
    """A process: becomes what ``python WORKER ARGUMENTS`` would be."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()  # the server has that of whoever was first to start a process
    os.environ.update(environment)
    tests = Path(__file__).parents[1]
    repository = tests.parent
    paths = [worker.parent, repository / "src", repository / "examples"]
    paths += [tests / folder for folder in ("distributed", "integrations", "ops")]
    sys.path[:0] = map(str, paths)
    sys.argv = [str(worker), *arguments]
    runpy.run_path(str(worker), run_name="__main__")


def _wait(processes: Sequence[BaseProcess]) -> None:
    """Until all have ended, or none has computed for a while."""
    spent, since = 0.0, time.monotonic()
    while running := [process for process in processes if process.is_alive()]:
        wait([process.sentinel for process in running], timeout=1)
        now = sum(map(_seconds, running))
        if abs(now - spent) > 0.1:
            spent, since = now, time.monotonic()
        elif time.monotonic() - since > IDLE:
            return


def _seconds(process: BaseProcess) -> float:
    """The processor's time that a process has had, 0 after its end."""
    try:
        times = psutil.Process(process.pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def run(worker: Path, world: int, folder: Path, only: Sequence[str] = ()) -> Found:
    """How each check went, or each of ``only``, for every process."""
    _, said = start(worker, world, folder, folder, *only)
    results = []
    for rank in range(world):
        file = folder / f"{rank}.json"
        done = json.loads(file.read_text()) if file.exists() else {}
        failed = any(result != "passed" for result in done.values())
        results.append((done, "not run: an earlier check failed" if failed else f"not run:\n{said[rank][-3000:]}"))
    return {name: [done.get(name, otherwise) for done, otherwise in results] for name in only or checks(worker)}


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Found]) -> Found:
    """What ``make`` returns, given a folder, in the first of pytest's workers that asks for it: they share tests."""
    base = factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / f"processes-{name}"
    folder.mkdir(exist_ok=True)
    found = folder / "found.json"
    with FileLock(folder / "lock"):
        if not found.exists():
            found.write_text(json.dumps(make(folder)))
    made: Found = json.loads(found.read_text())
    return made


def work(every_check: dict[str, Check], folder: Path, *only: str) -> None:
    """Runs the checks in this process, one after another; the first that fails is the last."""
    torch.set_num_threads(1)
    if ON_GPUS in os.environ:
        device = torch.device("cuda", int(os.environ["RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timedelta(seconds=60), device_id=device)
    else:
        dist.init_process_group(
            "gloo", timeout=timedelta(minutes=20)
        )  # who started them sees it when they wait in vain
    rank, results = dist.get_rank(), {}
    for name, function in every_check.items():
        if only and name not in only:
            continue
        here = folder / name
        here.mkdir(exist_ok=True)
        dist.barrier()
        try:
            function(here)
        except BaseException:
            results[name] = traceback.format_exc()
        else:
            results[name] = "passed"
        (folder / f"{rank}.json").write_text(json.dumps(results))
        if results[name] != "passed":
            print(results[name], flush=True)
            os._exit(1)  # the other processes may wait for this one: let them fail at once
    dist.barrier()
    dist.destroy_process_group()
