"""The figures of the walk through the theory are those that the script draws."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

COLOR = re.compile(r"#([0-9a-f]{6})")


@pytest.fixture(autouse=True)
def _default_dtype_as_before():
    yield
    torch.set_default_dtype(torch.float32)


def test_figures_are_those_that_are_drawn(repository: Path, tmp_path: Path) -> None:
    page = (repository / "docs" / "theory.md").read_text(encoding="utf-8")
    shown = re.findall(r"\]\((assets/theory/\w+\.svg)\)", page)
    script = runpy.run_path(str(repository / "examples" / "draw_theory.py"))
    script["main"].__globals__["FIGURES"] = tmp_path
    script["main"]()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(Path(name).name for name in shown)
    for path in tmp_path.iterdir():
        ElementTree.parse(path)
        drawn, kept = (
            folder.joinpath(path.name).read_text(encoding="utf-8")
            for folder in (tmp_path, repository / "docs" / "assets" / "theory")
        )
        assert COLOR.sub("", drawn) == COLOR.sub("", kept)
        for new, old in zip(COLOR.findall(drawn), COLOR.findall(kept), strict=True):
            assert max(abs(a - b) for a, b in zip(bytes.fromhex(new), bytes.fromhex(old), strict=True)) <= 1
