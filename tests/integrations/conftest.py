"""A tiny model, its inputs, and fresh interpreters for what depends on the order of imports."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import forks
from torch import Tensor

from mamba2_hf import Mamba2Config, Mamba2ForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_heads": 6,
    "head_dim": 8,
    "n_groups": 2,
    "state_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """A model in eval mode: a class, a seed, and changes to the configuration."""

    def make(cls: Any = Mamba2ForCausalLM, *, seed: int = 0, **changes: Any) -> Any:
        torch.manual_seed(seed)
        return cls(Mamba2Config(**{**SIZES, **changes})).eval()

    return make


@pytest.fixture
def input_ids() -> Tensor:
    """``(2, 17)``, without special tokens."""
    return torch.randint(3, SIZES["vocab_size"], (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def run_python(repository: Path) -> Iterator[Callable[[str], str]]:
    """Runs a program with warnings as errors, and returns what it prints.

    It finds imported what the packages here import, and none of those that are told of ours.
    """
    environment = {**os.environ, "PYTHONPATH": str(repository / "src")}
    options = "-W", "error::RuntimeWarning"
    with forks("datasets, scipy.optimize, torch._dynamo", *options, environment=environment) as run:
        yield lambda program: run(textwrap.dedent(program))
