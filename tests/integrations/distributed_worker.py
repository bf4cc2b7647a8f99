"""One of the processes that ``test_distributed.py`` starts: runs the checks and writes down how each went.

Not collected by pytest. Every process runs the same checks in the same order; the first that fails is the last.
"""

from __future__ import annotations

import copy
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_graphs
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from mamba2_hf import Mamba2Config, Mamba2ForCausalLM, Mamba2HybridConfig, Mamba2HybridForCausalLM
from mamba2_hf.distributed import whole_state_dict
from mamba2_hf.errors import ArgumentError, BackendError
from mamba2_hf.layers import Mamba2Mixer
from mamba2_hf.layers.fp32 import KeepsFp32
from mamba2_hf.training import CapturedStep, captured, fsdp1_wrap_policy, fully_shard_model

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FP32 = Mamba2Mixer.fp32_parameters
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
CHECKS: dict[str, Callable[[Path], None]] = {}


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CHECKS[function.__name__] = function
    return function


def make_model(heads: int = 5, **changes: Any) -> Any:
    """By default with heads that no two processes can share evenly."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 62,
        "hidden_size": 4 * heads,
        "num_hidden_layers": 2,
        "num_heads": heads,
        "head_dim": 8,
        "n_groups": 1,
        "state_size": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return Mamba2ForCausalLM(Mamba2Config(**{**sizes, **changes})).eval()


def make_hybrid(**changes: Any) -> Any:
    """A layer of each kind, and a block that two of them share."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 62,
        "hidden_size": 16,
        "layer_blocks": ["ssd mlp", "attention moe", "shared>ssd", "shared>ssd", "ssd+attention"],
        **{"ssm_num_heads": 6, "ssm_head_dim": 8, "ssm_state_size": 8, "ssm_use_bias": True, "attention_bias": True},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 16},
        **{"num_experts": 4, "moe_intermediate_size": 8, "moe_router": "sigmoid", "shared_expert_intermediate_size": 8},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "shared_adapter_rank": 2},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
        "experts_implementation": "eager",
    }
    config = Mamba2HybridConfig(**{"num_hidden_layers": 5, **sizes, **changes})
    return Mamba2HybridForCausalLM(config).eval()


def shard(model: Any, **options: Any) -> Any:
    """As users of FSDP2 do it: every block, then the model."""
    for block in model.backbone.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


IDS = torch.randint(3, 62, (2 * WORLD, 17), generator=torch.Generator().manual_seed(1))
PARTS = IDS.chunk(WORLD)
MINE = PARTS[RANK]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distance(one: Tensor, other: Tensor) -> float:
    one, other = whole(one).detach().double(), whole(other).detach().double()
    return float((one - other).norm() / other.norm())


def mean_over_processes(value: Tensor) -> float:
    value = value.detach().clone()
    dist.all_reduce(value)
    return float(value / WORLD)


@contextmanager
def dtypes_inside(model: nn.Module) -> Iterator[dict[str, torch.dtype]]:
    """The dtypes of the parameters of every mixer, while it runs."""
    seen: dict[str, torch.dtype] = {}
    mixers = [module for module in model.modules() if isinstance(module, Mamba2Mixer)]

    def look(mixer: nn.Module, args: Any) -> None:
        for name, parameter in mixer.named_parameters():
            assert not isinstance(parameter, DTensor), name
            seen[name] = parameter.dtype

    handles = [mixer.register_forward_pre_hook(look) for mixer in mixers]
    yield seen
    for handle in handles:
        handle.remove()


def assert_fp32_inside(seen: dict[str, torch.dtype], others: torch.dtype) -> None:
    assert seen
    for name, dtype in seen.items():
        assert dtype == (torch.float32 if name in FP32 else others), (name, dtype)


def assert_trains_like(reference: Any, model: Any, tolerance: float, steps: int = 3, rate: float = 1e-2) -> None:
    """Losses of ``steps`` steps, and gradients of each, against one process that sees all parts one by one."""
    one = torch.optim.AdamW(reference.parameters(), lr=rate)
    other = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(steps):
        expected = 0.0
        for part in PARTS:
            loss = reference(part, labels=part).loss / WORLD
            loss.backward()
            expected += loss.item()
        loss = model(MINE, labels=MINE).loss
        loss.backward()
        assert abs(mean_over_processes(loss) - expected) < tolerance * expected, (step, loss, expected)
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert p.grad is not None, name
            assert p.grad.dtype == p.dtype, name
            # AdamW turns a rounding of a gradient near zero into a whole step: later steps drift, the first does not.
            limit = tolerance if step == 0 else 20 * tolerance
            assert distance(p.grad, q.grad) < limit, (step, name, distance(p.grad, q.grad))
        for optimizer in (one, other):
            optimizer.step()
            optimizer.zero_grad()


@check
def fp32_trains_as_one_process_does(folder: Path) -> None:
    assert_trains_like(make_model(), shard(make_model()), 1e-5)


@check
def mixed_precision_gathers_the_three_as_they_are(folder: Path) -> None:
    reference, model = make_model(), shard(make_model(), mp_policy=BF16)
    equal: list[bool] = []

    def compare(mixer: Any, args: Any) -> None:
        expected = reference.backbone.layers[0].mixer
        equal.extend(torch.equal(getattr(mixer, name), getattr(expected, name)) for name in FP32)

    model.backbone.layers[0].mixer.register_forward_pre_hook(compare)
    with dtypes_inside(model) as seen, torch.no_grad():
        model(MINE)
        model(MINE)
    assert_fp32_inside(seen, torch.bfloat16)
    assert equal == [True] * 6


@check
def mixed_precision_trains_as_one_process_in_bf16_does(folder: Path) -> None:
    """The reference holds what FSDP2 gathers: bf16 weights, the three in fp32. Gradients are rounded to bf16."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    model = shard(make_model(), mp_policy=policy).train()
    reference = make_model().bfloat16().train()
    assert_trains_like(reference, model, 0.01, steps=1)


@check
def mixed_precision_follows_the_loss_curve_of_fp32(folder: Path) -> None:
    reference, model = make_model().train(), shard(make_model(), mp_policy=BF16).train()
    curves: list[list[float]] = [[], []]
    for curve, module, parts in ((curves[0], reference, [IDS]), (curves[1], model, [MINE])):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        for _ in range(3):
            (ids,) = parts
            loss = module(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(mean_over_processes(loss))
    assert all(abs(a - b) < 0.005 * a for a, b in zip(*curves, strict=True)), curves
    assert curves[0][-1] < 0.9 * curves[0][0]
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32, name


@check
def every_option_of_fully_shard(folder: Path) -> None:
    with torch.no_grad():
        expected = make_model()(MINE).logits
    options: list[dict[str, Any]] = [
        {"reshard_after_forward": False},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {"mesh": init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("replicate", "shard"))},
        {"mesh": init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("replicate", "shard"))},
    ]
    for option in options:
        model = shard(make_model(), mp_policy=BF16, **option).train()
        with dtypes_inside(model) as seen:
            for _ in range(2):
                out = model(MINE, labels=MINE, return_logits=True)
                out.loss.backward()
        assert_fp32_inside(seen, torch.bfloat16)
        assert distance(out.logits, expected) < 0.03
        assert all(p.grad is not None for p in model.parameters())


@check
def every_kind_of_optimizer(folder: Path) -> None:
    expected: dict[str, Tensor] = {}
    for kind in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        model = shard(make_model(), mp_policy=BF16).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **kind)
        for _ in range(2):
            model(MINE, labels=MINE).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        for name, p in model.named_parameters():
            torch.testing.assert_close(whole(p).detach(), expected.setdefault(name, whole(p).detach()))


@check
def gradient_checkpointing_and_accumulation_change_no_gradient(folder: Path) -> None:
    plain = shard(make_model(), mp_policy=BF16).train()
    plain(MINE, labels=MINE).loss.backward()

    checkpointed = make_model().train()
    checkpointed.gradient_checkpointing_enable()
    shard(checkpointed, mp_policy=BF16)(MINE, labels=MINE).loss.backward()

    accumulated = shard(make_model(), mp_policy=BF16).train()
    for last in (False, True):
        accumulated.set_requires_gradient_sync(last)
        (accumulated(MINE, labels=MINE).loss / 2).backward()

    for name, p in plain.named_parameters():
        for other in (checkpointed, accumulated):
            assert distance(other.get_parameter(name).grad, p.grad) < 0.02, name


@check
def states_are_those_of_the_plain_model_and_go_round(folder: Path) -> None:
    plain = make_model()
    trained = shard(make_model(), mp_policy=BF16).train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    trained(MINE, labels=MINE).loss.backward()
    optimizer.step()
    full = get_model_state_dict(trained, options=StateDictOptions(full_state_dict=True))
    assert list(full) == list(plain.state_dict())
    sharded = get_model_state_dict(trained)
    assert {type(value.to_local()) for value in sharded.values()} == {Tensor}

    # a whole file, on every process
    plain.load_state_dict(full)
    again = shard(make_model().requires_grad_(True), mp_policy=BF16)
    set_model_state_dict(again, dict(full), options=StateDictOptions(full_state_dict=True))
    # the shards of every process
    states = {"model": sharded, "optimizer": get_optimizer_state_dict(trained, optimizer)}
    dcp.save(states, checkpoint_id=folder / "dcp")
    resumed = shard(make_model(), mp_policy=BF16).train()
    other = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    states = {"model": get_model_state_dict(resumed), "optimizer": get_optimizer_state_dict(resumed, other)}
    dcp.load(states, checkpoint_id=folder / "dcp")
    set_model_state_dict(resumed, states["model"])
    set_optimizer_state_dict(resumed, other, states["optimizer"])
    # plain pickles, read without trusting them
    file = io.BytesIO()
    torch.save({name: value.to_local() for name, value in trained.state_dict().items()}, file)
    file.seek(0)
    for name, value in torch.load(file, weights_only=True).items():
        assert torch.equal(value, sharded[name].to_local())

    for name, value in full.items():
        for model in (again, resumed):
            assert torch.equal(whole(model.state_dict()[name]), value), name
    for module, optim in ((trained, optimizer), (resumed, other)):
        optim.zero_grad()
        with dtypes_inside(module) as seen:
            module(MINE, labels=MINE).loss.backward()
        assert_fp32_inside(seen, torch.bfloat16)
        optim.step()
    for name, value in trained.state_dict().items():
        assert torch.equal(value.to_local(), resumed.state_dict()[name].to_local()), name
    with torch.no_grad():
        assert distance(again(MINE).logits, plain(MINE).logits) < 0.03


@check
def weights_may_come_after_sharding(folder: Path) -> None:
    """Made on the meta device, sharded, given memory, filled: in place and by assignment."""
    state = make_model().state_dict()
    for assign in (False, True):
        with torch.device("meta"):
            model = make_model()
        shard(model, mp_policy=BF16)
        if assign:
            shards = {
                name: torch.distributed.tensor.distribute_tensor(state[name], value.device_mesh, value.placements)
                for name, value in model.state_dict().items()
            }
            model.load_state_dict(shards, assign=True)
        else:
            model.to_empty(device="cpu")
            set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))
        for _ in range(2):
            with dtypes_inside(model) as seen:
                loss = model(MINE, labels=MINE).loss
            loss.backward()
            assert_fp32_inside(seen, torch.bfloat16)
        with torch.no_grad():
            assert distance(loss, make_model()(MINE, labels=MINE).loss) < 0.01


@check
def casts_after_sharding_leave_the_three_alone(folder: Path) -> None:
    model = shard(make_model().requires_grad_(False))
    model.bfloat16()
    with dtypes_inside(model) as seen, torch.no_grad():
        model(MINE)
    assert_fp32_inside(seen, torch.bfloat16)


@check
def half_precision_is_refused_in_one_group_and_trained_in_two(folder: Path) -> None:
    with pytest.raises(ArgumentError, match=r"MixedPrecisionPolicy\(param_dtype=torch.bfloat16\).*fully_shard_model"):
        shard(make_model().bfloat16())

    frozen = shard(make_model().bfloat16().requires_grad_(False))
    with dtypes_inside(frozen) as seen, torch.no_grad():
        frozen(MINE)
    assert_fp32_inside(seen, torch.bfloat16)

    for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(torch.bfloat16, torch.float32)):
        model = fully_shard_model(make_model().bfloat16(), mp_policy=policy).train()
        with dtypes_inside(model) as seen:
            assert_trains_like(make_model().bfloat16().train(), model, 0.03, steps=1, rate=1e-3)
        assert_fp32_inside({name: seen[name] for name in FP32}, torch.bfloat16)
        model.eval()
        with torch.no_grad():
            tokens = model.generate(MINE, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert tokens.shape == (2, 21)

    whole_precision = fully_shard_model(make_model())
    assert not isinstance(whole_precision.backbone.layers[0].norm, FSDPModule)
    assert_trains_like(make_model(), whole_precision, 1e-5, steps=1)


def fsdp1(model: Any, policy: Any = None, **options: Any) -> Any:
    policy = fsdp1_wrap_policy(model) if policy is None else policy
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options).train()


def assert_fsdp1_trains_like(reference: Any, model: Any, tolerance: float) -> None:
    """The first step's loss and gradients. ``model`` keeps its parameters' names (``use_orig_params=True``)."""
    loss = model(MINE, labels=MINE).loss
    loss.backward()
    expected = torch.stack([reference(part, labels=part).loss / WORLD for part in PARTS])
    expected.sum().backward()
    assert abs(mean_over_processes(loss) - float(expected.sum())) < 0.005 * float(expected.sum())
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert p.grad.dtype == p.dtype, name
            assert distance(p.grad, q.grad) < tolerance, (name, distance(p.grad, q.grad))


@check
def fsdp1_trains_half_precision_and_mixed_precision(folder: Path) -> None:
    mixed = MixedPrecision(torch.bfloat16, torch.float32, torch.bfloat16)
    for make, dtype, precision in (
        (make_model, torch.bfloat16, None),
        (make_model, torch.float32, mixed),
        (make_hybrid, torch.bfloat16, mixed),
    ):
        seen: dict[str, set[torch.dtype]] = {}

        def look(module: Any, args: Any, seen: dict[str, set[torch.dtype]] = seen) -> None:
            for name in module.fp32_parameters:
                seen.setdefault(name, set()).add(getattr(module, name).dtype)

        for whole_names in (True, False):
            model = fsdp1(make().to(dtype), mixed_precision=precision, use_orig_params=whole_names)
            keeping = [module for module in model.modules() if isinstance(module, KeepsFp32)]
            handles = [module.register_forward_pre_hook(look) for module in keeping]
            if whole_names:
                # bf16 itself is up to 0.13 away from fp32 in the gradients of the hybrid.
                assert_fsdp1_trains_like(make().bfloat16().train(), model, 0.03 if make is make_model else 0.2)
            else:
                model(MINE, labels=MINE).loss.backward()
            for handle in handles:
                handle.remove()
        assert set(FP32) <= seen.keys()
        assert set().union(*seen.values()) == {torch.float32}, seen


@check
def fsdp1_in_fp32_is_exact_whatever_is_a_unit(folder: Path) -> None:
    assert_fsdp1_trains_like(make_hybrid().train(), fsdp1(make_hybrid(), use_orig_params=True), 1e-5)
    for kinds in ({Mamba2Mixer}, {type(make_model().backbone.layers[0])}):  # also a mixer without its children
        model = fsdp1(make_model(), ModuleWrapPolicy(kinds), use_orig_params=True)
        assert_fsdp1_trains_like(make_model().train(), model, 1e-5)


@check
def fsdp1_has_the_state_of_the_plain_model(folder: Path) -> None:
    plain = make_hybrid().bfloat16()
    expected = plain.state_dict()
    found = fsdp1(make_hybrid().bfloat16(), use_orig_params=True).state_dict()
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@check
def hybrids_train_as_one_process_does(folder: Path) -> None:
    assert_trains_like(make_hybrid(), shard(make_hybrid()), 1e-5, steps=2)
    model = shard(make_hybrid(), mp_policy=BF16)
    with dtypes_inside(model) as seen:
        model(MINE, labels=MINE).loss.backward()
    assert_fp32_inside(seen, torch.bfloat16)
    half = fully_shard_model(make_hybrid().bfloat16()).train()
    with dtypes_inside(half) as seen:
        # Sharded, the convolution and the norm are called as modules, which round to bf16 in between; bf16 itself is
        # up to 0.13 away from fp32 in these gradients.
        assert_trains_like(make_hybrid().bfloat16().train(), half, 0.2, steps=1, rate=1e-3)
    assert_fp32_inside({name: seen[name] for name in FP32}, torch.bfloat16)
    half.eval()
    with torch.no_grad():
        assert half.generate(MINE, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (2, 21)


@check
def generation_and_attention_matrices(folder: Path) -> None:
    plain, model = make_model(), shard(make_model())
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        assert torch.equal(model.generate(MINE, **options), plain.generate(MINE, **options))
        expected = plain(MINE, output_attentions=True).attentions
        torch.testing.assert_close(model(MINE, output_attentions=True).attentions, expected)


@check
@torch.no_grad()
def tokens_are_taken_back(folder: Path) -> None:
    """After the forward, when the weights are shards again."""
    for make in (make_model, make_hybrid):
        plain, model = make(), shard(make())
        cache = model(MINE[:, :5]).past_key_values
        for start, stop, stay in ((5, 6, 6), (6, 10, 8), (8, 12, 8), (8, 9, 9)):
            cache.activate_past_recording()
            model(MINE[:, start:stop], past_key_values=cache)
            cache.crop(stay - stop)
        cache.stop_recording()
        found = model(MINE[:, 9:], past_key_values=cache).logits
        torch.testing.assert_close(found, plain(MINE).logits[:, 9:], rtol=1e-5, atol=1e-5)


@check
def lora_on_a_sharded_model(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def adapted() -> Any:
        model = get_peft_model(make_model(), LoraConfig(r=2, init_lora_weights=False))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
        return model

    reference, model = adapted(), adapted()
    for block in model.base_model.model.backbone.layers:
        fully_shard(block, mp_policy=BF16)
    fully_shard(model, mp_policy=BF16)
    for part in PARTS:
        (reference(part, labels=part).loss / WORLD).backward()
    with dtypes_inside(model) as seen:
        model(MINE, labels=MINE).loss.backward()
    assert_fp32_inside({name: seen[name] for name in FP32}, torch.bfloat16)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert q.grad is None or distance(p.grad, q.grad) < 0.05, name


def accelerated(model: Any, cpu_ram_efficient_loading: bool = False) -> Any:
    """A model as accelerate shards it in bf16. Its FSDP2 wants a GPU; what it does to a model is this one function."""
    from accelerate import PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model

    PartialState(cpu=True)  # its logger asks for it
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=cpu_ram_efficient_loading,
    )
    plugin.set_mixed_precision("bf16")
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=None,
        mixed_precision="bf16",
        is_main_process=RANK == 0,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)


UNCAST = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)


def sharded_ways(make: Callable[[], Any]) -> Iterator[tuple[str, Any]]:
    """Models sharded in every way that there is, gathered in bf16."""
    yield "ours", fully_shard_model(make(), mp_policy=UNCAST, group_size=2)
    yield "accelerate", accelerated(make())
    alone = make()
    if alone.lm_head.weight is not alone.backbone.embeddings.weight:
        fully_shard(alone.lm_head, mp_policy=UNCAST)
        yield "head alone", shard(alone, mp_policy=UNCAST)
    tail = make()
    fully_shard([tail.backbone.norm_f, tail.backbone.embeddings, tail.lm_head], mp_policy=UNCAST)
    yield "tail", shard(tail, mp_policy=UNCAST)


def largest_kept(model: Any) -> int:
    """Elements of the largest tensor that a training forward keeps for its backward."""
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = model.train()(MINE, labels=MINE).loss
    loss.backward()
    return max(kept)


@check
def no_logits_are_held_however_the_head_is_sharded(folder: Path) -> None:
    vocab = 2000
    for tied in (True, False):
        plain = make_model(vocab_size=vocab, tie_word_embeddings=tied).bfloat16().train()
        expected = plain(MINE, labels=MINE).loss
        for name, model in sharded_ways(lambda: make_model(vocab_size=vocab, tie_word_embeddings=tied)):  # noqa: B023
            assert largest_kept(model) == vocab * model.config.hidden_size < MINE.numel() * vocab, (name, tied)
            assert distance(model(MINE, labels=MINE).loss, expected) < 0.01, (name, tied)
            model.lm_head.register_forward_hook(lambda head, args, logits: 2 * logits)  # who looks at logits sees them
            out = model(MINE, labels=MINE)
            assert distance(out.logits, 2 * plain(MINE).logits) < 0.05, (name, tied)


@check
def the_residual_stream_enters_blocks_in_fp32(folder: Path) -> None:
    for make in (make_model, make_hybrid):
        for name, model in sharded_ways(make):
            assert_stream_in_fp32(model, name)


def assert_stream_in_fp32(model: Any, name: str = "") -> None:
    seen: list[torch.dtype] = []
    # A hook of the module that follows the first block; what the first one gets are embeddings.
    for block in model.backbone.layers[1:]:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    model.train()(MINE, labels=MINE).loss.backward()
    assert seen, name
    assert set(seen) == {torch.float32}, (name, seen)


@check
def groups_of_blocks_give_the_gradients_of_blocks(folder: Path) -> None:
    for make in (lambda: make_model(num_hidden_layers=5), make_hybrid):
        expected: dict[str, Tensor] = {}
        for size, checkpointing in ((1, False), (2, True), (3, False), (3, True), (None, False)):
            model = make().train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            fully_shard_model(model, mp_policy=UNCAST, group_size=size)
            model(MINE, labels=MINE).loss.backward()
            for name, p in model.named_parameters():
                gradient = expected.setdefault(name, whole(p.grad))
                assert torch.equal(whole(p.grad), gradient), (size, checkpointing, name)


@check
def groups_train_as_one_process_does(folder: Path) -> None:
    for make in (lambda: make_model(num_hidden_layers=3), make_hybrid):
        assert_trains_like(make().train(), fully_shard_model(make(), group_size=2).train(), 1e-5)
        assert_trains_like(make().double().train(), fully_shard_model(make().double(), group_size=2).train(), 1e-12)


@check
def captured_steps_are_eager_ones(folder: Path) -> None:
    """Gradients wait in FSDP2 between the batches of a step; one of another length, and an evaluation, come between."""
    lengths = [17] * 12 + [11, 17, 17] + [17] * 3 + ([17, 11, 17] if RANK else [17] * 3) + [17] * 3
    few = {"layer_blocks": ["shared>ssd", "attention moe"], "num_hidden_layers": 2}
    wrap: dict[str, Callable[[], Any]] = {
        "fsdp2": lambda: fully_shard_model(make_model().train(), mp_policy=UNCAST, group_size=2),
        "kept": lambda: fully_shard_model(make_hybrid(**few).train(), reshard_after_forward=False),
        "ddp": lambda: nn.parallel.DistributedDataParallel(make_model().train()),
    }
    for name, make in wrap.items():
        model, plain = make(), make()
        step = CapturedStep(model, accumulate=3, stream="of DDP")
        with pytest.MonkeyPatch.context() as patch:
            graphs = fake_graphs.install(patch, step)
            patch.setattr(captured, "WARMUP_OF_DDP", 2)
            for index, length in enumerate(lengths):
                ids = (MINE + index) % 59 + 3
                last = index % 3 == 2
                loss = step(input_ids=ids[:, :length], labels=ids[:, :length])
                with captured._synchronized(plain, last):
                    expected = plain(input_ids=ids[:, :length], labels=ids[:, :length]).loss / 3
                    expected.backward()
                assert torch.equal(loss, expected), (name, index)
                for each in (model, plain):
                    if not last:
                        continue
                    with torch.no_grad():
                        for p in each.parameters():
                            p -= 0.1 * p.grad
                            p.grad = None
                        each.eval()(MINE)
                        each.train()
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                assert torch.equal(whole(p), whole(q)), name
        assert step.reason is None, (name, step.reason)
        assert sum(graph.replays for graph in graphs) > 10, name
        assert step.graphs == len(graphs) == 3, name


@check
def captures_fail_together(folder: Path) -> None:
    """A capture that only one process cannot make, or a replay that only one finds wrong, is nobody's."""
    for trouble in ("capture", "replay"):
        model = fully_shard_model(make_model().train(), group_size=2)
        step = CapturedStep(model)
        with pytest.MonkeyPatch.context() as patch:
            graphs = fake_graphs.install(patch, step, wrong=float(trouble == "replay" and RANK == 1))
            if trouble == "capture" and RANK == 1:
                patch.setattr(fake_graphs.FakeGraph, "capture", lambda graph, run: (run(), torch.zeros(1) @ MINE)[0])
            for _ in range(3):
                step(input_ids=MINE, labels=MINE)
            if trouble == "capture":  # on both, rather than that one waits for the other
                with pytest.raises(BackendError, match="FSDP2 and DDP cannot go on from the middle of a step"):
                    step(input_ids=MINE, labels=MINE)
                assert "cannot be captured" in str(step.reason)
                continue
            step(input_ids=MINE, labels=MINE)
        assert step.graphs == 0
        assert len(graphs) == 1
        assert "not those of the eager step" in str(step.reason), step.reason
        reference = fully_shard_model(make_model().train(), group_size=2)
        reference(input_ids=MINE, labels=MINE).loss.backward()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert distance(p.grad, 4 * whole(q.grad)) < 1e-5, trouble


@check
def casts_of_the_stream_are_warned_of(folder: Path) -> None:
    with pytest.warns(UserWarning, match="cast_forward_inputs=False"):
        fully_shard_model(make_model(), mp_policy=BF16)
    with pytest.raises(ArgumentError, match="group_size is 0"):
        fully_shard_model(make_model(), group_size=0)


@check
def the_way_accelerate_shards(folder: Path) -> None:
    for cpu_ram_efficient_loading in (False, True):
        loaded = make_model().bfloat16()  # accelerate makes fp32 master weights of it
        reference = copy.deepcopy(loaded).train()
        model = accelerated(loaded, cpu_ram_efficient_loading).train()
        assert isinstance(model.backbone.layers[0], FSDPModule)
        with dtypes_inside(model) as seen:
            loss = model(MINE, labels=MINE).loss
            loss.backward()
        assert_fp32_inside(seen, torch.bfloat16)
        for part in PARTS:
            (reference(part, labels=part).loss / WORLD).backward()
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert p.grad.dtype == torch.float32, name
            assert distance(p.grad, q.grad) < 0.1, (name, distance(p.grad, q.grad))


@check
def distributed_data_parallel(folder: Path) -> None:
    assert_trains_like(make_model().train(), nn.parallel.DistributedDataParallel(make_model().train()), 1e-5)
    double = nn.parallel.DistributedDataParallel(make_hybrid().double().train())
    assert_trains_like(make_hybrid().double().train(), double, 1e-12)


def saved(folder: Path, model: Any = None, **changes: Any) -> Path:
    path = folder / "model"
    if RANK == 0:
        model = make_model(6, n_groups=2, use_bias=True, **changes) if model is None else model
        model.save_pretrained(path)
    dist.barrier()
    return path


def load(path: Path, cls: Any = Mamba2ForCausalLM, **config: Any) -> Any:
    from transformers.distributed import DistributedConfig

    dtype = config.pop("dtype", torch.float32)
    return cls.from_pretrained(path, distributed_config=DistributedConfig(**config), dtype=dtype)


def assert_saves_like(model: Any, plain: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    dist.barrier()
    again = type(plain).from_pretrained(folder, dtype=plain.dtype).state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(again[name], value), name


@check
def tensor_parallel_plan(folder: Path) -> None:
    path = saved(folder)
    plain, model = Mamba2ForCausalLM.from_pretrained(path), load(path, tp_size=WORLD, tp_plan="auto")
    mixer, whole = model.backbone.layers[0].mixer, plain.backbone.layers[0].mixer
    for split in ("in_proj", "out_proj", "conv1d"):
        assert getattr(mixer, split).weight.numel() == getattr(whole, split).weight.numel() // WORLD
    mask = torch.ones_like(MINE)
    mask[0, :5] = 0
    same = PARTS[0]  # the processes share a batch
    with torch.no_grad():
        for named in ({}, {"attention_mask": mask}):
            torch.testing.assert_close(model(same, **named).logits, plain(same, **named).logits, atol=1e-5, rtol=1e-5)
        for options in ({}, {"num_beams": 2}):
            options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **options}
            assert torch.equal(model.generate(same, **options), plain.generate(same, **options))
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "prompt_lookup_num_tokens": 3}
        again = torch.cat([same[:1], same[:1, :9]], 1)  # something to look up
        assert torch.equal(model.generate(again, **options), plain.generate(again, **options))
    model(same, labels=same).loss.backward()
    plain(same, labels=same).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    found = whole_state_dict(model, model.tensor_group, gradients)
    for name, q in plain.named_parameters():
        assert distance(found[name], q.grad) < 1e-4, name
    assert_saves_like(model, plain, folder / "again")


@check
def tensor_parallel_half_precision_and_tied(folder: Path) -> None:
    path = saved(folder, tie_word_embeddings=True)
    plain = Mamba2ForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model = load(path, tp_size=WORLD, tp_plan="auto", dtype=torch.bfloat16)
    with torch.no_grad(), dtypes_inside(plain) as seen:
        assert distance(model(PARTS[0]).logits, plain(PARTS[0]).logits) < 0.02
    assert_fp32_inside(seen, torch.bfloat16)
    assert model.backbone.layers[0].mixer.A_log.dtype == torch.float32


LARGE = 2000  # a vocabulary whose logits would be the largest tensors


def fsdp_plan(folder: Path, dtype: torch.dtype, mixed: bool, **changes: Any) -> None:
    path = saved(folder, **changes)
    plain = Mamba2ForCausalLM.from_pretrained(path, dtype=dtype)
    model = load(path, fsdp_size=WORLD, fsdp_mixed_precision=mixed, dtype=dtype)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert_saves_like(model, plain, folder / "again")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    half = dtype == torch.bfloat16 or mixed
    with torch.no_grad():
        assert distance(model(MINE).logits, plain(MINE).logits) < (0.03 if half else 1e-5)
        tokens = model.generate(MINE, **options)
        assert half or torch.equal(tokens, plain.generate(MINE, **options))
    with dtypes_or_shards_inside(model) as seen:
        model.train()(MINE, labels=MINE).loss.backward()
    assert seen == dict.fromkeys(FP32, torch.float32)
    if mixed:
        assert_stream_in_fp32(model)
        model.zero_grad()
        assert largest_kept(model) < MINE.numel() * LARGE
    reference = Mamba2ForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    for part in PARTS:
        (reference(part, labels=part).loss / WORLD).backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert distance(p.grad, q.grad) < (0.15 if half else 1e-4), (name, distance(p.grad, q.grad))


@contextmanager
def dtypes_or_shards_inside(model: Any) -> Iterator[dict[str, torch.dtype]]:
    """The dtypes of the three; modules that are sharded by themselves still hold shards when the mixer starts."""
    seen: dict[str, torch.dtype] = {}

    def look(mixer: Any, args: Any) -> None:
        seen.update({name: getattr(mixer, name).dtype for name in FP32})

    handle = model.backbone.layers[0].mixer.register_forward_pre_hook(look)
    yield seen
    handle.remove()


@check
def fsdp_plan_in_fp32(folder: Path) -> None:
    fsdp_plan(folder, torch.float32, mixed=False)


@check
def fsdp_plan_in_mixed_precision(folder: Path) -> None:
    fsdp_plan(folder, torch.float32, mixed=True, vocab_size=LARGE)


@check
def fsdp_plan_in_bf16(folder: Path) -> None:
    fsdp_plan(folder, torch.bfloat16, mixed=False)


@check
def fsdp_plan_in_bf16_and_mixed_precision(folder: Path) -> None:
    fsdp_plan(folder, torch.bfloat16, mixed=True)


@check
def fsdp_plan_with_tied_embeddings(folder: Path) -> None:
    fsdp_plan(folder, torch.float32, mixed=False, tie_word_embeddings=True)
    fsdp_plan(folder, torch.float32, mixed=True, tie_word_embeddings=True, vocab_size=LARGE)


@check
def pipeline_parallelism_is_refused_at_once(folder: Path) -> None:
    path = saved(folder)
    started = time.monotonic()
    with pytest.raises(ArgumentError, match=r"pp_size=2: Mamba2ForCausalLM has no pipeline parallelism.*tp_size"):
        load(path, pp_size=WORLD)
    assert time.monotonic() - started < 10


def hybrid_in(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> tuple[Any, Any]:
    """A hybrid, whole and as it is spread over the processes."""
    cls = Mamba2HybridForCausalLM
    path = saved(folder, make_hybrid())
    both = cls.from_pretrained(path, dtype=dtype), load(path, cls, dtype=dtype, **config)
    for model in both:
        model.config._experts_implementation = "eager"
    return both


@check
def hybrid_tensor_parallel_plan(folder: Path) -> None:
    plain, model = hybrid_in(folder, tp_size=WORLD, tp_plan="auto")
    blocks = model.backbone.layers[0].blocks
    attention = model.backbone.layers[1].blocks[0].attention
    for split in (blocks[0].mixer.out_proj, blocks[1].mlp.up_proj, blocks[1].mlp.down_proj, attention.q_proj):
        assert split.weight.numel() == split.in_features * split.out_features // WORLD
    same = PARTS[0]  # the processes share a batch
    mask = torch.ones_like(same)
    mask[0, :5] = 0
    with torch.no_grad():
        for named in ({}, {"attention_mask": mask}):
            torch.testing.assert_close(model(same, **named).logits, plain(same, **named).logits, atol=1e-5, rtol=1e-5)
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        assert torch.equal(model.generate(same, **options), plain.generate(same, **options))
    model(same, labels=same).loss.backward()
    plain(same, labels=same).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    found = whole_state_dict(model, model.tensor_group, gradients)
    for name, q in plain.named_parameters():
        assert distance(found[name], q.grad) < 1e-4, name
    assert_saves_like(model, plain, folder / "again")


def hybrid_fsdp_plan(folder: Path, dtype: torch.dtype, tolerance: float) -> None:
    plain, model = hybrid_in(folder, dtype, fsdp_size=WORLD, fsdp_mixed_precision=False)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert_saves_like(model, plain, folder / "again")
    with torch.no_grad():
        assert distance(model(MINE).logits, plain(MINE).logits) < tolerance
    model.train()(MINE, labels=MINE).loss.backward()
    for part in PARTS:
        (plain(part, labels=part).loss / WORLD).backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert distance(p.grad, q.grad) < 5 * tolerance, (name, distance(p.grad, q.grad))


@check
def hybrid_fsdp_plan_in_fp32(folder: Path) -> None:
    hybrid_fsdp_plan(folder, torch.float32, 1e-5)


@check
def hybrid_fsdp_plan_in_bf16(folder: Path) -> None:
    hybrid_fsdp_plan(folder, torch.bfloat16, 0.03)


if __name__ == "__main__":
    from processes import work

    work(CHECKS, Path(sys.argv[1]), *sys.argv[2:])
