"""Environments of other programs, made from package registries below one folder, and what runs in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
TORCH = ("torch==2.13.0", "numpy", "safetensors")  # with pip's default on CPU machines, the build for CPUs
LLAMA_CPP_PYTHON = "0.3.36"
TRANSFORMERS = {"4.57.6": "transformers-4", "5.20.2": "transformers-5.20", "5.24.0": "transformers-5"}
"""Versions, and what ``convert --for`` calls them."""
OLDEST = "4.57.6"  # which llama.cpp's converters ask for
QUIET = {
    **{"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"},
    **{"TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"},
}


class ProgramError(Exception):
    """A program of another environment failed; the message is what it said last."""


@dataclass(frozen=True)
class Environment:
    """One virtual environment.

    Attributes:
        home: its folder.
    """

    home: Path

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.home / "bin" / "python")

    @property
    def packages(self) -> str:
        """The folder of its packages."""
        return run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()

    def install(self, *requirements: str, over: Environment | None = None, **variables: str) -> None:
        """Makes it, unless it was made before.

        Args:
            requirements: as pip takes them.
            over: another one, whose packages are seen from this one.
            variables: of the environment of pip.
        """
        done = self.home / "installed.json"
        if done.exists() and json.loads(done.read_text()) == list(requirements):
            return
        run(sys.executable, "-m", "venv", str(self.home))
        if over is not None:
            Path(self.packages, "below.pth").write_text(f"{over.packages}\n")
        run(self.python, "-m", "pip", "install", "--quiet", *requirements, **variables)
        done.write_text(json.dumps(requirements))

    def versions(self, *packages: str) -> dict[str, str]:
        """The versions of packages in it."""
        code = "import importlib.metadata as m, json, sys; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
        return json.loads(run(self.python, "-c", code, *packages))

    def read(self, script: str, jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
        """What a worker of this folder answers to jobs. One that ends the process is answered with its last words, and
        the jobs after it go to a new process.
        """
        answers: list[dict[str, Any]] = []
        lines = folder / "answers.jsonl"
        while len(answers) < len(jobs):
            lines.unlink(missing_ok=True)
            (folder / "jobs.json").write_text(json.dumps(jobs[len(answers) :]))
            words = ""
            try:
                run(self.python, str(HERE / script), str(folder / "jobs.json"), str(lines))
            except ProgramError as error:
                words = str(error)
            found = lines.read_text().splitlines() if lines.exists() else []
            answers += map(json.loads, found)
            if words and len(answers) < len(jobs):
                answers.append({"error": f"the process ended: {words}"})
        for answer in answers:
            for name, value in answer.items():
                if isinstance(value, str) and value.endswith(".npy"):
                    answer[name] = np.load(value)
        return answers


def run(*command: str, **variables: str) -> str:
    """The output of a command; raises ProgramError with its last lines where it fails."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, env={**inherited, **QUIET, **variables}, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise ProgramError("\n".join(said[-3:]) or f"{command[0]} ended with {done.returncode}")
    return done.stdout


class Programs:
    """All environments, and the checkout of llama.cpp whose converters are run.

    Args:
        cache: the folder of all environments.
        llama_cpp: the checkout; None for the sources in llama-cpp-python's package, of which the runtime is built.
    """

    def __init__(self, cache: Path, llama_cpp: Path | None = None) -> None:
        self.torch = Environment(cache / "torch")
        self.transformers = {version: Environment(cache / f"transformers-{version}") for version in TRANSFORMERS}
        self.mlx = Environment(cache / "mlx")
        self.llama = Environment(cache / "llama-cpp")
        self.sources = cache / f"llama_cpp_python-{LLAMA_CPP_PYTHON}"
        self.checkout = llama_cpp or self.sources / "vendor" / "llama.cpp"

    def install_transformers(self) -> None:
        """Makes the environments of every version; llama.cpp's converters run in the oldest."""
        self.torch.install(*TORCH)
        for version, environment in self.transformers.items():
            more = ("sentencepiece", "gguf") if version == OLDEST else ()
            environment.install(f"transformers=={version}", "peft", "accelerate", *more, over=self.torch)

    def install_mlx(self) -> None:
        """Makes the environment of mlx-lm."""
        self.mlx.install("mlx[cpu]", "mlx-lm")

    def install_llama(self) -> None:
        """Builds llama.cpp for the CPU, which takes minutes."""
        if not self.sources.exists():
            folder = self.sources.parent
            exact = f"llama-cpp-python=={LLAMA_CPP_PYTHON}"
            builder = Environment(folder / "builder")
            builder.install("scikit-build-core", "cmake", "ninja")
            path = f"{builder.home / 'bin'}:{os.environ['PATH']}"
            pip = (builder.python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation")
            run(*pip, "--no-binary", ":all:", "--dest", str(folder), exact, PATH=path)
            with tarfile.open(folder / f"{self.sources.name}.tar.gz") as archive:
                archive.extractall(folder, filter="data")
        self.llama.install(
            str(self.sources),
            CMAKE_ARGS="-DGGML_CUDA=OFF -DLLAVA_BUILD=OFF",
            CMAKE_BUILD_PARALLEL_LEVEL=str(os.cpu_count() or 1),
        )

    def to_gguf(self, conversions: list[tuple[str, ...]], folder: Path) -> list[str | None]:
        """Runs llama.cpp's converters; for each run the error, or None.

        Args:
            conversions: their names and arguments.
            folder: for files of this run.
        """
        jobs = [{"script": str(self.checkout / script), "arguments": rest} for script, *rest in conversions]
        environment = self.transformers[OLDEST]
        return [answer.get("error") for answer in environment.read("convert_llama_cpp.py", jobs, folder)]

    def make_tokenizer(self, folder: Path) -> None:
        """Writes a tokenizer that every program knows."""
        python = self.transformers[OLDEST].python
        run(python, str(HERE / "make_tokenizer.py"), str(self.checkout), str(folder))
