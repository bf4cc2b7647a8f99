"""The front page and the documentation: their Python does what it says, and their numbers are the results'."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


ONE_SCRIPT = {"theory.md"}  # pages that say that their blocks go on from each other


def blocks(page: Path) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return ["\n".join(found)] if page.name in ONE_SCRIPT else found


WITH_CODE = [page for page in PAGES if blocks(page)]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE, ids=[page.name for page in WITH_CODE])
def test_every_python_block_runs_as_it_stands(page: Path, tmp_path: Path) -> None:
    for number, code in enumerate(blocks(page)):
        completed = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert completed.returncode == 0, completed.stderr
        if page.name == "README.md" and number == 0:
            assert completed.stdout.startswith("def read_json(path):")
            assert len(completed.stdout) > 100


def test_the_front_page_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    assert len([line for line in blocks(ROOT / "README.md")[0].splitlines() if line.strip()]) <= 5


def test_numbers_are_those_of_the_result_files() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "render_numbers.py"), "--check"]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    completed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    for page in PAGES[1:]:
        name = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        assert (tmp_path / "site" / name).is_file(), page
