"""Small random checkpoints in every layout that is read, written here by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from hybrid_families import CASES
from hybrid_families import stock as stock_hybrid
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mamba2_hf import Mamba2Config, Mamba2ForCausalLM

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 8,
    "n_groups": 2,
    "state_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STATE_SPACES: dict[str, Any] = {
    **{"d_model": 32, "d_intermediate": 0, "n_layer": 2, "vocab_size": 61, "rms_norm": True},
    **{"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16, "tie_embeddings": True},
    **{"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 8}, "attn_layer_idx": [], "attn_cfg": {}},
}
CODESTRAL: dict[str, Any] = {
    **{"dim": 64, "n_layers": 2, "vocab_size": 64, "n_groups": 2, "rms_norm": True, "residual_in_fp32": True},
    **{"fused_add_norm": True, "pad_vocab_size_multiple": 1, "tie_embeddings": False, "model_type": "mamba"},
}


def make_model(**changes: Any) -> Any:
    """A model in eval mode whose parameters are all far from zero."""
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(Mamba2Config(**{**TINY, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "embeddings.weight", "lm_head.weight")):
                parameter.normal_(std=0.5)
    return model.eval()


def originals(model: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors under the names of the original code."""
    tensors = {name.replace("embeddings", "embedding"): tensor for name, tensor in model.state_dict().items()}
    return {prefix + name: tensor.clone() for name, tensor in tensors.items()}


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def nemotron_3(folder: Path, heads: int = 1, pattern: str = "*E") -> Any:
    """Nemotron 3 as published, with heads that predict further tokens. Returns transformers' own model, which knows
    none: the layers of the heads are the last ones of this one.
    """
    case = CASES["nemotron-experts"]
    layers = case.fields["hybrid_override_pattern"]
    model = stock_hybrid(case._replace(fields={**case.fields, "hybrid_override_pattern": layers + heads * pattern}))
    model.save_pretrained(folder)
    tensors, generator = {}, torch.Generator().manual_seed(3)
    for name, tensor in load_file(folder / "model.safetensors").items():
        _, _, number, *rest = name.split(".", 3) if ".layers." in name else ("", "", "0")
        own = int(number) < len(layers)
        tensors[name if own else f"mtp.layers.{int(number) - len(layers)}.{rest[0]}"] = tensor
    width = case.fields["hidden_size"]
    for head in range(heads):
        first, last = (f"mtp.layers.{head * len(pattern) + place}" for place in (0, len(pattern) - 1))
        for name in (f"{first}.enorm", f"{first}.hnorm", f"{last}.final_layernorm"):
            tensors[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=generator)
        projection = torch.randn(width, 2 * width, generator=generator)
        tensors[f"{first}.eh_proj.weight"] = projection * width**-0.5
    write_safetensors(folder / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text())
    config["layers_block_type"] = config["layers_block_type"][: len(layers)]
    config["num_hidden_layers"] = len(layers)
    config |= {"num_nextn_predict_layers": heads, "mtp_hybrid_override_pattern": pattern}
    config.pop("mtp_layers_block_type")
    write_json(folder / "config.json", config)
    return model


def state_spaces(folder: Path, **changes: Any) -> Any:
    """A folder as state-spaces publishes it, and the model in it."""
    folder.mkdir(exist_ok=True)
    model = make_model(n_groups=1, tie_word_embeddings=True)
    tensors = originals(model)
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    write_json(folder / "config.json", {**STATE_SPACES, **changes})
    return model


def codestral(folder: Path, **changes: Any) -> Any:
    """A folder as Mistral publishes it, and the model in it."""
    folder.mkdir(exist_ok=True)
    sizes = {"hidden_size": 64, "num_heads": 2, "head_dim": 64, "n_groups": 2, "state_size": 128}
    model = make_model(**sizes).bfloat16()
    write_safetensors(folder / "consolidated.safetensors", originals(model, "model."))
    write_json(folder / "params.json", {**CODESTRAL, **changes})
    return model


def stock(folder: Path, *, shards: bool = False, **changes: Any) -> Any:
    """A folder as transformers saves it, and the model in it."""
    model = make_model(**changes)
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")
    return model


def legacy(folder: Path, **changes: Any) -> Any:
    """A folder of an early conversion: the original name of the embedding, and keys that nothing reads."""
    model = stock(folder, **changes)
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    write_safetensors(folder / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text())
    inert = {"norm_before_gate": True, "rms_norm": True, "intermediate_size": 64, "time_step_scale": 1.0}
    write_json(folder / "config.json", {**config, **inert, "torch_dtype": "float32"})
    return model


def add_companions(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template, a generation config and a license."""
    symbols = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())[:61]]
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[], unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)
    write_json(folder / "generation_config.json", {"do_sample": True, "temperature": 0.5, "eos_token_id": 2})
    (folder / "LICENSE").write_text("Do as you like.")
    return fast


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, as torch and safetensors read them."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    for file in folder.glob("*.bin"):
        tensors |= torch.load(file, weights_only=True)
    return tensors


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two checkpoints hold the same names, dtypes, shapes and bits."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


IDS = torch.randint(3, 61, (2, 19), generator=torch.Generator().manual_seed(1))


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of small configurations of every kind."""
    groups, heads_each, head_dim = draw(st.sampled_from([1, 2])), draw(st.integers(1, 2)), draw(st.sampled_from([4, 8]))
    expand = draw(st.sampled_from([1, 2]))
    low, high = sorted(draw(st.lists(st.floats(0.0, 1.0, width=32), min_size=2, max_size=2, unique=True)))
    token = st.none() | st.integers(0, 7)
    return {
        "num_heads": groups * heads_each,
        "head_dim": head_dim,
        "n_groups": groups,
        "expand": expand,
        "hidden_size": groups * heads_each * head_dim // expand,
        "vocab_size": draw(st.integers(8, 40)),
        "state_size": draw(st.sampled_from([1, 4, 5])),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "conv_kernel": draw(st.integers(2, 4)),
        "use_bias": draw(st.booleans()),
        "use_conv_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "residual_in_fp32": draw(st.booleans()),
        "chunk_size": draw(st.integers(1, 300)),
        "time_step_limit": draw(st.sampled_from([(0.0, float("inf")), (low, high)])),
        "initializer_range": draw(st.floats(0.01, 1.0)),
        "hidden_act": draw(st.sampled_from(["silu", "swish"])),
        "pad_token_id": draw(token),
        "bos_token_id": draw(token),
        "eos_token_id": draw(token | st.lists(st.integers(0, 7), min_size=1, max_size=3)),
    }
