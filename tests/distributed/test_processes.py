"""Processes of tests are ended when none of them computes any more, however long they have."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest

pytestmark = processes.TIMEOUT


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(processes, "IDLE", 4)
    return tmp_path / "worker.py"


def test_they_may_compute_as_long_as_they_like(worker: Path) -> None:
    worker.write_text("import time\nwhile time.process_time() < 5: pass\nprint('done')")
    assert processes.start(worker, 1, worker.parent) == (True, ["done\n"])


def test_they_may_not_wait_for_each_other(worker: Path) -> None:
    worker.write_text("import os, time; print('waits', flush=True); time.sleep(1000 * int(os.environ['RANK']))")
    assert processes.start(worker, 2, worker.parent) == (False, ["waits\n", "waits\n"])
