"""Runs the tests of mamba_ssm and causal_conv1d, taken from checkouts of them, on this package's functions.

    git clone https://github.com/state-spaces/mamba
    git clone https://github.com/Dao-AILab/causal-conv1d
    python tests/compat/run_peers_tests.py --mamba mamba --conv causal-conv1d

Nothing of theirs is built or kept: their modules are read for the reference implementations that the tests compare
with, and every function and class that ``mamba2_hf.compat`` serves is put in the place of theirs. Without a GPU, tests
that ask for one get the CPU. Every test that does not pass is printed with what it said and, where that is known, why.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

SUITES = {
    "step": ("mamba", "tests/ops/triton/test_selective_state_update.py"),
    "norm": ("mamba", "tests/ops/triton/test_layernorm_gated.py"),
    "determinism": ("mamba", "tests/test_determinism.py"),
    "generation": ("mamba", "tests/test_generation.py"),  # their models, on our layer and norms
    "conv": ("conv", "tests/test_causal_conv1d.py"),
}
ON_GPU_ONLY = {"generation": "captures CUDA graphs by itself", "determinism": "skips itself without a GPU"}
LEFT_OUT = {
    "tests/ops/triton/test_ssd.py": "calls kernels inside of mamba_ssm (_chunk_state_fwd and others), which have no "
    "counterpart here",
    "tests/ops/test_selective_scan.py": "Mamba-1",
    "tests/ops/triton/test_mamba3_siso.py and others of Mamba-3": "Mamba-3",
    "tests/test_determinism.py::test_kernel_* and test_combined_kernel_*": "call kernels inside of mamba_ssm too, and "
    "nothing of ours; on a GPU, these are tuned for minutes",
}
INSIDE = re.compile(r"::test_(combined_)?kernel_")
CAUSES = (  # what a test's name matches, and why it does not pass
    (r"is_not_reproducible", "wants two runs to differ, and they do not"),
    (
        r"test_selective_state_update.*itype[12]",
        "the reference rounds 16-bit states before it reads them: the mean difference from fp64 is half of its here",
    ),
)
OUTCOMES = ("passed", "failed", "skipped", "expected to fail", "not begun")
_SETTINGS = "MAMBA2_HF_PEERS"  # the environment variable in which a run's process finds them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mamba", type=Path, help="a checkout of state-spaces/mamba")
    parser.add_argument("--conv", type=Path, help="a checkout of Dao-AILab/causal-conv1d")
    parser.add_argument("--suites", nargs="*", choices=SUITES, default=list(SUITES))
    parser.add_argument("--share", type=float, default=1.0, help="of the tests, a fixed choice; all by default")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no test after so many")
    parser.add_argument("--keyword", default="", help="as pytest's -k")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    given = parser.parse_args()
    roots = {"mamba": given.mamba, "conv": given.conv}
    ends, failed = time.time() + given.seconds, False
    for suite in given.suites:
        repository, file = SUITES[suite]
        if roots["mamba"] is None or roots["conv"] is None:
            parser.error("both --mamba and --conv are needed: either's tests use the other")
        if suite in ON_GPU_ONLY and not torch.cuda.is_available():
            print(f"{suite}: not run, {ON_GPU_ONLY[suite]}")
            continue
        with ThreadPoolExecutor(given.jobs) as pool:
            parts = [
                pool.submit(_run, roots, roots[repository].resolve() / file, given, ends, part)
                for part in range(given.jobs)
            ]
        reports = []
        for done in [part.result() for part in parts]:
            found = [line for line in done.stdout.splitlines() if line.startswith("{")]
            if found:
                reports.append(json.loads(found[-1]))
            else:
                print(f"{suite}: did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        failed |= len(reports) < given.jobs
        counts = {name: sum(report["counts"][name] for report in reports) for name in OUTCOMES}
        print(f"{suite}: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count))
        for name, said in [each for report in reports for each in report["failed"].items()]:
            why = next((why for pattern, why in CAUSES if re.search(pattern, name)), "not known")
            print(f"  {name}\n    said: {said}\n    why: {why}")
            failed |= why == "not known"
    for file, why in LEFT_OUT.items():
        print(f"left out: {file}: {why}")
    sys.exit(failed)


def _run(
    roots: dict[str, Path], file: Path, given: argparse.Namespace, ends: float, part: int
) -> subprocess.CompletedProcess[str]:
    """Runs one of as many parts of a suite as there are jobs."""
    settings = {
        "roots": {name: str(root.resolve()) for name, root in roots.items()},
        **{"share": given.share, "ends": ends, "part": part, "parts": given.jobs},
    }
    here = Path(__file__)
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", here.stem, "-p", "no:cacheprovider"),
            *("--rootdir", str(here.parent), "-c", os.devnull, "--tb=short", "--no-header"),
            *("--import-mode=importlib", "-k", given.keyword, str(file)),
        ],
        env={
            **os.environ,
            _SETTINGS: json.dumps(settings),
            "PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path[1:]]),
            **({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}),
        },
        capture_output=True,
        text=True,
        check=False,
    )


# What follows runs in the tests' process, as a plugin of pytest.


class _OnCPU(TorchFunctionMode):
    """Puts on the CPU what is asked for on a GPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        args = ["cpu" if isinstance(arg, str) and arg.startswith("cuda") else arg for arg in args]
        return function(*args, **kwargs)


class Run:
    """Counts outcomes and keeps what failing tests said."""

    def __init__(self, share: float, ends: float, part: int, parts: int) -> None:
        self.share, self.ends, self.part, self.parts = share, ends, part, parts
        self.counts = dict.fromkeys(OUTCOMES, 0)
        self.failed: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [
            item
            for item in items
            if zlib.crc32(item.nodeid.split("/")[-1].encode()) % 1000 < 1000 * self.share
            and not INSIDE.search(item.nodeid)
        ][self.part :: self.parts]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        if time.time() > self.ends:
            pytest.skip("no time is left")
        if torch.cuda.is_available():
            return (yield)
        with _OnCPU():
            return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        outcome = "expected to fail" if hasattr(report, "wasxfail") else report.outcome
        if outcome == "skipped" and "no time is left" in str(report.longrepr):
            outcome = "not begun"
        self.counts[outcome] += 1
        if outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failed[report.nodeid.split("::")[-1]] = str(getattr(crash, "message", report.longrepr)).splitlines()[0]

    def pytest_sessionfinish(self) -> None:
        print("\n" + json.dumps({"counts": self.counts, "failed": self.failed}))


def pytest_configure(config: pytest.Config) -> None:
    """Puts our functions in the place of theirs, before the tests are imported."""
    settings = json.loads(os.environ[_SETTINGS])
    _substitute({name: Path(root) for name, root in settings["roots"].items()})
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *args: None
    config.pluginmanager.register(Run(*(settings[name] for name in ("share", "ends", "part", "parts"))))


def _substitute(roots: dict[str, Path]) -> None:
    from mamba2_hf.compat import stand_in

    sys.modules["causal_conv1d_cuda"] = ModuleType("causal_conv1d_cuda")
    for package, root in (("causal_conv1d", roots["conv"]), ("mamba_ssm", roots["mamba"])):
        module: Any = ModuleType(package)
        module.__path__ = [str(root / package)]  # so that its __init__, which imports what is built, is not run
        sys.modules[package] = module
        served = {name: names for name, names in stand_in._SERVED.items() if name.partition(".")[0] == package}
        vars(module).update(served.pop(package))
        for name, names in served.items():
            if name.startswith(("mamba_ssm.models", "mamba_ssm.utils")):
                continue  # their own model and loop, on our layer
            vars(importlib.import_module(name)).update(names)


if __name__ == "__main__":
    main()
