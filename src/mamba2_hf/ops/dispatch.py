"""Which backend serves a call, and why.

In order: the call's ``backend=``, an enclosing :func:`use_backend` or :func:`batch_invariant`, the environment variable
``MAMBA2_HF_BACKEND``, else the fastest backend that can serve the call. A backend that was asked for by name and cannot
serve raises its reason; one that was merely preferred steps aside for the next.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ..errors import BackendError
from .runtime.modes import transformed

ENVIRONMENT_VARIABLE = "MAMBA2_HF_BACKEND"
BACKENDS = ("triton", "torch")  # fastest first
OPS = (
    "attend_one",
    "attention_step",
    "ssd_chunk_scan",
    "ssd_state_update",
    "causal_conv1d",
    "causal_conv1d_update",
    "experts_step",
    "gated_activation",
    "gated_rms_norm",
    "linear_cross_entropy",
    "mamba2_inner",
    "mamba2_layer",
    "mamba2_layer_step",
    "mamba2_step",
    "mlp_step",
    "rotary",
)

INVARIANT = "invariant"  # a backend that is used where it was asked for, by batch_invariant()
NOT_INVARIANT = ("attend_one", "attention_step", "experts_step", "linear_cross_entropy", "mlp_step")
"""Ops that it does not have: shortcuts of what it does by other ones, and a sum over tokens of all sequences."""

LOWEST_CAPABILITY = (8, 0)  # of an NVIDIA GPU, for Triton: the first whose matrix products take bfloat16

_override: str | None = None
_modules: dict[str, ModuleType] = {}  # a dict, so that compiled graphs can look a backend up


class Choice(NamedTuple):
    """The backend of a call and the reason for it."""

    name: str
    reason: str


class BackendStatus(NamedTuple):
    """Whether a backend can be used at all on this machine."""

    name: str
    available: bool
    reason: str


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Forces a backend for every op called inside: ``"torch"``, ``"triton"``, or ``None`` for the automatic choice.

    The setting is the process's, not the thread's, so that compiled graphs can guard on it.

    Raises:
        BackendError: ``name`` is no backend.
    """
    global _override
    previous, _override = _override, _known(name, "use_backend")
    try:
        yield
    finally:
        _override = previous


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Has every op and every layer of a model called inside give a sequence the same bits, whatever else is in the
    batch, however its tokens are divided among calls, and whether a token is read in a prompt or stepped.

    That holds for one machine, its number of threads and one choice of dtypes, for models that this process has whole,
    and without gradients. Results differ from those of other backends by rounding. See :mod:`mamba2_hf.ops.invariant`
    for how, and :func:`use_backend` for whom the setting is.
    """
    global _override
    previous, _override = _override, INVARIANT
    try:
        yield
    finally:
        _override = previous


def is_batch_invariant() -> bool:
    """Whether :func:`batch_invariant` is in force."""
    return _override == INVARIANT


def choose(op: str, device: torch.device, requested: str | None = None, **call: Any) -> Choice:
    """Picks the backend of one call.

    Args:
        op: one of ``OPS``.
        device: where the tensors are.
        requested: the call's own ``backend=``.
        call: what the backend needs to know to decide (sizes, dtypes), passed to its ``supports``. Without any, the
            answer is about calls in general, and its reason names the limits.

    Raises:
        BackendError: a backend was forced and cannot serve the call; the message says why.
    """
    forced, source = _forced(requested)
    if forced is not None:
        ok, reason = _supports(forced, op, device, call)
        if not ok:
            raise BackendError(f"backend {forced!r} was asked for by {source}, but cannot serve {op}: {reason}")
        return Choice(forced, f"asked for by {source}")
    skipped: list[str] = []
    for name in BACKENDS:
        ok, reason = _supports(name, op, device, call)
        if ok:
            return Choice(name, "; ".join([*skipped, reason]))
        skipped.append(f"{name}: {reason}")
    raise BackendError(f"no backend can serve {op}: {'; '.join(skipped)}")


def again(op: str, call: Any, requested: str | None = None) -> Any:
    """What an op of Triton gives for a call like one before, which passed its checks and which Triton served, with as
    little Python as there can be: for steps. None where there was none, or another backend may be meant.
    """
    module = _modules.get("triton")
    wanted = _override if requested is None else requested
    if module is None or wanted not in (None, "triton") or ENVIRONMENT_VARIABLE in os.environ:
        return None
    if torch.compiler.is_compiling() or transformed():
        return None
    return getattr(module, op).again(call)


def backend_module(name: str) -> ModuleType:
    """The module that implements the ops for a backend, imported on first use."""
    if name not in _modules:
        _modules[name] = importlib.import_module(f"{__package__}.{name}")
    return _modules[name]


def usable(device: torch.device) -> tuple[bool, str]:
    """Whether Triton can run where the tensors are, and why (not)."""
    return _usable(device)


def report() -> list[BackendStatus]:
    """Every backend with whether it can be used on this machine, and why (not)."""
    return [BackendStatus(name, *_available(name)) for name in BACKENDS]


def _forced(requested: str | None) -> tuple[str | None, str]:
    if requested is not None:
        return _known(requested, "backend="), "backend="
    if _override is not None:
        return _override, "batch_invariant()" if _override == INVARIANT else "use_backend(...)"
    return _known(os.environ.get(ENVIRONMENT_VARIABLE), ENVIRONMENT_VARIABLE), ENVIRONMENT_VARIABLE


def _known(name: str | None, source: str) -> str | None:
    if name in (None, "", "auto"):
        return None
    if name not in BACKENDS:
        raise BackendError(f"{source} names the backend {name!r}; there are: {', '.join(BACKENDS)}, auto")
    return name


def _available(name: str) -> tuple[bool, str]:
    if name == "torch":
        return True, f"PyTorch {torch.__version__} runs anywhere"
    if importlib.util.find_spec("triton") is None:
        return False, "the package triton is not installed"
    if not torch.cuda.is_available():
        return False, "PyTorch sees no GPU"
    return _usable_gpu(torch.cuda.current_device())


@functools.cache
def _usable_gpu(index: int) -> tuple[bool, str]:
    """Whether Triton can run on a GPU at all, and why (not)."""
    try:
        backend_module("triton")
    except ImportError as error:
        return False, f"its kernels cannot be imported: {error}"
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    if torch.version.hip is None and capability < LOWEST_CAPABILITY:
        found, lowest = (".".join(map(str, c)) for c in (capability, LOWEST_CAPABILITY))
        return False, f"{name} has compute capability {found}, below {lowest}"
    return True, f"GPU {name}"


@torch.compiler.assume_constant_result
def _usable(device: torch.device) -> tuple[bool, str]:
    """Whether Triton can run where the tensors are, and why (not)."""
    if device.type != "cuda":
        return False, f"the tensors are on {device.type}, not on a GPU"
    return _usable_gpu(torch.cuda.current_device() if device.index is None else device.index)


def _supports(name: str, op: str, device: torch.device, call: dict[str, Any]) -> tuple[bool, str]:
    if name == "torch":
        return True, "PyTorch serves every call"
    if transformed():
        return False, "torch.func and forward differentiation see PyTorch's own operations only"
    ok, reason = _usable(device)
    if name == INVARIANT:
        if op in NOT_INVARIANT:
            return False, "it is made of others, which can be called, or is a sum over several sequences"
        if torch.compiler.is_compiling():
            return False, "a compiler decides on the order of sums: call what is not compiled"
        if device.type == "cpu" and not ok:
            return True, "PyTorch serves it"
    return backend_module("triton").supports(op, **call) if ok else (False, reason)
