"""transformers' Trainer: which parameters decay, and that training, evaluation and resuming do what they should."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hybrids import make_hybrid
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Trainer,
    TrainingArguments,
)
from transformers import Mamba2Config as StockConfig
from transformers import Mamba2ForCausalLM as StockForCausalLM
from transformers.trainer_pt_utils import get_parameter_names

from mamba2_hf import Mamba2ForSequenceClassification
from mamba2_hf.errors import LogitsError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT reads it

CHECKPOINTING = next(  # renamed in transformers 5.2x
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)
LENGTHS = [5, 19, 11, 7, 23, 3, 13, 17]


@pytest.fixture
def documents() -> list[dict[str, list[int]]]:
    """Token sequences of different lengths in which the next token is the last one plus three."""
    return [
        {"input_ids": [3 + (7 * row + 3 * step) % 58 for step in range(length)]} for row, length in enumerate(LENGTHS)
    ]


def padded(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    rows = [torch.tensor(example["input_ids"]) for example in examples]
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad_sequence(rows, batch_first=True, padding_value=-100),
    }


@pytest.fixture
def make_trainer(
    make_model: Callable[..., Any], documents: list[dict[str, list[int]]], tmp_path: Path
) -> Callable[..., Any]:
    """A trainer of a tiny model on the documents; keyword arguments are those of ``TrainingArguments``."""

    def make(model: Any = None, *, collate: Any = padded, trainer: Any = Trainer, **arguments: Any) -> Any:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "train_sampling_strategy": "sequential",
            "dataloader_pin_memory": False,
        }
        kinds = {"compute_metrics", "preprocess_logits_for_metrics"}
        return trainer(
            model=make_model() if model is None else model,
            args=TrainingArguments(**{**defaults, **{k: v for k, v in arguments.items() if k not in kinds}}),
            train_dataset=documents,
            eval_dataset=documents,
            data_collator=collate,
            **{k: v for k, v in arguments.items() if k in kinds},
        )

    return make


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class TestWeightDecay:
    def test_only_matrices_and_convolutions_decay(self, make_trainer: Callable[..., Any]) -> None:
        trainer = make_trainer(weight_decay=0.1)
        optimizer = trainer.create_optimizer()
        decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
        names = {name for name, parameter in trainer.model.named_parameters() if id(parameter) in decayed}
        mixer = ("in_proj.weight", "conv1d.weight", "out_proj.weight")
        layers = {f"backbone.layers.{layer}.mixer.{name}" for layer in range(2) for name in mixer}
        assert names == layers | {"backbone.embeddings.weight", "lm_head.weight"}

    def test_a_step_with_decay_leaves_the_rest_where_it_was(self, make_trainer: Callable[..., Any]) -> None:
        """Without a gradient, AdamW moves exactly what decays."""
        trainer = make_trainer(weight_decay=0.5, learning_rate=0.1)
        optimizer = trainer.create_optimizer()
        before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        for parameter in trainer.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for name, parameter in trainer.model.named_parameters():
            fixed = name.endswith(("A_log", "D", "bias", "norm.weight", "norm_f.weight"))
            assert torch.equal(parameter, before[name] if fixed else before[name] * 0.95), name

    @pytest.mark.parametrize("trainer", [Trainer, Seq2SeqTrainer])
    def test_of_stock_models_is_untouched(self, trainer: Any, make_trainer: Callable[..., Any]) -> None:
        stock = StockForCausalLM(
            StockConfig(vocab_size=61, hidden_size=24, num_hidden_layers=1, num_heads=6, head_dim=8, n_groups=2)
        )
        patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
        names = Trainer.get_decay_parameter_names(make_trainer(), stock)
        assert names == get_parameter_names(stock, [nn.LayerNorm], patterns)
        assert "backbone.layers.0.mixer.A_log" in names

    def test_reaches_our_layers_inside_peft(self, make_model: Callable[..., Any], make_trainer: Any) -> None:
        adapted = get_peft_model(
            make_model(), LoraConfig(r=2, target_modules=["in_proj"], modules_to_save=["norm_f", "conv1d"])
        )
        decayed = make_trainer(adapted).get_decay_parameter_names(adapted)
        trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        assert not any(name.endswith((".A_log", ".D", ".dt_bias")) or "norm" in name for name in decayed)
        assert {name.rpartition("mixer.")[2] for name in trained & set(decayed)} == {
            "in_proj.lora_A.default.weight",
            "in_proj.lora_B.default.weight",
            "conv1d.modules_to_save.default.weight",
        }


class TestTraining:
    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {CHECKPOINTING: True},
            {"bf16": True},
            {"torch_compile": False, "optim": "adafactor"},
            {"label_smoothing_factor": 0.1},  # needs logits
        ],
        ids=["plain", "gradient checkpointing", "bf16 autocast", "adafactor", "label smoothing"],
    )
    def test_lowers_the_loss(self, arguments: dict[str, Any], make_trainer: Callable[..., Any]) -> None:
        trainer = make_trainer(max_steps=12, **arguments)
        trainer.train()
        first, *_, last = losses(trainer)
        assert math.isclose(first, math.log(61), rel_tol=0.1)
        assert last < 0.8 * first

    def test_gradient_checkpointing_changes_no_loss(self, make_trainer: Callable[..., Any]) -> None:
        plain, checkpointed = make_trainer(), make_trainer(**{CHECKPOINTING: True})
        runs: list[int] = []
        checkpointed.model.backbone.layers[0].mixer.register_forward_pre_hook(lambda *_: runs.append(1))
        plain.train()
        checkpointed.train()
        assert len(runs) == 2 * 4  # the mixer once more for the backward of each step
        assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-5)

    def test_bf16_autocast_stays_near_fp32(self, make_trainer: Callable[..., Any]) -> None:
        plain, autocast = make_trainer(), make_trainer(bf16=True)
        plain.train()
        autocast.train()
        assert losses(autocast) == pytest.approx(losses(plain), rel=0.02)
        assert losses(autocast) != losses(plain)

    def test_accumulated_gradients_equal_those_of_the_whole_batch(self, make_trainer: Callable[..., Any]) -> None:
        """With documents of 3 to 23 tokens, a mean of means would be far off."""
        whole = make_trainer(max_steps=1, per_device_train_batch_size=8)
        parts = make_trainer(max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4)
        whole.train()
        parts.train()
        assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
        for (name, one), (_, other) in zip(whole.model.named_parameters(), parts.model.named_parameters(), strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")

    @pytest.mark.parametrize("seq_idx", [False, True])
    def test_flattened_batches_give_the_loss_of_padded_ones(
        self, seq_idx: bool, make_trainer: Callable[..., Any]
    ) -> None:
        collator = DataCollatorWithFlattening(return_seq_idx=seq_idx, return_flash_attn_kwargs=seq_idx)
        flat, padding = make_trainer(collate=collator), make_trainer()
        flat.train()
        padding.train()
        assert losses(flat) == pytest.approx(losses(padding), rel=1e-4)

    def test_resumes_where_it_stopped(self, make_trainer: Callable[..., Any], tmp_path: Path) -> None:
        whole = make_trainer(max_steps=6, save_strategy="steps", save_steps=3)
        whole.train()
        again = make_trainer(max_steps=6)
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
        assert losses(again)[3:] == pytest.approx(losses(whole)[3:], rel=1e-6)
        for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
            torch.testing.assert_close(one, other)

    def test_accumulated_gradients_of_a_classifier_are_those_of_the_whole_batch(
        self, make_model: Callable[..., Any], documents: Any, make_trainer: Any
    ) -> None:
        def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
            return {**padded(examples), "labels": torch.tensor([len(example["input_ids"]) % 2 for example in examples])}

        def train(**arguments: Any) -> Any:
            model = make_model(Mamba2ForSequenceClassification, num_labels=2)
            trainer = make_trainer(model, collate=collate, max_steps=1, **arguments)
            trainer.train()
            return trainer

        whole = train(per_device_train_batch_size=8)
        parts = train(per_device_train_batch_size=2, gradient_accumulation_steps=4)
        assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
        norms = [trainer.state.log_history[0]["grad_norm"] for trainer in (whole, parts)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-4)

    def test_classification(self, make_model: Callable[..., Any], documents: Any, make_trainer: Any) -> None:
        for index, document in enumerate(documents):
            document["labels"] = index % 2

        def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
            return {**padded(examples), "labels": torch.tensor([example["labels"] for example in examples])}

        def accuracy(predictions: Any) -> dict[str, float]:
            return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}

        model = make_model(Mamba2ForSequenceClassification, num_labels=2)
        trainer = make_trainer(model, collate=collate, max_steps=20, compute_metrics=accuracy)
        trainer.train()
        assert trainer.evaluate()["eval_accuracy"] == 1.0


class TestLabelSmoothing:
    @pytest.mark.parametrize("hybrid", [False, True])
    def test_smooths_the_loss_of_the_next_token(
        self, hybrid: bool, make_model: Callable[..., Any], make_trainer: Callable[..., Any], documents: Any
    ) -> None:
        model = make_hybrid() if hybrid else make_model()
        trainer = make_trainer(model, label_smoothing_factor=0.1)
        batch = padded(documents)
        with torch.no_grad():
            logp = model(**{name: value for name, value in batch.items() if name != "labels"}).logits.log_softmax(-1)
        targets = batch["labels"][:, 1:]
        picked = -logp[:, :-1].gather(2, targets.clamp(min=0)[..., None])[..., 0]
        smoothed = 0.9 * picked - 0.1 * logp[:, :-1].mean(-1)
        expected = smoothed[targets != -100].mean()
        assert trainer.compute_loss(model, {**batch}).item() == pytest.approx(expected.item(), rel=1e-5)

    def test_is_that_of_other_models(self, make_trainer: Callable[..., Any], documents: Any) -> None:
        """The smoother is told to shift by the class of the model: given the same logits, it gives the same loss."""
        sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
        ours = make_hybrid()
        llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
        llama.forward = ours.forward
        batch = padded(documents)
        losses = [make_trainer(m, label_smoothing_factor=0.1).compute_loss(m, {**batch}) for m in (ours, llama)]
        torch.testing.assert_close(*losses)


class TestLogitsInTraining:
    @pytest.mark.parametrize("bf16", [False, True])  # accelerate makes the outputs anew
    def test_a_loss_of_the_user_s_is_told_how_to_get_them(self, bf16: bool, make_trainer: Callable[..., Any]) -> None:
        class OwnLoss(Trainer):
            more: dict[str, Any] = {}

            def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
                logits = model(**inputs, **self.more).logits[:, :-1].flatten(0, 1)
                return nn.functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten())

        trainer = make_trainer(trainer=OwnLoss, bf16=bf16)
        with pytest.raises(LogitsError, match="return_logits=True"):
            trainer.train()
        OwnLoss.more = {"return_logits": True}
        own, usual = make_trainer(trainer=OwnLoss, bf16=bf16), make_trainer(bf16=bf16)
        own.train()
        usual.train()
        assert losses(own)[0] == pytest.approx(losses(usual)[0], rel=1e-3)


class TestEvaluation:
    def test_loss_is_the_model_s_own(self, make_trainer: Callable[..., Any], documents: Any) -> None:
        trainer = make_trainer(per_device_eval_batch_size=8)
        with torch.no_grad():
            expected = trainer.model(**padded(documents)).loss.item()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)

    def test_metrics_read_the_logits(self, make_trainer: Callable[..., Any], documents: Any) -> None:
        seen: dict[str, Any] = {}

        def metrics(predictions: Any) -> dict[str, float]:
            seen["logits"], seen["labels"] = predictions.predictions, predictions.label_ids
            return {}

        trainer = make_trainer(per_device_eval_batch_size=4, compute_metrics=metrics)
        trainer.model.config.use_cache = True
        trainer.evaluate()
        assert isinstance(seen["logits"], np.ndarray)  # not a tuple with a cache in it
        assert seen["logits"].shape == (8, 23, 61)
        with torch.no_grad():
            expected = trainer.model(**padded(documents[:4])).logits
        np.testing.assert_allclose(seen["logits"][:4, : expected.shape[1]], expected.numpy(), atol=1e-5)
