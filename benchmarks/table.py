"""Tables of results, which every benchmark here writes alike."""

from __future__ import annotations

import csv
import datetime
import functools
import os
import shlex
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
    """The command that is running, without where it writes to, the commit it runs at (of a checkout, or as ``COMMIT``
    in the environment says) and the day.
    """
    here = Path(__file__).resolve()
    asked = ["git", "-C", str(here.parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    written = {i + place for i, word in enumerate(sys.argv) for place in (0, 1) if word == "--out"}
    words = [word for i, word in enumerate(sys.argv[1:], 1) if i not in written]
    command = shlex.join([Path(sys.argv[0]).name, *words])
    commit = os.environ.get("COMMIT") or found.stdout.strip()
    values = (command, commit, datetime.datetime.now(datetime.timezone.utc).date().isoformat())
    return dict(zip(ORIGIN, values, strict=True))
