"""What the workers in other environments have in common: they take jobs from a file and answer a line for each."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def serve(read: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answers the jobs of ``sys.argv[1]``, a JSON list, in ``sys.argv[2]``: lines of JSON, one as each is done.

    Args:
        read: from a job what the program made of it: ``logits`` of its ``ids``, of shape (length, vocabulary), and the
            ``tokens`` that it writes after them; an array becomes a file beside the job's folder.
    """
    jobs = json.loads(Path(sys.argv[1]).read_text())
    with open(sys.argv[2], "a", encoding="utf-8") as lines:
        for job in jobs:
            try:
                answer = read(job)
                for name, value in answer.items():
                    if isinstance(value, np.ndarray):
                        path = f"{job['out']}-{name}.npy"
                        np.save(path, value.astype(np.float32))
                        answer[name] = path
            except Exception as error:
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            lines.write(json.dumps(answer) + "\n")
            lines.flush()
