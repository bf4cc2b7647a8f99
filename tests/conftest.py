"""What every test runs under: no network, one thread, no GPU tests without a GPU."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import threading
import zlib

# Set before torch and the Hub client are imported. The suite runs one process per core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import settings

# Looking for garbage as often as Python does by itself takes an eighth of the time of imports and of the compiler.
gc.set_threshold(50_000, 20, 50)
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Without a GPU, Triton kernels run in its interpreter; Triton reads this when the kernels are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ModuleNotFoundError):  # of Triton, where there is none
        from interpreting import work_once

        work_once()

# A shell that starts the suite in the background has it ignore Ctrl-C; tests of what that does send it on purpose.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none, tests marked gpu are deselected"
    return f"torch {torch.__version__}, GPU: {gpu}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--readers", metavar="FOLDER", help="install other programs there, and run tests marked readers")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = {"gpu": torch.cuda.is_available(), "readers": config.getoption("--readers") is not None}
    lacking = [name for name, found in here.items() if not found]
    deselected = [item for item in items if any(map(item.get_closest_marker, lacking))]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


def pytest_collection_finish() -> None:
    """Has the garbage collector leave out all that the imports have made, which it takes long to look through: the
    compiler has it do so before and after each of its tests.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries that count their objects at the end would miss some


def seed(name: str) -> None:
    number = zlib.crc32(name.encode())
    random.seed(number)
    numpy.random.seed(number)
    torch.manual_seed(number)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest) -> None:
    seed(f"{request.node.nodeid} {fixturedef.argname}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Gives a test the same random numbers on every machine, whichever tests run before it or beside it: libraries
    draw some that no test can seed (PEFT's adapters), and what is rare should fail when it is written or never.
    """
    seed(item.nodeid)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]
