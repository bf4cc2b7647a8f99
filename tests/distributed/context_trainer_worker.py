"""One of the two processes that ``test_context_trainer.py`` starts; sequences are spread over both by accelerate.

Not collected by pytest. On a CPU accelerate never turns FSDP2 on, so it is told that the processes have other devices.
"""

from __future__ import annotations

import copy
import csv
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pretrain
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate_worker import let_fsdp_run_on_a_cpu
from context_worker import batch
from datasets import Dataset
from distributed_worker import make_hybrid, make_model
from processes import Check, work
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from mamba2_hf import Mamba2ForCausalLM
from mamba2_hf.errors import ArgumentError

CHECKS: dict[str, Check] = {}
MODELS = {"pure": make_model, "hybrid": make_hybrid}
ROWS = [{name: tensor[0].tolist() for name, tensor in batch(1, 33, seed).items()} for seed in range(8)]


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def train(model: Any, folder: Path, *, spread: bool, **more: Any) -> Trainer:
    """A trainer for three steps of two batches each."""
    options = {"parallelism_config": ParallelismConfig(cp_size=2)} if spread else {}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        optim="sgd",  # AdamW divides gradients by their own size, and makes rounding as large
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        prediction_loss_only=True,
        max_grad_norm=1.0,
        **options,
        **more,
    )
    return Trainer(model, arguments, train_dataset=Dataset.from_list(ROWS), eval_dataset=Dataset.from_list(ROWS))


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return [*curve, *norms, trainer.evaluate()["eval_loss"]]


def expected() -> dict[str, list[float]]:
    """What one process finds."""
    with tempfile.TemporaryDirectory() as folder:
        found = {kind: losses(train(make().train(), Path(folder), spread=False)) for kind, make in MODELS.items()}
        return {**found, "example": example_losses(Path(folder))}


def example_losses(folder: Path, *options: str) -> list[float]:
    """Of the first steps of the example."""
    sizes = ("--preset", "tiny", "--steps", "3", "--batch", "2", "--length", "65")
    pretrain.app([*sizes, "--out", str(folder / "run"), *options], standalone_mode=False)
    if dist.is_initialized():
        dist.barrier()  # one process writes the file
    with (folder / "run" / "loss.csv").open(newline="") as file:
        return [float(row["train"]) for row in csv.DictReader(file) if row["train"]]


@check
def trainer_with_fsdp2(folder: Path) -> None:
    known = json.loads((folder.parent / "expected.json").read_text())
    for kind, make in MODELS.items():
        trainer = train(make().train(), folder, spread=True)
        assert losses(trainer) == pytest.approx(known[kind], rel=1e-4), kind
        model = trainer.model_wrapped
        assert all(isinstance(p, DTensor) for p in model.backbone.layers.parameters())
        assert model.backbone.context.group.size == 2
        AcceleratorState._reset_state(reset_partial_state=True)


@check
def pretraining_example(folder: Path) -> None:
    known = json.loads((folder.parent / "expected.json").read_text())["example"]
    assert example_losses(folder, "--context", "2") == pytest.approx(known, rel=1e-5)
    AcceleratorState._reset_state(reset_partial_state=True)


@check
def pretraining_example_by_heads(folder: Path) -> None:
    known = json.loads((folder.parent / "expected.json").read_text())["example"]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ACCELERATE_USE_FSDP")
        assert example_losses(folder, "--tensor", "2") == pytest.approx(known, rel=1e-5)
    trained = Mamba2ForCausalLM.from_pretrained(folder / "run" / "model")
    assert trained.tensor_group is None
    assert trained.backbone.layers[0].mixer.in_proj.weight.shape[0] == 2 * 128 + 2 * 128 + 2
    AcceleratorState._reset_state(reset_partial_state=True)


@check
def trainer_refuses_what_needs_all_logits(folder: Path) -> None:
    trainer = train(make_model().train(), folder, spread=True, label_smoothing_factor=0.1)
    with pytest.raises(ArgumentError, match="label_smoothing_factor needs all logits, and with cp_size=2"):
        trainer.train()
    AcceleratorState._reset_state(reset_partial_state=True)


@check
def accelerate_leaves_batches_whole(folder: Path) -> None:
    """Also in the loop that accelerate's own documentation has for models whose batches it cuts."""
    plain, given = make_model().train(), batch(2, 21, 0)
    accelerator = Accelerator(cpu=True, parallelism_config=ParallelismConfig(cp_size=2))
    model = copy.deepcopy(plain)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ids = given["input_ids"].clone()
    with accelerator.maybe_context_parallel(buffers=[ids], buffer_seq_dims=[1], no_restore_buffers={ids}):
        loss = model(ids, labels=given["labels"]).loss
        accelerator.backward(loss)
    own = plain(given["input_ids"], labels=given["labels"]).loss
    own.backward()
    assert loss.item() == pytest.approx(own.item(), rel=1e-5)
    norm = accelerator.clip_grad_norm_(model.parameters(), 1e9)
    assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(plain.parameters(), 1e9).item(), rel=1e-5)
    optimizer.step()


if __name__ == "__main__":
    if sys.argv[1] == "alone":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
        Path(sys.argv[2]).write_text(json.dumps(expected()))
        sys.exit()
    # As accelerate launch --use_fsdp --fsdp_version 2 sets them.
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP")
    let_fsdp_run_on_a_cpu()
    work(CHECKS, Path(sys.argv[1]), *sys.argv[2:])
