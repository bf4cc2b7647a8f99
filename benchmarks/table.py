"""Tables of results, which every benchmark here writes alike."""

from __future__ import annotations

import csv
import datetime
import functools
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ORIGIN = ("command", "commit", "date")
"""Columns that say how to measure again what a row holds."""

PLOTS = Path(__file__).resolve().parents[1] / "docs" / "assets"
"""Where plots of results go."""


def write_csv(path: Path | None, fields: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes all rows there are, in place of what was written before; nothing without a path. Called after every row,
    so that whatever happens next, these are kept.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = [*(field for field in fields if field not in ORIGIN), *ORIGIN]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows({**origin(), **row} for row in rows)


@functools.cache
def origin() -> dict[str, str]:
    """The command that is running, the commit it runs at (empty outside of a checkout) and the day."""
    here = Path(__file__).resolve()
    asked = ["git", "-C", str(here.parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    values = (command, found.stdout.strip(), datetime.datetime.now(datetime.timezone.utc).date().isoformat())
    return dict(zip(ORIGIN, values, strict=True))
