"""Broken and hostile input: one error that names file and field, and nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
from safetensors.torch import load_file

from mamba2_hf import Mamba2ForCausalLM
from mamba2_hf.checkpoints import convert, detect, verify
from mamba2_hf.errors import CheckpointError, ConfigurationError, Mamba2HFError

Break = Callable[[Path], None]


def header(change: Callable[[dict[str, Any]], None]) -> Break:
    """Rewrites the header of model.safetensors and leaves the values alone."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        content = json.loads(data[8 : 8 + size])
        change(content)
        text = json.dumps(content).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return apply


def config(**changes: Any) -> Break:
    def apply(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        layouts.write_json(folder / "config.json", {**content, **changes})

    return apply


def tensors(change: Callable[[dict[str, Any]], Any]) -> Break:
    def apply(folder: Path) -> None:
        content = load_file(folder / "model.safetensors")
        change(content)
        layouts.write_safetensors(folder / "model.safetensors", content)

    return apply


def file(name: str, content: bytes | str) -> Break:
    return lambda folder: (
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content) and None
    )


def index(change: Callable[[dict[str, Any]], None]) -> Break:
    """Turns the checkpoint into two shards with an index, and changes the index."""

    def apply(folder: Path) -> None:
        everything = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        places = {name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(everything)}
        for shard in sorted(set(places.values())):
            layouts.write_safetensors(folder / shard, {n: everything[n] for n in places if places[n] == shard})
        content = {"metadata": {}, "weight_map": places}
        change(content)
        layouts.write_json(folder / "model.safetensors.index.json", content)

    return apply


def cut(count: int) -> Break:
    return lambda folder: os.truncate(
        folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - count
    )


def claim(size: int) -> Break:
    """A header that says it is this long."""

    def apply(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + data[8:])

    return apply


def set_value(name: str, value: float) -> Break:
    return tensors(lambda found: found[name].view(-1).__setitem__(1, value))


class Payload:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return Path.touch, (self.witness,)


def in_zip(folder: Path) -> None:
    """What torch.save writes, with a payload among the tensors."""
    (folder / "model.safetensors").unlink()
    torch.save({"x": Payload(folder / "witness")}, folder / "pytorch_model.bin")


def bare_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(folder / "witness")))


def renamed_pickle(folder: Path) -> None:
    torch.save({"x": Payload(folder / "witness")}, folder / "model.safetensors")


def torch_file(change: Callable[[dict[str, Any]], Any]) -> Break:
    def apply(folder: Path) -> None:
        content: Any = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(change(content) or content, folder / "pytorch_model.bin")

    return apply


def squeezed(folder: Path) -> None:
    torch_file(lambda content: None)(folder)
    with zipfile.ZipFile(folder / "pytorch_model.bin") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, record in records.items():
            archive.writestr(name, record)


def longer_storage(folder: Path) -> None:
    """A pickle that claims more values than its record has, into the next record."""
    torch_file(lambda content: None)(folder)
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, record in records.items():
            archive.writestr(name, record[:-4] if name.endswith("/data/3") else record)


def empty_torch_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()


def pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
MIXER = "backbone.layers.1.mixer"
CASES: dict[str, tuple[Break, str]] = {
    # what is there
    "no_config": (lambda f: (f / "config.json").unlink(), "no config.json and no params.json"),
    "no_weights": (lambda f: (f / "model.safetensors").unlink(), r"holds none of model\.safetensors"),
    "empty_folder": (lambda f: [p.unlink() for p in f.iterdir()] and None, "no config.json"),
    "empty_weights": (file("model.safetensors", b""), r"model\.safetensors: not a complete safetensors file"),
    "pipe": (pipe, r"model\.safetensors: not a regular file"),
    # JSON
    "empty_config": (file("config.json", b""), r"config\.json: not readable as JSON"),
    "cut_config": (file("config.json", '{"model_type": "mam'), r"config\.json: not readable as JSON"),
    "binary_config": (file("config.json", b"\xff\xfe\x00"), r"config\.json: not readable as JSON"),
    "list_config": (file("config.json", "[1]"), r"config\.json: holds a JSON list"),
    "deep_config": (file("config.json", DEEP), r"config\.json: nested too deeply"),
    "deepish_config": (file("config.json", '{"a":' * 60 + "1" + "}" * 60), r"config\.json: nested too deeply"),
    "huge_number": (file("config.json", '{"model_type": "mamba2", "vocab_size": ' + "9" * 9999 + "}"), r"config\.json"),
    "twice": (file("config.json", '{"model_type": "mamba2", "model_type": "x"}'), "'model_type' stands there twice"),
    "huge_config": (lambda f: os.truncate(f / "config.json", 2**40), r"config\.json: 1099511627776 bytes"),
    "deep_generation_config": (file("generation_config.json", DEEP), r"generation_config\.json: nested too deeply"),
    # config
    "other_model": (config(model_type="llama"), "model_type 'llama'"),
    "negative": (config(num_heads=-8), r"config\.json: num_heads is -8"),
    "wrong_type": (config(hidden_size="32"), r"config\.json: hidden_size is '32'"),
    "nested_size": (config(vocab_size={"a": 1}), r"config\.json: vocab_size is"),
    "infinite": (file("config.json", '{"model_type": "mamba2", "layer_norm_epsilon": NaN}'), "layer_norm_epsilon"),
    "more_layers": (config(num_hidden_layers=3), r"layers\.2\.\S+ is missing"),
    "fewer_layers": (config(num_hidden_layers=1), r"layers\.1\.\S+ is no tensor of a model"),
    "many_layers": (config(num_hidden_layers=10**12), "num_hidden_layers is 1000000000000"),
    "huge_sizes": (config(vocab_size=10**30), "no tensor can have the sizes"),
    "large_sizes": (config(vocab_size=10**15), r"embeddings\.weight has shape \(64, 32\)"),
    "other_state": (config(state_size=16), r"mixer\.\S+ has shape"),
    "many_labels": (config(num_labels=10**10), r"config\.json: num_labels is 10000000000"),
    "quantized": (config(quantization_config={"quant_method": "gptq"}), "quantization_config says that the weights"),
    "odd_multiple": (config(pad_vocab_size_multiple="x", num_heads=-1), "num_heads is -1"),
    "untied": (config(tie_word_embeddings=True), r"lm_head\.weight differs from backbone\.embeddings\.weight"),
    # headers
    "header_too_long": (claim(2**40), r"model\.safetensors: not a complete safetensors file"),
    "header_negative": (claim(2**64 - 1), r"model\.safetensors: not a complete safetensors file"),
    "header_past_end": (claim(10**6), r"model\.safetensors: not a complete safetensors file"),
    "header_empty": (claim(0), r"model\.safetensors: not a complete safetensors file"),
    "header_deep": (file("model.safetensors", struct.pack("<Q", len(DEEP)) + DEEP.encode()), r"not a complete"),
    "one_byte_short": (cut(1), r"model\.safetensors: not a complete safetensors file"),
    "half": (cut(8000), r"model\.safetensors: not a complete safetensors file"),
    "trailing": (lambda f: os.truncate(f / "model.safetensors", 10**6), "not a complete safetensors file"),
    "overlap": (
        header(lambda h: h[f"{MIXER}.D"].update(data_offsets=h[f"{MIXER}.A_log"]["data_offsets"])),
        "not a complete safetensors file",
    ),
    "out_of_range": (header(lambda h: h[f"{MIXER}.D"].update(data_offsets=[10**9, 10**9 + 32])), "not a complete"),
    "backwards": (header(lambda h: h[f"{MIXER}.D"].update(data_offsets=[64, 32])), "not a complete"),
    "overflow": (header(lambda h: h[f"{MIXER}.D"].update(shape=[2**62, 2**62])), "not a complete"),
    "negative_shape": (header(lambda h: h[f"{MIXER}.D"].update(shape=[-8])), "not a complete"),
    "wrong_size": (header(lambda h: h[f"{MIXER}.D"].update(shape=[9])), "not a complete"),
    "odd_dtype": (header(lambda h: h[f"{MIXER}.D"].update(dtype="I32")), rf"{MIXER}\.D has dtype I32"),
    "unknown_dtype": (header(lambda h: h[f"{MIXER}.D"].update(dtype="F31")), "not a complete"),
    "other_shape": (header(lambda h: h[f"{MIXER}.D"].update(shape=[2, 4])), r"D has shape \(2, 4\)"),
    # tensors
    "missing": (tensors(lambda t: t.pop(f"{MIXER}.A_log")), rf"{MIXER}\.A_log is missing"),
    "missing_head": (tensors(lambda t: t.pop("lm_head.weight")), "lm_head.weight is missing, and tie_word"),
    "unknown": (tensors(lambda t: t.update({"extra": torch.ones(2)})), "extra is no tensor of a model"),
    "two_names": (
        tensors(lambda t: t.update({"backbone.embedding.weight": torch.ones(64, 32)})),
        r"backbone\.embeddings?\.weight and backbone\.embeddings?\.weight are two names",
    ),
    "integers": (tensors(lambda t: t.update({f"{MIXER}.D": torch.ones(8, dtype=torch.int64)})), "D has dtype I64"),
    "nan_A_log": (set_value(f"{MIXER}.A_log", float("nan")), rf"{MIXER}\.A_log holds NaN or Inf"),
    "inf_D": (set_value(f"{MIXER}.D", float("inf")), rf"{MIXER}\.D holds NaN or Inf"),
    "inf_dt_bias": (set_value(f"{MIXER}.dt_bias", float("-inf")), rf"{MIXER}\.dt_bias holds NaN or Inf"),
    "nan_elsewhere": (set_value("backbone.norm_f.weight", float("nan")), r"backbone\.norm_f\.weight holds NaN or Inf"),
    # index
    "index_up": (index(lambda i: i["weight_map"].update(x="../model.safetensors")), "names the file '../model"),
    "index_absolute": (index(lambda i: i["weight_map"].update(x="/etc/passwd")), "names the file '/etc/passwd'"),
    "index_drive": (index(lambda i: i["weight_map"].update(x="C:model.safetensors")), "names the file 'C:model"),
    "index_backslash": (index(lambda i: i["weight_map"].update(x="..\\x.safetensors")), "names the file"),
    "index_nul": (index(lambda i: i["weight_map"].update(x="a\0b.safetensors")), "names the file"),
    "index_number": (index(lambda i: i["weight_map"].update(x=3)), "names the file 3"),
    "index_absent": (
        index(lambda i: i["weight_map"].update(x="model-9.safetensors")),
        "model-9.safetensors, which is not",
    ),
    "index_pickle": (index(lambda i: i["weight_map"].update(x="config.json")), "config.json, a file of another kind"),
    "index_swapped": (
        index(
            lambda i: (
                i["weight_map"].update({f"{MIXER}.D": "model-00001-of-00002.safetensors"})
                if i["weight_map"][f"{MIXER}.D"].startswith("model-00002")
                else i["weight_map"].update({f"{MIXER}.D": "model-00002-of-00002.safetensors"})
            )
        ),
        rf"weight_map puts {MIXER}\.D into",
    ),
    "index_short": (index(lambda i: i["weight_map"].pop(f"{MIXER}.D")), rf"weight_map does not name {MIXER}\.D"),
    "index_empty": (index(lambda i: i.update(weight_map={})), "weight_map is {}"),
    "index_list": (index(lambda i: i.update(weight_map=[1])), r"weight_map is \[1\]"),
    "index_none": (index(lambda i: i.pop("weight_map")), "weight_map is None"),
    # pickles
    "payload": (in_zip, r"pytorch_model\.bin: its pickle asks for more than tensors"),
    "bare_payload": (bare_pickle, r"pytorch_model\.bin: not a complete file of torch\.save"),
    "pickle_as_safetensors": (renamed_pickle, r"model\.safetensors: .*it is a pickle under a wrong name"),
    "torch_list": (torch_file(lambda t: list(t.values())), r"pytorch_model\.bin: holds a list"),
    "torch_nested": (torch_file(lambda t: {"model": t}), r"pytorch_model\.bin: 'model' is a dict"),
    "torch_sparse": (torch_file(lambda t: {"x": torch.eye(3).to_sparse()}), "no plain tensor"),
    "torch_meta": (torch_file(lambda t: {"x": torch.ones(3, device="meta")}), "x is no plain tensor"),
    "torch_bool": (torch_file(lambda t: {"x": torch.ones(3, dtype=torch.bool)}), "x has dtype torch.bool"),
    "torch_expanded": (
        torch_file(lambda t: {"x": torch.ones(1).expand(10**12)}),
        "x has shape .* more than its stored",
    ),
    "torch_squeezed": (squeezed, "is compressed, which torch.save never does"),
    "torch_longer": (longer_storage, r"pytorch_model\.bin: "),
    "torch_empty": (empty_torch_file, r"pytorch_model\.bin: not a complete file"),
}


@pytest.fixture(scope="module", name="intact")
def _intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact") / "source"
    layouts.stock(folder)
    return folder


@pytest.mark.parametrize(("spoil", "match"), CASES.values(), ids=CASES.keys())
def test_one_error_and_nothing_left(intact: Path, tmp_path: Path, spoil: Break, match: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(intact, source)
    spoil(source)
    for act in (lambda: convert(source, tmp_path / "out/deep"), lambda: verify(intact, source, tokens=2)):
        if "generation_config" in match and act.__code__.co_names[0] == "verify":
            continue  # it only reads the model
        with pytest.raises(Mamba2HFError, match=match) as caught:
            act()
        assert isinstance(caught.value, (CheckpointError, ConfigurationError))
        assert str(source) in str(caught.value)
        assert len(str(caught.value)) < 1000
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
        assert not (source / "witness").exists()


class TestOtherModelsByName:
    """What would be needed is part of the refusal."""

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"ssm_cfg": {}}, "ssm_cfg.layer is 'Mamba1'.*load it with"),
            ({"ssm_cfg": {"layer": "Mamba1"}}, "ssm_cfg.layer is 'Mamba1'"),
            (
                {"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}},
                "ssm_cfg.D_has_hdim asks for a skip weight per channel",
            ),
            ({"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_ssm": 32}}, "ssm_cfg.d_ssm is 32 and the inner width 64"),
            (
                {"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}},
                "ssm_cfg.norm_before_gate asks for a norm before",
            ),
            ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "ssm_cfg.rmsnorm asks for a gate without a norm"),
            ({"ssm_cfg": {"layer": "Mamba2", "dt_rank": 3}}, "ssm_cfg.dt_rank is 3"),
            ({"ssm_cfg": ["Mamba2"]}, "ssm_cfg is"),
            ({"ssm_cfg": {"layer": "Mamba2", "headdim": 0}}, "ssm_cfg.headdim is 0"),
            ({"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "expand": "2"}}, "ssm_cfg.expand is '2'"),
            ({"rms_norm": False}, "rms_norm is False"),
            ({"d_model": "32"}, "d_model is '32'"),
            ({"vocab_size": None}, "vocab_size is None"),
            ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple is 0"),
            ({"n_layer": 1.5}, "num_hidden_layers is 1.5"),
        ],
    )
    def test_state_spaces(self, tmp_path: Path, changes: dict[str, Any], match: str) -> None:
        layouts.state_spaces(tmp_path / "source", **changes)
        with pytest.raises(ConfigurationError, match=rf"config\.json: {match}"):
            convert(tmp_path / "source", tmp_path / "out")
        with pytest.raises(ConfigurationError, match=match):
            Mamba2ForCausalLM.from_pretrained(tmp_path / "source")
        assert not (tmp_path / "out").exists()

    def test_an_inner_width_that_is_all_ssm_is_fine(self, tmp_path: Path) -> None:
        ssm = {**layouts.STATE_SPACES["ssm_cfg"], "d_ssm": 64, "use_mem_eff_path": False}
        layouts.state_spaces(tmp_path / "source", ssm_cfg=ssm)
        convert(tmp_path / "source", tmp_path / "out")

    @pytest.mark.parametrize(
        ("changes", "match"),
        [({"model_type": "transformer"}, "model_type is 'transformer'"), ({"n_groups": "8"}, "n_groups is '8'")],
    )
    def test_codestral(self, tmp_path: Path, changes: dict[str, Any], match: str) -> None:
        layouts.codestral(tmp_path / "source", **changes)
        with pytest.raises(ConfigurationError, match=rf"params\.json: {match}"):
            convert(tmp_path / "source", tmp_path / "out")

    def test_codestral_without_a_size(self, tmp_path: Path) -> None:
        layouts.codestral(tmp_path / "source")
        params = {name: value for name, value in layouts.CODESTRAL.items() if name != "n_groups"}
        layouts.write_json(tmp_path / "source/params.json", params)
        with pytest.raises(ConfigurationError, match=r"params\.json: n_groups is missing"):
            convert(tmp_path / "source", tmp_path / "out")

    def test_what_is_no_checkpoint_is_listed(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no such folder"):
            detect(tmp_path / "nowhere")
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match="is a file"):
            detect(tmp_path / "file")
        layouts.write_json(tmp_path / "config.json", {"model_type": "jamba"})
        with pytest.raises(CheckpointError, match=r"model_type 'jamba'; the formats read here are mamba2 .*codestral"):
            detect(tmp_path)
