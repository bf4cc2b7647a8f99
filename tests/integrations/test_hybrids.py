"""Hybrids under PEFT, Trainer, TRL and accelerate's offloading: as their pure siblings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from datasets import Dataset
from hybrids import ARCHITECTURES, make_hybrid
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from test_trl import documents, token_mean, tokenizer  # noqa: F401
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from mamba2_hf import Mamba2HybridForCausalLM, Mamba2HybridForSequenceClassification, parameter_groups

pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated"),  # TRL and PEFT read it
    pytest.mark.filterwarnings("ignore:`(return_outputs=True|label_smoothing_factor)`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`.*` was set to a device map"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),  # PEFT looks for the base's on the Hub
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1"),
    pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on a device type"),
]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
IDS = torch.randint(3, 61, (2, 13), generator=torch.Generator().manual_seed(1))
every = pytest.mark.parametrize("name", ARCHITECTURES)
LINEARS = {
    "plain": {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "sigmoid": {
        *("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
        *("latent_in", "latent_out"),
    },
    "shared": {
        *("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("linear", "0", "1"),
    },
}


def adapt(model: Any, **config: Any) -> Any:
    adapted = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, **{"r": 4, **config}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
    return adapted.eval()


def adapted_modules(model: Any) -> set[str]:
    return {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_modules() if ".lora_A" in name}


class TestLora:
    @every
    @pytest.mark.parametrize("targets", [None, "all-linear"])
    def test_reaches_every_linear_and_merges(self, name: str, targets: str | None) -> None:
        plain = make_hybrid(name)(IDS).logits
        adapted = adapt(make_hybrid(name), target_modules=targets)
        if targets and name in LINEARS:
            assert adapted_modules(adapted) == LINEARS[name]
        adapted.train()(IDS, labels=IDS).loss.backward()
        for parameter_name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, parameter_name
                assert parameter.grad.abs().max() > 0, parameter_name
        adapted.eval()
        with torch.no_grad():
            logits = adapted(IDS).logits
            assert (logits - plain).abs().max() > 0.05
            cache = adapted(IDS[:, :6], use_cache=True).past_key_values
            steps = [adapted(token, past_key_values=cache).logits for token in IDS[:, 6:].split(1, 1)]
            torch.testing.assert_close(torch.cat(steps, 1), logits[:, 6:], **CLOSE)
            merged = adapted.merge_and_unload()
            assert type(merged) is Mamba2HybridForCausalLM
            torch.testing.assert_close(merged(IDS).logits, logits, **CLOSE)

    @pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["LoRA", "DoRA", "rsLoRA"])
    @pytest.mark.parametrize("name", ["plain", "parallel", "sigmoid", "shared"])
    def test_trained_saved_reloaded_and_merged(self, name: str, kind: dict[str, bool], tmp_path: Path) -> None:
        make_hybrid(name).save_pretrained(tmp_path / "base")
        config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules="all-linear", **kind)
        adapted = get_peft_model(Mamba2HybridForCausalLM.from_pretrained(tmp_path / "base"), config).train()
        optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=0.05)
        for _ in range(2):
            adapted(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        adapted.eval().save_pretrained(tmp_path / "adapter")
        base = Mamba2HybridForCausalLM.from_pretrained(tmp_path / "base").eval()
        with torch.no_grad():
            expected, plain = adapted(IDS).logits, base(IDS).logits
            again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
            assert (expected - plain).abs().max() > 0.05
            assert torch.equal(again(IDS).logits, expected)
            torch.testing.assert_close(again.merge_and_unload()(IDS).logits, expected, rtol=1e-4, atol=1e-4)

    def test_default_targets(self) -> None:
        assert adapted_modules(adapt(make_hybrid("plain"))) == LINEARS["plain"]

    def test_the_head_of_a_classifier_stays_trainable(self) -> None:
        model = make_hybrid("plain", Mamba2HybridForSequenceClassification, num_labels=3)
        adapted = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=4))
        adapted(IDS, labels=torch.tensor([0, 2])).loss.backward()
        trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
        assert "base_model.model.score.modules_to_save.default.weight" in trained

    def test_an_adapted_convolution_is_called(self) -> None:
        model = make_hybrid("rotary")
        taps = model.backbone.layers[0].blocks[0].attention.conv1d
        adapted = adapt(model, target_modules=r".*attention\.conv1d", r=taps.in_channels)
        with torch.no_grad():
            logits = adapted(IDS).logits
            assert (logits - make_hybrid("rotary")(IDS).logits).abs().max() > 0.01
            mask = torch.ones_like(IDS)
            mask[0, :5] = 0
            padded = adapted(IDS, attention_mask=mask).logits[0, 5:]
            torch.testing.assert_close(padded, adapted(IDS[:1, 5:]).logits[0], **CLOSE)


# Every other part is on disk, so that a shared block is elsewhere than the layers that use it.
ON_DISK = ("layers.1", "layers.3", "shared_blocks.0", "lm_head")


@pytest.mark.parametrize("name", ["rotary", "parallel", "sigmoid", "shared"])
@pytest.mark.parametrize("place", ["cpu_offload", "disk_offload", "device_map", "auto"])
@torch.no_grad()
def test_offloaded(name: str, place: str, tmp_path: Path) -> None:
    plain = make_hybrid(name, tie_word_embeddings=False)
    placed = make_hybrid(name, tie_word_embeddings=False)
    if place == "cpu_offload":
        cpu_offload(placed, execution_device=torch.device("cpu"))
    elif place == "disk_offload":
        disk_offload(placed, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        placed.save_pretrained(tmp_path / "model")
        parts = [part for part, _ in placed.named_modules() if part.count(".") == 2 and part[-1].isdigit()]
        parts += ["backbone.embeddings", "backbone.norm_f", "lm_head"]
        parts += ["backbone.rotary"] if hasattr(placed.backbone, "rotary") else []
        places = {part: "disk" if part.endswith(ON_DISK) else "cpu" for part in parts}
        options = {"device_map": places}
        if place == "auto":
            options = {"device_map": "auto", "max_memory": {"cpu": "30KB"}}
        placed = Mamba2HybridForCausalLM.from_pretrained(
            tmp_path / "model", offload_folder=str(tmp_path / "offload"), **options
        )
        placed.config._experts_implementation = plain.config._experts_implementation
    assert any(parameter.is_meta for parameter in placed.parameters())
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    torch.testing.assert_close(placed(IDS, attention_mask=mask).logits, plain(IDS, attention_mask=mask).logits, **CLOSE)
    cache = placed(IDS[:, :9]).past_key_values
    steps = [placed(part, past_key_values=cache).logits for part in IDS[:, 9:].split([1, 2, 1], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), plain(IDS).logits[:, 9:], **CLOSE)
    ids = torch.cat([IDS[:1], IDS[:1, :9]], 1)  # something to look up
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = plain.generate(ids, **greedy)
    for guesses in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": placed}):
        assert torch.equal(placed.generate(ids, **guesses, **greedy), expected)


class TestTrainer:
    @every
    def test_what_does_not_decay(self, name: str, tmp_path: Path) -> None:
        model = make_hybrid(name)
        arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
        decayed = set(Trainer(model=model, args=arguments).get_decay_parameter_names(model))
        names = {parameter for parameter, _ in model.named_parameters()}
        for kept in names - decayed:
            assert kept.endswith(("A_log", "D", "dt_bias", "bias", "norm.weight", "norm_f.weight")), kept
        last = {parameter.rpartition(".")[2] for parameter in decayed}
        assert last <= {"weight", "gate_up_proj", "up_proj", "down_proj"}
        groups = parameter_groups(model, 0.1)
        by_id = {id(parameter): parameter_name for parameter_name, parameter in model.named_parameters()}
        assert {by_id[id(parameter)] for parameter in groups[0]["params"]} == decayed & names  # a tied head is one

    def test_trains(self, tmp_path: Path) -> None:
        model = make_hybrid("sigmoid", output_router_logits=True)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=6, learning_rate=1e-2, logging_steps=1,
            save_strategy="no", disable_tqdm=True, per_device_train_batch_size=2,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in IDS.tolist()] * 6
        trainer = Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows))
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        assert trainer.evaluate(Dataset.from_list(rows[:2]))["eval_loss"] > 0


@pytest.mark.parametrize("name", ["parallel", "rotary"])
@pytest.mark.parametrize("layout", ["padded", "padding-free", "packed"])
def test_trl_s_loss_is_the_mean_over_separate_documents(
    name: str, layout: str, documents: list[list[int]], tokenizer: Any, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    """TRL computes logits itself, so the scale of logits has to have a name that it knows."""
    layouts: dict[str, dict[str, Any]] = {
        "padded": {"max_length": 64},
        "padding-free": {"padding_free": True, "max_length": None},
        "packed": {"packing": True, "packing_strategy": "bfd", "max_length": 98, "per_device_train_batch_size": 1},
    }
    arguments: dict[str, Any] = {
        "output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "logging_steps": 1, "per_device_train_batch_size": 8, "max_steps": 1, "train_sampling_strategy": "sequential",
        "shuffle_dataset": False, "dataloader_pin_memory": False, "bf16": False,
    }  # fmt: skip
    dataset = Dataset.from_list([{"input_ids": ids} for ids in documents])
    trainer = SFTTrainer(
        model=make_hybrid(name),
        args=SFTConfig(**{**arguments, **layouts[layout]}),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx([token_mean(make_hybrid(name), documents)], rel=1e-4)
