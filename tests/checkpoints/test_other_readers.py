"""What is saved here has the keys and names that other programs read.

Stock transformers loads it for real, in ``test_convert.py`` and ``models/test_loading.py``. For the others their
sources were read, and what they look up is listed here.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import pytest
import sentencepiece
from layouts import stored
from transformers import AutoTokenizer

from mamba2_hf.checkpoints import convert
from mamba2_hf.pretrained import SHIPPED, shipped_model_path

# vllm-project/vllm: vllm/model_executor/models/mamba2.py and registry.py. It builds its config by transformers' class
# for model_type and reads these attributes; names of tensors are those of its modules, with A_log renamed to A.
VLLM_CONFIG = {
    *("hidden_size", "state_size", "conv_kernel", "expand", "use_conv_bias", "use_bias", "n_groups", "num_heads"),
    *("head_dim", "layer_norm_epsilon", "hidden_act", "vocab_size", "num_hidden_layers"),
}
VLLM_ARCHITECTURE = "Mamba2ForCausalLM"
VLLM_TENSORS = (
    *(r"backbone\.embeddings\.weight", r"backbone\.norm_f\.weight", r"lm_head\.weight"),
    r"backbone\.layers\.\d+\.norm\.weight",
    r"backbone\.layers\.\d+\.mixer\.(in_proj|conv1d|out_proj)\.(weight|bias)",
    r"backbone\.layers\.\d+\.mixer\.(A_log|D|dt_bias|norm\.weight)",
)
# ggml-org/llama.cpp: convert_hf_to_gguf.py (conversion/mamba.py), class Mamba2Model, and gguf-py's tensor_mapping.py.
# It reads the JSON itself: of each row the first key that is there, else the default.
LLAMA_CPP_CONFIG: dict[str, tuple[tuple[str, ...], Any]] = {
    "d_model": (("hidden_size", "d_model", "dim"), None),
    "d_inner": (("mamba_d_ssm", "intermediate_size", "d_inner"), "2 * d_model"),
    "n_group": (("n_groups",), 1),
    "vocab_size": (("vocab_size",), None),
    "pad_vocab": (("pad_vocab_size_multiple",), 16),
    "d_conv": (("conv_kernel", "d_conv"), 4),
    "d_state": (("state_size", "d_state"), 128),
    "head_dim": (("mamba_d_head", "head_dim"), 64),
    "eps": (("layer_norm_epsilon", "rms_norm_eps"), 1e-5),
    "block_count": (("n_layers", "num_hidden_layers", "n_layer", "num_layers"), None),
}
LLAMA_CPP_TENSORS = (
    *(r"backbone\.embeddings?\.weight", r"backbone\.norm_f\.weight", r"lm_head\.weight"),
    r"backbone\.layers\.\d+\.norm\.weight",
    r"backbone\.layers\.\d+\.mixer\.(in_proj|out_proj|norm)\.weight",
    r"backbone\.layers\.\d+\.mixer\.conv1d\.(weight|bias)",
    r"backbone\.layers\.\d+\.mixer\.(A_log|D|dt_bias)",
)
# Of the pre-tokenizers in a tokenizer.json it knows those of published models only, so that one of our own needs this.
# Its runtime puts a space before each text then (llama.cpp's src/llama-vocab.cpp).
LLAMA_CPP_TOKENIZER = "tokenizer.model"


def llama_cpp(config: dict[str, Any]) -> dict[str, Any]:
    """The sizes that its converter would work out."""
    found = {
        name: next((config[key] for key in keys if key in config), default)
        for name, (keys, default) in LLAMA_CPP_CONFIG.items()
    }
    if found["d_inner"] == "2 * d_model":
        found["d_inner"] = 2 * found["d_model"]
    found["vocab_size"] = -(-found["vocab_size"] // found["pad_vocab"]) * found["pad_vocab"]
    return found


def by_conversion(write: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write(folder / "source")
        convert(folder / "source", folder / "out")
        return folder / "out"

    return make


def by_saving(**changes: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        layouts.stock(folder / "out", **changes)
        return folder / "out"

    return make


SAVED: dict[str, Callable[[Path], Path]] = {
    "shipped": by_conversion(lambda folder: shutil.copytree(shipped_model_path(), folder)),
    "saved": by_saving(),
    "saved_with_8_groups": by_saving(n_groups=8),
    "from_state_spaces": by_conversion(layouts.state_spaces),
    "from_codestral": by_conversion(layouts.codestral),
    "from_legacy": by_conversion(layouts.legacy),
    "odd_vocabulary": by_conversion(lambda folder: layouts.stock(folder, vocab_size=61)),
}


@pytest.fixture(params=SAVED, name="folder")
def _folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return SAVED[request.param](tmp_path)


@pytest.fixture(name="config")
def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_vllm(folder: Path, config: dict[str, Any]) -> None:
    assert config["model_type"] == "mamba2"
    assert config["architectures"] == [VLLM_ARCHITECTURE]
    assert config.keys() >= VLLM_CONFIG
    assert (
        config.get("intermediate_size", config["expand"] * config["hidden_size"])
        == config["num_heads"] * config["head_dim"]
    )
    assert config["num_heads"] * config["head_dim"] == config["expand"] * config["hidden_size"]
    for name in stored(folder):
        assert any(re.fullmatch(pattern, name) for pattern in VLLM_TENSORS), name
    assert ("lm_head.weight" in stored(folder)) == (not config.get("tie_word_embeddings"))


def test_llama_cpp(folder: Path, config: dict[str, Any]) -> None:
    assert config["architectures"] == ["Mamba2ForCausalLM"]
    assert not {"llm_config", "text_config"} & config.keys()
    found, tensors = llama_cpp(config), stored(folder)
    assert found["d_inner"] == 2 * found["d_model"] == config["num_heads"] * config["head_dim"]
    assert found["d_inner"] % found["head_dim"] == 0
    assert found["head_dim"] == config["head_dim"]
    assert found["vocab_size"] == len(tensors["backbone.embeddings.weight"])
    assert found["block_count"] == config["num_hidden_layers"]
    assert (found["n_group"], found["d_state"]) == (config["n_groups"], config["state_size"])
    layer = "backbone.layers.0.mixer"
    assert tensors[f"{layer}.norm.weight"].numel() == found["d_inner"]
    assert tensors[f"{layer}.conv1d.weight"].shape[0] == found["d_inner"] + 2 * found["n_group"] * found["d_state"]
    assert tensors[f"{layer}.conv1d.weight"].shape[2] == found["d_conv"]
    for name in tensors:
        assert any(re.fullmatch(pattern, name) for pattern in LLAMA_CPP_TENSORS), name


@pytest.mark.parametrize("name", SHIPPED)
def test_llama_cpp_finds_the_shipped_tokenizer_and_reads_it_as_we_do(name: str) -> None:
    folder = shipped_model_path(name)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / LLAMA_CPP_TOKENIZER))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = Path(__file__).read_text(encoding="utf-8") + "é 日\t\r\n"
    assert tokenizer.tokenize("def")[0] == "\u2581def"
    assert processor.encode(text) == tokenizer(text).input_ids
    assert json.loads((folder / "tokenizer_config.json").read_text())["add_bos_token"] is False
