"""Tables of results, which every benchmark here writes alike."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PLOTS = Path(__file__).resolve().parents[1] / "docs" / "assets"
"""Where plots of results go."""


def write_csv(path: Path | None, fields: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes all rows there are, in place of what was written before; nothing without a path. Called after every row,
    so that whatever happens next, these are kept.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
