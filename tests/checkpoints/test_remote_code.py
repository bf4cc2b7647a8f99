"""The generated file is the models of this package, and works where the package is not installed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import layouts
import pytest
import torch
from layouts import IDS, logits

from mamba2_hf import Mamba2ForSequenceClassification
from mamba2_hf.checkpoints import convert, remote_code

# Runs in an environment without the package; prints nothing, fails loudly.
CODE = """
import importlib.metadata, importlib.util, sys
assert importlib.util.find_spec("mamba2_hf") is None
assert not [found for found in importlib.metadata.distributions() if found.name == "mamba2-hf"]

import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import PreTrainedTokenizerFast
from transformers import Mamba2ForCausalLM as Stock

folder, out = sys.argv[1:]
trusted = {"trust_remote_code": True}
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **trusted)
assert not any(info.values()), info
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert type(AutoConfig.from_pretrained(folder, **trusted)).__module__.startswith("transformers_modules.")
assert type(AutoModel.from_pretrained(folder, **trusted)).__name__ == "Mamba2Model"
assert "mamba2_hf" not in sys.modules

given = torch.load(out + "/in.pt", weights_only=True)
with torch.no_grad():
    found = {
        "logits": model(given["ids"]).logits,
        "padded": model(given["ids"], attention_mask=given["mask"]).logits,
        "packed": model(given["ids"], seq_idx=given["documents"]).logits,
        "generated": model.generate(given["ids"], attention_mask=given["mask"], max_new_tokens=9, do_sample=False),
        "beams": model.generate(given["ids"], num_beams=3, max_new_tokens=5, do_sample=False),
        "attentions": torch.stack(model(given["ids"], output_attentions=True, use_cache=False).attentions),
    }
# What generate takes for itself does not reach the forward.
words = {f"w{index}" if index else "abcdef": index for index in range(model.config.vocab_size)}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="abcdef")))
for beams in (1, 3):
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "prefill_chunk_size": 4}
    stopped = model.generate(given["ids"], stop_strings=[" w3 w4 w3"], tokenizer=tokenizer, **options)
    assert torch.equal(stopped, model.generate(given["ids"], **options))
loss = model.train()(given["ids"], labels=given["ids"]).loss
loss.backward()
found["loss"], found["gradient"] = loss.detach(), model.backbone.layers[0].mixer.A_log.grad
torch.save(found, out + "/found.pt")

# Saved again it is complete again, code included; without trust stock reads it.
model.save_pretrained(out + "/again")
again = AutoModelForCausalLM.from_pretrained(out + "/again", **trusted)
assert type(again).__module__ != type(model).__module__
assert torch.equal(again(given["ids"]).logits, found["logits"])
assert type(AutoModelForCausalLM.from_pretrained(folder)) is Stock
assert type(AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **trusted)).__name__ == (
    "Mamba2ForSequenceClassification"
)
half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **trusted)
assert half.backbone.layers[0].mixer.A_log.dtype == torch.float32
try:
    model.config.num_heads = -1
    model.config.validate()
except ValueError as error:
    assert "num_heads is -1" in str(error)
else:
    raise AssertionError
"""


@pytest.fixture(scope="module", name="without")
def _without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a virtual environment that has what this one has, but the package."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = folder / "packages"
    packages.mkdir()
    for entry in sys.path:
        for path in Path(entry).iterdir() if entry.endswith("-packages") else ():
            if "mamba2_hf" not in path.name.replace("-", "_") and path.suffix != ".pth":
                (packages / path.name).symlink_to(path)
    (next(folder.glob("lib/python*/site-packages")) / "packages.pth").write_text(f"{packages}\n")
    return folder / "bin/python"


@pytest.mark.slow
def test_it_is_the_model_where_the_package_is_not_installed(without: Path, tmp_path: Path) -> None:
    model = layouts.stock(tmp_path / "source", use_bias=True)
    convert(tmp_path / "source", tmp_path / "model", with_code=True)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    documents = (torch.arange(IDS.shape[1]) > 7).long().expand_as(IDS)
    torch.save({"ids": IDS, "mask": mask, "documents": documents.contiguous()}, tmp_path / "in.pt")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    completed = subprocess.run(
        [without, "-c", CODE, str(tmp_path / "model"), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "HF_HOME": str(tmp_path / "home")},
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    with torch.no_grad():
        expected = {
            "logits": logits(model, IDS),
            "padded": model(IDS, attention_mask=mask).logits,
            "packed": model(IDS, seq_idx=documents).logits,
            "generated": model.generate(IDS, attention_mask=mask, max_new_tokens=9, do_sample=False),
            "beams": model.generate(IDS, num_beams=3, max_new_tokens=5, do_sample=False),
            "attentions": torch.stack(model(IDS, output_attentions=True, use_cache=False).attentions),
        }
    loss = model.train()(IDS, labels=IDS).loss
    loss.backward()
    expected |= {"loss": loss.detach(), "gradient": model.backbone.layers[0].mixer.A_log.grad}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_it_imports_only_what_transformers_brings() -> None:
    tree = ast.parse(remote_code.source())
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers", "huggingface_hub", "safetensors"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]


def test_any_python_can_read_it() -> None:
    """Whatever Python generated it. From 3.12 on, ``ast.unparse`` writes f-strings that 3.11 cannot parse."""
    tree = ast.parse(remote_code.source(), feature_version=(3, 10))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]


def test_it_is_documented_and_says_where_it_comes_from() -> None:
    tree = ast.parse(remote_code.source())
    assert "do not edit" in (ast.get_docstring(tree) or "")
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for name in remote_code.ROOTS:
        assert ast.get_docstring(classes[name])


def test_the_config_names_its_classes(tmp_path: Path) -> None:
    layouts.stock(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", with_code=True)
    config = json.loads((tmp_path / "out/config.json").read_text())
    text = (tmp_path / "out" / remote_code.FILE).read_text()
    for name in config["auto_map"].values():
        module, _, defined = name.partition(".")
        assert f"{module}.py" == remote_code.FILE
        assert f"\nclass {defined}(" in text
    assert config["architectures"] == ["Mamba2ForCausalLM"]
    convert(tmp_path / "out", tmp_path / "plain")
    assert "auto_map" not in json.loads((tmp_path / "plain/config.json").read_text())
    assert not (tmp_path / "plain" / remote_code.FILE).exists()


def test_the_installed_package_goes_first(tmp_path: Path) -> None:
    """Where it is imported, its own classes serve, with all its backends."""
    layouts.stock(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", with_code=True)
    from transformers import AutoModelForSequenceClassification

    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded) is Mamba2ForSequenceClassification
