"""The weight-reading rule: whatever is done to a child of the mixer, the result is that of calling the child."""

from __future__ import annotations

import ast
import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.utils import parametrize, prune

from mamba2_hf.layers import GatedRMSNorm, Mamba2Mixer, SSDState, linear, plain_weight
from mamba2_hf.layers.sequence import sequence_layout
from mamba2_hf.ops.scan.reference import ssd_recurrent

CHILDREN = ("in_proj", "conv1d", "norm", "out_proj")
BATCH, TOKENS, WIDTH = 2, 13, 16


def make_mixer() -> Mamba2Mixer:
    torch.manual_seed(0)
    mixer = Mamba2Mixer(WIDTH, num_heads=4, head_dim=8, n_groups=2, state_size=4, use_bias=True)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.5)
    return mixer


def composed(mixer: Mamba2Mixer, hidden_states: Tensor) -> Tensor:
    """The mixer as the paper draws it, for one document per row: every child is called, the scan is the oracle's."""
    z, xbc, dt = mixer.in_proj(hidden_states).split([mixer.inner_size, mixer.conv_size, mixer.num_heads], -1)
    xbc = nn.functional.silu(mixer.conv1d(xbc.mT)[..., : xbc.shape[1]].mT)
    groups = mixer.n_groups * mixer.state_size
    x, B, C = xbc.split([mixer.inner_size, groups, groups], -1)
    y, _ = ssd_recurrent(
        x.unflatten(-1, (mixer.num_heads, mixer.head_dim)),
        dt,
        -torch.exp(mixer.A_log),
        B.unflatten(-1, (mixer.n_groups, mixer.state_size)),
        C.unflatten(-1, (mixer.n_groups, mixer.state_size)),
        D=mixer.D,
        dt_bias=mixer.dt_bias,
        dt_softplus=True,
    )
    return mixer.out_proj(mixer.norm(y.flatten(-2), z))


class Adapted(nn.Module):
    """As LoRA wraps: the child inside, something added to what it returns."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.base_layer = child
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, *args: Tensor) -> Tensor:
        out = self.base_layer(*args)
        return out + self.scale * torch.sin(out)


class Stored8Bit(nn.Module):
    """As quantization replaces: integers and a scale, made into a weight in every forward."""

    def __init__(self, child: Any) -> None:
        super().__init__()
        self.register_buffer("scale", child.weight.detach().abs().amax() / 127)
        self.register_buffer("integers", (child.weight.detach() / self.scale).round().to(torch.int8))
        self.child = [child]

    def forward(self, *args: Tensor) -> Tensor:
        weight = {"weight": self.integers * self.scale}
        return torch.func.functional_call(self.child[0], weight, args)


def subclass(child: Any) -> Any:
    """As quantized layers that remain a Linear or Conv1d: ``weight`` holds integers that mean nothing by themselves."""
    quantized = Stored8Bit(child)
    child = copy.copy(child)
    child._parameters = dict(child._parameters)

    class Packed(type(child)):  # type: ignore[misc]
        def forward(self, *args: Tensor) -> Tensor:
            return quantized(*args)

    child.__class__ = Packed
    child.weight = nn.Parameter(quantized.integers, requires_grad=False)
    return child


def instance_forward(child: Any) -> Any:
    """As accelerate and tensor parallelism hook: ``forward`` of this one instance is another."""
    original = child.forward
    child.forward = lambda *args: 1.5 * original(*args)
    return child


def post_hook(child: Any) -> Any:
    child.register_forward_hook(lambda module, args, out: 1.5 * out)
    return child


def pre_hook(child: Any) -> Any:
    child.register_forward_pre_hook(lambda module, args: (1.5 * args[0], *args[1:]))
    return child


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(child: Any) -> Any:
    return parametrize.register_parametrization(child, "weight", Doubled())


def pruned(child: Any) -> Any:
    return prune.random_unstructured(child, "weight", amount=0.5)


def brought_from_meta(child: Any) -> Any:
    """As offloading: the weight is on the meta device, and another one comes when the module is called."""
    weight = 2 * child.weight.detach()
    child.weight = nn.Parameter(weight.to("meta"))
    original = child.forward

    def forward(*args: Tensor) -> Tensor:
        child.weight = nn.Parameter(weight)
        try:
            return original(*args)
        finally:
            child.weight = nn.Parameter(weight.to("meta"))

    child.forward = forward
    return child


class Marked(Tensor):
    """A weight of another type, as quantization libraries make them: a convolution sees twice its values."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.conv1d:
            return super().__torch_function__(func, types, args, kwargs)
        x, weight, *rest = (arg.as_subclass(Tensor) if type(arg) is cls else arg for arg in args)
        return func(x, 2 * weight, *rest)


SUBSTITUTIONS: dict[str, Callable[[Any], Any]] = {
    "adapted": Adapted,
    "quantized replacement": Stored8Bit,
    "quantized subclass": subclass,
    "forward of the instance": instance_forward,
    "forward hook": post_hook,
    "forward pre-hook": pre_hook,
    "parametrized": parametrized,
    "pruned": pruned,
    "weight on meta": brought_from_meta,
}


@pytest.mark.parametrize("substitution", SUBSTITUTIONS)
@pytest.mark.parametrize("child", CHILDREN)
class TestSubstitutions:
    @pytest.fixture
    def mixer(self, child: str, substitution: str) -> Mamba2Mixer:
        mixer = make_mixer()
        setattr(mixer, child, SUBSTITUTIONS[substitution](getattr(mixer, child)))
        return mixer

    @pytest.fixture
    def hidden_states(self) -> Tensor:
        return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))

    def test_equals_calling_every_child(self, mixer: Mamba2Mixer, hidden_states: Tensor) -> None:
        expected = composed(mixer, hidden_states)
        assert (expected - make_mixer()(hidden_states)).abs().max() > 1e-3  # the substitution shows
        torch.testing.assert_close(mixer(hidden_states), expected, atol=1e-5, rtol=1e-4)

    def test_keeps_documents_apart(self, mixer: Mamba2Mixer, hidden_states: Tensor) -> None:
        bounds = (0, 5, 6, 13)
        parts = [composed(mixer, hidden_states[:, a:b]) for a, b in itertools.pairwise(bounds)]
        seq_idx = torch.tensor([[0] * 5 + [1] + [2] * 7]).expand(BATCH, -1)
        layout = sequence_layout(BATCH, TOKENS, seq_idx=seq_idx)
        torch.testing.assert_close(mixer(hidden_states, layout), torch.cat(parts, 1), atol=1e-5, rtol=1e-4)

    def test_leaves_padding_out(self, mixer: Mamba2Mixer, hidden_states: Tensor) -> None:
        mask = torch.ones(BATCH, TOKENS)
        mask[0, :4] = mask[1, 9:] = 0
        layout = sequence_layout(BATCH, TOKENS, attention_mask=mask)
        out = mixer(hidden_states, layout)
        torch.testing.assert_close(out[:1, 4:], composed(mixer, hidden_states[:1, 4:]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(out[1:, :9], composed(mixer, hidden_states[1:, :9]), atol=1e-5, rtol=1e-4)

    def test_continues_a_state(self, mixer: Mamba2Mixer, hidden_states: Tensor) -> None:
        state = SSDState()
        with torch.no_grad():
            expected = composed(mixer, hidden_states)
            parts = [mixer(part, state=state) for part in hidden_states.split([2, 6, 1, 1, 3], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-4)

    def test_sends_gradients_through_every_child(self, mixer: Mamba2Mixer, hidden_states: Tensor) -> None:
        parameters = [p for p in mixer.parameters() if p.requires_grad and not p.is_meta]
        probe = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))
        got = torch.autograd.grad((mixer(hidden_states) * probe).sum(), parameters)
        expected = torch.autograd.grad((composed(mixer, hidden_states) * probe).sum(), parameters)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


class TestPlainWeight:
    def test_is_the_parameter_itself_where_nothing_was_done(self) -> None:
        mixer = make_mixer()
        assert plain_weight(mixer.conv1d) is mixer.conv1d.weight
        assert plain_weight(mixer.norm) is mixer.norm.weight
        assert plain_weight(mixer.in_proj) is mixer.in_proj.weight

    @pytest.mark.parametrize("substitution", SUBSTITUTIONS)
    @pytest.mark.parametrize("child", CHILDREN)
    def test_is_none_where_something_was(self, child: str, substitution: str) -> None:
        assert plain_weight(SUBSTITUTIONS[substitution](getattr(make_mixer(), child))) is None

    def test_is_none_for_unknown_modules(self) -> None:
        class Conv(nn.Conv1d):
            pass

        assert plain_weight(Conv(4, 4, 2)) is None
        assert plain_weight(nn.Identity()) is None

    @pytest.mark.parametrize(
        "register", ["register_full_backward_hook", "register_full_backward_pre_hook", "register_forward_hook"]
    )
    def test_comes_back_when_a_hook_is_removed(self, register: str) -> None:
        norm = GatedRMSNorm(8, 4)
        handle = getattr(norm, register)(lambda *args: None)
        assert plain_weight(norm) is None
        handle.remove()
        assert plain_weight(norm) is norm.weight

    def test_is_none_for_tensors_of_another_type(self) -> None:
        mixer = make_mixer()
        mixer.conv1d.weight = nn.Parameter(mixer.conv1d.weight.detach().as_subclass(Marked))
        assert plain_weight(mixer.conv1d) is None
        hidden_states = torch.randn(BATCH, TOKENS, WIDTH)
        with torch.no_grad():
            torch.testing.assert_close(mixer(hidden_states), composed(mixer, hidden_states), atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("substitution", ["forward hook", "adapted"])
    def test_is_asked_for_when_a_graph_is_captured(self, substitution: str) -> None:
        mixer = make_mixer()
        mixer.conv1d = SUBSTITUTIONS[substitution](mixer.conv1d)
        hidden_states = torch.randn(BATCH, TOKENS, WIDTH)
        with torch.no_grad():
            compiled = torch.compile(mixer, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(hidden_states), composed(mixer, hidden_states), atol=1e-5, rtol=1e-4)
        torch._dynamo.reset()

    def test_stands_in_exported_programs(self) -> None:
        mixer = make_mixer()
        hidden_states = torch.randn(BATCH, TOKENS, WIDTH)
        seen: list[bool] = []

        def look(module: nn.Module, part: bool = False) -> Tensor | None:
            weight = plain_weight(module, part)
            seen.append(weight is not None)
            return weight

        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr("mamba2_hf.layers.mixer.plain_weight", look)
            program = torch.export.export(mixer, (hidden_states,), strict=False)
        assert seen
        assert all(seen)
        torch.testing.assert_close(program.module()(hidden_states), mixer(hidden_states), atol=1e-6, rtol=1e-5)


class TestLinear:
    """``linear`` is the module, whichever product computes it."""

    @pytest.fixture(params=[True, False], ids=["bias", "no bias"])
    def module(self, request: pytest.FixtureRequest) -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(48, 96, bias=request.param)

    @pytest.mark.parametrize(
        "shape", [(), (1,), (1, 1), (2, 1), (3, 1), (4,), (5, 1), (2, 3, 5), (0, 3), (110, 100)], ids=str
    )
    def test_has_its_numbers(self, module: nn.Linear, shape: tuple[int, ...]) -> None:
        x = torch.randn(*shape, 48)
        expected = module(x).detach()
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                y = linear(module, x)
                torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
                assert y.is_contiguous()
                mirrored = x.mT.contiguous().mT if x.dim() > 1 else x
                torch.testing.assert_close(linear(module, mirrored), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("rows", [1, 6])
    @pytest.mark.parametrize("substitution", SUBSTITUTIONS)
    def test_is_called_where_something_was_done_to_it(self, module: nn.Linear, substitution: str, rows: int) -> None:
        x = torch.randn(rows, 48)
        with torch.no_grad():
            plain = module(x)
            changed = SUBSTITUTIONS[substitution](module)
            expected = changed(x)
            assert (expected - plain).abs().max() > 1e-3
            torch.testing.assert_close(linear(changed, x), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("rows", [1, 6])
    def test_leaves_gradients_autocast_graphs_and_transforms_alone(self, module: nn.Linear, rows: int) -> None:
        x = torch.randn(rows, 48)
        assert linear(module, x).requires_grad
        with torch.no_grad():
            expected = module(x)
            assert torch.equal(torch.compile(linear, backend="eager", fullgraph=True)(module, x), expected)
            batched = torch.func.vmap(lambda one: linear(module, one))(torch.stack([x, 2 * x]))
            torch.testing.assert_close(batched[0], expected)
            for dtype in (torch.float64, torch.bfloat16):
                assert linear(module.to(dtype), x.to(dtype)).dtype == dtype
            with torch.autocast("cpu", torch.bfloat16):
                assert linear(module.float(), x).dtype == torch.bfloat16
        torch.compiler.reset()


class TestDTensor:
    @pytest.fixture
    def mesh(self) -> Iterator[Any]:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        dist.destroy_process_group()

    @pytest.mark.parametrize("placement", [Replicate(), Shard(0)], ids=str)
    def test_sharded_weights_are_left_to_their_module(self, placement: Any, mesh: Any) -> None:
        mixer = make_mixer()
        hidden_states = torch.randn(BATCH, TOKENS, WIDTH)
        with torch.no_grad():
            expected = mixer(hidden_states)
            for child in (mixer.conv1d, mixer.norm):
                whole = child.weight.detach()
                child.weight = nn.Parameter(distribute_tensor(whole, mesh, [placement]))
                assert plain_weight(child) is None
                forward = child.forward

                def gathered(*args: Tensor, child: Any = child, forward: Any = forward) -> Tensor:
                    weight = {"weight": child.weight.full_tensor()}
                    child.__dict__.pop("forward")
                    try:
                        return torch.func.functional_call(child, weight, args)
                    finally:
                        child.forward = gathered

                child.forward = gathered
            torch.testing.assert_close(mixer(hidden_states), expected, atol=1e-5, rtol=1e-4)


class Reads(ast.NodeVisitor):
    """Reads of ``<child>.weight`` or ``<child>.bias`` that no ``plain_weight`` guards."""

    def __init__(self) -> None:
        self.found: list[int] = []
        self.plain: set[str] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name.startswith("_init") or node.name == "plain_weight":  # initialization writes weights
            return
        outer, self.plain = self.plain, set(self.plain)
        self.generic_visit(node)
        self.plain = outer

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            for name, value in zip(names, values, strict=False):
                if isinstance(value, ast.Call) and ast.unparse(value.func) == "plain_weight":
                    self.plain.add(ast.unparse(name))
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        tests = node.test.values if isinstance(node.test, ast.BoolOp) else [node.test]
        guarded = any(ast.unparse(test) == f"{name} is not None" for test in tests for name in self.plain)
        for statement in [] if guarded else node.body:
            self.visit(statement)
        for statement in node.orelse:
            self.visit(statement)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        own = isinstance(node.value, ast.Name) and node.value.id == "self"
        if node.attr in ("weight", "bias") and not own:
            self.found.append(node.lineno)
        self.generic_visit(node)


def unguarded(source: str) -> list[int]:
    reads = Reads()
    reads.visit(ast.parse(source))
    return reads.found


def test_no_layer_or_model_reads_a_child_s_weight_unguarded(repository: Path) -> None:
    package = repository / "src" / "mamba2_hf"
    for path in [*(package / "layers").glob("*.py"), *(package / "models").glob("*.py")]:
        assert unguarded(path.read_text()) == [], path


def test_the_check_sees_a_read() -> None:
    assert unguarded("def forward(self, x):\n    return linear(x, self.out_proj.weight)") == [2]
    assert unguarded("def forward(self, x):\n    w = plain_weight(self.c)\n    return f(x, self.c.bias)") == [3]
    guarded = "def forward(self, x):\n    w = plain_weight(self.c)\n    if w is not None:\n        return self.c.bias"
    assert unguarded(guarded) == []
    assert unguarded(f"{guarded}\n    else:\n        return self.c.bias") == [6]
