"""Models that two processes on the CPU share; the checks are in ``tensor_worker.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from processes import checks, run

WORKER = Path(__file__).with_name("tensor_worker.py")

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict[str, list[str]]:
    return run(WORKER, 2, tmp_path_factory.mktemp("tensor"), repository)


def test_groups_of_heads_that_several_of_four_processes_have(tmp_path: Path, repository: Path) -> None:
    names = ("one_group", "groups_and_biases", "no_bias_of_the_convolution", "norms_of_several_processes")
    names += ("with_slices_of_sequences", "with_data_parallelism")
    found = run(WORKER, 4, tmp_path, repository, only=names)
    for name in names:
        assert found[name] == ["passed"] * 4, "\n".join(found[name])


@pytest.mark.parametrize("name", checks(WORKER))
def test_tensor_parallel(name: str, results: dict[str, list[str]]) -> None:
    for rank, result in enumerate(results[name]):
        assert result == "passed", f"process {rank}: {result}"
