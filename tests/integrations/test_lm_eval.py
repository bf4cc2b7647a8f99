"""lm-evaluation-harness: its stock ``hf`` backend runs these models, and a batch changes no result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mamba2_hf  # noqa: F401 (registers the models)
from mamba2_hf.pretrained import shipped_model_path

# Words as they go on in Python, and as they do not; of different lengths, so that a batch needs padding.
CHOICES = [
    ("import os\nimport ", ["sys\n", "quickly\n"], 0),
    ("def __init__(", ["walrus, tusk", "self"], 1),
    ("for i in range(10):\n    ", ["print(i)", ")("], 0),
    ("x = 3\nif x ", ["== 3:\n    return", "of course"], 0),
    ('class Stack:\n    """A stack."""\n\n    def push(self, ', ["item):", ":::"], 0),
    ("try:\n    pass\n", ["otherwise maybe", "except ValueError:"], 1),
]


@pytest.fixture(scope="module", name="evaluate")
def _evaluate(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """Runs the harness as its command line does, on a task of local files, and returns results and samples."""
    lm_eval = pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    documents = [{"text": text, "choices": choices, "label": label} for text, choices, label in CHOICES]
    (folder / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder)},
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "target_delimiter": "",
    }
    choice = {
        **data,
        "task": "python_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    writing = {
        **data,
        "task": "python_writing",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["\n\n\n\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }

    def evaluate(batch_size: int) -> dict[str, Any]:
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(shipped_model_path()), "dtype": "float32"},
            tasks=[choice, writing],
            batch_size=batch_size,
            device="cpu",
            bootstrap_iters=0,
        )
        assert found is not None
        return dict(found)

    return evaluate


@pytest.fixture(scope="module", name="single")
def _single(evaluate: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    return evaluate(1)


# What the harness and its parts warn about is theirs.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_the_shipped_model_knows_python(single: dict[str, Any]) -> None:
    assert single["config"]["model"] == "hf"
    assert single["results"]["python_choice"]["acc,none"] >= 5 / 6
    assert all(sample["resps"][0][0].strip() for sample in single["samples"]["python_writing"])


def test_a_batch_gives_what_single_documents_give(
    evaluate: Callable[[int], dict[str, Any]], single: dict[str, Any]
) -> None:
    batch = evaluate(len(CHOICES))
    for one, other in zip(single["samples"]["python_choice"], batch["samples"]["python_choice"], strict=True):
        likelihoods = [torch.tensor([float(response[0][0]) for response in found["resps"]]) for found in (one, other)]
        torch.testing.assert_close(*likelihoods, rtol=0, atol=2e-4)
    written = [[sample["resps"] for sample in found["samples"]["python_writing"]] for found in (single, batch)]
    assert written[0] == written[1]


def test_its_results_make_a_card(single: dict[str, Any], tmp_path: Path) -> None:
    from mamba2_hf.checkpoints import open_checkpoint
    from mamba2_hf.checkpoints.cards import read_evals, render_card

    (tmp_path / "results.json").write_text(json.dumps({"results": single["results"]}))
    card = render_card(open_checkpoint(shipped_model_path()), evals=read_evals(tmp_path / "results.json"))
    assert "| python_choice | acc |" in card.content
