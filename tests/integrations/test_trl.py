"""TRL's SFTTrainer: its losses are those of the model itself, whichever way documents are laid out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hybrids import make_hybrid
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated"
    ),  # TRL and PEFT use it
    pytest.mark.filterwarnings("ignore:`(return_outputs=True|label_smoothing_factor)`:FutureWarning"),
]

LENGTHS = [5, 19, 11, 7, 23, 3, 13, 17]


@pytest.fixture
def documents() -> list[list[int]]:
    """Token sequences of different lengths in which the next token is the last one plus three."""
    return [[3 + (7 * row + 3 * step) % 58 for step in range(length)] for row, length in enumerate(LENGTHS)]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2, **{str(n): n for n in range(3, 61)}}, unk_token="<pad>")
    backend = Tokenizer(words)
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.fixture
def make_trainer(
    make_model: Callable[..., Any], documents: list[list[int]], tokenizer: Any, tmp_path: Path
) -> Callable[..., Any]:
    """An SFTTrainer of a tiny model on the documents; keyword arguments are those of ``SFTConfig``."""

    def make(model: Any = None, peft_config: Any = None, **arguments: Any) -> Any:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "train_sampling_strategy": "sequential",
            "shuffle_dataset": False,
            "dataloader_pin_memory": False,
            "max_length": 64,
            "bf16": False,
        }
        dataset = Dataset.from_list([{"input_ids": ids} for ids in documents])
        return SFTTrainer(
            model=make_model() if model is None else model,
            args=SFTConfig(**{**defaults, **arguments}),
            train_dataset=dataset,
            eval_dataset=dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def token_mean(model: Any, documents: list[list[int]]) -> float:
    """The mean loss over the predicted tokens of documents that are run one by one."""
    with torch.no_grad():
        rows = [torch.tensor([ids]) for ids in documents]
        total = sum(model(row, labels=row).loss * (row.shape[1] - 1) for row in rows)
    return float(total / sum(row.shape[1] - 1 for row in rows))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"padding_free": True, "max_length": None},
        {"padding_free": True, "max_length": None, "pad_to_multiple_of": 64},
        {"packing": True, "packing_strategy": "bfd", "per_device_train_batch_size": 1, "max_length": 98},
    ],
    ids=["padded", "padding-free", "padding-free and padded to a multiple", "packed"],
)
def test_loss_is_the_mean_over_separate_documents(
    arguments: dict[str, Any],
    make_trainer: Callable[..., Any],
    make_model: Callable[..., Any],
    documents: list[list[int]],
) -> None:
    trainer = make_trainer(max_steps=1, **{"per_device_train_batch_size": 8, **arguments})
    trainer.train()
    assert losses(trainer) == pytest.approx([token_mean(make_model(), documents)], rel=1e-4)
    assert trainer.evaluate()["eval_loss"] < losses(trainer)[0]


def test_every_layout_trains_alike(make_trainer: Callable[..., Any]) -> None:
    padded, flat = make_trainer(), make_trainer(padding_free=True, max_length=None)
    padded.train()
    flat.train()
    assert losses(flat) == pytest.approx(losses(padded), rel=1e-4)
    for one, other in itertools.pairwise([padded, flat]):
        for (name, a), (_, b) in zip(one.model.named_parameters(), other.model.named_parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2, msg=lambda m, name=name: f"{name}: {m}")


def test_accumulated_gradients_equal_those_of_the_whole_batch(make_trainer: Callable[..., Any]) -> None:
    whole = make_trainer(max_steps=1, per_device_train_batch_size=8)
    parts = make_trainer(max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    whole.train()
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize("option", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}, {"bf16": True}])
def test_other_losses_teach_the_next_token(option: dict[str, Any], make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(max_steps=8, padding_free=True, max_length=None, **option)
    trainer.train()
    right = [entry["mean_token_accuracy"] for entry in trainer.state.log_history if "mean_token_accuracy" in entry]
    assert right[0] < 0.1
    assert right[-1] > 0.5


def test_lora_trains_both_projections(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(peft_config=LoraConfig(r=4), max_steps=8, packing=True, max_length=32)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_B" in name}
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    moved = {name: not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in before}
    assert len(moved) == 4
    assert all(moved.values()), moved


def test_compute_metrics_read_the_logits(make_trainer: Callable[..., Any], documents: list[list[int]]) -> None:
    trainer = make_trainer(per_device_eval_batch_size=8)
    shapes: list[tuple[int, ...]] = []

    def metrics(predictions: Any) -> dict[str, float]:
        shapes.append(predictions.predictions.shape)
        return {}

    trainer.compute_metrics = metrics
    trainer.evaluate()
    assert shapes == [(8, 23, 61)]


def test_generation_is_unchanged_by_the_replaced_forward(
    make_trainer: Callable[..., Any], make_model: Callable[..., Any], input_ids: Tensor
) -> None:
    trainer = make_trainer()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = make_model().generate(input_ids, **options)
    assert torch.equal(trainer.model.eval().generate(input_ids, **options), expected)


PAIRS = [{"prompt": "5 8", "chosen": " 11 14", "rejected": " 3 3"}] * 4
FROM_A_PATH: dict[str, tuple[Any, Any, list[dict[str, Any]], dict[str, Any]]] = {
    "SFT": (SFTTrainer, SFTConfig, [{"text": "5 8 11 14 17"}] * 4, {"packing": True, "max_length": 8}),
    "DPO": (DPOTrainer, DPOConfig, PAIRS, {}),
    "KTO": (
        KTOTrainer,
        KTOConfig,
        [{"prompt": "5 8", "completion": " 11", "label": bool(n % 2)} for n in range(4)],
        {},
    ),
    "GRPO": (
        GRPOTrainer,
        GRPOConfig,
        [{"prompt": "5 8"}] * 4,
        {"beta": 0.1, "num_generations": 2, "max_completion_length": 3},
    ),
    "reward": (RewardTrainer, RewardConfig, PAIRS, {}),
}


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("name", FROM_A_PATH)
def test_a_path_gives_what_the_auto_class_builds(
    name: str, hybrid: bool, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    """The model itself, and the one that it is compared with."""
    folder = tmp_path / "model"
    (make_hybrid() if hybrid else make_model()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trainer_class, config_class, rows, options = FROM_A_PATH[name]
    arguments = config_class(
        **{"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none", "disable_tqdm": True},
        **{"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "bf16": False, "dataloader_pin_memory": False},
        **{"per_device_train_batch_size": 4, **options},
    )
    rewards = {"reward_funcs": lambda completions, **_: [float(len(text)) for text in completions]}
    trainer = trainer_class(
        str(folder),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        **(rewards if name == "GRPO" else {}),
    )
    auto = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
    built = [trainer.model, getattr(trainer, "ref_model", None)]
    assert [type(model) for model in built if model is not None] == [type(auto.from_pretrained(folder))] * (
        2 if name in ("DPO", "KTO", "GRPO") else 1
    )
    trainer.train()
    assert [entry for entry in trainer.state.log_history if "loss" in entry]
