"""The files of a checkpoint beside its config and weights: tokenizer, chat template, generation config, license."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..errors import CheckpointError
from . import remote_code
from .checkpoint import SIDECAR
from .files import check_regular, read_json, stays_inside, write_bytes, write_json
from .formats import FORMATS

CARD = "README.md"
TOKENIZERS = frozenset({"tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "vocab.json", "spiece.model"})
"""Any of them makes a tokenizer."""
_OF_TOKENIZERS = (
    *sorted(TOKENIZERS),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
_TEMPLATES = "additional_chat_templates"
_OTHERS = ("generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
WRITTEN = frozenset(
    {*_OF_TOKENIZERS, *_OTHERS, _TEMPLATES, SIDECAR, CARD, remote_code.FILE}
    | {entry.config_file for entry in FORMATS.values()}
)
"""Names that a folder may hold if it is to be overwritten, beside its weights."""


def companions(folder: Path, *, with_code: bool = False) -> list[str]:
    """Names of a folder's files that belong to the checkpoint, beside its config and weights.

    Args:
        folder: the checkpoint.
        with_code: whether its card and remote code count too.

    Raises:
        CheckpointError: one is a link out of the folder, or no regular file.
    """
    names = [*_OF_TOKENIZERS, *_OTHERS, *((CARD, remote_code.FILE) if with_code else ())]
    found = [name for name in names if (folder / name).exists()]
    found += [f"{_TEMPLATES}/{path.name}" for path in sorted(folder.glob(f"{_TEMPLATES}/*.jinja"))]
    for name in found:
        check_regular(folder / name)
        if not stays_inside(folder / name, folder):
            raise CheckpointError(f"{folder / name}: is a link out of its folder; put a copy in its place")
    return found


def carry(folder: Path, tokenizer: Path | None, destination: Path) -> list[str]:
    """Copies them to another folder, but card and code; a tokenizer from elsewhere replaces the source's as a whole.

    Raises:
        CheckpointError: one is broken or leads elsewhere, or ``tokenizer`` holds none.
    """
    found = dict.fromkeys(companions(folder), folder)
    if tokenizer is not None:
        own = dict.fromkeys((name for name in companions(tokenizer) if name not in _OTHERS), tokenizer)
        if not TOKENIZERS & own.keys():
            raise CheckpointError(f"{tokenizer}: holds no tokenizer ({', '.join(sorted(TOKENIZERS))})")
        found = {name: home for name, home in found.items() if name in _OTHERS} | own
    for name, home in found.items():
        if name == "generation_config.json":
            _check_generation_config(home / name)
        elif name.endswith(".json") and name not in TOKENIZERS:
            read_json(home / name)
        (destination / name).parent.mkdir(exist_ok=True)
        spelled = _for_transformers_4(read_json(home / name)) if name == "tokenizer_config.json" else None
        if spelled is None:
            write_bytes(destination / name, (home / name).read_bytes())
        else:
            write_json(destination / name, spelled)
    return list(found)


def _for_transformers_4(config: dict[str, Any]) -> dict[str, Any] | None:
    """A ``tokenizer_config.json`` of transformers 5 with the class and the extra tokens under the names of 4, which 5
    reads too; None for one that has none of 5's names.
    """
    spelled = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        spelled["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # 4 has a dictionary under that name
        spelled.setdefault("additional_special_tokens", spelled.pop("extra_special_tokens"))
    return None if spelled == config else spelled


def tokenizer_steps(reader: str, folder: Path) -> list[str]:
    """What is left to do by hand so that a program reads the tokenizer of a converted checkpoint.

    Args:
        reader: the program, by its name in ``READERS``.
        folder: the checkpoint.
    """
    if reader != "llama.cpp" or (folder / "tokenizer.model").exists():
        return []
    if (folder / "tokenizer.model.v3").exists():
        return ["rename tokenizer.model.v3 to tokenizer.model"]
    path = folder / "tokenizer.json"
    if not path.exists():
        return ["put a tokenizer beside the model: without one it takes that of GPT-NeoX"]
    if b'"Metaspace"' in path.read_bytes():
        return ["put the SentencePiece tokenizer.model beside tokenizer.json, whose Metaspace it does not read"]
    return [
        "its converter knows the splitting of a BPE tokenizer by a hash: where it says that the pre-tokenizer was not "
        "recognized, name the one that splits alike in get_vocab_base_pre of its conversion/base.py"
    ]


def _check_generation_config(path: Path) -> None:
    """Every load of the model reads it, and fails with it."""
    try:
        GenerationConfig.from_dict(read_json(path))
    except CheckpointError:
        raise
    except Exception as error:  # whatever comparing values of wrong types raises
        raise CheckpointError(f"{path}: no generation config can be made of it ({error})") from None
