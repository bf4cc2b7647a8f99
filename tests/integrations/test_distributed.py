"""FSDP2, DDP and tensor parallelism, with two processes on the CPU; the checks are in ``distributed_worker.py``."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from mamba2_hf import Mamba2ForCausalLM, Mamba2HybridForCausalLM, Mamba2Model
from mamba2_hf.errors import ArgumentError

WORKER = Path(__file__).with_name("distributed_worker.py")
WORLD = 2

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed")


def checks(suite: str) -> list[str]:
    """Names of the functions that the worker runs, read without importing it."""
    functions = [node for node in ast.parse(WORKER.read_text()).body if isinstance(node, ast.FunctionDef)]
    marks = {function.name: [ast.unparse(mark) for mark in function.decorator_list] for function in functions}
    return [name for name, decorators in marks.items() if f"check('{suite}')" in decorators]


def run(suite: str, folder: Path, source: Path) -> dict[str, list[str]]:
    """How each check went, for every process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": str(source),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(WORLD),
        "LOCAL_WORLD_SIZE": str(WORLD),
        "OMP_NUM_THREADS": "1",
    }
    outputs = [(folder / f"{suite}-{rank}.txt").open("w+") for rank in range(WORLD)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), suite, str(folder)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        for rank, output in enumerate(outputs)
    ]
    try:
        for process in processes:
            process.wait(timeout=280)
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
        file = folder / f"{suite}-{rank}.json"
        done = json.loads(file.read_text()) if file.exists() else {}
        failed = any(result != "passed" for result in done.values())
        results.append((done, "not run: an earlier check failed" if failed else f"not run:\n{said[-3000:]}"))
    return {name: [done.get(name, otherwise) for done, otherwise in results] for name in checks(suite)}


@pytest.mark.parametrize("config", [{"pp_size": 2}, DistributedConfig(pp_size=2)], ids=["dict", "object"])
@pytest.mark.parametrize("cls", [Mamba2ForCausalLM, Mamba2HybridForCausalLM, Mamba2Model])
def test_pipeline_parallelism_is_refused_before_processes_meet(cls: Any, config: Any, tmp_path: Path) -> None:
    with torch.device("meta"):
        cls(cls.config_class(num_hidden_layers=1)).config.save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=f"pp_size=2: {cls.__name__} has no pipeline parallelism"):
        cls.from_pretrained(tmp_path, distributed_config=config)
    assert not dist.is_initialized()


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict[str, list[str]]:
    return run("fsdp", tmp_path_factory.mktemp("fsdp"), repository / "src")


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict[str, list[str]]:
    return run("transformers", tmp_path_factory.mktemp("transformers"), repository / "src")


@pytest.mark.parametrize("name", checks("fsdp"))
def test_fsdp(name: str, fsdp: dict[str, list[str]]) -> None:
    for rank, result in enumerate(fsdp[name]):
        assert result == "passed", f"process {rank}: {result}"


@pytest.mark.parametrize("name", checks("transformers"))
def test_transformers(name: str, transformers: dict[str, list[str]]) -> None:
    for rank, result in enumerate(transformers[name]):
        assert result == "passed", f"process {rank}: {result}"
