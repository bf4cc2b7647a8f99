"""Captured training steps against eager ones, with graphs that need no GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_graphs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer, TrainingArguments

from mamba2_hf import Mamba2Config, Mamba2ForCausalLM
from mamba2_hf.errors import ArgumentError
from mamba2_hf.training import CapturedStep, capture_training, captured, fully_shard_model

VOCAB = 61
# Of a Trainer: two rows a step, each step's loss in its log, and nothing else anywhere.
QUIET: dict[str, Any] = {
    **{"report_to": "none", "disable_tqdm": True, "save_strategy": "no"},
    **{"logging_steps": 1, "per_device_train_batch_size": 2},
}
Zero = Callable[[torch.optim.Optimizer], None]
ZEROS: dict[str, Zero] = {
    "none": lambda optimizer: optimizer.zero_grad(set_to_none=True),
    "zeros": lambda optimizer: optimizer.zero_grad(set_to_none=False),
    "kept": lambda optimizer: None,  # somebody adds up the gradients of several calls
}


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4}
    return Mamba2ForCausalLM(Mamba2Config(**sizes, head_dim=8, n_groups=1, state_size=8)).train()


def batch(index: int, tokens: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (2, tokens), generator=torch.Generator().manual_seed(index))
    labels = ids.clone()
    labels[0, : 1 + index % 5] = -100
    return {"input_ids": ids, "labels": labels, "seq_idx": (torch.arange(tokens) // (2 + index % 3)).expand(2, -1)}


class Compared:
    """A model trained by a :class:`CapturedStep` beside one that is trained eagerly; all has to be equal."""

    def __init__(self, model: nn.Module, accumulate: int = 1) -> None:
        self.model, self.plain = model, copy.deepcopy(model)
        self.step = CapturedStep(model, accumulate)
        self.accumulate = accumulate
        self.optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (self.model, self.plain)]

    def train(self, *batches: dict[str, Any], zero: Zero = ZEROS["none"]) -> None:
        for inputs in batches:
            loss = self.step(**inputs)
            expected = self.plain(**inputs).loss
            if self.accumulate > 1 and inputs.get("num_items_in_batch") is None:
                expected = expected / self.accumulate
            expected.backward()
            assert torch.equal(loss, expected)
        for p, q in zip(self.model.parameters(), self.plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.equal(p.grad, q.grad)
        for optimizer in self.optimizers:
            optimizer.step()
            zero(optimizer)


@pytest.mark.parametrize("zero", ZEROS.values(), ids=ZEROS)
def test_steps_are_those_of_an_eager_loop(model: Any, zero: Zero, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Compared(model)
    graphs = fake_graphs.install(monkeypatch, both.step)
    for index in range(12):
        both.train(batch(index), zero=zero)
    assert both.step.reason is None
    assert both.step.graphs == len(graphs) == 1
    assert graphs[0].replays >= 8


def test_batches_of_a_step_are_three_graphs(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Compared(model, accumulate=5)
    graphs = fake_graphs.install(monkeypatch, both.step)
    for index in range(6):
        both.train(*(batch(5 * index + each) for each in range(5)))
    assert both.step.graphs == len(graphs) == 3
    assert [graph.replays for graph in graphs] == [16, 4, 4]  # in the middle, first, last


def test_the_number_of_items_is_a_tensor(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Compared(model, accumulate=2)
    fake_graphs.install(monkeypatch, both.step)
    for index in range(6):
        both.train(*({**batch(2 * index + each), "num_items_in_batch": 7 + index} for each in range(2)))
    assert both.step.graphs == 2


def test_other_shapes_run_eagerly_in_between(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Compared(model, accumulate=2)
    graphs = fake_graphs.install(monkeypatch, both.step)
    lengths = [12] * 8 + [9, 12, 12, 9, 9, 9] + [12] * 4
    for index in range(0, len(lengths), 2):
        both.train(*(batch(each, lengths[each]) for each in (index, index + 1)))
    assert len(graphs) == 2
    for length in range(13, 18):
        for index in range(4):
            both.train(batch(index, length), batch(index + 1, length))
    assert both.step.graphs == captured.MAX_GRAPHS


def test_shapes_that_never_come_again_are_no_longer_looked_at(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = CapturedStep(model)
    fake_graphs.install(monkeypatch, step)
    monkeypatch.setattr(captured, "MAX_SHAPES", 5)
    for length in range(4, 10):
        step(**batch(0, length))
    assert step.reason is not None
    assert "5 shapes" in step.reason


def test_a_replay_that_differs_is_not_trusted(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (1e-6, float("nan")):
        both = Compared(copy.deepcopy(model), accumulate=2)
        graphs = fake_graphs.install(monkeypatch, both.step, wrong=wrong)
        for index in range(6):
            both.train(batch(2 * index), batch(2 * index + 1))
        assert "of a replay are not those of the eager step, from which they differ by" in str(both.step.reason)
        assert both.step.graphs == 0
        assert [graph.replays for graph in graphs] == [1]


@pytest.mark.parametrize(("wrong", "trusted"), [(0.0, True), (1e-2, False)])
def test_a_replay_may_differ_as_much_as_two_eager_steps(
    model: Any, wrong: float, trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of kernels that add up in any order are never twice the same."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: grad * (1 + 1e-4 * torch.randn(grad.shape, generator=generator)))
    step = CapturedStep(model)
    fake_graphs.install(monkeypatch, step, wrong=wrong)
    for index in range(6):
        step(**batch(index))
        model.zero_grad()
    assert (step.graphs == 1) is trusted
    assert (step.reason is None) is trusted


@pytest.mark.parametrize(("off", "trusted"), [(1e-5, True), (1e-2, False)])
def test_sums_in_another_order_may_come_to_the_same_twice(
    model: Any, off: float, trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two eager steps alike to the bit do not say that every step is; gradients far from theirs are not trusted."""
    step, replaying = CapturedStep(model), []
    model.lm_head.weight.register_hook(lambda grad: grad * (1 + off * len(replaying)))
    replay = fake_graphs.FakeGraph.replay

    def differing(graph: Any) -> None:
        replaying.append(True)
        replay(graph)
        replaying.clear()

    monkeypatch.setattr(fake_graphs.FakeGraph, "replay", differing)
    fake_graphs.install(monkeypatch, step)
    for index in range(6):
        step(**batch(index))
        model.zero_grad()
    assert (step.reason is None) is trusted


def test_what_cannot_be_captured_runs_eagerly(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Compared(model, accumulate=2)
    fake_graphs.install(monkeypatch, both.step)

    def refuse(self: Any, run: Any) -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(fake_graphs.FakeGraph, "capture", refuse)
    for index in range(5):
        both.train(batch(2 * index), batch(2 * index + 1))
    assert both.step.reason == "its step cannot be captured: operation not permitted when stream is capturing"


def test_a_change_is_captured_anew(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Compared(model)
    graphs = fake_graphs.install(monkeypatch, both.step)

    def train() -> int:
        before = sum(graph.replays for graph in graphs)
        for index in range(5):
            both.train(batch(index))
        return sum(graph.replays for graph in graphs) - before

    assert train() == 3
    for each in (both.model, both.plain):
        each.backbone.layers[0].requires_grad_(False)
    assert train() == 3
    for each in (both.model, both.plain):
        each.eval()
    assert train() == 3
    for each in (both.model, both.plain):
        each.train()
    assert train() == 5  # there is a graph of that still
    for each in (both.model, both.plain):
        each.lm_head.weight.data = each.lm_head.weight.data.clone()
    assert train() == 3
    both.step.drop()
    assert train() == 3


def test_without_a_gpu_it_says_so(model: Any) -> None:
    both = Compared(model, accumulate=2)
    for index in range(4):
        both.train(batch(2 * index), batch(2 * index + 1))
    assert both.step.reason == "the model is on cpu, not on one GPU"
    with pytest.raises(ArgumentError, match="accumulate is 0"):
        CapturedStep(model, 0)


@pytest.fixture
def process_group() -> Iterator[None]:
    """One process with a GPU, so that collectives are copies."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    return fully_shard_model(model, mp_policy=policy, group_size=2)


@pytest.mark.gpu
class TestOnAGpu:
    WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
        "alone": lambda model: model,
        "half": lambda model: model.bfloat16(),
        "fsdp2": sharded,
        "ddp": nn.parallel.DistributedDataParallel,
    }

    @pytest.fixture
    def made(self) -> Callable[[], Any]:
        """A model whose kernels are those of the 130M."""
        sizes: dict[str, Any] = {"vocab_size": 512, "hidden_size": 768, "num_hidden_layers": 4, "num_heads": 24}

        def make() -> Any:
            torch.manual_seed(0)
            with torch.device("cuda"):
                return Mamba2ForCausalLM(Mamba2Config(**sizes, head_dim=64, n_groups=1, state_size=128)).train()

        return make

    @pytest.mark.parametrize("accumulate", [1, 3])
    @pytest.mark.parametrize("wrap", WRAPS)
    def test_steps_are_those_of_an_eager_loop(
        self, wrap: str, accumulate: int, made: Callable[[], Any], process_group: None
    ) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model = self.WRAPS[wrap](made())
        torch.cuda.synchronize()
        models = [model, self.WRAPS[wrap](made())]
        step = CapturedStep(model, accumulate, stream)
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
        lengths = [96] * 8 + [64, 96, 96, 64, 64, 64, 64, 64] + [96] * 4
        for index, length in enumerate(lengths):
            for part in range(accumulate):
                inputs = {name: value.cuda() for name, value in batch(3 * index + part, length).items()}
                loss = step(**inputs)
                with captured._synchronized(models[1], part == accumulate - 1):
                    expected = models[1](**inputs).loss / accumulate
                    expected.backward()
                assert torch.equal(loss, expected), (index, part, step.reason)
            for p, q in zip(*(model.parameters() for model in models), strict=True):
                assert torch.equal(captured.local(p.grad), captured.local(q.grad))
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    model.eval()(inputs["input_ids"])
                model.train()
        assert step.reason is None
        assert step.graphs == (2 if accumulate == 1 else 4)

    @pytest.mark.parametrize("wrap", ["alone", "fsdp2"])
    def test_a_step_that_reads_values_runs_eagerly(
        self, wrap: str, made: Callable[[], Any], process_group: None
    ) -> None:
        model = self.WRAPS[wrap](made())
        step = CapturedStep(model)
        for index in range(5):
            inputs = {name: value.cuda() for name, value in batch(index, 64).items()}
            del inputs["seq_idx"]
            mask = torch.ones_like(inputs["input_ids"])
            mask[0, 50:] = 0
            loss = step(**inputs, attention_mask=mask)
            assert torch.equal(loss, model(**inputs, attention_mask=mask).loss)
        assert "sequence.py" in str(step.reason)

    def test_gradients_that_no_two_steps_have_alike(self) -> None:
        class Picked(nn.Module):
            """Adds up the gradients of each weight in any order."""

            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.rand(8, 64, device="cuda"))

            def forward(self, where: Tensor) -> dict[str, Tensor]:
                return {"loss": self.weight.gather(0, where).mul(self.weight.sin().sum(0)).exp().mean()}

        model = Picked()
        plain, step = copy.deepcopy(model), CapturedStep(model)
        for _ in range(6):
            where = torch.randint(8, (2**16, 64), device="cuda")
            loss, expected = step(where=where), plain(where)["loss"]
            expected.backward()
            torch.testing.assert_close(loss, expected.detach())
            torch.testing.assert_close(model.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-7)
            model.weight.grad = plain.weight.grad = None
        assert step.reason is None
        assert step.graphs == 1

    def test_ddp_of_another_stream_runs_eagerly(self, made: Callable[[], Any], process_group: None) -> None:
        step = CapturedStep(nn.parallel.DistributedDataParallel(made()))
        step(**{name: value.cuda() for name, value in batch(0).items()})
        assert "another stream" in str(step.reason)

    def test_a_capture_that_fails_leaves_no_trace(self, made: Callable[[], Any]) -> None:
        model = made()
        step = CapturedStep(model)
        capturing = torch.cuda.is_current_stream_capturing

        def read(*_: Any) -> None:
            if capturing():
                model.lm_head.weight.sum().item()

        model.backbone.layers[1].register_forward_hook(read)
        for index in range(5):
            inputs = {name: value.cuda() for name, value in batch(index, 64).items()}
            loss = step(**inputs)
            assert torch.equal(loss, model(**inputs).loss)
            torch.randn(3, device="cuda")
        assert "cannot be captured" in str(step.reason)

    def test_the_step_of_a_trainer(self, made: Callable[[], Any], tmp_path: Path) -> None:
        curves = []
        for capture in (False, True):
            arguments = TrainingArguments(
                str(tmp_path),
                bf16=True,
                **QUIET,
                max_steps=8,
                gradient_accumulation_steps=2,
            )
            arguments._n_gpu = 1  # of those of one process, else the model is copied to all
            trainer = Trainer(
                made(),
                arguments,
                train_dataset=[{name: value[0] for name, value in batch(index, 64).items()} for index in range(32)],
            )
            step = capture_training(trainer) if capture else None
            trainer.train()
            curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert step is not None
        assert step.reason is None
        assert step.graphs == 2
        assert curves[0] == curves[1]


class TestTrainer:
    def train(self, model: Any, out: Path, capture: Any = None, **arguments: Any) -> tuple[Trainer, list[float]]:
        rows = [{name: value[0] for name, value in batch(index).items()} for index in range(22)]
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                str(out),
                use_cpu=True,
                **QUIET,
                learning_rate=1e-2,
                num_train_epochs=4,
                train_sampling_strategy="sequential",
                dataloader_pin_memory=False,
                eval_strategy="epoch",
                **arguments,
            ),
            train_dataset=rows,
            eval_dataset=rows[:3],
        )
        if capture is not None:
            capture(trainer)
        trainer.train()
        return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    @pytest.mark.parametrize("accumulate", [1, 4])  # 11 batches an epoch: its last step has less than 4
    def test_trains_the_same(
        self, model: Any, accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain, steps, graphs = copy.deepcopy(model), [], []

        def capture(trainer: Trainer) -> None:
            steps.append(capture_training(trainer))
            graphs.append(fake_graphs.install(monkeypatch, steps[0]))

        options = {"gradient_accumulation_steps": accumulate, "average_tokens_across_devices": False}
        _, expected = self.train(plain, tmp_path, **options)
        _, losses = self.train(model, tmp_path, capture, **options)
        assert losses == expected
        assert steps[0].reason is None
        assert sum(graph.replays for graph in graphs[0]) > 20
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p, q)

    def test_of_fp16_is_refused(self, model: Any, tmp_path: Path) -> None:
        steps = []

        def capture(trainer: Trainer) -> None:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)
            steps.append(capture_training(trainer))

        self.train(model, tmp_path, capture, max_steps=1)
        assert steps[0].reason.startswith("fp16 needs a scaler")
