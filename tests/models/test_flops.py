"""What counters of operations find in whole models: the sum of a formula written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hybrids import make_hybrid
from torch import Tensor, nn
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mamba2_hf.layers import Attention, Mamba2Mixer
from mamba2_hf.ops import dispatch

B, T, CHUNKS, Q = 2, 130, 3, 64


class OperatorCounter(TorchDispatchMode):
    """A counter that sees operators only, and no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_counter.flop_registry.get(func._overloadpacket)
        if formula is not None:
            name = str(func._overloadpacket)
            self.counts[name] = self.counts.get(name, 0) + formula(*args, **(kwargs or {}), out_val=out)
        return out


def by_modules(run: Callable[[], object]) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        run()
    return {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}


def by_operators(run: Callable[[], object]) -> dict[str, int]:
    with OperatorCounter() as counter:
        run()
    return counter.counts


@pytest.fixture(params=["pure", "hybrid"])
def model(request: pytest.FixtureRequest, tiny_model: Callable[..., Any]) -> Any:
    return tiny_model() if request.param == "pure" else make_hybrid(attn_implementation="eager")


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 61, (B, T), generator=torch.Generator().manual_seed(0))


def linears(model: Any) -> int:
    """Of a token."""
    return 2 * sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def scans(model: Any) -> int:
    """Of a row: per chunk C B^T, its product with x dt, what it adds to the state and what it reads from it."""
    total = 0
    for mixer in (module for module in model.modules() if isinstance(module, Mamba2Mixer)):
        heads, head_dim, groups, state = mixer.num_heads, mixer.head_dim, mixer.n_groups, mixer.state_size
        total += 2 * CHUNKS * Q * (Q * groups * state + Q * heads * head_dim + 2 * heads * head_dim * state)
    return total


def steps(model: Any) -> int:
    """Of a row."""
    mixers = [module for module in model.modules() if isinstance(module, Mamba2Mixer)]
    return 2 * sum(mixer.num_heads * mixer.head_dim * mixer.state_size for mixer in mixers)


def attention(model: Any, tokens: int, keys: int) -> int:
    """Of a row: scores, and their product with the values."""
    widths = [module.o_proj.in_features for module in model.modules() if isinstance(module, Attention)]
    return 2 * 2 * tokens * keys * sum(widths)


@pytest.mark.parametrize("counted", [by_modules, by_operators])
@pytest.mark.parametrize("recorded", [False, True], ids=["no gradient", "gradient"])
def test_forward(model: Any, ids: Tensor, counted: Any, recorded: bool) -> None:
    with torch.set_grad_enabled(recorded):
        found = counted(lambda: model(ids, use_cache=False))
    assert sum(found.values()) == B * (T * linears(model) + scans(model) + attention(model, T, T))


@pytest.mark.parametrize("counted", [by_modules, by_operators])
def test_training_step(model: Any, ids: Tensor, counted: Any) -> None:
    """A product has two in the backward; a scan is recomputed there first."""
    found = counted(lambda: model.train()(ids, labels=ids).loss.backward())
    assert sum(found.values()) == B * (3 * T * linears(model) + 4 * scans(model) + 3 * attention(model, T, T))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton interprets nothing where there is a GPU")
@pytest.mark.parametrize("counted", [by_modules, by_operators])
def test_training_step_on_triton(
    tiny_model: Callable[..., Any], ids: Tensor, counted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_usable", lambda device: (True, "by test"))
    model = tiny_model(num_hidden_layers=1, num_heads=2, head_dim=16, hidden_size=16)
    found = counted(lambda: model.train()(ids[:1], labels=ids[:1]).loss.backward())
    assert sum(found.values()) == 3 * T * linears(model) + 4 * scans(model)
    assert any(name.startswith("mamba2_hf.") for name in found)


@pytest.mark.parametrize("counted", [by_modules, by_operators])
@torch.no_grad()
def test_decode_step(model: Any, ids: Tensor, counted: Any) -> None:
    cache = model(ids).past_key_values
    found = counted(lambda: model(ids[:, :1], past_key_values=cache))
    assert sum(found.values()) == B * (linears(model) + steps(model) + attention(model, 1, T + 1))


@torch.inference_mode()
def test_inference_mode(model: Any, ids: Tensor) -> None:
    found = by_modules(lambda: model(ids, use_cache=False))
    assert sum(found.values()) == B * (T * linears(model) + scans(model) + attention(model, T, T))
