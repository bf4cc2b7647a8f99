"""The mixer against the one page of examples/minimal_mamba2.py, its states, and the parameters that no cast reaches."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import minimal_mamba2
import pytest
import torch
from torch import Tensor, nn

from mamba2_hf.errors import CacheError
from mamba2_hf.layers import Mamba2Mixer, RMSNorm, SSDState
from mamba2_hf.layers.norm import SiluGate
from mamba2_hf.layers.sequence import PLAIN, sequence_layout

BATCH, TOKENS, WIDTH = 2, 21, 16
SIZES: dict[str, Any] = {"num_heads": 4, "head_dim": 8, "n_groups": 2, "state_size": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "one group": {"n_groups": 1},
    "a group per head": {"n_groups": 4},
    "biases": {"use_bias": True},
    "no convolution bias": {"use_conv_bias": False},
    "two taps": {"conv_kernel": 2},
    "swish": {"activation": "swish"},
    "norm first": {"norm": "norm_first"},
    "clamped steps": {"dt_limit": (0.2, 0.8)},
    "chunks of 4": {"chunk_size": 4},
    "a gate without a norm": {"norm": "none"},
    "multipliers": {"multipliers": (0.5, 1.5, 0.25, 2.0, 0.75)},
    "larger groups": {"norm_group_size": 32},
    "wide heads": {"num_heads": 2, "head_dim": 16, "state_size": 32},
}


def make_mixer(dtype: torch.dtype = torch.float64, **options: Any) -> Mamba2Mixer:
    torch.manual_seed(0)
    mixer = Mamba2Mixer(WIDTH, **{**SIZES, **options}).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.5)
    return mixer


@pytest.fixture
def hidden_states() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Gate(nn.Module):
    """Gates without a norm."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * nn.functional.silu(gate)


class NormFirst(minimal_mamba2.RMSNorm):
    """Gates what it has normed."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        assert gate is not None
        return super().forward(x) * nn.functional.silu(gate)


def one_page(mixer: Mamba2Mixer) -> minimal_mamba2.Mamba2:
    """The layer of ``examples/minimal_mamba2.py`` with the weights of ``mixer``, and what hybrids vary around it."""
    norm = mixer.norm
    config = minimal_mamba2.Config(
        hidden_size=WIDTH,
        num_heads=mixer.num_heads,
        head_dim=mixer.head_dim,
        state_size=mixer.state_size,
        n_groups=mixer.n_groups,
        conv_kernel=mixer.conv_kernel,
        chunk_size=5,
        time_step_limit=mixer.dt_limit,
        use_bias=mixer.in_proj.bias is not None,
        use_conv_bias=mixer.conv1d.bias is not None,
    )
    layer = minimal_mamba2.Mamba2(config)
    if isinstance(norm, SiluGate):
        layer.norm = Gate()
    else:
        kind = NormFirst if norm.norm_before_gate else minimal_mamba2.RMSNorm
        layer.norm = kind(mixer.inner_size, norm.eps, mixer.inner_size // norm.group_size)
    if mixer.multipliers:
        maps = mixer.n_groups * mixer.state_size
        sizes = torch.tensor([mixer.inner_size, mixer.inner_size, maps, maps, mixer.num_heads])
        scale = torch.tensor(mixer.multipliers, dtype=torch.float64).repeat_interleave(sizes)
        layer.in_proj.register_forward_hook(lambda module, args, out: out * scale)
    layer.double().load_state_dict(mixer.state_dict())
    return layer


@pytest.mark.parametrize("options", OPTIONS)
class TestResults:
    def test_are_the_paper_s(self, options: str, hidden_states: Tensor) -> None:
        mixer = make_mixer(**OPTIONS[options])
        expected, _ = one_page(mixer)(hidden_states)
        torch.testing.assert_close(mixer(hidden_states), expected, atol=1e-10, rtol=1e-8)

    def test_gradients_are_the_paper_s(self, options: str, hidden_states: Tensor) -> None:
        mixer = make_mixer(**OPTIONS[options])
        layer = one_page(mixer)
        probe = torch.randn_like(hidden_states)
        (mixer(ours := hidden_states.clone().requires_grad_()) * probe).sum().backward()
        (layer(theirs := hidden_states.clone().requires_grad_())[0] * probe).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-7)
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(mixer.get_parameter(name).grad, parameter.grad, atol=1e-9, rtol=1e-7, msg=name)

    @pytest.mark.parametrize("prompt", [0, 1, 13])
    @torch.no_grad()
    def test_states_are_the_paper_s(self, prompt: int, options: str, hidden_states: Tensor) -> None:
        """After a prompt and steps."""
        mixer, state = make_mixer(**OPTIONS[options]), SSDState()
        layer, expected = one_page(mixer), None
        for part in hidden_states.split([prompt, *[1] * (TOKENS - prompt)], 1)[prompt == 0 :]:
            out, expected = layer(part, expected)
            torch.testing.assert_close(mixer(part, state=state), out, atol=1e-10, rtol=1e-8)
        torch.testing.assert_close((state.conv, state.ssm), expected, atol=1e-10, rtol=1e-8)

    @pytest.mark.parametrize("split", [[21], [1] * 21, [2, 6, 1, 1, 11], [20, 1]])
    def test_states_carry_over_any_split(self, split: list[int], options: str, hidden_states: Tensor) -> None:
        mixer = make_mixer(**OPTIONS[options])
        state = SSDState()
        with torch.no_grad():
            parts = [mixer(part, state=state) for part in hidden_states.split(split, 1)]
            torch.testing.assert_close(torch.cat(parts, 1), mixer(hidden_states), atol=1e-10, rtol=1e-8)

    def test_documents_stay_apart(self, options: str, hidden_states: Tensor) -> None:
        mixer = make_mixer(**OPTIONS[options])
        parts = torch.cat([mixer(part) for part in hidden_states.split([5, 1, 15], 1)], 1)
        seq_idx = torch.tensor([[0] * 5 + [1] + [2] * 15]).expand(BATCH, -1)
        rows = mixer(hidden_states, sequence_layout(BATCH, TOKENS, seq_idx=seq_idx))
        torch.testing.assert_close(rows, parts, atol=1e-10, rtol=1e-8)
        flat = sequence_layout(1, BATCH * TOKENS, cu_seqlens=torch.tensor([0, 5, 6, 21, 26, 27, 42]))
        row = mixer(hidden_states.view(1, -1, WIDTH), flat)
        torch.testing.assert_close(row.view_as(parts), parts, atol=1e-10, rtol=1e-8)


class TestLayer:
    """Norm, mixer and residual as one op."""

    @pytest.mark.parametrize("options", OPTIONS)
    def test_is_its_parts(self, options: str, hidden_states: Tensor) -> None:
        mixer, norm = make_mixer(**OPTIONS[options]), RMSNorm(WIDTH).double()
        nn.init.normal_(norm.weight)
        seq_idx = torch.arange(TOKENS).div(8, rounding_mode="floor").expand(BATCH, -1)
        parameters = [*mixer.parameters(), *norm.parameters()]
        for layout in (PLAIN, sequence_layout(BATCH, TOKENS, seq_idx=seq_idx)):
            whole = mixer.layer(hidden_states, norm, layout)
            parts = hidden_states + mixer(norm(hidden_states), layout)
            torch.testing.assert_close(whole, parts)
            gradients = [torch.autograd.grad(out.square().sum(), parameters) for out in (whole, parts)]
            torch.testing.assert_close(*gradients)

    @pytest.mark.parametrize("options", OPTIONS)
    def test_reads_prompts_and_steps(self, options: str, hidden_states: Tensor) -> None:
        """Whatever it is split into, with states as the mixer itself leaves them."""
        mixer, norm = make_mixer(**OPTIONS[options]), RMSNorm(WIDTH).double()
        state, usual = SSDState(), SSDState()
        for part in hidden_states.split([5, 1, 1, 14], 1):
            with torch.no_grad():
                whole = mixer.layer(part, norm, PLAIN, state, input_multiplier=0.5, output_multiplier=2.0)
                torch.testing.assert_close(whole, part + 2 * mixer(0.5 * norm(part), PLAIN, usual))
            assert state.conv is not None
            assert state.ssm is not None
            torch.testing.assert_close((state.conv, state.ssm), (usual.conv, usual.ssm))

    @pytest.mark.parametrize("part", ["", "in_proj", "conv1d", "norm", "out_proj", "the norm before"])
    def test_calls_modules_that_have_to_be_called(self, part: str, hidden_states: Tensor) -> None:
        mixer, norm = make_mixer(), RMSNorm(WIDTH).double()
        module = norm if part == "the norm before" else mixer.get_submodule(part)
        handle = module.register_forward_hook(lambda module, args, out: 2 * out)
        hooked = mixer.layer(hidden_states, norm, residual=hidden_states + 1)
        torch.testing.assert_close(hooked, hidden_states + 1 + mixer(norm(hidden_states)))
        handle.remove()
        plain = mixer.layer(hidden_states, norm)
        assert not torch.allclose(hooked - 1, plain)

    def test_weights_of_several_dtypes_are_left_to_their_modules(self, hidden_states: Tensor) -> None:
        mixer, norm = make_mixer(torch.float32), RMSNorm(WIDTH).half()
        stream = hidden_states.float()
        with pytest.raises(RuntimeError, match="dtype"):
            mixer.layer(stream, norm)
        with torch.autocast("cpu", torch.bfloat16):  # which makes one of them
            assert mixer.layer(stream, norm).isfinite().all()


class TestAttentionMatrix:
    def test_is_what_the_scan_multiplies_x_with(self, hidden_states: Tensor) -> None:
        mixer = make_mixer()
        out, matrix = mixer(hidden_states, output_attentions=True)
        assert torch.equal(out, mixer(hidden_states))
        z, xbc, _ = mixer.in_proj(hidden_states).split([mixer.inner_size, mixer.conv_size, mixer.num_heads], -1)
        xbc = nn.functional.silu(mixer.conv1d(xbc.mT)[..., :TOKENS].mT)
        x = xbc[..., : mixer.inner_size].unflatten(-1, (mixer.num_heads, -1))
        y = torch.einsum("bhij,bjhp->bihp", matrix, x) + mixer.D[:, None] * x
        torch.testing.assert_close(mixer.out_proj(mixer.norm(y.flatten(-2), z)), out, atol=1e-10, rtol=1e-8)

    def test_is_causal_and_keeps_documents_apart(self, hidden_states: Tensor) -> None:
        seq_idx = torch.tensor([[0] * 5 + [1] * 16]).expand(BATCH, -1)
        _, matrix = make_mixer()(hidden_states, sequence_layout(BATCH, TOKENS, seq_idx=seq_idx), output_attentions=True)
        assert matrix.shape == (BATCH, 4, TOKENS, TOKENS)
        assert torch.equal(matrix, matrix.tril())
        assert not matrix[:, :, 5:, :5].any()
        assert matrix[:, :, 5:, 5:].tril().count_nonzero() == BATCH * 4 * 16 * 17 // 2


class TestStates:
    def test_of_another_batch_are_refused(self, hidden_states: Tensor) -> None:
        mixer, state = make_mixer(), SSDState()
        with torch.no_grad():
            mixer(hidden_states, state=state)
            with pytest.raises(CacheError, match="holds 2 sequences and the input has 1"):
                mixer(hidden_states[:1], state=state)

    def test_hold_no_graph(self, hidden_states: Tensor) -> None:
        state = SSDState()
        make_mixer()(hidden_states, state=state)
        assert state.conv is not None
        assert not state.conv.requires_grad
        assert state.ssm is not None
        assert not state.ssm.requires_grad

    def test_gradients_flow_through_what_continues_them(self, hidden_states: Tensor) -> None:
        """A step with gradients goes through the scan: the same result, and the state is the only constant."""
        mixer, state = make_mixer(), SSDState()
        with torch.no_grad():
            mixer(hidden_states[:, :-1], state=state)
        last = hidden_states[:, -1:].clone().requires_grad_()
        out = mixer(last, state=state)
        torch.testing.assert_close(out, mixer(hidden_states)[:, -1:], atol=1e-10, rtol=1e-8)
        assert all(gradient.any() for gradient in torch.autograd.grad(out.sum(), [last, mixer.A_log, mixer.D]))


def names_and_dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in module.named_parameters()}


CASTS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "bfloat16": (lambda module: module.bfloat16(), torch.bfloat16),
    "half": (lambda module: module.half(), torch.float16),
    "to dtype": (lambda module: module.to(torch.bfloat16), torch.bfloat16),
    "to device and dtype": (lambda module: module.to("cpu", torch.float16), torch.float16),
    "to meta and dtype": (lambda module: module.to("meta", torch.bfloat16), torch.bfloat16),
    "type": (lambda module: module.type(torch.bfloat16), torch.bfloat16),
}


class TestFp32Parameters:
    @pytest.mark.parametrize("cast", CASTS)
    @pytest.mark.parametrize("wrap", [lambda mixer: mixer, lambda mixer: nn.Sequential(nn.ModuleList([mixer]))])
    def test_no_cast_reaches_them(self, cast: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
        convert, dtype = CASTS[cast]
        mixer = make_mixer(torch.float32)
        before = {name: getattr(mixer, name).detach().clone() for name in mixer.fp32_parameters}
        convert(wrap(mixer))
        for name, got in names_and_dtypes(mixer).items():
            assert got == (torch.float32 if name in mixer.fp32_parameters else dtype), name
        if not mixer.A_log.is_meta:
            for name, value in before.items():
                assert torch.equal(getattr(mixer, name), value)

    def test_nor_their_gradients(self, hidden_states: Tensor) -> None:
        mixer = make_mixer(torch.float32)
        mixer(hidden_states.float()).sum().backward()
        before = mixer.A_log.grad.clone()
        mixer.bfloat16()
        assert torch.equal(mixer.A_log.grad, before)
        assert mixer.in_proj.weight.grad.dtype == torch.bfloat16

    def test_wider_types_are_taken_and_kept(self) -> None:
        mixer = make_mixer(torch.float32).double()
        assert set(names_and_dtypes(mixer).values()) == {torch.float64}
        mixer.float()
        assert set(names_and_dtypes(mixer).values()) == {torch.float32}

    def test_hold_under_a_half_precision_default(self) -> None:
        torch.set_default_dtype(torch.bfloat16)
        try:
            dtypes = names_and_dtypes(Mamba2Mixer(WIDTH, **SIZES))
        finally:
            torch.set_default_dtype(torch.float32)
        assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {"A_log", "D", "dt_bias"}

    def test_survive_copies_and_pickles(self, hidden_states: Tensor) -> None:
        mixer = make_mixer(torch.float32).bfloat16()
        for other in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
            assert names_and_dtypes(other) == names_and_dtypes(mixer)
            assert torch.equal(other(hidden_states.bfloat16()), mixer(hidden_states.bfloat16()))

    def test_state_dict_keeps_the_published_names(self) -> None:
        names = {"A_log", "D", "dt_bias", "norm.weight", "conv1d.weight", "conv1d.bias"}
        assert set(make_mixer().state_dict()) == names | {"in_proj.weight", "out_proj.weight"}

    def test_low_precision_loses_little(self, hidden_states: Tensor) -> None:
        mixer = make_mixer(torch.float32)
        expected = mixer(hidden_states.float())
        out = mixer.bfloat16()(hidden_states.bfloat16())
        assert out.dtype == torch.bfloat16
        assert (out - expected).norm() / expected.norm() < 0.02
