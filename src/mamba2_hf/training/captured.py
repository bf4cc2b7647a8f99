"""Training steps through CUDA graphs: one launch for a forward and backward whose calls from Python, and FSDP2's, take
longer than the GPU does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import logging

from ..errors import ArgumentError, BackendError
from ..models.graphs import capturing

logger = logging.get_logger(__name__)

MAX_GRAPHS = 4
MAX_SHAPES = 64
"""Batches of so many shapes, none of which came often enough to be captured, are no longer looked at."""
WARMUP, WARMUP_OF_DDP = 2, 11
"""Eager steps before a capture: kernels are compiled, and DistributedDataParallel has settled on its buckets, and no
longer takes the time of its reductions.
"""
PARTS = 32
"""Of each gradient, whose norms are compared: so many differ by as much from one eager step to the next."""
NOISE = 8
"""Where two eager steps differ, a replay may be so many times as far from the first as the second is."""
ORDER = 1e-4
"""So far off gradients may be in any case: steps that add up in any order have the same bits most of the time, two of
four now and then, and where they have not, roundings to bfloat16 make 6e-6 of the norms of that (Transformers, H200).
"""
LEARNING_STEPS = 32
"""Where there are several processes, they agree on captures, which waits for the GPU; so they do in the first steps."""


class CapturedStep:
    """Forward and backward of a batch, replayed as CUDA graphs once batches of its shapes have been seen. The optimizer
    stays outside.

    ::

        step = CapturedStep(model)
        for batch in batches:
            loss = step(**batch)          # fills .grad, as model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    The model may be alone, in ``DistributedDataParallel`` or sharded by FSDP2. The first steps run eagerly; then one is
    run and captured, and is replayed from then on if loss and gradients of the replay are those of the run bit for bit.
    Where two runs differ by themselves, as the gradients of attention and of ``gather`` do on a GPU, the replay may
    differ as much, and gradients by what another order of their sums comes to. Batches of other shapes, and all where
    that fails, run eagerly, and :attr:`reason` says why. Pad or pack to one shape, and name packed documents by
    ``seq_idx``: other names for them are read by the CPU.

    A replay runs what was captured: hooks do nothing more, and Python values of the time stay. Call :meth:`drop` after
    a change to the model's modules; moved or frozen parameters are noticed. Gradients of a step are overwritten by a
    later one, also where somebody still holds them. Where there are several processes, all have to make their steps
    together, as for training anyway.

    Args:
        model: returns its loss for ``model(**batch)``.
        accumulate: how many batches make up an optimizer's step. Gradients are synchronized in the last, and the loss
            is divided by it, unless ``num_items_in_batch`` is given.
        stream: the ``torch.cuda.Stream`` that captures are made on. ``DistributedDataParallel`` has to be made on it,
            ``with torch.cuda.stream(stream)``: its backward runs where it was made, and no capture can follow it to the
            default stream.
    """

    def __init__(self, model: nn.Module, accumulate: int = 1, stream: Any = None) -> None:
        if accumulate < 1:
            raise ArgumentError(f"accumulate is {accumulate}, expected at least 1: the batches of an optimizer's step")
        self._accumulate = accumulate
        self._batches = 0
        self._stream = stream
        self.follow(model)

    @property
    def graphs(self) -> int:
        """How many graphs there are, at most ``MAX_GRAPHS``."""
        return len(self._graphs)

    def drop(self) -> None:
        """Forgets what was captured, and captures anew."""
        self.reason: str | None = None
        self._gradients: _Gradients | None = None
        self._graphs: dict[Hashable, _Captured] = {}
        self._pool: Any = None
        self._learning = True
        self._calls = 0
        self._seen: Counter[Hashable] = Counter()
        self._ready: set[Hashable] = set()

    def follow(self, model: nn.Module) -> None:
        """Captures the steps of another model, or of what wraps the model now."""
        self._model = model
        self._has_ddp = any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules())
        self.drop()

    def __call__(self, **batch: Any) -> Tensor:
        """The loss ``()``, detached; its gradients are added to ``.grad``.

        Args:
            batch: arguments of the model; tensors may change from call to call, everything else as little as shapes.

        Raises:
            BackendError: a capture failed halfway under FSDP2 or DDP, on every process. Steps that would are found out
                before, as far as PyTorch can tell.
        """
        self._batches += 1
        last = self._batches % self._accumulate == 0
        count = batch.get("num_items_in_batch")
        if isinstance(count, int):
            batch["num_items_in_batch"] = torch.tensor(count)

        def run(**batch: Any) -> Tensor:
            with _synchronized(self._model, last):
                output = self._model(**batch)
                loss: Tensor = output[0] if isinstance(output, tuple) else output["loss"]
                if self._accumulate > 1 and batch.get("num_items_in_batch") is None:
                    loss = loss / self._accumulate
                loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        return self.run_or_replay(run, batch, last)

    def run_or_replay(self, run: Callable[..., Tensor], batch: dict[str, Any], *how: Hashable) -> Tensor:
        """``run(**batch)``, or a replay of it.

        Args:
            run: forward and backward; returns the loss.
            batch: what it gets.
            how: what else it depends on; a graph is replayed for equal ones.
        """
        if self._gradients is None or self._gradients.moved():
            self.drop()
            self._gradients = _Gradients(self._model)
            self.reason = why_not_train(self._model)
            if self.reason is None and self._has_ddp and self._stream is None:
                self.reason = "DistributedDataParallel was made on another stream: make it on one that is given, too"
            self._learning = self.reason is None
            if self.reason is not None:
                logger.warning_once(f"training goes on without a CUDA graph: {self.reason}")
        self._calls += 1
        key = self._key(batch, how)
        graph = self._graphs.get(key)
        agreed = False
        if self._learning:
            ready = key in self._ready and graph is None and self.reason is None and self.graphs < MAX_GRAPHS
            agreed = self._agree(ready)
            if _processes() > 1 and self._calls == LEARNING_STEPS * self._accumulate:
                self._learning = False
                if not self._graphs and self.reason is None:
                    self._refuse("the processes never had batches of known shapes at the same time")
        if graph is not None:
            return self._replay(graph, batch)
        if self.reason is not None:
            return run(**batch)
        if agreed:
            return self._capture(run, batch, key)
        device = self._device
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        if not self._learning or self.graphs == MAX_GRAPHS or key in self._ready:
            return self._aside(run, batch)
        self._seen[key] += 1
        if self._seen[key] < WARMUP or self._calls < (WARMUP_OF_DDP * self._accumulate if self._has_ddp else WARMUP):
            if len(self._seen) > MAX_SHAPES and not self._graphs:
                self._refuse(f"batches have come in {MAX_SHAPES} shapes: pad or pack them to one")
            return self._aside(run, batch)
        with _reads(device) as found:
            loss = self._aside(run, batch)
        if found:
            self._refuse(f"the step waits for the GPU, to read what it holds, in {found[0]}")
        else:
            self._ready.add(key)
        return loss

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _key(self, batch: dict[str, Any], how: tuple[Hashable, ...]) -> Hashable:
        """What has to be equal for a replay."""
        assert self._gradients is not None
        given = tuple(
            (name, (value.shape, value.dtype) if isinstance(value, Tensor) else repr(value))
            for name, value in sorted(batch.items())
        )
        return given, how, self._gradients.are_there(), self._model.training

    def _agree(self, flag: bool) -> bool:
        """Whether all processes say so."""
        if _processes() == 1:
            return flag
        flags = torch.tensor(int(flag), device=self._device)
        dist.all_reduce(flags, op=dist.ReduceOp.MIN)
        return bool(flags)

    def _refuse(self, reason: str) -> None:
        self.reason = reason
        logger.warning_once(f"training goes on without a CUDA graph: {reason}")

    def _aside(self, run: Callable[..., Tensor], batch: dict[str, Any]) -> Tensor:
        """An eager run where a capture will be: gradients are accumulated on the stream of the first backward."""
        if self._device.type != "cuda":
            return run(**batch)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            loss = run(**batch)
        here.wait_stream(self._stream)
        return loss

    def _capture(self, run: Callable[..., Tensor], batch: dict[str, Any], key: Hashable) -> Tensor:
        """A run, its capture, and a replay that is compared with it; all leave the gradients of one step."""
        assert self._gradients is not None
        gradients, device = self._gradients, self._device
        gradients.reshard()
        static = {
            name: value.to(device, copy=True) if isinstance(value, Tensor) else value for name, value in batch.items()
        }
        before = gradients.read()
        values = [None if gradient is None else gradient.clone() for gradient in before]
        random = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

        def go_back() -> None:
            for gradient, value in zip(before, values, strict=True):
                if gradient is not None and value is not None:
                    gradient.copy_(value)
            gradients.write(before)
            if random is not None:
                torch.cuda.set_rng_state(random, device)

        expected = self._digest(self._aside(run, static))
        go_back()
        captured, failure = self._captured(run, static, before)
        if not self._agree(captured is not None):
            self._refuse(f"its step cannot be captured: {failure or 'another process failed to'}")
            if self._has_ddp or gradients.sharded:
                raise BackendError(
                    f"{self.reason}. FSDP2 and DDP cannot go on from the middle of a step: train without CapturedStep"
                )
            go_back()
            return self._aside(run, batch)
        assert captured is not None
        go_back()
        loss = self._replay(captured, batch)
        replayed = self._digest(loss)
        if not self._agree(_equal_bits(replayed, expected)):
            go_back()
            loss = self._aside(run, static)
            loss_noise, noise = _difference(self._digest(loss), expected)
            off_loss, off = _difference(replayed, expected)
            if not self._agree(off_loss <= NOISE * loss_noise and off <= max(NOISE * noise, ORDER)):
                self._refuse(
                    "loss or gradients of a replay are not those of the eager step, from which they differ by "
                    f"{off_loss:.0e} and {off:.0e}; those of a second eager step by {loss_noise:.0e} and {noise:.0e}"
                )
                return loss
        self._graphs[key] = captured
        return loss

    def _captured(
        self, run: Callable[..., Tensor], static: dict[str, Any], before: list[Tensor | None]
    ) -> tuple[_Captured | None, str]:
        """A capture of ``run(**static)``, or None and why there is none."""
        assert self._gradients is not None
        graph = Graph(self._pool, self._stream)
        collecting = gc.isenabled()
        gc.disable()  # what it frees may wait for the GPU
        try:
            loss = graph.capture(functools.partial(run, **static))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if "previous error during capture" in reason:
                reason += " (a loss that is kept from a step elsewhere ties gradients to that stream: detach it)"
            return None, reason
        finally:
            if collecting:
                gc.enable()
        self._pool = graph.pool
        return _Captured(graph, static, before, self._gradients.read(), loss), ""

    def _replay(self, captured: _Captured, batch: dict[str, Any]) -> Tensor:
        assert self._gradients is not None
        self._gradients.reshard()
        for name, static in captured.batch.items():
            if isinstance(static, Tensor):
                static.copy_(batch[name], non_blocking=True)
        for gradient, now in zip(captured.before, self._gradients.read(), strict=True):
            if gradient is not None and gradient is not now:
                assert now is not None  # or the key would be another
                gradient.copy_(now)
        captured.graph.replay()
        self._gradients.write(captured.after)
        return captured.loss.clone()

    def _digest(self, loss: Tensor) -> list[Tensor]:
        """The loss and, for each gradient, norms of parts of it, in fp32."""
        assert self._gradients is not None
        found = [local(gradient).reshape(-1) for gradient in self._gradients.read() if gradient is not None]
        parts = [part for gradient in found for part in gradient.tensor_split(PARTS)]
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(parts)])
        return [loss.float(), *norms.split(PARTS)]


def _equal_bits(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(found, expected, strict=True))


def _difference(found: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """Relative differences of losses, and the largest of gradients, by what ``_digest`` gives."""
    tiny = torch.finfo(torch.float32).tiny
    errors = [float((a - b).norm() / b.norm().clamp(min=tiny)) for a, b in zip(found, expected, strict=True)]
    return errors[0], math.nan if any(map(math.isnan, errors)) else max(errors[1:])


class Graph:
    """A CUDA graph of a pool of memory.

    Args:
        pool: that of other graphs, None for a new one.
        stream: to capture on.
    """

    def __init__(self, pool: Any, stream: Any) -> None:
        self.pool = torch.cuda.graph_pool_handle() if pool is None else pool
        self._stream = stream
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        """What ``run`` returns, which replays write."""
        with capturing(self._graph, self.pool, self._stream):
            return run()

    def replay(self) -> None:
        """Runs what was captured, on the current stream."""
        self._graph.replay()


@dataclasses.dataclass
class _Captured:
    """A graph, the tensors it reads and writes, and the gradients that it takes and leaves."""

    graph: Graph
    batch: dict[str, Any]
    before: list[Tensor | None]
    after: list[Tensor | None]
    loss: Tensor


class _Gradients:
    """Everywhere that a model's gradients wait between two batches: ``.grad`` of its parameters and, until the last
    batch of an optimizer's step, what FSDP2 has of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._root = model
        self._shards = _fsdp_modules(model)
        self.reshard()  # parameters are those that the optimizer has
        self._parameters = list(model.parameters())
        self._gathered = [parameter for group in _fsdp_groups(self._shards) for parameter in group.fsdp_params]
        self._where = self._addresses()

    def _places(self) -> Iterator[tuple[Any, str]]:
        for parameter in self._parameters:
            yield parameter, "grad"
        for parameter in self._gathered:
            yield parameter, "unsharded_accumulated_grad"  # in the dtype of reductions, or
            yield getattr(parameter, "_unsharded_param", None), "grad"  # in that of the gathered weights, once there

    def _addresses(self) -> list[tuple[int, bool]]:
        return [(local(parameter).data_ptr(), parameter.requires_grad) for parameter in self._parameters]

    def moved(self) -> bool:
        """Whether a parameter lies elsewhere than at first, or has been frozen or unfrozen."""
        return self._addresses() != self._where

    def reshard(self) -> None:
        """Has FSDP2 drop weights that an evaluation has gathered, and which a replay would not."""
        for module in self._shards:
            module.reshard()

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 has any of it."""
        return bool(self._shards)

    def read(self) -> list[Tensor | None]:
        """All gradients, None where there is none."""
        return [getattr(owner, name, None) for owner, name in self._places()]

    def write(self, gradients: list[Tensor | None]) -> None:
        """Puts back what :meth:`read` gave."""
        for (owner, name), gradient in zip(self._places(), gradients, strict=True):
            if getattr(owner, name, None) is not gradient:
                setattr(owner, name, gradient)

    def are_there(self) -> bytes:
        """Which of them there are, a byte for each."""
        return bytes(gradient is not None for gradient in self.read())


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process has; others as they are."""
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


def why_not_train(model: nn.Module) -> str | None:
    """Why a model's training steps are not to be captured; None if they may be tried."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        return f"the model is on {', '.join(sorted(map(str, devices)))}, not on one GPU"
    for name, module in model.named_modules():
        if type(module).__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine"):
            return f"{name or 'the model'} is a {type(module).__name__}: shard by FSDP2 (fully_shard)"
    return None


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _fsdp_modules(model: nn.Module) -> list[Any]:
    """Modules that FSDP2 shards, one of each group, the root first."""
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    states = {id(m._get_fsdp_state()): m for m in reversed(list(model.modules())) if isinstance(m, FSDPModule)}
    return list(states.values())[::-1]


def _fsdp_groups(modules: list[Any]) -> Iterator[Any]:
    for module in modules:
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        yield from [state._fsdp_param_group] if groups is None else groups


@contextlib.contextmanager
def _synchronized(model: Any, last: bool) -> Iterator[None]:
    """Has FSDP2 and DDP reduce gradients of a backward inside of it only if it is the last."""
    no_sync = getattr(model, "no_sync", None)
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
        yield
    elif no_sync is not None and not last:
        with no_sync():
            yield
    else:
        yield


@contextlib.contextmanager
def _reads(device: torch.device) -> Iterator[list[str]]:
    """Lines of the code that make the CPU wait for the GPU, which a capture does not allow and may not survive."""
    found: list[str] = []
    if device.type != "cuda":
        yield found
        return
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            found.append(f"{warning.filename}:{warning.lineno}")
        elif "Synchronization debug mode" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def capture_training(trainer: Any) -> CapturedStep:
    """Has a :class:`transformers.Trainer` make its training steps by a :class:`CapturedStep`, accelerate's backward
    included. Call it before ``train()``; trainers that read values in a step (TRL's SFTTrainer does for its metrics) go
    on eagerly.

    Args:
        trainer: whose ``training_step`` is replaced.

    Returns:
        The step, whose ``reason`` says why training is not captured, if so.
    """
    original = trainer.training_step
    stream = _prepare_aside(trainer.accelerator) if trainer.args.device.type == "cuda" else None
    step = CapturedStep(trainer.model, trainer.args.gradient_accumulation_steps, stream)

    def training_step(model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        reason = _why_not_trainer(trainer)
        if reason is not None:
            if step.reason is None:
                step._refuse(reason)
            return original(model, inputs, num_items_in_batch)  # type: ignore[no-any-return]
        if model is not step._model:  # accelerate's
            step.follow(model)
        if not model.training:
            model.train()
        if isinstance(num_items_in_batch, int):
            num_items_in_batch = torch.tensor(num_items_in_batch)
        batch = {**trainer._prepare_inputs(inputs), _COUNT: num_items_in_batch}

        def run(**batch: Any) -> Tensor:
            count = batch.pop(_COUNT)
            return original(model, batch, count)  # type: ignore[no-any-return]

        how = trainer.accelerator.sync_gradients, trainer.current_gradient_accumulation_steps
        return step.run_or_replay(run, batch, *how)

    trainer.training_step = training_step
    return step


def _prepare_aside(accelerator: Any) -> Any:
    """The stream on which accelerate will put models in DistributedDataParallel."""
    stream, original = torch.cuda.Stream(), accelerator.prepare_model

    def prepare_model(*args: Any, **kwargs: Any) -> Any:
        here = torch.cuda.current_stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            model = original(*args, **kwargs)
        here.wait_stream(stream)
        return model

    accelerator.prepare_model = prepare_model
    return stream


_COUNT = "num_items_in_batch of the step"


def _why_not_trainer(trainer: Any) -> str | None:
    accelerator, arguments = trainer.accelerator, trainer.args
    if accelerator.scaler is not None:
        return "fp16 needs a scaler of gradients, which reads them: train in bf16"
    if arguments.n_gpu > 1:
        return f"{arguments.n_gpu} GPUs in one process are DataParallel: start a process for each (torchrun)"
    if arguments.torch_empty_cache_steps is not None:
        return f"torch_empty_cache_steps={arguments.torch_empty_cache_steps} empties the cache inside of steps"
    if "lomo" in str(arguments.optim):
        return f"optim={arguments.optim} makes the optimizer's step inside of the backward"
    return None
