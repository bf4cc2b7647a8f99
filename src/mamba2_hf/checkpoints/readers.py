"""What other programs read of a checkpoint: for each the keys it looks up, the models it takes, and where that stands."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import CheckpointError

NAMES = ("llama.cpp", "mlx-lm", "vllm", "transformers-4", "transformers-5")


@dataclass(frozen=True)
class Verdict:
    """Whether a program computes the same model from a converted checkpoint.

    Attributes:
        reader: the program, with the version that was read.
        refusals: why it does not; empty if it does.
        steps: what is left to do by hand, and what to know.
    """

    reader: str
    refusals: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)


def reader_named(name: str) -> str:
    """A program that is known here; raises CheckpointError with all of their names."""
    if name not in NAMES:
        raise CheckpointError(f"{name!r} is no reader known here; there are {', '.join(NAMES)}")
    return name
