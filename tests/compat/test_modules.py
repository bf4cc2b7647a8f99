"""The module ``Mamba2`` and ``MambaLMHeadModel``: against the functions that they stand for, and against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2_hf import Mamba2ForCausalLM, compat
from mamba2_hf.errors import ArgumentError, ConfigurationError

B, T, WIDTH = 2, 13, 16
SIZES = {"d_model": WIDTH, "d_state": 5, "headdim": 4, "ngroups": 2, "dtype": torch.float64}
LAYERS = {
    "plain": {},
    "mlp": {"d_ssm": 24, "bias": True},
    "wide_skip": {"D_has_hdim": True, "conv_bias": False},
    "no_norm": {"rmsnorm": False, "dt_limit": (0.01, 0.2)},
    "norm_first": {"norm_before_gate": True, "conv_init": 0.3, "d_conv": 3},
}
every = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def make(options: dict[str, Any], layer_idx: int | None = 3) -> compat.Mamba2:
    torch.manual_seed(0)
    return compat.Mamba2(**SIZES, **options, layer_idx=layer_idx)


def hidden(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@every
def test_layer_is_its_functions(options: dict[str, Any]) -> None:
    """With one weight per parameter of mamba_ssm's, and gradients for all of them."""
    layer, u = make(options), hidden(B, T, WIDTH)
    named = {"in_proj.weight", "conv1d.weight", "dt_bias", "A_log", "D", "out_proj.weight"}
    named |= {"norm.weight"} if layer.rmsnorm else set()
    named |= {"conv1d.bias"} if options.get("conv_bias", True) else set()
    named |= {"in_proj.bias", "out_proj.bias"} if options.get("bias") else set()
    assert {name for name, _ in layer.named_parameters()} == named
    expected = compat.mamba_split_conv1d_scan_combined(
        layer.in_proj(u),
        layer.conv1d.weight.squeeze(1),
        layer.conv1d.bias,
        layer.dt_bias,
        -layer.A_log.exp(),
        layer.D.unflatten(0, (-1, 4)) if layer.D_has_hdim else layer.D,
        chunk_size=256,
        dt_limit=layer.dt_limit,
        rmsnorm_weight=layer.norm.weight if layer.rmsnorm else None,
        rmsnorm_eps=1e-5,
        outproj_weight=layer.out_proj.weight,
        outproj_bias=layer.out_proj.bias,
        headdim=4,
        ngroups=2,
        norm_before_gate=layer.norm_before_gate,
    )
    y = layer(u)
    torch.testing.assert_close(y, expected, **EXACT)
    y.square().sum().backward()
    assert all(parameter.grad.norm() > 0 for parameter in layer.parameters())


@every
@torch.no_grad()
def test_tokens_continue_a_prompt(options: dict[str, Any]) -> None:
    layer, u = make(options), hidden(B, T, WIDTH)
    expected = layer(u)
    for prompt in (1, 2, 9):
        params = compat.InferenceParams(T, B)
        ys = [layer(u[:, :prompt], inference_params=params)]
        for column in range(prompt, T):
            params.seqlen_offset = column
            ys.append(layer(u[:, column : column + 1], inference_params=params))
        torch.testing.assert_close(torch.cat(ys, 1), expected, **EXACT)
        entering = layer.in_proj(u)[..., -layer.conv1d.weight.shape[0] - layer.nheads : -layer.nheads]
        held, _ = params.key_value_memory_dict[3]
        torch.testing.assert_close(held, F.pad(entering.mT, (4, 0))[..., -layer.d_conv :], **EXACT)


@every
@torch.no_grad()
def test_packed_documents(options: dict[str, Any]) -> None:
    """By their numbers and by their bounds; each goes on from its own states."""
    layer, lengths = make(options), [5, 1, 7]
    u, bounds = hidden(1, T, WIDTH), torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    seq_idx = torch.repeat_interleave(torch.tensor(lengths))[None].int()
    parts = u.split(lengths, 1)
    expected = torch.cat([layer(part) for part in parts], 1)
    for named in ({"seq_idx": seq_idx}, {"cu_seqlens": bounds}, {"seq_idx": seq_idx, "cu_seqlens": bounds}):
        torch.testing.assert_close(layer(u, **named), expected, **EXACT)
    params = compat.InferenceParams(T, 3)
    torch.testing.assert_close(layer(u, seq_idx=seq_idx, cu_seqlens=bounds, inference_params=params), expected, **EXACT)
    params.seqlen_offset, following = T, hidden(3, 1, WIDTH)
    y = layer(following, inference_params=params)
    for row, part in enumerate(parts):
        alone = layer(torch.cat([part, following[row : row + 1]], 1))
        torch.testing.assert_close(y[row], alone[0, -1:], **EXACT)


def test_rows_may_come_flat() -> None:
    layer, u = make({}), hidden(B, T, WIDTH)
    torch.testing.assert_close(layer(u.flatten(0, 1), seqlen=T), layer(u).flatten(0, 1), **EXACT)


def test_what_a_layer_cannot_be() -> None:
    with pytest.raises(ArgumentError, match="process_group was given"):
        compat.Mamba2(WIDTH, process_group=object())
    with pytest.raises(ArgumentError, match="headdim has to divide d_ssm"):
        compat.Mamba2(WIDTH, headdim=5)
    layer = make({})
    states = layer.allocate_inference_cache(B, T)
    with pytest.raises(ArgumentError, match="has 2 tokens"):
        layer.step(hidden(B, 2, WIDTH), *states)
    with pytest.raises(ArgumentError, match="layer_idx is None"):
        make({}, layer_idx=None)(hidden(B, T, WIDTH), inference_params=compat.InferenceParams(T, B))


# Language models


@pytest.fixture
def model() -> compat.MambaLMHeadModel:
    torch.manual_seed(0)
    sizes = {"layer": "Mamba2", "d_state": 8, "headdim": 8}
    return compat.MambaLMHeadModel(compat.MambaConfig(d_model=32, n_layer=2, vocab_size=61, ssm_cfg=sizes)).eval()


IDS = torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_saved_and_loaded(model: compat.MambaLMHeadModel, tmp_path: Path) -> None:
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    loaded = compat.MambaLMHeadModel.from_pretrained(str(tmp_path), device="cpu", dtype=torch.float32)
    assert torch.equal(loaded(IDS).logits, expected)
    assert torch.equal(Mamba2ForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected)
    torch.testing.assert_close(loaded(IDS, num_last_tokens=2).logits, expected[:, -2:])


@torch.no_grad()
def test_generates(model: compat.MambaLMHeadModel) -> None:
    out = model.generate(IDS, T + 6, return_dict_in_generate=True, output_scores=True, cg=True)
    full = model(out.sequences).logits[:, T - 1 : -1]
    torch.testing.assert_close(torch.stack(out.scores, 1), full)
    assert torch.equal(out.sequences[:, T:], full.argmax(-1))
    assert torch.equal(model.generate(IDS, T + 6), out.sequences)
    ends = int(out.sequences[0, T + 1])
    assert (model.generate(IDS[:1], T + 6, eos_token_id=ends)[0, -1:] == ends).all()
    sampled = model.generate(IDS, T + 30, top_k=0, top_p=0.9, min_p=0.01, temperature=2.0, vocab_size=20)
    assert sampled.shape == (B, T + 30)
    assert (sampled[:, T:] < 20).all()


@torch.no_grad()
def test_a_loop_of_its_own(model: compat.MambaLMHeadModel) -> None:
    """One that keeps states in ``inference_params``, and begins anew with the same ones."""
    expected = model(IDS).logits
    params = compat.InferenceParams(T, B)
    for _ in range(2):
        logits = [model(IDS[:, :9], inference_params=params).logits]
        params.seqlen_offset = 9
        for column in range(9, T):
            logits.append(model(IDS[:, [column]], inference_params=params, num_last_tokens=1).logits)
            params.seqlen_offset += 1
        torch.testing.assert_close(torch.cat(logits, 1), expected)
        params.reset(T, B)
    with pytest.raises(ArgumentError, match="packed documents"):
        model(IDS, inference_params=params, seq_idx=torch.zeros_like(IDS))


def test_packed_rows(model: compat.MambaLMHeadModel) -> None:
    expected = torch.cat([model(part).logits for part in IDS[:1].split([4, 9], 1)], 1)
    seq_idx = torch.tensor([[0] * 4 + [1] * 9])
    torch.testing.assert_close(model(IDS[:1], seq_idx=seq_idx).logits, expected)
    torch.testing.assert_close(model(IDS[:1], cu_seqlens=torch.tensor([0, 4, 13])).logits, expected)


def test_other_models_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="not a Mamba-2"):
        compat.MambaLMHeadModel(compat.MambaConfig())
    with pytest.raises(ArgumentError, match="initializer_cfg"):
        compat.MambaLMHeadModel(compat.MambaConfig(), initializer_cfg={"rescale_prenorm_residual": False})
