"""Holds what this package writes against the programs that read it, each in an environment of its own.

Writes checkpoints of every family with ``mamba2-hf convert --for``, reads them with transformers of three versions,
mlx-lm and llama.cpp, and compares logits and greedy tokens with this package's. The result is a table, as Markdown and
lines of JSON. Exits with 1 where a program reads something else, or nothing of what it was written for.

    python tests/readers/run_readers.py --cache ~/.cache/readers --out tests/readers

The first run installs the programs into the cache folder, and builds llama.cpp there, which takes minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from cases import CASES, Case, random_model
from peft import LoraConfig, get_peft_model
from programs import TRANSFORMERS, Programs
from transformers import AutoTokenizer, GenerationConfig

import mamba2_hf
from mamba2_hf.checkpoints import convert, convert_adapter
from mamba2_hf.checkpoints.checkpoint import SIDECAR
from mamba2_hf.checkpoints.formats import FORMATS, HYBRID
from mamba2_hf.checkpoints.readers import READERS
from mamba2_hf.errors import CheckpointError, ConfigurationError
from mamba2_hf.pretrained import shipped_model_path

LENGTH, COUNT = 24, 40
TEXT = "def read_json(path):\n    with open(path) as file:\n        return json.load(file)  # it's 2024\n"
NOISE = 1e-3  # of a logit over the largest, between programs in float32
_ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
ADAPTED = {
    "mamba2": ["in_proj"],
    "zamba2": ["in_proj", "out_proj"],
    "falcon_h1": _ATTENTION_AND_MLP,
    "nemotron_h": ["in_proj", *_ATTENTION_AND_MLP],
}
"""What adapters are for, where it is not every projection. PEFT refuses out_proj in some of transformers' classes,
whose kernels take its weight past the module; blocks that layers of Zamba2 share have an adapter for each use there;
llama.cpp's converter stumbles over one of Falcon-H1's in_proj.
"""
RIGHT, REFUSED, WRONG, FAILED, UNTRIED = "right", "refused", "wrong", "failed", "as read"


@dataclass(frozen=True)
class Reader:
    """A program.

    Attributes:
        title: the column of the table.
        version: of it.
        name: what ``convert --for`` calls it.
        read: from jobs what it answers; None of a program that is not run here, but whose source was read.
    """

    title: str
    version: str
    name: str
    read: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None


@dataclass
class Cell:
    """What one program made of one checkpoint.

    Attributes:
        model, origin, kind, reader: which: ``kind`` is ``"model"`` or ``"adapter"``.
        variant: whether the model is beside those of the main table.
        status: right, refused, wrong, failed, or of a program that is not run here, as read.
        difference: of a logit, the largest.
        same_tokens: how many greedy tokens were the same, from the first on.
        quantized: the error of the quantized copy's logits, by norm and relative to them.
        words: the reason, or the error.
    """

    model: str
    origin: str
    kind: str
    reader: str
    variant: bool
    status: str = FAILED
    difference: float | None = None
    same_tokens: int | None = None
    quantized: float | None = None
    words: str = ""


@dataclass
class Written:
    """A checkpoint as this package has it, and what comes out of it here.

    Attributes:
        name, origin: of the row.
        folder: in this package's format, or as published.
        family: the format that others read.
        variant: whether it is beside the models of the main table.
        ids: the tokens that programs are given.
        logits, tokens, text: what they have to answer.
        adapter: of PEFT, with ``adapted`` in the place of ``logits`` and ``adapted_tokens`` of ``tokens``.
    """

    name: str
    origin: str
    folder: Path
    family: str
    variant: bool
    ids: list[int]
    logits: np.ndarray
    tokens: list[int]
    text: list[int]
    adapter: Path
    adapted: np.ndarray
    adapted_tokens: list[int]


def readers_of(programs: Programs, work: Path) -> list[Reader]:
    """All programs, installed."""
    programs.install_transformers()
    found = [
        Reader(
            f"transformers {version.rpartition('.')[0]}",
            version,
            TRANSFORMERS[version],
            lambda jobs, environment=environment: environment.read("read_transformers.py", jobs, work),
        )
        for version, environment in programs.transformers.items()
    ]
    programs.install_mlx()
    version = programs.mlx.versions("mlx-lm")["mlx-lm"]
    found.append(Reader("mlx-lm", version, "mlx-lm", lambda jobs: programs.mlx.read("read_mlx.py", jobs, work)))
    programs.install_llama()
    version = f"llama-cpp-python {programs.llama.versions('llama-cpp-python')['llama-cpp-python']}"
    found.append(Reader("llama.cpp", version, "llama.cpp", lambda jobs: read_llama_cpp(programs, jobs, work)))
    found.append(Reader("vLLM", f"{READERS['vllm'].version}, by reading its source", "vllm", None))
    return found


def read_llama_cpp(programs: Programs, jobs: list[dict[str, Any]], work: Path) -> list[dict[str, Any]]:
    """What llama.cpp answers, after its own converters."""
    runs: dict[str, tuple[str, ...]] = {}
    for job in jobs:
        folder, adapter = job["folder"], job["adapter"]
        job["file"] = f"{folder}.gguf"
        runs[job["file"]] = ("convert_hf_to_gguf.py", folder, "--outtype", "f32", "--outfile", job["file"])
        if adapter:
            job["adapter"] = f"{job['out']}.gguf"
            runs[job["adapter"]] = ("convert_lora_to_gguf.py", adapter, "--base", folder, "--outfile", job["adapter"])
    problems = dict(zip(runs, programs.to_gguf(list(runs.values()), work), strict=True))
    found = [problems[job["file"]] or (problems[job["adapter"]] if job["adapter"] else None) for job in jobs]
    ready = [job for job, problem in zip(jobs, found, strict=True) if problem is None]
    read = iter(programs.llama.read("read_llama_cpp.py", ready, work))
    return [{"error": f"llama.cpp's converter: {problem}"} if problem else next(read) for problem in found]


def write_models(pattern: str, tokenizer: Path, work: Path) -> list[Written]:
    """Every model that the pattern finds, of both origins, with what it answers here."""
    found = []
    for case in CASES:
        if not re.search(pattern, case.name):
            continue
        published = write_published(case, work / "published" / slug(case.name), tokenizer)
        here = work / "here" / slug(case.name)
        _again(here)
        model = random_model(case)
        if hasattr(model.config, "original_config"):
            del model.config.original_config
        model.save_pretrained(here)
        _copy_tokenizer(tokenizer, here)
        found.append(answered(case.name, "here", here, case.family, case.variant, work))
        if not case.variant:
            found.append(answered(case.name, "published", published, case.family, case.variant, work))
    for name in ("mamba2-tiny-python", "mamba2-hybrid-tiny-python"):
        if re.search(pattern, name):
            found.append(answered(name, "shipped", shipped_model_path(name), None, False, work))
    return found


def write_published(case: Case, folder: Path, tokenizer: Path) -> Path:
    """A folder as the family publishes it, taken over here, and its end token changed, as a training would."""
    raw, taken = folder.with_name(f"{folder.name}-raw"), folder
    for place in (raw, taken):
        _again(place)
    model = random_model(case)
    own = folder.with_name(f"{folder.name}-own")
    _again(own)
    model.save_pretrained(own)
    shutil.rmtree(raw)
    convert(own, raw, to=case.family)
    (raw / "config.json").write_text(json.dumps(case.config, indent=2))
    (raw / SIDECAR).unlink(missing_ok=True)
    _copy_tokenizer(tokenizer, raw)
    shutil.rmtree(taken)
    convert(raw, taken)
    config = json.loads((taken / "config.json").read_text())
    (taken / "config.json").write_text(json.dumps({**config, "eos_token_id": 50255}))
    return taken


def _again(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)


def slug(name: str) -> str:
    """A name as a folder's."""
    return re.sub(r"\W+", "-", name)


def format_for_others(config: Any) -> str:
    """The first format of other programs that a model can be written in; this package's own where there is none."""
    if config.model_type != "mamba2_hybrid":
        return config.model_type
    for entry in FORMATS.values():
        if entry.family is HYBRID and entry.write_config is not None and entry is not FORMATS[HYBRID.name]:
            with contextlib.suppress(ConfigurationError):
                entry.write_config(config)
                return entry.name
    return HYBRID.name


@torch.no_grad()
def answered(name: str, origin: str, folder: Path, family: str | None, variant: bool, work: Path) -> Written:
    """A checkpoint with what this package makes of it, and of a random adapter of it."""
    from mamba2_hf import Mamba2ForCausalLM, Mamba2HybridForCausalLM

    hybrid = json.loads((folder / "config.json").read_text())["model_type"] == "mamba2_hybrid"
    model: Any = (Mamba2HybridForCausalLM if hybrid else Mamba2ForCausalLM).from_pretrained(folder, dtype=torch.float32)
    model.eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(min(model.config.vocab_size, 50000), (1, LENGTH), generator=generator)

    model.generation_config = GenerationConfig()  # greedily, and on after an end

    def answer(model: Any) -> tuple[np.ndarray, list[int]]:
        logits = model(input_ids=ids, use_cache=False).logits[0].numpy()
        mask = torch.ones_like(ids)
        tokens = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=COUNT)
        return logits, tokens[0, LENGTH:].tolist()

    logits, tokens = answer(model)
    adapter = work / "adapters" / f"{slug(name)}-{origin}"
    _again(adapter)
    family = family or format_for_others(model.config)
    names = ADAPTED.get(family, ["in_proj", "out_proj", *_ATTENTION_AND_MLP])
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=names, lora_dropout=0.0))
    for parameter_name, parameter in peft.named_parameters():
        if "lora_" in parameter_name:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    peft.save_pretrained(adapter)
    adapted, adapted_tokens = answer(peft.eval())
    return Written(
        *(name, origin, folder, family, variant),
        *(ids[0].tolist(), logits, tokens, AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]),
        *(adapter, adapted, adapted_tokens),
    )


def write(model: Written, reader: str | None, work: Path) -> tuple[Path, set[str]]:
    """The folder that ``convert`` writes for a program, or for none in particular; raises what it raises.

    Returns:
        The folder, and the programs that it is said to be right for.
    """
    out = work / "written" / slug(f"{model.name}-{model.origin}-{reader}")
    shutil.rmtree(out, ignore_errors=True)
    done = convert(model.folder, out, to=model.family, for_reader=reader, dtype=torch.float32)
    return out, {verdict.reader for verdict in done.readers if verdict.takes}


def write_adapter(model: Written, work: Path) -> Path:
    """The adapter for what :func:`write` makes of a model."""
    if model.family == "mamba2":
        return model.adapter
    out = work / "written" / slug(f"{model.name}-{model.origin}-adapter")
    shutil.rmtree(out, ignore_errors=True)
    convert_adapter(model.adapter, out, base=model.folder, to=model.family)
    return out


def judge(cell: Cell, model: Written, answer: dict[str, Any]) -> None:
    """Fills in how an answer compares."""
    if "error" in answer:
        cell.status, cell.words = FAILED, answer["error"]
        return
    adapted = cell.kind == "adapter"
    logits, tokens = (model.adapted, model.adapted_tokens) if adapted else (model.logits, model.tokens)
    width = logits.shape[1]
    found = answer["logits"][:, :width]
    cell.difference = float(np.abs(found - logits).max()) if found.shape == logits.shape else float("inf")
    same = [one == other for one, other in zip(answer["tokens"], tokens, strict=True)]
    cell.same_tokens = next((place for place, equal in enumerate(same) if not equal), len(same))
    if "quantized" in answer:
        cell.quantized = float(np.linalg.norm(answer["quantized"][:, :width] - logits) / np.linalg.norm(logits))
    right = cell.difference <= NOISE * np.abs(logits).max() and cell.same_tokens == len(tokens)
    cell.status = RIGHT if right else WRONG
    if right and answer["text"] != model.text:
        cell.status, cell.words = WRONG, f"its tokenizer makes {answer['text']} of {TEXT!r}, and not {model.text}"


def compare(reader: Reader, models: list[Written], work: Path) -> list[Cell]:
    """The cells of one program. What is written without ``--for`` is read too where it is said to be right and differs
    from what is written for the program.
    """
    cells: list[Cell] = []
    tasks: list[tuple[Cell, Written, Path, Path | None]] = []
    for model in models:
        cell = Cell(model.name, model.origin, "model", reader.title, model.variant)
        cells.append(cell)
        plain, takes = write(model, None, work)
        try:
            folder, _ = write(model, reader.name, work)
        except (CheckpointError, ConfigurationError) as error:
            cell.status, cell.words = REFUSED, str(error)
            if reader.name in takes:
                cell.status, cell.words = WRONG, f"is said to take what is written without --for, but: {error}"
            continue
        if reader.read is None:
            cell.status = UNTRIED
            continue
        tasks.append((cell, model, folder, None))
        if reader.name in takes and (folder / "config.json").read_bytes() != (plain / "config.json").read_bytes():
            cells.append(replace(cell, origin=f"{cell.origin}, without --for"))
            tasks.append((cells[-1], model, plain, None))
        if reader.title == "mlx-lm":  # it has a format of its own for adapters
            continue
        cells.append(replace(cell, kind="adapter"))
        try:
            tasks.append((cells[-1], model, folder, write_adapter(model, work)))
        except (CheckpointError, ConfigurationError) as error:
            cells[-1].status, cells[-1].words = REFUSED, str(error)
    if reader.read is None:
        return cells
    jobs = [
        {
            **{"folder": str(folder), "adapter": adapter and str(adapter), "out": f"{folder}-{cell.kind}"},
            **{"ids": model.ids, "count": COUNT, "text": TEXT},
        }
        for cell, model, folder, adapter in tasks
    ]
    for (cell, model, *_), answer in zip(tasks, reader.read(jobs), strict=True):
        judge(cell, model, answer)
    return cells


_RANK = [RIGHT, UNTRIED, REFUSED, FAILED, WRONG]


def shown(cells: list[Cell]) -> str:
    """A cell of the table: the worst of those of its origins."""
    if not cells:
        return ""
    cell = max(cells, key=lambda one: (_RANK.index(one.status), one.difference or 0.0))
    if cell.status == RIGHT:
        return f"{cell.difference:.0e}"
    if cell.status == WRONG and cell.difference is not None:
        return f"**wrong**: {cell.difference:.1g}, {cell.same_tokens} tokens"
    return cell.status if cell.status in (REFUSED, UNTRIED) else f"**{cell.status}**"


def table(cells: list[Cell], titles: list[str], **which: Any) -> list[str]:
    """Lines of Markdown: models by programs."""
    chosen = [cell for cell in cells if all(getattr(cell, name) == value for name, value in which.items())]
    lines = [f"| model | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    for name in dict.fromkeys(cell.model for cell in chosen):
        row = [[cell for cell in chosen if (cell.model, cell.reader) == (name, title)] for title in titles]
        lines.append(f"| {name} | {' | '.join(map(shown, row))} |")
    return lines


def report(cells: list[Cell], versions: dict[str, str]) -> str:
    """All of it as Markdown."""
    titles = list(versions)
    of_adapters = [title for title in titles if any(one.reader == title and one.kind == "adapter" for one in cells)]
    named = [f"{title} ({version})" for title, version in versions.items()]
    words: dict[tuple[str, str], dict[str, None]] = {}
    for cell in cells:
        if cell.status != RIGHT and cell.words:
            reason = cell.words.splitlines()[-1].partition(" does not compute it: ")
            what = cell.model if cell.kind == "model" else f"adapter of {cell.model}"
            words.setdefault((cell.reader, f"{cell.status}, {reason[2] or reason[0]}"), {})[what] = None
    reasons = [f"- {reader}, {reason} ({'; '.join(where)})" for (reader, reason), where in words.items()]
    return "\n".join(
        [
            "# What other programs make of what is written here",
            "",
            f"Made by `tests/readers/run_readers.py` on {time.strftime('%Y-%m-%d')} with mamba2-hf "
            f"{mamba2_hf.__version__}, torch {torch.__version__} and transformers {transformers.__version__}, for "
            f"{', '.join(named)}.",
            "",
            f"A number is the largest difference of a logit over {LENGTH} tokens from this package's in float32, with "
            f"the same {COUNT} greedy tokens after them; the worst of a model made here and of a published one that "
            "was taken over, changed and written back. *refused* is `mamba2-hf convert --for`, with the reason below; "
            "*as read* is a model that a program which was not run takes by its source.",
            "",
            *table(cells, titles, kind="model", variant=False),
            "",
            "LoRA adapters, converted along (mlx-lm has a format of its own for them):",
            "",
            *table(cells, of_adapters, kind="adapter", variant=False),
            "",
            "Settings beside the usual ones:",
            "",
            *table(cells, titles, kind="model", variant=True),
            "",
            "Their adapters:",
            "",
            *table(cells, of_adapters, kind="adapter", variant=True),
            "",
            "Quantized copies (llama.cpp q8_0, mlx-lm 4 bit) load; relative errors of their logits:",
            "",
            *[
                f"- {cell.model}, {cell.origin}, {cell.reader}: {cell.quantized:.2g}"
                for cell in cells
                if cell.quantized is not None and cell.kind == "model" and not cell.variant
            ],
            "",
            "Reasons and errors:",
            "",
            *reasons,
            "",
        ]
    )


def main() -> int:
    """Runs it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the programs; is made and kept")
    parser.add_argument("--llama-cpp", type=Path, help="checkout of llama.cpp, in place of llama-cpp-python's sources")
    parser.add_argument("--out", type=Path, help="folder for results.md and results.jsonl; else the table is printed")
    parser.add_argument("--models", default="", help="only rows that this regular expression finds")
    parser.add_argument("--readers", default="", help="only programs that this regular expression finds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cache = options.cache.expanduser().resolve()
    work = cache / "work"
    _again(work)
    programs = Programs(cache, options.llama_cpp)
    readers = [reader for reader in readers_of(programs, work) if re.search(options.readers, reader.title)]
    tokenizer = work / "tokenizer"
    programs.make_tokenizer(tokenizer)
    models = write_models(options.models, tokenizer, work)
    cells = []
    for reader in readers:
        started = time.monotonic()
        cells += compare(reader, models, work)
        print(f"{reader.title}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    versions = {reader.title: reader.version for reader in readers}
    text = report(cells, versions)
    if options.out is None:
        print(text)
    else:
        (options.out / "results.md").write_text(text)
        rows = [json.dumps({"versions": versions})]
        rows += [json.dumps({key: value for key, value in asdict(cell).items() if value is not None}) for cell in cells]
        (options.out / "results.jsonl").write_text("\n".join(rows) + "\n")
    return int(any(cell.status in (WRONG, FAILED) for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
