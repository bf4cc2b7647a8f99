"""One of the four processes that ``test_context_processes.py`` starts; not collected by pytest.

Each check trains a model whose sequences are spread over processes, and one that sees all of them alone.
"""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_worker import distance, make_hybrid, make_model
from peft import LoraConfig, get_peft_model
from processes import Check, work
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mamba2_hf.distributed import context_parallel
from mamba2_hf.errors import ArgumentError
from mamba2_hf.training import fully_shard_model

CHECKS: dict[str, Check] = {}
STEPS = 3


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def batch(rows: int, tokens: int, seed: int) -> dict[str, Tensor]:
    """Rows whose documents end at, before and after borders of slices, with some labels left out."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 62, (rows, tokens), generator=generator)
    labels = ids.masked_fill(torch.rand(rows, tokens, generator=generator) < 0.1, -100)
    starts = torch.rand(rows, tokens, generator=generator) < 0.2
    return {"input_ids": ids, "labels": labels, "seq_idx": starts.long().cumsum(1)}


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """One in whose steps rounding stays as small as it is: AdamW divides gradients by their own size."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def assert_trains_like(
    plain: Any,
    model: Any,
    batches: list[list[dict[str, Any]]],
    mine: int,
    tolerance: float,
    share: int | None = None,
) -> None:
    """Losses, gradients and weights of three steps against one process.

    Args:
        plain: the model of one process, which sees all batches of a step.
        model: wrapped in what averages gradients.
        batches: of each step, one for each group that data is spread over.
        mine: the one that is this process's.
        tolerance: relative.
        share: how many processes share a loss that is divided by a number of items; None where each mean counts alike.
    """
    one, other = optimizer(plain), optimizer(model)
    for step, given in enumerate(batches):
        expected = 0.0
        for part in given:
            loss = plain(**part).loss / (len(given) if share is None else 1)
            loss.backward()
            expected += loss.item()
        loss = model(**given[mine]).loss * (share or 1)
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total, group=getattr(model, "process_group", None))
        total /= dist.get_world_size(getattr(model, "process_group", None))
        assert total.item() == pytest.approx(expected, rel=tolerance), step
        trained = [(n, p) for n, p in plain.named_parameters() if p.requires_grad]
        for (name, p), q in zip(trained, [q for q in model.parameters() if q.requires_grad], strict=True):
            assert distance(q.grad, p.grad) < tolerance, (step, name, distance(q.grad, p.grad))
        for each in (one, other):
            each.step()
            each.zero_grad()
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert distance(q, p) < 10 * tolerance, name


def spread(plain: Any, mesh: DeviceMesh, **options: Any) -> DistributedDataParallel:
    """A copy of a model with its sequences spread over a mesh, and its gradients averaged there."""
    model = context_parallel(copy.deepcopy(plain), mesh)
    return DistributedDataParallel(model, process_group=mesh.get_group(), **options)


def mesh_of(*ranks: int) -> DeviceMesh:
    return DeviceMesh("cpu", list(ranks), mesh_dim_names=("cp",))


@check
def four_slices_in_fp64(folder: Path) -> None:
    """Slices of three tokens, as many as the convolution looks back."""
    plain = make_model(heads=4, n_groups=2).double().train()
    model = spread(plain, mesh_of(0, 1, 2, 3))
    assert_trains_like(plain, model, [[batch(2, 10 + step, step)] for step in range(STEPS)], 0, 1e-12)


@check
def four_slices_in_fp32(folder: Path) -> None:
    """Against fp64: the gradient of a decay rate sums what cancels, and one process has no more of its digits."""
    plain, given = make_model().train(), batch(1, 150, 0)
    model, exact = spread(plain, mesh_of(0, 1, 2, 3)), copy.deepcopy(plain).double()
    losses = [each(**given).loss for each in (exact, plain, model)]
    for loss in losses:
        loss.backward()
    assert losses[2].item() == pytest.approx(losses[0].item(), rel=1e-5)
    for (name, p), q, own in zip(exact.named_parameters(), plain.parameters(), model.parameters(), strict=True):
        assert distance(own.grad, p.grad) < max(1e-5, 2 * distance(q.grad, p.grad)), name


@check
def three_slices_of_a_hybrid(folder: Path) -> None:
    """Attention with all tokens and with a window, shared blocks, experts; rows with padding, checkpointing."""
    mesh = mesh_of(0, 1, 2)
    if dist.get_rank() == 3:
        return
    plain = make_hybrid(
        layer_blocks=["ssd moe", "attention mlp", "shared>ssd", "ssd+sliding_attention"],
        num_hidden_layers=4,
        sliding_window=5,
    )
    plain = plain.double().train()
    batches = [[batch(2, 23, step)] for step in range(STEPS)]
    for (given,) in batches:
        mask = torch.ones_like(given["input_ids"])
        mask[0, 17:] = 0
        given["attention_mask"] = mask
    model = spread(plain, mesh)
    model.module.gradient_checkpointing_enable()
    assert_trains_like(plain, model, batches, 0, 1e-12)


@check
def two_groups_of_two_slices_with_fsdp2(folder: Path) -> None:
    """Data over one dimension of a mesh, sequences over the other, weights over both."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "cp"))
    plain = make_model().double().train()
    model = context_parallel(copy.deepcopy(plain), mesh)
    everywhere = mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
    policy = MixedPrecisionPolicy(param_dtype=torch.float64, reduce_dtype=torch.float64)
    fully_shard_model(model, mesh=everywhere, mp_policy=policy)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    batches = [[batch(2, 17, 2 * step + group) for group in range(2)] for step in range(STEPS)]
    assert_trains_like(plain, model, batches, mesh.get_local_rank("dp_shard"), 1e-12)


@check
def accumulation_by_a_number_of_items(folder: Path) -> None:
    """As Trainer does it: a number of labels of all processes' batches, whose shares of the loss are summed."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "cp"))
    plain = make_model().double().train()
    model = context_parallel(copy.deepcopy(plain), mesh["cp"])
    model = DistributedDataParallel(model)
    batches = [[batch(1, 17 + group, 2 * step + group) for group in range(2)] for step in range(STEPS)]
    for given in batches:
        for part in given:
            del part["seq_idx"]
        items = sum(int((part["labels"][:, 1:] != -100).sum()) for part in given)
        for part in given:
            part["num_items_in_batch"] = items
    assert_trains_like(plain, model, batches, mesh.get_local_rank("dp_shard"), 1e-12, share=4)


@check
def balanced_experts(folder: Path) -> None:
    """The loss that keeps experts busy alike counts the tokens of all slices."""
    plain = make_hybrid(output_router_logits=True, router_aux_loss_coef=0.5).train()
    model = spread(plain, mesh_of(0, 1, 2, 3), find_unused_parameters=True)
    given = batch(2, 21, 0)
    assert plain(**given).aux_loss.item() == pytest.approx(model(**given).aux_loss.item(), rel=1e-5)
    assert_trains_like(plain, model, [[given]], 0, 1e-5)


@check
def lora(folder: Path) -> None:
    """On the projections alone, and on the convolution too, which then has to be called as a module."""
    for more in ([], ["conv1d"]):
        torch.manual_seed(1)
        targets = ["in_proj", "out_proj", *more]
        ranks = {"conv1d": 56}  # a filter of its own for each channel
        config = LoraConfig(r=2, rank_pattern=ranks, target_modules=targets, init_lora_weights=False)
        plain = get_peft_model(make_model(), config).double().train()
        model = spread(plain, mesh_of(0, 1, 2, 3))
        assert_trains_like(plain, model, [[batch(2, 17, step)] for step in range(STEPS)], 0, 1e-12)


@check
def losses_are_one_number(folder: Path) -> None:
    """Bit for bit the same in each process, be it in training, without gradients, or with the logits."""
    plain = make_model().train()
    model = context_parallel(copy.deepcopy(plain), mesh_of(0, 1, 2, 3))
    given = batch(2, 19, 0)
    for kind in (nullcontext(), torch.no_grad()):
        with kind:
            for logits in (False, True):
                out = model(**given, return_logits=logits)
                everyones = [None] * 4
                dist.all_gather_object(everyones, out.loss.item())
                assert len(set(everyones)) == 1
                assert out.loss.item() == pytest.approx(plain(**given).loss.item(), rel=1e-6)
    context = model.backbone.context
    whole = context.join(out.logits, 19)
    torch.testing.assert_close(whole, plain(**given, return_logits=True).logits)
    start, end = context.bounds(19)
    torch.testing.assert_close(out.logits[:, : end - start], whole[:, start:end])


@check
def refusals(folder: Path) -> None:
    """Each process says no by itself, and none is left waiting."""
    plain = make_model()
    with pytest.raises(ArgumentError, match=r"dimensions \('dp', 'tp'\), and 'cp' is needed"):
        context_parallel(plain, init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")))
    with pytest.raises(ArgumentError, match="Linear holds no model of mamba2_hf"):
        context_parallel(nn.Linear(2, 2), mesh_of(0, 1, 2, 3))
    model = context_parallel(plain, mesh_of(0, 1, 2, 3))
    ids = batch(2, 17, 0)["input_ids"]
    left = torch.ones_like(ids)
    left[1, :2] = 0
    refused = {
        "padding before a token in row 1": {"attention_mask": left},
        "output_attentions=True": {"output_attentions": True},
        "a cache": {"use_cache": True},
        "logits_to_keep": {"logits_to_keep": 1},
    }
    for name, arguments in refused.items():
        with pytest.raises(ArgumentError, match=name):
            model(ids, **arguments)
    with pytest.raises(ArgumentError, match="generate cannot be had while sequences are spread over 4 processes"):
        model.generate(ids, max_new_tokens=2)
    dist.barrier()
    assert context_parallel(model, None).generate(ids, max_new_tokens=2).shape == (2, 19)


if __name__ == "__main__":
    work(CHECKS, Path(sys.argv[1]), *sys.argv[2:])
