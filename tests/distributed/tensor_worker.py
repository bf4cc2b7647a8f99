"""One of the two processes that ``test_tensor_processes.py`` starts; not collected by pytest.

Each check compares a model that the processes share with one that each of them has alone.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import ParallelismConfig
from datasets import Dataset
from distributed_worker import distance, make_hybrid, make_model, whole
from interpreting import work_once
from peft import LoraConfig, PeftModel, get_peft_model
from processes import Check, work
from steps import ops_serve, token_by_token
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint import state_dict as states_of_torch
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from mamba2_hf import Mamba2Cache, Mamba2ForCausalLM, Request, generate_batch, ops
from mamba2_hf.distributed import (
    clip_grad_norm_,
    context_parallel,
    get_state_dict,
    set_state_dict,
    tensor_parallel,
    whole_state_dict,
)
from mamba2_hf.errors import ArgumentError, CacheError, CheckpointError, ProcessError
from mamba2_hf.layers import Mamba2Mixer
from mamba2_hf.ops import dispatch, use_backend
from mamba2_hf.ops.runtime import plan
from mamba2_hf.training import fully_shard_model

CHECKS: dict[str, Check] = {}
STEPS = 3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def batch(seed: int, rows: int = 2, tokens: int = 13) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 62, (rows, tokens), generator=generator)
    starts = torch.rand(rows, tokens, generator=generator) < 0.2
    return {"input_ids": ids, "labels": ids, "seq_idx": starts.long().cumsum(1)}


def moved(model: Any) -> Any:
    """With values in what starts as zeros or ones."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.1)
    return model


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """One in whose steps rounding stays as small as it is: AdamW divides gradients by their own size."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_trains_like(plain: Any, model: Any, dtype: torch.dtype = torch.float64) -> None:
    """Logits, losses, gradients, their clipped norm and weights of three steps."""
    group, tolerance = model.get_submodule(ours(model)).tensor_group, TOLERANCE[dtype]
    one, other = optimizer(plain), optimizer(model)
    with torch.no_grad():
        ids = batch(0)["input_ids"]
        assert distance(model(ids).logits, plain(ids).logits) < tolerance
    for step in range(STEPS):
        given = batch(step)
        expected, loss = plain(**given).loss, model(**given).loss
        expected.backward()
        loss.backward()
        assert distance(loss, expected) < tolerance
        found = whole_state_dict(model, group, gradients(model))
        assert found.keys() == gradients(plain).keys()
        for name, gradient in gradients(plain).items():
            assert gradient.norm() > 0, name
            assert distance(found[name], gradient) < tolerance, (step, name, distance(found[name], gradient))
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        assert distance(clip_grad_norm_(model, 0.5), norm) < tolerance
        for each in (one, other):
            each.step()
            each.zero_grad()
    found = whole_state_dict(model, group)
    for name, value in plain.state_dict().items():
        assert torch.equal(found[name], value) or distance(found[name], value) < tolerance, name


def ours(model: Any) -> str:
    return next(name for name, module in model.named_modules() if getattr(module, "tensor_group", None) is not None)


def assert_same(make: Any, dtype: torch.dtype = torch.float64) -> None:
    plain = moved(make().to(dtype)).train()
    model = tensor_parallel(copy.deepcopy(plain), mesh())
    assert_trains_like(plain, model, dtype)


def make_pure(**changes: Any) -> Any:
    return make_model(8, **{"num_hidden_layers": 2, **changes})


@check
def one_group(folder: Path) -> None:
    assert_same(make_pure)


@check
def one_group_in_fp32_with_tied_head(folder: Path) -> None:
    assert_same(lambda: make_pure(tie_word_embeddings=True), torch.float32)


@check
def groups_and_biases(folder: Path) -> None:
    assert_same(lambda: make_pure(n_groups=4, use_bias=True))


@check
def no_bias_of_the_convolution(folder: Path) -> None:
    assert_same(lambda: make_pure(use_conv_bias=False, n_groups=2))


@check
def hybrid(folder: Path) -> None:
    assert_same(lambda: make_hybrid(n_group=1, topk_group=1))


@check
def hybrid_of_eight_heads(folder: Path) -> None:
    """For four processes too, two of which have the same keys."""
    assert_same(lambda: make_hybrid(ssm_num_heads=8, vocab_size=64))


@check
def hybrid_with_copied_keys_and_joint_norms(folder: Path) -> None:
    changes: dict[str, Any] = {
        **{"layer_blocks": ["ssd mlp", "attention moe", "ssd+attention"], "num_hidden_layers": 3, "mlp_type": "gelu"},
        **{"num_key_value_heads": 1, "attention_conv_kernel": 3, "ssm_norm": "norm_first", "shared_adapter_rank": 0},
        **{"logits_scaling": 4.0, "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.35, "residual_multiplier": 0.5},
    }
    assert_same(lambda: make_hybrid(**changes))


@check
def norms_of_several_processes(folder: Path) -> None:
    """Two groups, which four processes share and two have one each of."""
    sizes = {"layer_blocks": ["ssd", "ssd"], "num_hidden_layers": 2, "ssm_num_heads": 8, "ssm_norm_group_size": 32}
    assert_same(lambda: make_hybrid(**sizes, ssm_n_groups=2, shared_adapter_rank=0, rope_parameters=None))


@check
def hybrid_with_adapters_and_no_norm(folder: Path) -> None:
    assert_same(lambda: make_hybrid(ssm_norm="none", shared_attention_adapters=True, num_key_value_heads=1))


def with_lora(model: Any) -> Any:
    """With values in both factors."""
    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False))


@check
def lora_before(folder: Path) -> None:
    for make in (make_pure, make_hybrid):
        plain = with_lora(moved(make().double())).double().train()
        model = tensor_parallel(copy.deepcopy(plain), mesh())
        assert_trains_like(plain, model)


@check
def lora_after_and_its_checkpoints(folder: Path) -> None:
    """Adapters that are made, saved and loaded while the layers are shared."""
    plain = moved(make_pure(n_groups=1)).double()
    shared = tensor_parallel(copy.deepcopy(plain), mesh())
    torch.manual_seed(5 + dist.get_rank())  # what the first process draws counts
    model = get_peft_model(shared, LoraConfig(r=2, init_lora_weights=False)).double().train()
    model.save_pretrained(folder, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    one = PeftModel.from_pretrained(copy.deepcopy(plain), folder, is_trainable=True).double().train()
    loaded = tensor_parallel(copy.deepcopy(plain), mesh())
    again = PeftModel.from_pretrained(loaded, folder, is_trainable=True).double().train()
    ids = batch(0)["input_ids"]
    with torch.no_grad():
        assert distance(again(ids).logits, one(ids).logits) < 1e-6  # saved in fp32
    trained = whole_state_dict(model, shared.tensor_group)
    assert all(torch.equal(trained[name].float(), value.float()) for name, value in one.state_dict().items())
    assert_trains_like(one, again)
    merged = again.merge_and_unload()
    with torch.no_grad():
        assert distance(merged(ids).logits, one(ids).logits) < 1e-12


@check
def trainer(folder: Path) -> None:
    """Losses, clipped norms and weights against a loop in one process."""
    plain = moved(make_pure()).train()
    if dist.get_rank() == 0:
        plain.save_pretrained(folder / "model")
    dist.barrier()
    model = Mamba2ForCausalLM.from_pretrained(folder / "model", distributed_config=DistributedConfig(tp_size=2))
    ids = batch(0)["input_ids"]  # every step sees both rows
    options: dict[str, Any] = {
        **{"per_device_train_batch_size": 2, "max_steps": 4, "report_to": [], "save_strategy": "no", "use_cpu": True},
        **{"learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.5, "logging_steps": 1, "disable_tqdm": True},
        **{"lr_scheduler_type": "constant", "prediction_loss_only": True},
    }
    arguments = TrainingArguments(output_dir=str(folder / "out"), **options)
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids.tolist()])
    with pytest.MonkeyPatch.context() as patch:  # which knows several processes on a CPU with no other parallelism
        patch.setattr(ParallelismConfig, "_validate_accelerator", lambda *_: None)
        training = Trainer(model=model, args=arguments, train_dataset=data)
        training.train()
    logs = [log for log in training.state.log_history if "loss" in log]
    steps = torch.optim.SGD(plain.parameters(), lr=0.1)
    assert len(logs) == 4
    for log in logs:
        loss = plain(ids, labels=ids).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        assert log["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert log["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        steps.step()
        steps.zero_grad()
    training.save_model(str(folder / "trained"))
    dist.barrier()
    again = Mamba2ForCausalLM.from_pretrained(folder / "trained").state_dict()
    for name, value in plain.state_dict().items():
        assert distance(again[name], value) < 1e-5, name


@check
def generates_the_same_tokens(folder: Path) -> None:
    for make in (make_pure, lambda: make_hybrid(ssm_num_heads=8)):
        plain = moved(make()).eval()
        model = tensor_parallel(copy.deepcopy(plain), mesh())
        ids = batch(1)["input_ids"]
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        shared = {"max_new_tokens": 5, "eos_token_id": None, "attention_mask": mask}
        for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 2}, {"do_sample": True}):
            torch.manual_seed(7)
            expected = plain.generate(ids, **shared, **options)
            torch.manual_seed(7 + dist.get_rank())  # that of the first process is taken
            assert torch.equal(model.generate(ids, **shared, **options), expected), options
        again = torch.cat([ids[:1], ids[:1, :9]], 1)
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "prompt_lookup_num_tokens": 3}
        assert torch.equal(model.generate(again, **options), plain.generate(again, **options))


FAMILIES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "Bamba": ({"layer_blocks": ["ssd mlp", "attention mlp"], "ssm_use_bias": False, "mlp_bias": True},
              {"attention_step": 1, "mlp_step": 2}),
    "Granite": ({"layer_blocks": ["ssd moe", "attention moe"], "moe_router": "softmax", "residual_multiplier": 0.3,
                 "rope_parameters": None, "logits_scaling": 4.0, "attention_scale": 0.1, "embedding_multiplier": 2.0},
                {"attention_step": 1, "mlp_step": 2, "experts_step": 2}),
    "Falcon-H1": ({"layer_blocks": ["ssd+attention mlp"], "ssm_norm": "none", "attention_in_multiplier": 1.2,
                   "attention_out_multiplier": 0.9, "key_multiplier": 0.7, "mlp_multipliers": [1.2, 0.7],
                   "ssm_multipliers": [0.7, 1.2, 0.9, 1.1, 0.8]}, {"attention_step": 1, "mlp_step": 1}),
    "Nemotron": ({"layer_blocks": ["ssd", "attention", "mlp", "moe"], "mlp_type": "relu2", "ssm_norm_group_size": 8,
                  "ssm_n_groups": 2}, {"attention_step": 1, "mlp_step": 1}),
    "Zamba": ({"layer_blocks": ["shared>ssd", "ssd mlp", "shared>ssd"]}, {"mlp_step": 1}),
}  # fmt: skip
"""What the layers of each are, and how many of an op a token of one sequence takes."""


def sums(patch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of what is summed over processes from now on."""
    sent: list[torch.Size] = []
    reduce = dist.all_reduce
    patch.setattr(dist, "all_reduce", lambda tensor, **named: sent.append(tensor.shape) or reduce(tensor, **named))
    return sent


@check
@torch.no_grad()
def hybrids_step_by_ops(folder: Path) -> None:
    """With a sum a part of a layer, and as many more as the embedding and a mixture's shared MLP take."""
    called: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        sent = sums(patch)
        ops_serve(patch)
        for name in ("attention_step", "mlp_step", "experts_step"):
            step = getattr(ops, name)
            patch.setattr(ops, name, lambda call, s=step, n=name, **shared: called.append(n) or s(call, **shared))
        for family, (changes, expected) in FAMILIES.items():
            sizes = {
                **{"vocab_size": 64, "ssm_num_heads": 8, "experts_implementation": "grouped_mm"},
                "shared_adapter_rank": 2 * (family == "Zamba"),
                "num_hidden_layers": len(changes["layer_blocks"]),
                **changes,
            }
            plain = moved(make_hybrid(**sizes).double())
            model = tensor_parallel(copy.deepcopy(plain), mesh())
            pairs = [(plain, model)]
            if dist.get_world_size() == 2:
                adapted = with_lora(copy.deepcopy(plain)).double()
                pairs.append((adapted, tensor_parallel(copy.deepcopy(adapted), mesh())))
            for one, other in pairs:
                for rows in (1, 3):
                    ids = batch(1, rows=rows)["input_ids"]
                    known = token_by_token(one.eval(), ids, 3)
                    called.clear()
                    found = token_by_token(other.eval(), ids, 3)
                    assert distance(found, known) < 1e-12, (family, rows, distance(found, known))
                    assert torch.equal(found.argmax(-1), known.argmax(-1))
                    if one is plain:
                        served = expected if rows == 1 else {n: c for n, c in expected.items() if n != "mlp_step"}
                        assert Counter(called) == {n: 3 * c for n, c in served.items()}, (family, rows)
            cache = Mamba2Cache(model.config, static=True, max_length=20)
            model(ids[:1], past_key_values=cache)
            sent.clear()
            model(ids[:1, :1], past_key_values=cache)
            blocks = "+".join(changes["layer_blocks"]).replace(" ", "+").replace("shared>ssd", "ssd+attention+mlp")
            with_shared = blocks.count("moe")  # whose shared MLP is summed before
            assert len(sent) == 1 + len(blocks.split("+")) + with_shared, (family, sent)


@check
def saves_the_whole_checkpoint(folder: Path) -> None:
    for index, make in enumerate((make_pure, lambda: make_pure(n_groups=4, tie_word_embeddings=True), make_hybrid)):
        plain = moved(make())
        model = tensor_parallel(copy.deepcopy(plain), mesh())
        model.save_pretrained(folder / str(index), is_main_process=dist.get_rank() == 0)
        dist.barrier()
        again = type(plain).from_pretrained(folder / str(index)).state_dict()
        assert again.keys() == plain.state_dict().keys()
        for name, value in plain.state_dict().items():
            assert torch.equal(again[name], value), name


@check
def is_loaded_by_either_argument(folder: Path) -> None:
    plain = moved(make_pure()).eval()
    if dist.get_rank() == 0:
        plain.save_pretrained(folder / "model")
    dist.barrier()
    ids = batch(1)["input_ids"]
    for options in (
        {"tp_plan": "auto"},
        {"distributed_config": DistributedConfig(tp_size=2)},
        {"device_mesh": mesh(), "tp_size": 2},
    ):
        model = Mamba2ForCausalLM.from_pretrained(folder / "model", **options)
        assert model.tp_size == 2
        assert model.backbone.layers[0].mixer.num_heads == 4
        with torch.no_grad():
            assert distance(model(ids).logits, plain(ids).logits) < 1e-5
    model.save_pretrained(folder / "again")
    again = Mamba2ForCausalLM.from_pretrained(folder / "again")
    assert not hasattr(again.config, "distributed_config") or again.config.distributed_config is None
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in again.state_dict().items())
    with pytest.raises(ArgumentError, match="leave it out"):
        model.save_pretrained(folder / "sharded", distributed_checkpoint=True)


@check
def a_token_takes_one_sum_a_layer(folder: Path) -> None:
    """Also where the gated norm is one group over all heads."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        sent = sums(patch)
        for groups, numbers in ((1, 33), (4, 32)):
            model = tensor_parallel(make_pure(n_groups=groups), mesh()).eval()
            cache = model(batch(1)["input_ids"]).past_key_values
            sent.clear()
            model(batch(1)["input_ids"][:, -1:], past_key_values=cache)
            assert sent == [(2, 1, 32), *2 * [(2, 1, numbers)]]  # the embedding's, then a layer's each


@check
def layers_are_one_op(folder: Path) -> None:
    """In training and over prompts too, with a sum each way, what copies of weights add, and two numbers a token."""

    def called(mixer: Any, *_: Any) -> None:
        raise AssertionError("a mixer is called as a module")

    with pytest.MonkeyPatch.context() as patch:
        sent = sums(patch)
        patch.setattr(Mamba2Mixer, "forward", called)
        ids = batch(1)["input_ids"]
        stream, number = (2, 13, 32), (2, 13, 1)
        for groups, one, copies in ((1, [number], [(16 * 32 + 16 * 5,)]), (4, [], [])):
            model = tensor_parallel(make_pure(n_groups=groups, num_hidden_layers=1), mesh())
            for prompt in (True, False):
                sent.clear()
                with torch.set_grad_enabled(not prompt):
                    loss = model.backbone(ids).last_hidden_state.sum()
                assert sent == [stream, *one, stream]  # the embedding's first
            sent.clear()
            loss.backward()
            assert sent == [stream, *copies]
        model = tensor_parallel(with_lora(make_pure()), mesh())
        model(**batch(0)).loss.backward()


@check
def attention_and_mlps_train_with_a_sum_each_way(folder: Path) -> None:
    """Beside what LoRA takes: what enters its last factor, and gradients of the first, for each projection."""
    ids = batch(1)["input_ids"]
    sizes = {"layer_blocks": ["attention mlp"], "num_hidden_layers": 1, "shared_adapter_rank": 0, "vocab_size": 61}
    with pytest.MonkeyPatch.context() as patch:
        sent = sums(patch)
        for adapted in (False, True):
            plain = make_hybrid(**sizes)
            model = tensor_parallel(with_lora(plain) if adapted else plain, mesh())
            sent.clear()
            loss = model(ids, labels=ids).loss
            assert Counter(sent) == Counter(2 * [(2, 13, 16)] + adapted * 2 * [(2, 13, 2)]), sent
            sent.clear()
            loss.backward()
            # What enters the first layer then needs no gradient: the embedding is frozen.
            assert Counter(sent) == Counter((2 - adapted) * [(2, 13, 16)] + adapted * 5 * [(2 * 16,)]), sent


@check
def layers_are_one_op_on_triton(folder: Path) -> None:
    """In its interpreter; plans of a layer's pieces are made and carried out."""
    work_once()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_usable", lambda device: (True, "by test"))
        patch.setattr(plan, "enabled", lambda: True)
        given = batch(0, tokens=9)
        for changes in ({"n_groups": 1, "use_bias": True}, {"n_groups": 4}):
            plain = moved(make_pure(num_hidden_layers=1, **changes)).train()
            model = tensor_parallel(copy.deepcopy(plain), mesh())
            with use_backend("torch"):
                plain.double()(**given).loss.backward()
            for _ in range(3):
                model.zero_grad()
                with use_backend("triton"):
                    model(**given).loss.backward()
                found = whole_state_dict(model, model.tensor_group, gradients(model))
                for name, gradient in gradients(plain).items():
                    assert distance(found[name].double(), gradient) < 5e-5, name


@check
def batches_are_served_alike(folder: Path) -> None:
    """By all processes, with random numbers of the first."""
    plain = moved(make_pure()).eval()
    model = tensor_parallel(copy.deepcopy(plain), mesh())
    texts = [row[:length] for row, length in zip(batch(1, rows=3)["input_ids"], (3, 9, 13), strict=True)]
    for sampled in (False, True):
        requests = [Request(ids, {"max_new_tokens": 5, "eos_token_id": None, "do_sample": sampled}) for ids in texts]
        torch.manual_seed(7)
        expected = generate_batch(plain, requests, slots=2)
        torch.manual_seed(7 + dist.get_rank())
        assert generate_batch(model, requests, slots=2) == expected


@check
def checkpointing_runs_layers_twice(folder: Path) -> None:
    plain = moved(make_hybrid().double()).train()
    model = tensor_parallel(copy.deepcopy(plain), mesh())
    model.gradient_checkpointing_enable()
    assert_trains_like(plain, model)


@check
def with_slices_of_sequences(folder: Path) -> None:
    """Some processes share the layers, others the tokens."""
    others = dist.get_world_size() // 2
    both = init_device_mesh("cpu", (others, 2), mesh_dim_names=("cp", "tp"))
    for make in (make_pure, make_hybrid):
        plain = moved(make().double()).train()
        model = context_parallel(tensor_parallel(copy.deepcopy(plain), both), both)
        given = batch(2, tokens=24)
        expected, loss = plain(**given).loss, model(**given).loss
        expected.backward()
        loss.backward()
        assert distance(loss, expected) < 1e-12
        for gradient in gradients(model).values():
            dist.all_reduce(gradient, group=both["cp"].get_group())
            gradient /= others
        found = whole_state_dict(model, model.tensor_group, gradients(model))
        for name, gradient in gradients(plain).items():
            assert distance(found[name], gradient) < 1e-12, name


@check
def with_data_parallelism(folder: Path) -> None:
    """DDP and FSDP2 around the parts, each over its own dimension of the mesh."""
    others = dist.get_world_size() // 2
    both = init_device_mesh("cpu", (others, 2), mesh_dim_names=("dp", "tp"))
    given = [batch(seed) for seed in range(others)]
    mine = given[both["dp"].get_local_rank()]
    for make, shard in ((make_pure, True), (make_hybrid, True), (make_pure, False)):
        plain = moved(make().double()).train()
        model = tensor_parallel(copy.deepcopy(plain), both)
        group = model.tensor_group
        if shard:
            fully_shard_model(model, mesh=both["dp"])
        wrapped = model if shard else DistributedDataParallel(model, process_group=both["dp"].get_group())
        for _ in range(2):  # gradients are added up
            for part in given:
                (plain(**part).loss / others).backward()
            wrapped(**mine).loss.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        assert distance(clip_grad_norm_(model, 0.5), norm) < 1e-12
        found = {name: whole(tensor) for name, tensor in whole_state_dict(model, group, gradients(model)).items()}
        for name, gradient in gradients(plain).items():
            assert distance(found[name], gradient) < 1e-12, name


def states(model: nn.Module, steps: torch.optim.Optimizer) -> dict[str, Any]:
    return dict(zip(("model", "optimizer"), get_state_dict(model, steps), strict=True))


def load(model: nn.Module, steps: torch.optim.Optimizer, folder: Path) -> None:
    found = states(model, steps)
    dcp.load(found, checkpoint_id=folder)
    set_state_dict(model, steps, model_state_dict=found["model"], optim_state_dict=found["optimizer"])


def train(model: Any, steps: torch.optim.Optimizer, seeds: range, dp: Any = None) -> None:
    """Each process of ``dp`` has rows of its own, as many tokens as others."""
    for seed in seeds:
        given = batch(seed, rows=dist.get_world_size())
        del given["seq_idx"]
        if dp is not None:
            rank, size = dp.get_local_rank(), dp.size()
            given = {name: value.chunk(size)[rank] for name, value in given.items()}
        model(**given).loss.backward()
        steps.step()
        steps.zero_grad()


def assert_same_states(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["model"].keys() == other["model"].keys()
    assert one["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    assert one["optimizer"]["state"].keys() == other["optimizer"]["state"].keys()
    pairs = [(name, value, other["model"][name]) for name, value in one["model"].items()]
    for name, state in one["optimizer"]["state"].items():
        assert state.keys() == other["optimizer"]["state"][name].keys()
        pairs += [(f"{name}: {key}", value, other["optimizer"]["state"][name][key]) for key, value in state.items()]
    for name, value, found in pairs:
        assert value.device.type == "cpu"
        assert type(value) is Tensor
        assert torch.equal(found, value) or distance(found, value) < 1e-12, name


@check
def checkpoints_go_from_mesh_to_mesh(folder: Path) -> None:
    """Saved by processes that share layers, with FSDP2 and without; each other mesh goes on as if nothing had been."""
    world = dist.get_world_size()
    both = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    sharded = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    few: dict[str, Any] = {
        **{"layer_blocks": ["attention moe", "shared>ssd", "shared>ssd"], "num_hidden_layers": 3},
        "tie_word_embeddings": True,
    }
    recipes: list[tuple[str, Any, Any]] = [
        ("tp", make_pure, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        # Steps of a size that a gradient's rounding does not change: AdamW divides gradients by their own size.
        ("dp x tp", lambda: make_hybrid(**few), lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1.0)),
    ]
    for saving, make, optimizer_of in recipes[world // 2 - 1 :]:  # four processes save by a mesh of both
        start = moved(make().double()).train()

        def begin(kind: str, start: Any = start, optimizer_of: Any = optimizer_of) -> tuple[Any, Any, Any]:
            model, dp = copy.deepcopy(start), None
            if "tp" in kind:
                tensor_parallel(model, both)
            if "dp" in kind:
                dp = both["dp"] if "tp" in kind else sharded
                fully_shard_model(model, mesh=dp)
            return model, optimizer_of(model.parameters()), dp

        def forget(model: nn.Module, steps: torch.optim.Optimizer) -> None:
            steps.param_groups[0]["lr"] = 7.0
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()

        plain, steps, _ = begin("one")
        train(plain, steps, range(2))
        saved = states(plain, steps)
        train(plain, steps, range(2, 3))
        ended = states(plain, steps)
        at = folder / saving
        model, its_steps, dp = begin(saving)
        train(model, its_steps, range(2), dp)
        assert_same_states(states(model, its_steps), saved)
        dcp.save(states(model, its_steps), checkpoint_id=at)
        for kind in ("one", "tp", "dp", "dp x tp"):
            model, its_steps, dp = begin(kind)
            forget(model, its_steps)
            load(model, its_steps, at)
            assert_same_states(states(model, its_steps), saved)
            train(model, its_steps, range(2, 3), dp)
            assert_same_states(states(model, its_steps), ended)
        # by PyTorch alone, where layers are whole
        model, its_steps, _ = begin("dp")
        found = dict(zip(("model", "optimizer"), states_of_torch.get_state_dict(model, its_steps), strict=True))
        dcp.load(found, checkpoint_id=at)
        states_of_torch.set_state_dict(
            model, its_steps, model_state_dict=found["model"], optim_state_dict=found["optimizer"]
        )
        assert_same_states(states(model, its_steps), saved)


@check
def checkpoints_that_do_not_fit_are_refused(folder: Path) -> None:
    model = tensor_parallel(make_pure(), mesh()).train()
    steps = torch.optim.AdamW(model.parameters())
    train(model, steps, range(1))
    alone = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))["dp"]
    wrapped = DistributedDataParallel(model, process_group=alone.get_group())
    assert_same_states(states(wrapped, steps), states(model, steps))
    before = states(model, steps)
    weight = "backbone.layers.1.mixer.in_proj.weight"

    def refused(match: str, change: Any) -> None:
        given = copy.deepcopy(before)
        change(given)
        with pytest.raises(CheckpointError, match=match):
            set_state_dict(model, steps, model_state_dict=given["model"], optim_state_dict=given["optimizer"])
        assert_same_states(states(model, steps), before)

    refused(rf"lacks {weight}:", lambda given: given["model"].pop(weight))
    refused(r"has, and the model has not, extra:", lambda given: given["model"].update(extra=torch.zeros(1)))
    shape = r"has the shape \(3, 2\), and the model's whole tensor \(\d+, 32\)"
    refused(f"^{weight} {shape}", lambda given: given["model"].update({weight: torch.zeros(3, 2)}))
    refused(
        f"^exp_avg of {weight} in the optimizer's state {shape}",
        lambda given: given["optimizer"]["state"][weight].update(exp_avg=torch.zeros(3, 2)),
    )
    refused(f"^the optimizer's state .* lacks {weight}:", lambda given: given["optimizer"]["state"].pop(weight))
    refused("^the optimizer's state .* not, extra:", lambda given: given["optimizer"]["state"].update(extra={}))
    factored = torch.optim.Adafactor(model.parameters())
    with pytest.raises(CheckpointError, match=r"row_var of .* the process's piece of the parameter .* as AdamW's"):
        get_state_dict(model, factored)
    renamed = copy.deepcopy(model)
    renamed.backbone.layers[1] = checkpoint_wrapper(renamed.backbone.layers[1])
    with pytest.raises(ArgumentError, match=r"layers.1.* is cut, and the model's state has no such name"):
        get_state_dict(renamed)
    # DCP names the tensor too, on all processes
    dcp.save(before, checkpoint_id=folder / "saved")
    other = tensor_parallel(make_pure(num_hidden_layers=1, vocab_size=64), mesh())
    found = {"model": get_state_dict(other)[0]}
    with pytest.raises(dcp.CheckpointException, match=r"Size mismatch .*embeddings.weight"):
        dcp.load(found, checkpoint_id=folder / "saved")


@check
def what_parts_cannot_give_is_refused(folder: Path) -> None:
    model = tensor_parallel(make_pure(), mesh()).eval()
    ids = batch(1)["input_ids"]
    with pytest.raises(ArgumentError, match="2 processes share: each has the matrices"):
        model(ids, output_attentions=True)
    with pytest.raises(ArgumentError, match="vocab_size=62"):
        model(torch.tensor([[3, 62]]))
    with pytest.raises(ArgumentError, match="2 processes share the model: resize_token_embeddings"):
        model.resize_token_embeddings(70)
    cache = model.read(ids)
    with pytest.raises(CacheError, match="2 processes share the model"):
        cache.save(folder / "state", model)


NOT_SHARED: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"ssm_num_heads": 5}, r"mixer: num_heads=5 heads .* by 2 processes.*divides 5: 1, 5"),
    "groups": ({"ssm_n_groups": 3}, r"mixer: n_groups=3 groups .* by 2 processes .* a multiple of it"),
    "queries": ({"num_attention_heads": 3, "num_key_value_heads": 1}, r"num_attention_heads=3 heads .* by 2 processes"),
    "keys": ({"num_attention_heads": 6, "num_key_value_heads": 3}, r"num_key_value_heads=3 heads can neither"),
    "MLPs": ({"intermediate_size": 9}, r"mlp: intermediate_size=9 channels .* by 2 .*divides 9: 1, 3, 9"),
    "experts": ({"moe_intermediate_size": 7}, r"experts: moe_intermediate_size=7 channels .*divides 7: 1, 7"),
    "norms": ({"ssm_norm_group_size": 16}, r"norm: 3 groups of 16 channels can neither be shared by 2 processes"),
}


@check
def what_cannot_be_shared_is_refused(folder: Path) -> None:
    """By every process, with value and remedy; the model stays as it was."""
    for name, (changes, message) in NOT_SHARED.items():
        model = make_hybrid(**changes)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ArgumentError, match=message):
            tensor_parallel(model, mesh())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), name
    with pytest.raises(ArgumentError, match="'tp' is needed"):
        tensor_parallel(make_pure(), init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "cp")))
    with pytest.raises(ArgumentError, match="holds no layers"):
        tensor_parallel(nn.Linear(2, 2), mesh())
    model = make_pure()
    model.backbone.layers[0].mixer.in_proj = nn.Identity()
    with pytest.raises(ArgumentError, match=r"layers.0.mixer.in_proj is a .*Identity"):
        tensor_parallel(model, mesh())


@check
def a_process_that_fails_is_not_waited_for(folder: Path) -> None:
    """What one cannot load or cut, none goes on with; the others say what it said."""
    last = dist.get_rank() == 1
    model = make_pure()
    before = copy.deepcopy(model.state_dict())
    if last:
        model.backbone.layers[0].mixer.in_proj = nn.Identity()
    own, others = r"layers.0.mixer.in_proj is a .*Identity", "process 1 of the 2 .* failed: ArgumentError: .*in_proj is"
    with pytest.raises(ArgumentError if last else ProcessError, match=own if last else others):
        tensor_parallel(model, mesh())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(
        ArgumentError, match=r"different models: .* \(62, 32\) in process 0 .* \(64, 32\) in process 1\. Make or load"
    ):
        tensor_parallel(make_pure(num_hidden_layers=1, vocab_size=62 + 2 * last), mesh())
    if dist.get_rank() == 0:
        make_pure().save_pretrained(folder / "model")
    dist.barrier()
    with pytest.raises(OSError if last else ProcessError, match="nowhere"):
        Mamba2ForCausalLM.from_pretrained(folder / ("nowhere" if last else "model"), tp_plan="auto")
    assert Mamba2ForCausalLM.from_pretrained(folder / "model", tp_plan="auto").tp_size == 2


if __name__ == "__main__":
    work(CHECKS, Path(sys.argv[1]), *sys.argv[2:])
