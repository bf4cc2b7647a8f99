"""Hooks on modules, and modules around modules: nothing is gone past."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hybrids import ARCHITECTURES, make_hybrid
from torch import Tensor, nn
from torch.nn.modules import module as every_module
from torch.utils.hooks import RemovableHandle

from mamba2_hf.layers import Mamba2Mixer
from mamba2_hf.models.graphs import ModelWatch

FORWARD = {
    "forward": every_module.register_module_forward_hook,
    "forward pre-": every_module.register_module_forward_pre_hook,
}
BACKWARD = {
    "full backward": every_module.register_module_full_backward_hook,
    "full backward pre-": every_module.register_module_full_backward_pre_hook,
}
Register = Callable[[Callable[..., Any]], RemovableHandle]


@pytest.fixture(params=["pure", *ARCHITECTURES])
def model(request: pytest.FixtureRequest, tiny_model: Callable[..., Any]) -> Any:
    return tiny_model() if request.param == "pure" else make_hybrid(request.param)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def for_all() -> Iterator[Callable[[Register, Callable[..., Any]], None]]:
    """Registers a hook for all modules, until the test ends."""
    handles: list[RemovableHandle] = []
    yield lambda register, hook: handles.append(register(hook))
    for handle in handles:
        handle.remove()


def weighty(model: Any) -> set[str]:
    """Names of the modules with parameters of their own."""
    return {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}


def seen(model: Any, modules: set[nn.Module]) -> set[str]:
    return weighty(model) & {name for name, module in model.named_modules() if module in modules}


class TestHooksForAllModules:
    @pytest.mark.parametrize("register", FORWARD.values(), ids=FORWARD)
    def test_see_every_module_of_a_forward(self, model: Any, ids: Tensor, register: Register, for_all: Any) -> None:
        modules: set[nn.Module] = set()
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits
            cache = model(ids[:, :-1]).past_key_values
        for_all(register, lambda module, *_: modules.add(module))
        for recorded in (False, True):
            with torch.set_grad_enabled(recorded):
                torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
            assert seen(model, modules) == weighty(model)
            modules.clear()
        with torch.no_grad():
            last = model(ids[:, -1:], past_key_values=cache).logits
        torch.testing.assert_close(last, expected[:, -1:], atol=1e-5, rtol=1e-5)
        assert seen(model, modules) == weighty(model)

    @pytest.mark.filterwarnings("ignore:For backward hooks to be called:UserWarning")  # outputs that are no tensors
    @pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # inputs that are token ids
    @pytest.mark.parametrize("register", BACKWARD.values(), ids=BACKWARD)
    def test_see_every_module_of_a_backward(self, model: Any, ids: Tensor, register: Register, for_all: Any) -> None:
        modules: set[nn.Module] = set()
        for_all(register, lambda module, *_: modules.add(module))
        model.train()(ids, labels=ids).loss.backward()
        # A hook of a module gets gradients of what it returned; an output that is no tensor has none.
        assert {name for name in weighty(model) if "router" not in name} <= seen(model, modules)

    @torch.no_grad()
    def test_may_change_what_modules_return(self, model: Any, ids: Tensor, for_all: Any) -> None:
        def louder(module: nn.Module, args: Any, out: Any) -> Any:
            return 1.5 * out if isinstance(module, (nn.Conv1d, nn.Linear)) else None

        plain = model(ids).logits
        handles = [module.register_forward_hook(louder) for module in model.modules()]
        expected = model(ids).logits
        for handle in handles:
            handle.remove()
        for_all(every_module.register_module_forward_hook, louder)
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
        assert (expected - plain).abs().max() > 0.1

    @pytest.mark.parametrize("register", (FORWARD | BACKWARD).values(), ids=FORWARD | BACKWARD)
    def test_are_a_change_to_what_was_captured(self, model: Any, register: Register, for_all: Any) -> None:
        watch = ModelWatch(model)
        watch.changed()
        assert not watch.changed()
        for_all(register, lambda *_: None)
        assert watch.changed()


class Around(nn.Module):
    """As FSDP 1, ``torch.compile`` and adapters wrap a module: has all its attributes, and does more when called."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inside, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return 1.5 * self.inside(*args, **kwargs)


@pytest.mark.parametrize("recorded", [False, True], ids=["no gradient", "gradient"])
def test_what_is_around_a_mixer_is_called(model: Any, ids: Tensor, recorded: bool) -> None:
    plain = model(ids, use_cache=False).logits
    holders = [module for module in model.modules() if isinstance(getattr(module, "mixer", None), Mamba2Mixer)]
    assert holders
    handles = [holder.mixer.register_forward_hook(lambda mixer, args, out: 1.5 * out) for holder in holders]
    expected = model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    for holder in holders:
        holder.mixer = Around(holder.mixer)
    with torch.set_grad_enabled(recorded):
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
    assert (expected - plain).abs().max() > 0.1
