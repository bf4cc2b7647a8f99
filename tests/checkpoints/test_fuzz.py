"""Mutated checkpoints end in a typed error or in exactly the model that their files say."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, reject, settings
from hypothesis import strategies as st
from layouts import stored
from torch import Tensor

from mamba2_hf import Mamba2Config, Mamba2ForCausalLM
from mamba2_hf.checkpoints import convert
from mamba2_hf.checkpoints.formats import FORMATS
from mamba2_hf.errors import CheckpointError, ConfigurationError

LAYOUTS = ("stock", "shards", "torch", "state_spaces", "codestral")
JSON_FILES = ("config.json", "params.json", "model.safetensors.index.json", "generation_config.json")


@pytest.fixture(scope="module", name="originals")
def _originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    layouts.stock(root / "stock")
    layouts.stock(root / "shards", shards=True)
    (root / "torch").mkdir()
    model = layouts.make_model(num_hidden_layers=1)
    model.config.save_pretrained(root / "torch")
    torch.save({name: tensor.clone() for name, tensor in model.state_dict().items()}, root / "torch/pytorch_model.bin")
    layouts.state_spaces(root / "state_spaces")
    layouts.codestral(root / "codestral")
    return root


# Keys that transformers, or a reader that is fooled, would act on.
KEYS = (
    *("attn_implementation", "_attn_implementation", "experts_implementation", "quantization_config", "text_config"),
    *("pad_vocab_size_multiple", "intermediate_size", "num_labels", "id2label", "auto_map", "dtype", "torch_dtype"),
    *("layer_types", "return_dict", "output_attentions", "to_dict", "problem_type", "mamba_ssm_config", "_inert"),
    *("architectures", "sub_configs", "is_encoder_decoder", "head_dim", "D_has_hdim", "ssm_cfg", "__metadata__"),
)
# What takes the place of a value somewhere in a JSON file.
odd = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.sampled_from(
        [2**31, 2**63, 10**400, -1.5, 0.0, 1e-5, float("nan"), float("inf"), "", "..", "/etc/passwd", "F16"]
    )
    | st.sampled_from(["mamba2", "Mamba2", "BF16", "F32", "I8", "backbone.layers.0.mixer.D", "model.safetensors"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "__float__", "0"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def spots(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON value can be changed."""
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(spot for key, value in inside for spot in spots(value, (*path, key)))]


def change_json(data: st.DataObject, content: Any) -> Any:
    """One change: a value replaced, removed, renamed, doubled or put deep inside."""
    if isinstance(content, dict) and data.draw(st.integers(0, 3), label="add") == 0:
        return {**content, data.draw(st.sampled_from(KEYS), label="key"): data.draw(odd, label="value")}
    path = data.draw(st.sampled_from(spots(content)), label="spot")
    if not path:
        return data.draw(odd, label="value")
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    kind = data.draw(st.sampled_from(["replace", "remove", "rename", "exchange", "deepen"]), label="kind")
    if kind == "remove":
        del parent[path[-1]]
    elif kind == "rename" and isinstance(parent, dict):
        parent[data.draw(st.sampled_from([*parent, "x", "../x"]), label="name")] = parent.pop(path[-1])
    elif kind == "exchange":
        other = data.draw(
            st.sampled_from(list(parent) if isinstance(parent, dict) else range(len(parent))), label="other"
        )
        parent[path[-1]], parent[other] = parent[other], parent[path[-1]]
    elif kind == "deepen":
        for _ in range(data.draw(st.sampled_from([1, 40, 500]), label="depth")):
            parent[path[-1]] = [parent[path[-1]]]
    else:
        parent[path[-1]] = data.draw(odd, label="value")
    return content


def change_bytes(data: st.DataObject, content: bytes, end: int) -> bytes:
    """One change among the first ``end`` bytes."""
    at = data.draw(st.integers(0, max(0, end - 1)), label="at")
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "remove", "append", "empty"]), label="kind")
    some = data.draw(st.binary(min_size=1, max_size=9), label="bytes")
    return {
        "flip": content[:at] + some + content[at + len(some) :],
        "cut": content[:at],
        "insert": content[:at] + some + content[at:],
        "remove": content[:at] + content[at + len(some) :],
        "append": content + some,
        "empty": b"",
    }[kind]


def mutate(data: st.DataObject, folder: Path) -> None:
    path = data.draw(st.sampled_from(sorted(folder.iterdir())), label="file")
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
    start = 8 if path.suffix == ".safetensors" else 0
    if path.suffix in (".json", ".safetensors") and data.draw(st.booleans(), label="structured"):
        try:
            parsed = json.loads(content[start : start + size])
        except ValueError:  # changed before
            reject()
        text = json.dumps(change_json(data, parsed)).encode()
        path.write_bytes(text if not start else struct.pack("<Q", len(text)) + text + content[start + size :])
    else:
        path.write_bytes(change_bytes(data, content, min(start + size, len(content))))


def says(folder: Path, source: str) -> dict[str, Tensor]:
    """What the files hold, read by their own libraries and named by hand."""
    names = {
        name.removeprefix("model.").replace(".embedding.", ".embeddings."): tensor
        for name, tensor in stored(folder).items()
    }
    if source == "mamba_ssm" or json.loads((folder / FORMATS[source].config_file).read_text()).get(
        "tie_word_embeddings"
    ):
        names.pop("lm_head.weight", None)
    return names


@pytest.mark.slow
@settings(
    max_examples=250,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.sampled_from(LAYOUTS), st.integers(1, 2), st.data())
def test_a_typed_error_or_an_exact_load(
    originals: Path, tmp_path_factory: pytest.TempPathFactory, layout: str, changes: int, data: st.DataObject
) -> None:
    work = tmp_path_factory.mktemp("fuzz")
    folder = work / "source"
    shutil.copytree(originals / layout, folder)
    for _ in range(changes):
        mutate(data, folder)
    result, error = None, ""
    try:
        result = convert(folder, work / "out")
    except (CheckpointError, ConfigurationError) as refusal:
        error = str(refusal)
    if result is None:
        event(f"{layout}: refused")
        assert str(folder) in error
        assert [path.name for path in work.iterdir()] == ["source"]
        shutil.rmtree(work)
        return
    event(f"{layout}: loaded")
    assert sorted(path.name for path in work.iterdir()) == ["out", "source"]
    written = stored(work / "out")
    assert layouts.same(written, says(folder, result.source))
    config = json.loads((work / "out/config.json").read_text())
    if result.source == "mamba2":
        given_config = json.loads((folder / "config.json").read_text())
        fields = Mamba2Config.__dataclass_fields__.keys() - {"architectures", "dtype", "rescale_prenorm_residual"}
        for name in fields & given_config.keys() - {"transformers_version", "time_step_rank"}:
            default, given = getattr(Mamba2Config(), name), given_config[name]
            if given is None and name in ("id2label", "label2id"):  # labels that are not named have transformers' names
                given = default
            assert config.get(name, default) == given, name
    try:
        convert(work / "out", work / "other", to="mamba_ssm")
    except ConfigurationError as refusal:
        event(f"no mamba_ssm: {str(refusal).partition(' is ')[0].rpartition(' ')[2]}")
    else:
        convert(work / "other", work / "back")
        assert layouts.same(stored(work / "back"), written)
        assert (work / "back/config.json").read_bytes() == (work / "out/config.json").read_bytes()
    loaded, info = Mamba2ForCausalLM.from_pretrained(work / "out", output_loading_info=True)
    assert not any(info.values())
    state = loaded.state_dict()
    assert all(torch.equal(state[name].to(tensor.dtype), tensor) for name, tensor in written.items())
    shutil.rmtree(work)
