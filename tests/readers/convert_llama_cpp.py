"""Runs the converters of a checkout of llama.cpp as they are, one job after the other."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

from worker import serve

ARGUMENTS = list(sys.argv)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Runs one script with its arguments."""
    sys.argv = [job["script"], *job["arguments"]]
    sys.path.insert(0, str(Path(job["script"]).parent))  # as where it is run by its path
    try:
        runpy.run_path(job["script"], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise ValueError(f"ended with {end.code}") from None
    finally:
        sys.path.pop(0)
        sys.argv = ARGUMENTS
    return {}


serve(run)
