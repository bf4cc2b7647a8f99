"""The programs that read what is written here, run for real: ``pytest tests/readers --readers FOLDER``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.readers
@pytest.mark.timeout(3 * 3600)
def test_each_program_computes_the_same_or_is_refused(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    script = Path(__file__).with_name("run_readers.py")
    folder = request.config.getoption("--readers")
    command = [sys.executable, str(script), "--cache", folder, "--out", str(tmp_path)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr + (tmp_path / "results.md").read_text()
