"""Model cards: a template, what a checkpoint says of itself, and what is known of the published families."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import CheckpointError
from . import remote_code
from .checkpoint import Checkpoint
from .companions import TOKENIZERS
from .files import read_json
from .formats import HYBRID


@dataclass(frozen=True)
class Family:
    """Models that were published together; one file in ``model_cards/``.

    Attributes:
        title: what they are called.
        about: a sentence or two on what they are.
        license: as published, by the Hub's name of it.
        language: of their training data.
        arxiv: the paper.
        command: how to convert one, with ``{id}`` and ``{name}`` to fill in.
        config: what all of them have in common.
        models: of each its ``id``, sizes and number of parameters.
        format: whose fields ``config`` and sizes are.
    """

    title: str
    about: str
    license: str
    language: str
    arxiv: str
    command: str
    config: dict[str, Any]
    models: list[dict[str, Any]]
    format: str = "mamba2"


@cache
def cards_folder() -> Path:
    """Where template and families are: in the package, or at the top of a checkout."""
    inside = Path(__file__).parents[1] / "model_cards"
    return inside if inside.is_dir() else Path(__file__).parents[3] / "model_cards"


@cache
def families() -> dict[str, Family]:
    """The published families by the name of their file."""
    return {path.stem: Family(**read_json(path)) for path in sorted(cards_folder().glob("*.json"))}


def family_of(model_id: str) -> Family | None:
    """The family that a published model belongs to."""
    return next((found for found in families().values() if any(m["id"] == model_id for m in found.models)), None)


def render_card(
    checkpoint: Checkpoint,
    *,
    name: str | None = None,
    repo_id: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    evals: list[EvalResult] | None = None,
) -> ModelCard:
    """The card of a checkpoint.

    Args:
        checkpoint: what the card is of; its numbers are read from it.
        name: of the model; the folder's by default.
        repo_id: where it will be on the Hub.
        base_model: the published model it was converted from; fills in license, language and origin.
        license: by the Hub's name of it.
        evals: results to show, see :func:`read_evals`.
    """
    config, name = checkpoint.config, name or checkpoint.folder.resolve().name
    hybrid = checkpoint.format.family is HYBRID
    family = family_of(base_model) if base_model else None
    evals = evals or []
    for result in evals:
        result.source_name = result.source_name or name
    data = ModelCardData(
        language=family.language if family else None,
        license=license or (family.license if family else None),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[
            "mamba2",
            "state-space-model",
            *(["hybrid"] if hybrid else []),
            *([f"arxiv:{family.arxiv}"] if family else []),
        ],
        base_model=base_model,
        model_name=name,
        eval_results=evals or None,
    )
    parameters = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    return ModelCard.from_template(
        data,
        template_path=str(cards_folder() / "template.md"),
        summary=f"A {'hybrid of Mamba-2 and attention' if hybrid else 'Mamba-2 language model'} of "
        f"{_count(parameters)} parameters.",
        loader=_LOADERS.get(checkpoint.format.name),
        needs=_NEEDS.get(checkpoint.format.name, "transformers' own class reads the same files without it"),
        facts=[
            ("parameters", f"{parameters:,}"),
            *(_hybrid_facts(config) if hybrid else _pure_facts(config)),
            ("vocabulary", f"{config.vocab_size:,}" + (", tied to the head" if config.tie_word_embeddings else "")),
            ("weights", str(checkpoint.dtype).removeprefix("torch.")),
        ],
        repo_id=repo_id,
        family=family,
        command=family.command.format(id=base_model, name=name) if family else None,
        remote_code=remote_code.FILE if (checkpoint.folder / remote_code.FILE).exists() else None,
        tokenizer=any((checkpoint.folder / file).exists() for file in TOKENIZERS),
        evals=evals,
        format=f"the format {checkpoint.format.title}"
        + (", which vLLM and llama.cpp's converter read too" if checkpoint.format.name == "mamba2" else ""),
    )


_NEEDS = {
    "mamba2": "optional: without it, transformers' own Mamba-2 reads the same files",
    "mamba2_hybrid": "the model's classes",
}
"""What the import of this package is there for, by format."""
_LOADERS = {
    "mamba_ssm": "Mamba2ForCausalLM",
    "mamba2attn": "Mamba2HybridForCausalLM",
    "megatron": "Mamba2HybridForCausalLM",
}
"""What reads formats whose files name no class, so that the Auto classes cannot."""


def _pure_facts(config: Any) -> list[tuple[str, Any]]:
    return [
        ("layers", config.num_hidden_layers),
        ("width", config.hidden_size),
        ("heads", f"{config.num_heads} of {config.head_dim}, {config.n_groups} group{'s' * (config.n_groups > 1)}"),
        ("state", config.state_size),
    ]


def _hybrid_facts(config: Any) -> list[tuple[str, Any]]:
    kinds = Counter(config.layer_blocks)
    facts: list[tuple[str, Any]] = [
        ("layers", f"{config.num_hidden_layers}: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}"),
        ("width", config.hidden_size),
    ]
    mixers = set(config.mixer_kinds)
    if "ssd" in mixers:
        groups = config.ssm_n_groups
        heads = f"{config.ssm_num_heads} of {config.ssm_head_dim}, {groups} group{'s' * (groups > 1)}"
        facts += [("SSD heads", heads), ("state", config.ssm_state_size)]
    if mixers - {"ssd"}:
        shared = f"{config.num_key_value_heads} of keys and values"
        facts.append(("attention heads", f"{config.num_attention_heads} of {config.head_dim}, {shared}"))
    if any("moe" in kinds for kinds in config.blocks):
        facts.append(("experts", f"{config.num_experts}, {config.num_experts_per_tok} per token"))
    return facts


def _count(parameters: int) -> str:
    for unit, word in ((10**9, "billion"), (10**6, "million")):
        if parameters >= unit:
            return f"{parameters / unit:.3g} {word}"
    return f"{parameters:,}"


def read_evals(path: Path) -> list[EvalResult]:
    """Results from the JSON that lm-evaluation-harness writes (``lm_eval --output_path``).

    Raises:
        CheckpointError: the file is of another kind, or a value is no finite number.
    """
    results = read_json(path).get("results")
    if not isinstance(results, dict) or not all(isinstance(metrics, dict) for metrics in results.values()):
        raise CheckpointError(f"{path}: has no object 'results' with an object per task, as lm_eval writes it")
    found = []
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue  # the task's name and such
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise CheckpointError(f"{path}: results.{task}.{key} is {value!r}, expected a finite number")
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=task,
                    dataset_name=str(metrics.get("alias") or task).strip(" -"),
                    metric_type=metric,
                    metric_value=value,
                )
            )
    if not found:
        raise CheckpointError(f"{path}: results holds no metric, such as 'acc,none'")
    return found
