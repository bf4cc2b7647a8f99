"""What transformers' own Mamba-2 gets wrong or refuses, and what holds here instead: one short test each.

LoRA on ``out_proj`` and without ``target_modules`` and Trainer's weight decay have theirs in ``tests/integrations``.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config as StockConfig
from transformers.models.mamba2.modeling_mamba2 import Mamba2ForCausalLM as StockModel

from mamba2_hf import Mamba2Config, Mamba2ForCausalLM, Mamba2ForSequenceClassification
from mamba2_hf.errors import CheckpointError, ConfigurationError, Mamba2HFError

SIZES = {
    **{"vocab_size": 61, "hidden_size": 16, "num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 6},
    **{"num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def random_model(**options) -> Mamba2ForCausalLM:
    """Every parameter away from its initial value, so that nothing is hidden by a zero or a one."""
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(Mamba2Config(**{**SIZES, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(sum(shape)))


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


def close(out: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_with_biases(side):
    model = random_model(use_bias=True)
    rows = [tokens(5), tokens(11)]
    ids, mask = padded(rows, side)
    logits = model(ids, attention_mask=mask).logits
    for row, out, keep in zip(rows, logits, mask.bool(), strict=True):
        close(out[keep], model(row[None]).logits[0])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_segments_that_continue_a_cache(side):
    model = random_model(use_bias=True)
    first, second, third = ([tokens(n), tokens(m)] for n, m in ((4, 9), (7, 2), (1, 1)))
    cache = None
    for turn in (first, second, third):
        ids, mask = padded(turn, side)
        outputs = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
    for i in range(2):
        whole = torch.cat([turn[i] for turn in (first, second, third)])[None]
        close(outputs.logits[i, -1], model(whole).logits[0, -1])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_decoding_after_padding(side):
    model = random_model(use_bias=True)
    rows, following = [tokens(5), tokens(11)], tokens(2, 3)
    ids, mask = padded(rows, side)
    cache = model(ids, attention_mask=mask).past_key_values
    steps = torch.cat([model(following[:, t : t + 1], past_key_values=cache).logits for t in range(3)], 1)
    for row, more, out in zip(rows, following, steps, strict=True):
        close(out, model(torch.cat([row, more])[None]).logits[0, -3:])


@pytest.mark.parametrize("named_by", ["seq_idx", "cu_seq_lens", "position_ids"])
def test_packing_reaches_logits_loss_and_gradients(named_by):
    model = random_model()
    rows = [tokens(5), tokens(9), tokens(3)]
    packed = torch.cat(rows)[None]
    names = {
        "seq_idx": {"seq_idx": torch.repeat_interleave(torch.arange(3), torch.tensor([5, 9, 3]))[None]},
        "cu_seq_lens": dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([0, 5, 14, 17])),
        "position_ids": {"position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None]},
    }
    outputs = model(packed, labels=packed, **names[named_by])
    alone = [model(row[None], labels=row[None]) for row in rows]
    close(outputs.logits, torch.cat([out.logits for out in alone], 1))
    loss = sum(out.loss * (len(row) - 1) for out, row in zip(alone, rows, strict=True)) / (17 - 3)
    close(outputs.loss, loss)
    parameters = list(model.parameters())
    for left, right in zip(
        torch.autograd.grad(outputs.loss, parameters), torch.autograd.grad(loss, parameters), strict=True
    ):
        close(left, right)


@torch.no_grad()
def test_the_cache_counts_selects_and_goes_by_both_names():
    model = random_model()
    ids = tokens(3, 9)
    cache = model(ids[:, :6]).past_key_values
    assert cache.get_seq_length() == 6
    rows = torch.tensor([2, 0])
    cache.batch_select_indices(rows)
    out = model(ids[rows, 6:8], past_key_values=cache)
    assert out.past_key_values.get_seq_length() == 8
    close(model(ids[rows, 8:], cache_params=out.cache_params).logits, model(ids[rows]).logits[:, 8:])


def test_generation_reads_prompts_in_chunks_and_continues_from_a_cache():
    model = random_model()
    ids = tokens(2, 9)
    options = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **{**options, "max_new_tokens": 8})
    assert torch.equal(model.generate(ids, **options, prefill_chunk_size=4), expected[:, :13])
    first = model.generate(ids, **options, return_dict_in_generate=True)
    again = model.generate(first.sequences, **options, past_key_values=first.past_key_values)
    assert torch.equal(again, expected)


@torch.no_grad()
def test_a_finite_step_limit_holds_in_decoding_too():
    model = random_model(time_step_limit=(0.3, 0.7))
    ids = tokens(2, 8)
    cache = model(ids[:, :5]).past_key_values
    steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(5, 8)]
    close(torch.cat(steps, 1), model(ids).logits[:, 5:])


def test_loading_never_rescales_again(tmp_path):
    model = random_model(rescale_prenorm_residual=True)
    model.save_pretrained(tmp_path)
    again = Mamba2ForCausalLM.from_pretrained(tmp_path)
    stock = StockModel.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
        assert torch.equal(stock.state_dict()[name], value), name


@pytest.mark.parametrize("tied", [True, False])
def test_the_original_embedding_key_loads(tmp_path, tied):
    model = random_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights["backbone.embedding.weight"] = weights.pop("backbone.embeddings.weight")
    save_file(weights, path, {"format": "pt"})
    again = Mamba2ForCausalLM.from_pretrained(tmp_path).eval()
    ids = tokens(1, 7)
    assert torch.equal(again(ids).logits, model(ids).logits)
    again.save_pretrained(tmp_path / "again")
    assert "backbone.embeddings.weight" in load_file(tmp_path / "again" / "model.safetensors")


def test_a_directory_of_the_original_code_loads(tmp_path):
    model = random_model(tie_word_embeddings=True, vocab_size=64)
    weights = model.state_dict()
    weights["backbone.embedding.weight"] = weights.pop("backbone.embeddings.weight")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    ssm = {"layer": "Mamba2", "d_state": 6, "headdim": 8, "ngroups": 1}
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 61, "ssm_cfg": ssm, "pad_vocab_size_multiple": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = Mamba2ForCausalLM.from_pretrained(tmp_path).eval()
    ids = tokens(1, 7)
    close(again(ids).logits, model(ids).logits)
    config["ssm_cfg"] = {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Mamba2HFError, match="Mamba1"):
        Mamba2ForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("cast", ["load", "to", "bfloat16"])
def test_half_precision_leaves_the_decay_rates_alone(tmp_path, cast):
    model = random_model()
    model.save_pretrained(tmp_path)
    half = Mamba2ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16 if cast == "load" else torch.float32)
    half = half.to(torch.bfloat16) if cast == "to" else half.bfloat16() if cast == "bfloat16" else half
    for name, value in half.state_dict().items():
        if name.endswith(("A_log", "D", "dt_bias")):
            assert value.dtype == torch.float32
            assert torch.equal(value, model.state_dict()[name])
        else:
            assert value.dtype == torch.bfloat16, name


@pytest.mark.parametrize("broken", ["missing", "nan"])
def test_broken_checkpoints_are_refused_by_name(tmp_path, broken):
    random_model().save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "backbone.layers.1.mixer.A_log"
    weights = load_file(path)
    if broken == "missing":
        del weights[name]
    else:
        weights[name][0] = torch.nan
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Mamba2ForCausalLM.from_pretrained(tmp_path)


def test_what_is_saved_is_the_stock_format(tmp_path):
    stock = StockModel(StockConfig(**SIZES, tie_word_embeddings=False))
    stock.save_pretrained(tmp_path / "stock")
    ours = Mamba2ForCausalLM.from_pretrained(tmp_path / "stock").eval()
    ours.save_pretrained(tmp_path / "ours")
    saved = [load_file(tmp_path / name / "model.safetensors") for name in ("stock", "ours")]
    assert {name: value.shape for name, value in saved[0].items()} == {
        name: value.shape for name, value in saved[1].items()
    }
    keys = [set(json.loads((tmp_path / name / "config.json").read_text())) for name in ("stock", "ours")]
    assert keys[1] - keys[0] == {"intermediate_size", "pad_vocab_size_multiple"}  # for mlx-lm and llama.cpp
    assert keys[0] <= keys[1]
    ids = tokens(2, 30)
    close(ours(ids).logits, stock.eval()(ids).logits)


@torch.no_grad()
def test_initialization_is_the_originals():
    torch.manual_seed(0)
    options = {"hidden_size": 64, "num_heads": 16, "vocab_size": 4000}
    model = Mamba2ForCausalLM(Mamba2Config(**{**SIZES, **options, "num_hidden_layers": 4}))
    assert float(model.backbone.embeddings.weight.std()) == pytest.approx(0.02, rel=0.02)
    for layer in model.backbone.layers:
        rates = layer.mixer.A_log.exp()
        assert 1 <= float(rates.min()) < float(rates.max()) <= 16
        assert not torch.equal(rates.round(), torch.arange(1.0, 17.0))
        steps = torch.nn.functional.softplus(layer.mixer.dt_bias)
        assert 0.99e-3 < float(steps.min()) < float(steps.max()) < 0.101
        bound = 1 / (128**0.5 * 4**0.5)  # fan-in of out_proj, depth
        assert 0.9 * bound < float(layer.mixer.out_proj.weight.abs().max()) <= bound


def test_each_heads_attention_matrix():
    model = random_model()
    ids = tokens(1, 9)
    seq_idx = torch.tensor([[0] * 4 + [1] * 5])
    matrices = model(ids, seq_idx=seq_idx, output_attentions=True).attentions
    assert len(matrices) == 2
    for matrix in matrices:
        assert matrix.shape == (1, 4, 9, 9)
        assert matrix.abs().sum() > 0
        assert not matrix.triu(1).any()
        assert not matrix[:, :, 4:, :4].any()  # no row crosses a document


def test_classifies_whatever_the_padding():
    torch.manual_seed(0)
    model = Mamba2ForSequenceClassification(Mamba2Config(**SIZES, num_labels=3)).eval()
    rows = [tokens(5), tokens(11)]
    alone = torch.cat([model(row[None]).logits for row in rows])
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        out = model(ids, attention_mask=mask, labels=torch.tensor([2, 0]))
        close(out.logits, alone)
        assert out.loss.isfinite()


def test_says_how_to_split_it_over_devices():
    mixer = "backbone.layers.*.mixer"
    assert {f"{mixer}.in_proj", f"{mixer}.out_proj", "lm_head"} <= random_model().tp_plan.keys()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_groups", 3),
        ("chunk_size", 0),
        ("state_size", -6),
        ("time_step_limit", (0.5, 0.1)),
        ("layer_norm_epsilon", float("nan")),
        ("num_head", 4),
    ],
)
def test_nonsense_in_a_configuration_is_refused(field, value):
    StockConfig(**{**SIZES, field: value})
    with pytest.raises(ConfigurationError, match=field):
        Mamba2Config(**{**SIZES, field: value})


def test_training_keeps_little_for_the_backward():
    model = random_model(hidden_size=64, num_heads=16)
    mixer = model.backbone.layers[0].mixer
    hidden = torch.randn(1, 512, 64, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = mixer(hidden)
    weights = sum(parameter.nbytes for parameter in mixer.parameters())
    projected = 512 * 4 * (mixer.in_proj.out_features + mixer.inner_size)  # what the two projections exchange
    assert out.requires_grad
    assert sum(kept.values()) <= weights + hidden.nbytes + 1.2 * projected
