"""The README's Python does what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


def blocks(repository: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_every_python_block_runs_as_it_stands(repository: Path, tmp_path: Path) -> None:
    assert blocks(repository)
    for number, code in enumerate(blocks(repository)):
        completed = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert completed.returncode == 0, completed.stderr
        if number == 0:
            assert completed.stdout.startswith("def read_json(path):")
            assert len(completed.stdout) > 100


def test_the_first_block_is_short(repository: Path) -> None:
    code = [line for line in blocks(repository)[0].splitlines() if line.strip()]
    assert len(code) <= 5
