"""Models that two processes on the CPU share; the checks are in ``tensor_worker.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from processes import TIMEOUT, checks, once, run

WORKER = Path(__file__).with_name("tensor_worker.py")
SEVERAL = (
    *("one_group", "groups_and_biases", "no_bias_of_the_convolution", "norms_of_several_processes"),
    *(
        "hybrid_of_eight_heads",
        "hybrids_step_by_ops",
        "with_slices_of_sequences",
        "with_data_parallelism",
        "checkpoints_go_from_mesh_to_mesh",
    ),
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


@pytest.mark.parametrize("name", checks(WORKER))
def test_tensor_parallel(name: str, results: dict[str, list[str]]) -> None:
    for rank, result in enumerate(results[name]):
        assert result == "passed", f"process {rank}: {result}"
