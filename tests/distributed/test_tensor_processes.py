"""Models that two processes on the CPU share; the checks are in ``tensor_worker.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from processes import TIMEOUT, checks, once, run, start

WORKER = Path(__file__).with_name("tensor_worker.py")
SEVERAL = (
    *("one_group", "groups_and_biases", "no_bias_of_the_convolution", "norms_of_several_processes"),
    *("hybrid_of_eight_heads", "hybrids_step_by_ops", "generates_the_same_tokens"),
    *("with_slices_of_sequences", "with_data_parallelism", "checkpoints_go_from_mesh_to_mesh"),
)

pytestmark = [
    TIMEOUT,
    pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return once(tmp_path_factory, "tensor", lambda folder: run(WORKER, 2, folder))


def test_groups_of_heads_that_several_of_four_processes_have(tmp_path: Path) -> None:
    found = run(WORKER, 4, tmp_path, only=SEVERAL)
    for name in SEVERAL:
        assert found[name] == ["passed"] * 4, "\n".join(found[name])


FAILS = """
import os, torch, torch.distributed as dist
from distributed_worker import make_model
from torch.distributed.device_mesh import init_device_mesh
from mamba2_hf.distributed import tensor_parallel
torch.set_num_threads(1)
model = tensor_parallel(make_model(4, num_hidden_layers=2), init_device_mesh("cpu", (2,)))
ids = torch.full((1, 5), 3)
model(ids, labels=ids).loss.backward()
if dist.get_rank() == 1:
    model.backbone.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
print("once", flush=True)
model(ids, labels=ids).loss.backward()
print("twice", flush=True)
"""


def test_nobody_waits_for_a_process_that_has_ended(tmp_path: Path) -> None:
    """In the middle of a step: the others fail, too, rather than that somebody has to end them."""
    worker = tmp_path / "worker.py"
    worker.write_text(FAILS)
    well, said = start(worker, 2, tmp_path)
    assert not well
    assert "ZeroDivisionError" in said[1]
    assert all("once" in each and "twice" not in each for each in said)
    assert "Error: " in said[0], said[0]


@pytest.mark.parametrize("name", checks(WORKER))
def test_tensor_parallel(name: str, results: dict[str, list[str]]) -> None:
    for rank, result in enumerate(results[name]):
        assert result == "passed", f"process {rank}: {result}"
