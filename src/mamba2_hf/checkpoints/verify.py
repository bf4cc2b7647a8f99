"""Whether two checkpoints are the same model: by their tensors, their logits, and their logits token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import Checkpoint, open_checkpoint
from .hub import local_folder
from .io import aligned


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` measured, as largest absolute differences.

    Attributes:
        tensors: between the stored values of the two, and ``tensor``, the name of the one that differs most.
        logits: between their logits over a whole sequence.
        decoded: between their logits token by token, each continuing its own cache.
        own: between whole sequence and token by token, the larger of the two models'.
        scale: the largest logit of the first.
        tolerance: what ``logits`` and ``decoded`` may be.
    """

    tensors: float
    tensor: str
    logits: float
    decoded: float
    own: float
    scale: float
    tolerance: float

    @property
    def largest(self) -> float:
        """The largest difference between the two models' logits."""
        return max(self.logits, self.decoded)

    @property
    def same(self) -> bool:
        """Whether the two agree within the tolerance, and each with itself within 1e-3 of the largest logit."""
        return self.largest <= self.tolerance and self.own <= 1e-3 * max(self.scale, 1.0)


def verify(
    first: str | Path,
    second: str | Path,
    *,
    tokens: int = 64,
    seed: int = 0,
    tolerance: float = 1e-5,
    revision: str | None = None,
) -> Verification:
    """Loads two checkpoints of any format, one after the other, in float32 on the CPU, and compares them.

    Args:
        first, second: folders or Hub ids.
        tokens: of the random sequence.
        seed: of the sequence.
        tolerance: largest difference of a logit at which they count as the same.
        revision: of Hub ids.

    Raises:
        CheckpointError: one is broken, or they have other sizes.
        ConfigurationError: one is no Mamba-2.
    """
    if tokens < 2:
        raise CheckpointError(f"tokens is {tokens}: at least 2 are needed to continue a cache")
    left, right = (open_checkpoint(local_folder(source, revision)) for source in (first, second))
    _compare_sizes(left, right)
    name, difference = _compare_tensors(left, right)
    ids = torch.randint(left.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
    whole_left, steps_left = _run(left, ids)
    whole_right, steps_right = _run(right, ids)
    return Verification(
        tensors=difference,
        tensor=name,
        logits=_largest(whole_left, whole_right),
        decoded=_largest(steps_left, steps_right),
        own=max(_largest(whole_left, steps_left), _largest(whole_right, steps_right)),
        scale=float(whole_left.abs().max()),
        tolerance=tolerance,
    )


def _compare_sizes(left: Checkpoint, right: Checkpoint) -> None:
    if left.format.family is not right.format.family:
        raise CheckpointError(
            f"{left.folder} is a {left.format.family.title} and {right.folder} a {right.format.family.title}: two "
            "different models"
        )
    for name in left.format.family.sizes:
        one, other = getattr(left.config, name), getattr(right.config, name)
        if one != other:
            raise CheckpointError(
                f"{name} is {one} in {left.folder} and {other} in {right.folder}: two different models"
            )
    if one_sided := sorted(left.tensors.keys() ^ right.tensors.keys()):
        raise CheckpointError(
            f"only one of {left.folder} and {right.folder} holds {one_sided[0]}: two different models"
        )


def _compare_tensors(left: Checkpoint, right: Checkpoint) -> tuple[str, float]:
    worst, where = 0.0, ""
    for name, tensor in left.tensors.items():
        other = right.tensors[name]
        if tensor.shape != other.shape:
            raise CheckpointError(
                f"{name} has shape {tensor.shape} in {left.folder} and {other.shape} in {right.folder}"
            )
        for one, two in aligned(left.pieces(name), right.pieces(name)):
            if (difference := _largest(one, two)) > worst:
                worst, where = difference, name
    return where, worst


@torch.no_grad()
def _run(checkpoint: Checkpoint, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``(T, vocab)`` of a sequence ``(1, T)``, whole and token by token."""
    model = checkpoint.model(torch.float32)
    options = {"output_hidden_states": False, "output_attentions": False, "return_dict": True}  # whatever it says
    whole = model(ids, use_cache=False, **options).logits[0]
    steps, cache = [], None
    for token in ids.split(1, dim=1):
        output = model(token, past_key_values=cache, use_cache=True, **options)
        cache = output.past_key_values
        steps.append(output.logits[0, 0])
    decoded = torch.stack(steps)
    if not bool(torch.isfinite(whole).all() and torch.isfinite(decoded).all()):
        raise CheckpointError(f"{checkpoint.folder}: its logits are NaN or infinite although its weights are not")
    return whole, decoded


def _largest(left: Tensor, right: Tensor) -> float:
    difference = float((left.double() - right.double()).abs().max()) if left.numel() else 0.0
    return math.inf if math.isnan(difference) else difference
