"""Benchmarks that need no GPU to be run."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run(repository: Path, out: Path, script: str, *arguments: str) -> list[dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": str(repository / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(repository / "benchmarks" / script), *arguments, "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_scaling_model_meets_what_was_measured(repository: Path, tmp_path: Path) -> None:
    rows = run(repository, tmp_path / "predicted.csv", "scaling_model.py")
    assert {row["gpus"] for row in rows} >= {"2", "8", "64", "1024"}
    measured = [(float(row["predicted_ms"]), float(row["measured_ms"])) for row in rows if row["measured_ms"]]
    assert len(measured) >= 4
    for predicted, found in measured:
        assert predicted == pytest.approx(found, rel=0.08)


@pytest.mark.slow
def test_training_is_measured_in_every_way(repository: Path, tmp_path: Path) -> None:
    rows = run(repository, tmp_path / "distributed.csv", "bench_distributed.py", "--tiny")
    ways = {way for kind in ("one", "ddp", "fsdp2") for way in (kind, f"{kind}, captured")}
    for case in ("tiny", "tiny_hybrid"):
        assert {row["impl"] for row in rows if row["case"] == case} == ways
    assert all(float(row["ms_p50"]) > 0 for row in rows)
