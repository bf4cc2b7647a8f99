"""``accelerate launch`` with two processes on the CPU, in bf16: FSDP2 as accelerate sets it up, and data parallelism.

The processes run ``accelerate_worker.py``.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.launch import launch_command, launch_command_parser
from processes import TIMEOUT, start
from safetensors.torch import load_file

from mamba2_hf import Mamba2ForCausalLM

WORKER = Path(__file__).with_name("accelerate_worker.py")
FSDP2 = (
    *("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
    *("--fsdp_state_dict_type", "FULL_STATE_DICT"),
)
# Where only one process has the weights, accelerate hands on parameters and no buffers, which some routers have.
FROM_EVERY_PROCESS = ("--fsdp_cpu_ram_efficient_loading", "false")

pytestmark = [
    pytest.mark.slow,
    TIMEOUT,
    pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed"),
]


def launch(folder: Path, options: tuple[str, ...], *arguments: object) -> None:
    """``accelerate launch``, except that what it has torchrun start is forked, which takes less time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["--num_processes", "2", "--num_machines", "1", "--main_process_port", str(port)]
    command += ["--mixed_precision", "bf16", "--dynamo_backend", "no", *options, str(WORKER), *map(str, arguments)]
    environments = []

    def started(given: Any) -> None:
        assert (given.nproc_per_node, given.training_script) == ("2", str(WORKER))
        environments.append(dict(os.environ))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.run.run", started)
        launch_command(launch_command_parser().parse_args(command))
    fork(folder, *arguments, environment=environments[0])


def fork(folder: Path, *arguments: object, **options: Any) -> None:
    """As torchrun starts two processes, which ``test_generate_tensor_parallel.py`` has it do itself."""
    well, said = start(WORKER, 2, folder, *arguments, **options)
    assert well, said


@pytest.mark.parametrize(("model", "more"), [("pure", ()), ("hybrid", FROM_EVERY_PROCESS)])
def test_fsdp2_trains_as_one_process_does(model: str, more: tuple[str, ...], tmp_path: Path) -> None:
    launch(tmp_path, (*FSDP2, *more), tmp_path, "fsdp", model)
    found = check(tmp_path)
    for process in found:
        assert process["kind"].endswith(".FSDP")
        assert process["sharded"]
        for name, dtype in process["dtypes"].items():
            assert dtype == ("torch.float32" if name in process["fp32"] else "torch.bfloat16"), name


def test_data_parallel_trains_as_one_process_does(tmp_path: Path) -> None:
    """What accelerate makes of it on a CPU: autocast over fp32 weights."""
    launch(tmp_path, FSDP2, tmp_path, "ddp", "pure")
    for process in check(tmp_path):
        assert process["kind"].endswith(".MULTI_CPU")
        assert set(process["dtypes"].values()) == {"torch.float32"}


def check(folder: Path) -> list[dict[str, Any]]:
    """Losses, step by step and in the end, and what holds for either kind."""
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    for process in found:
        assert process["curve"] == pytest.approx(process["expected"], rel=0.01)
        assert process["fp32"] == ["A_log", "D", "dt_bias"]
        assert process["masters"] == ["torch.float32"]
    # The gathered weights are those that were trained.
    assert found[0]["final"] < 0.95 * found[0]["curve"][-1]
    return found


def test_the_pretraining_example_shards(tmp_path: Path) -> None:
    """Two processes with copies of the weights, and two with a half each, train the same."""
    found = []
    for shard in (1, 2):
        out = tmp_path / str(shard)
        sizes = ("--preset", "tiny", "--steps", 3, "--batch", 2, "--length", 64, "--shard", shard, "--captured")
        arguments = (tmp_path, "fsdp" if shard > 1 else "ddp", "pretrain", *sizes, "--out", out)
        fork(tmp_path, *arguments)
        with (out / "loss.csv").open(newline="") as file:
            found.append([float(row["train"]) for row in csv.DictReader(file) if row["train"]])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_the_pretraining_example_shards_and_goes_on(tmp_path: Path) -> None:
    def run(out: Path, *more: str) -> list[float]:
        sizes = ("--preset", "tiny", "--steps", 4, "--batch", 2, "--length", 64)
        launch(tmp_path, FSDP2, tmp_path, "fsdp", "pretrain", *sizes, "--out", out, *more)
        with (out / "loss.csv").open(newline="") as file:
            return [float(row["held_out"]) for row in csv.DictReader(file) if row["held_out"]]

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    losses = run(whole)
    assert losses[-1] < losses[0]
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    assert run(resumed, "--resume") == pytest.approx(losses, rel=1e-4)
    loaded, other = (Mamba2ForCausalLM.from_pretrained(out / "model") for out in (whole, resumed))
    for (name, one), another in zip(loaded.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, another, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    saved = load_file(whole / "model" / "model.safetensors")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, saved[name]), name
