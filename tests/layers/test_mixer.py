"""The mixer against the paper's drawing of it, its states, and the parameters that no cast reaches."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mamba2_hf.errors import CacheError
from mamba2_hf.layers import Mamba2Mixer, RMSNorm, SSDState
from mamba2_hf.layers.norm import SiluGate
from mamba2_hf.layers.sequence import PLAIN, sequence_layout
from mamba2_hf.ops.scan.reference import ssd_recurrent

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


def composed(mixer: Mamba2Mixer, hidden_states: Tensor) -> Tensor:
    """The paper's Figure 6 written out, for one document per row."""
    groups = mixer.n_groups * mixer.state_size
    parts = mixer.in_proj(hidden_states).split([*[mixer.inner_size] * 2, groups, groups, mixer.num_heads], -1)
    z, x, B, C, dt = (part * factor for part, factor in zip(parts, mixer.multipliers or (1,) * 5, strict=True))
    xbc = torch.cat([x, B, C], -1)
    xbc = nn.functional.silu(mixer.conv1d(xbc.mT)[..., : xbc.shape[1]].mT)
    x, B, C = xbc.split([mixer.inner_size, groups, groups], -1)
    y, _ = ssd_recurrent(
        x.unflatten(-1, (mixer.num_heads, -1)),
        dt,
        -torch.exp(mixer.A_log),
        B.unflatten(-1, (mixer.n_groups, -1)),
        C.unflatten(-1, (mixer.n_groups, -1)),
        D=mixer.D,
        dt_bias=mixer.dt_bias,
        dt_softplus=True,
        dt_limit=mixer.dt_limit,
    )
    size = mixer.norm.group_size
    y = y.flatten(-2).unflatten(-1, (-1, size))
    gate = nn.functional.silu(z).unflatten(-1, (-1, size))
    if isinstance(mixer.norm, SiluGate):
        return mixer.out_proj((y * gate).flatten(-2))
    if not mixer.norm.norm_before_gate:
        y = y * gate
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + mixer.norm.eps)
    y = y * mixer.norm.weight.unflatten(-1, (-1, size))
    if mixer.norm.norm_before_gate:
        y = y * gate
    return mixer.out_proj(y.flatten(-2))


@pytest.mark.parametrize("options", OPTIONS)
class TestResults:
    def test_are_the_paper_s(self, options: str, hidden_states: Tensor) -> None:
        mixer = make_mixer(**OPTIONS[options])
        torch.testing.assert_close(mixer(hidden_states), composed(mixer, hidden_states), atol=1e-10, rtol=1e-8)

    def test_gradients_are_the_paper_s(self, options: str, hidden_states: Tensor) -> None:
        mixer = make_mixer(**OPTIONS[options])
        hidden_states.requires_grad_()
        inputs = [hidden_states, *mixer.parameters()]
        probe = torch.randn_like(hidden_states)
        got = torch.autograd.grad((mixer(hidden_states) * probe).sum(), inputs)
        expected = torch.autograd.grad((composed(mixer, hidden_states) * probe).sum(), inputs)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)

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
