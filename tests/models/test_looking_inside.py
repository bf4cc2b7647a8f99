"""Who looks into a model from outside meets the batch that was given: hooks, steering, patches, adapters by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from hybrids import ARCHITECTURES, make_hybrid
from torch import Tensor, nn

Make = Callable[..., Any]
EXACT = {"rtol": 0, "atol": 1e-10}  # fp64: only the order of the sums differs
MASK = torch.tensor(
    [
        [0, 0, 0, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 1, 1, 1],
    ]
)
IDS = torch.randint(3, 61, MASK.shape, generator=torch.Generator().manual_seed(1))
KINDS = ["mamba2", *ARCHITECTURES]


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tiny_model: Make) -> Any:
    made = tiny_model() if request.param == "mamba2" else make_hybrid(request.param)
    return made.double()


def rows_alone(run: Callable[[Tensor], Tensor]) -> Tensor:
    """``run`` on each row without its padding, ``(1, T')`` to ``(1, T', V)``: the last logits of each."""
    return torch.cat([run(ids[keep][None])[:, -1] for ids, keep in zip(IDS, MASK.bool(), strict=True)])


def leading_shapes(model: nn.Module, **arguments: Any) -> dict[str, set[tuple[int, ...]]]:
    """The first two sizes of what every module takes and returns, by name; tensors of one axis are left out."""
    found: dict[str, set[tuple[int, ...]]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            tensors = [x for x in (*args, *(out if isinstance(out, tuple) else [out])) if isinstance(x, Tensor)]
            found.setdefault(name, set()).update(tuple(x.shape[:2]) for x in tensors if x.dim() > 1)

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    model(**arguments)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("grad", [True, False])
def test_every_module_takes_and_returns_the_batch(model: Any, grad: bool) -> None:
    rows, tokens = MASK.shape
    with torch.set_grad_enabled(grad):
        found = leading_shapes(model, input_ids=IDS, attention_mask=MASK)
    assert any(name.endswith("conv1d") for name in found)
    for name, shapes in found.items():
        if name.endswith("conv1d"):
            assert all(shape[0] == rows for shape in shapes), name  # and channels
        elif ".router" in name or ".experts" in name or ".latent" in name:
            assert {shape[0] for shape in shapes} == {rows * tokens}, name  # tokens in order, as in transformers' own
        elif not name.endswith("rotary"):  # rows may share their positions
            assert shapes <= {(rows, tokens)}, name  # none where everything goes by keyword


@pytest.mark.parametrize("part", ["layer", "norm", "mixer", "in_proj", "out_proj", "head"])
def test_a_hook_steers_the_last_token_of_every_row(model: Any, part: str) -> None:
    layer = model.backbone.layers[1]
    mixers = [module for module in model.backbone.modules() if hasattr(module, "in_proj")]
    target = {
        "layer": layer,
        "norm": next(module for module in layer.modules() if type(module).__name__ == "RMSNorm"),
        "mixer": mixers[-1],
        "in_proj": mixers[-1].in_proj,
        "out_proj": mixers[-1].out_proj,
        "head": model.backbone.norm_f,
    }[part]

    def steer(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, -1] += 0.7
        return out

    handle = target.register_forward_hook(steer)
    with torch.no_grad():
        together = model(IDS, attention_mask=MASK).logits[:, -1]
        expected = rows_alone(lambda ids: model(ids).logits)
        handle.remove()
        unsteered = model(IDS, attention_mask=MASK).logits[:, -1]
    torch.testing.assert_close(together, expected, **EXACT)
    assert (together - unsteered).abs().amax(1).min() > 1e-3


def test_a_patch_of_one_row_leaves_the_others(model: Any) -> None:
    def patch(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        clean, edited = out[:-1], out[-1:]
        return torch.cat([clean, edited * 1.5])

    with torch.no_grad():
        before = model(IDS, attention_mask=MASK).logits
        handle = model.backbone.layers[0].register_forward_hook(patch)
        after = model(IDS, attention_mask=MASK).logits
        handle.remove()
        handle = model.backbone.layers[0].register_forward_hook(lambda module, args, out: out * 1.5)
        last = model(IDS[-1:, 1:]).logits
        handle.remove()
    torch.testing.assert_close(after[:-1], before[:-1], **EXACT)
    torch.testing.assert_close(after[-1:, 1:], last, **EXACT)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hidden_states_are_in_the_graph(model: Any, checkpointing: bool) -> None:
    model.train()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    keep = MASK.bool()
    outputs = model(IDS, attention_mask=MASK, output_hidden_states=True)
    gradients = torch.autograd.grad(outputs.logits[keep].square().sum(), outputs.hidden_states)
    for row, columns in enumerate(keep):
        alone = model(IDS[row, columns][None], output_hidden_states=True)
        expected = torch.autograd.grad(alone.logits.square().sum(), alone.hidden_states)
        for got, own in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got[row, columns], own[0], rtol=1e-8, atol=1e-9)
            assert not got[row, ~columns].any()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT reads it
@pytest.mark.parametrize("architecture", ["mamba2", "plain", "shared"])
def test_rows_may_have_adapters_of_their_own(tiny_model: Make, architecture: str) -> None:
    model = (tiny_model() if architecture == "mamba2" else make_hybrid(architecture)).double()
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["in_proj", "out_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config, adapter_name="one")
    adapted.add_adapter("two", config)
    adapted.double().eval()
    names = ["two", "__base__", "one"]
    with torch.no_grad():
        together = adapted(input_ids=IDS, attention_mask=MASK, adapter_names=names).logits[:, -1]
        for row, name in enumerate(names):
            ids = IDS[row, MASK[row].bool()][None]
            if name == "__base__":
                with adapted.disable_adapter():
                    alone = adapted(input_ids=ids).logits
            else:
                adapted.set_adapter(name)
                alone = adapted(input_ids=ids).logits
            torch.testing.assert_close(together[row], alone[0, -1], **EXACT)


class TestConvolution:
    """What a hook on ``conv1d`` reads is aligned with the tokens."""

    @staticmethod
    def record(model: Any) -> tuple[list[tuple[Tensor, Tensor]], Any]:
        seen: list[tuple[Tensor, Tensor]] = []
        conv1d = next(module for name, module in model.named_modules() if name.endswith("mixer.conv1d"))
        handle = conv1d.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
        return seen, (conv1d, handle)

    @pytest.mark.parametrize("padded", [True, False])
    def test_of_a_batch(self, model: Any, padded: bool) -> None:
        seen, (conv1d, handle) = self.record(model)
        mask = MASK if padded else torch.ones_like(MASK)
        with torch.no_grad():
            model(IDS, attention_mask=mask)
        handle.remove()
        [(entered, left)] = seen
        assert entered.shape == left.shape == (len(MASK), conv1d.in_channels, MASK.shape[1])
        for row, keep in enumerate(mask.bool()):
            padding = F.pad(entered[row : row + 1, :, keep], (conv1d.kernel_size[0] - 1, 0))
            expected = F.conv1d(padding, conv1d.weight, conv1d.bias, groups=conv1d.groups)
            torch.testing.assert_close(left[row : row + 1, :, keep], expected, **EXACT)

    def test_of_tokens_that_continue_a_cache(self, model: Any) -> None:
        seen, (_, handle) = self.record(model)
        with torch.no_grad():
            model(IDS)
            cache = None
            for part in IDS.split([3, 1, 1, 3], 1):
                cache = model(part, past_key_values=cache, use_cache=True).past_key_values
        handle.remove()
        whole, *parts = seen
        for index in (0, 1):
            torch.testing.assert_close(torch.cat([part[index] for part in parts], 2), whole[index], **EXACT)

    def test_what_a_hook_changes_stays_changed(self, model: Any) -> None:
        _, (conv1d, handle) = self.record(model)
        handle.remove()
        conv1d.register_forward_pre_hook(lambda module, args: (1.5 * args[0], *args[1:]))
        conv1d.register_forward_hook(lambda module, args, out: out + 0.3)
        with torch.no_grad():
            together = model(IDS, attention_mask=MASK).logits[:, -1]
            expected = rows_alone(lambda ids: model(ids).logits)
            cache = model(IDS[1:2, :5], use_cache=True).past_key_values
            step = model(IDS[1:2, 5:], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(together, expected, **EXACT)
        torch.testing.assert_close(step, expected[1:2], **EXACT)
