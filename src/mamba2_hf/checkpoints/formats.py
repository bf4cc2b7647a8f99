"""The formats that checkpoints come in. A format is one entry of ``FORMATS``; everything that differs is in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..models import Mamba2ForCausalLM, Mamba2HybridForCausalLM, SSDPreTrainedModel
from ..models.mamba_ssm_config import is_mamba_ssm_config
from . import mapping
from .equations import Equation, Shape
from .families import bamba, falcon, granite, mamba2attn, megatron, nemotron, zamba
from .files import read_json
from .mapping import KeyMap

TRANSFORMERS_WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
MISTRAL_WEIGHTS = ("consolidated.safetensors", "consolidated.safetensors.index.json")


@dataclass(frozen=True)
class Family:
    """Models that one class builds.

    Attributes:
        name: its model type, and the name of its own format.
        title: what a person calls it.
        model: the class.
        config: from fields and the most layers that there can be.
        sizes: fields that two checkpoints of one model share.
    """

    name: str
    title: str
    model: type[SSDPreTrainedModel]
    config: Callable[[Mapping[str, Any], int], Any]
    sizes: tuple[str, ...]


PURE = Family(
    name="mamba2",
    title="Mamba-2",
    model=Mamba2ForCausalLM,
    config=mapping.mamba2_config,
    sizes=("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "head_dim", "n_groups", "state_size"),
)
HYBRID = Family(
    name="mamba2_hybrid",
    title="hybrid",
    model=Mamba2HybridForCausalLM,
    config=mapping.hybrid_config,
    sizes=(
        *("vocab_size", "hidden_size", "num_hidden_layers", "layer_blocks", "ssm_num_heads", "ssm_head_dim"),
        *("ssm_n_groups", "ssm_state_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    ),
)


@dataclass(frozen=True)
class Format:
    """One layout of checkpoints on disk.

    Attributes:
        name: what ``--from`` and ``--to`` call it.
        title: what a person calls it.
        config_file: the file with the sizes.
        weights: names of files with weights, the preferred ones first.
        recognizes: whether an object from ``config_file`` is of this format.
        read_config: its object as fields of its family; raises ConfigurationError for what cannot be expressed.
        family: of its models.
        keys: names of the tensors, where names are all that differs.
        equations: else which of theirs are which of ours, from configuration, shapes of ours, and the names that
            a file to be read has.
        canonical: the name that a stored tensor has in these equations; None for one that no model here has.
        write_config: the way back; None where the format is only read.
        stores_tied_head: whether a head that shares the embedding is stored a second time.
        in_torch_file: whether it is written as one file of ``torch.save``, and not as safetensors.
    """

    name: str
    title: str
    config_file: str
    weights: tuple[str, ...]
    recognizes: Callable[[Mapping[str, Any]], bool]
    read_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    family: Family = PURE
    keys: KeyMap = field(default_factory=KeyMap)
    equations: Callable[[Any, Mapping[str, Shape], Collection[str]], list[Equation]] | None = None
    canonical: Callable[[Any, str], str | None] | None = None
    write_config: Callable[[Any], dict[str, Any]] | None = None
    stores_tied_head: bool = False
    in_torch_file: bool = False


def _of_transformers(module: Any, title: str, *, stores_tied_head: bool = False) -> Format:
    """The entry of a hybrid family that transformers has classes for."""
    name: str = module.NAME
    return Format(
        name=name,
        title=f"{name} of transformers, {title}",
        config_file="config.json",
        weights=TRANSFORMERS_WEIGHTS,
        recognizes=lambda config: config.get("model_type") == name,
        family=HYBRID,
        equations=module.equations,
        canonical=getattr(module, "canonical", None),
        read_config=module.read_config,
        write_config=module.write_config,
        stores_tied_head=stores_tied_head,
    )


FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format(
            name="mamba2",
            title="mamba2 of transformers",
            config_file="config.json",
            weights=TRANSFORMERS_WEIGHTS,
            recognizes=lambda config: config.get("model_type") == "mamba2",
            keys=mapping.MAMBA2_KEYS,
            read_config=mapping.read_mamba2,
            write_config=mapping.write_own,
        ),
        Format(
            name="mamba_ssm",
            title="of mamba_ssm, as state-spaces publishes",
            config_file="config.json",
            weights=TRANSFORMERS_WEIGHTS,
            recognizes=lambda config: is_mamba_ssm_config(config) and not mamba2attn.recognizes(config),
            keys=mapping.MAMBA_SSM_KEYS,
            read_config=mapping.read_mamba_ssm,
            write_config=mapping.write_mamba_ssm,
            stores_tied_head=True,
            in_torch_file=True,
        ),
        Format(
            name="codestral",
            title="of Codestral Mamba, as Mistral publishes",
            config_file="params.json",
            weights=MISTRAL_WEIGHTS,
            recognizes=lambda params: "dim" in params and "n_layers" in params,
            keys=mapping.CODESTRAL_KEYS,
            read_config=mapping.read_codestral,
            stores_tied_head=True,
        ),
        Format(
            name="mamba2_hybrid",
            title="mamba2_hybrid of this package",
            config_file="config.json",
            weights=TRANSFORMERS_WEIGHTS,
            recognizes=lambda config: config.get("model_type") == "mamba2_hybrid",
            family=HYBRID,
            read_config=mapping.read_hybrid,
            write_config=mapping.write_own,
        ),
        _of_transformers(bamba, "Bamba"),
        _of_transformers(granite, "Granite 4 H"),
        _of_transformers(nemotron, "Nemotron-H", stores_tied_head=True),
        _of_transformers(falcon, "Falcon-H1"),
        _of_transformers(zamba, "Zamba2"),
        Format(
            name=mamba2attn.NAME,
            title="of mamba_ssm, with attention or MLPs",
            config_file="config.json",
            weights=TRANSFORMERS_WEIGHTS,
            recognizes=mamba2attn.recognizes,
            family=HYBRID,
            equations=mamba2attn.equations,
            read_config=mamba2attn.read_config,
            stores_tied_head=True,
        ),
        Format(
            name="megatron",
            title="of Megatron, hybrids",
            config_file="config.json",
            weights=TRANSFORMERS_WEIGHTS,
            recognizes=megatron.recognizes_hybrid,
            family=HYBRID,
            equations=megatron.equations,
            canonical=megatron.canonical,
            read_config=megatron.read_hybrid,
        ),
        Format(
            name="megatron_mamba2",
            title="of Megatron, pure Mamba-2",
            config_file="config.json",
            weights=TRANSFORMERS_WEIGHTS,
            recognizes=megatron.recognizes_pure,
            equations=megatron.equations,
            canonical=megatron.canonical,
            read_config=megatron.read_pure,
        ),
    )
}


def format_named(name: str) -> Format:
    """An entry of ``FORMATS``; raises CheckpointError with all of their names."""
    if name not in FORMATS:
        raise CheckpointError(f"{name!r} is no format known here; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def detect(folder: Path) -> Format:
    """The format of a checkpoint folder: the first whose config and weights are both there.

    Raises:
        CheckpointError: there is none; the message says what was seen.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: {'is a file' if folder.exists() else 'no such folder'}; give a checkpoint's folder"
        )
    seen: list[str] = []
    fitting: list[Format] = []
    configs: dict[str, dict[str, Any]] = {}
    for entry in FORMATS.values():
        path = folder / entry.config_file
        if not path.exists():
            continue
        if entry.config_file not in configs:
            configs[entry.config_file] = read_json(path)
        if entry.recognizes(configs[entry.config_file]):
            fitting.append(entry)
        else:
            seen.append(f"{entry.config_file} with model_type {configs[entry.config_file].get('model_type')!r}")
    with_weights = [entry for entry in fitting if any((folder / name).exists() for name in entry.weights)]
    if with_weights or fitting:
        return (with_weights or fitting)[0]
    known = "; ".join(f"{entry.name} ({entry.config_file}, {entry.title})" for entry in FORMATS.values())
    found = ", ".join(dict.fromkeys(seen)) or "no config.json and no params.json"
    raise CheckpointError(f"{folder}: {found}; the formats read here are {known}")
