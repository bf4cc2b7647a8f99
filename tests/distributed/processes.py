"""Starts processes that run the checks of a worker's file, and says how each went in each of them."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

Check = Callable[[Path], None]
ON_GPUS = "TEST_ON_GPUS"
"""The variable by which every process has a GPU."""


def checks(worker: Path, mark: str = "check") -> list[str]:
    """Names of the functions that the worker runs and marks so, read without importing it."""
    functions = [node for node in ast.parse(worker.read_text()).body if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if mark in map(ast.unparse, f.decorator_list)]


def run(
    worker: Path, world: int, folder: Path, repository: Path, deadline: float = 280, only: Sequence[str] = ()
) -> dict[str, list[str]]:
    """How each check went, or each of ``only``, for every process; they have ``deadline`` seconds together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = repository / "tests"
    paths = [repository / "src", repository / "examples", tests / "distributed", tests / "integrations"]
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
    }
    outputs = [(folder / f"{rank}.txt").open("w+") for rank in range(world)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(folder), *only],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        for rank, output in enumerate(outputs)
    ]
    ends = time.monotonic() + deadline
    try:
        for process in processes:
            process.wait(timeout=max(ends - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    results = []
    for rank, output in enumerate(outputs):
        output.seek(0)
        said = output.read()
        output.close()
        file = folder / f"{rank}.json"
        done = json.loads(file.read_text()) if file.exists() else {}
        failed = any(result != "passed" for result in done.values())
        results.append((done, "not run: an earlier check failed" if failed else f"not run:\n{said[-3000:]}"))
    return {name: [done.get(name, otherwise) for done, otherwise in results] for name in only or checks(worker)}


def work(every_check: dict[str, Check], folder: Path, *only: str) -> None:
    """Runs the checks in this process, one after another; the first that fails is the last."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if ON_GPUS in os.environ:
        device = torch.device("cuda", int(os.environ["RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timedelta(seconds=60), device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
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
