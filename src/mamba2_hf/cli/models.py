"""The model that a command runs: where it comes from, and on which device."""

from __future__ import annotations

import os
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .console import DType, busy, fail, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_HELP = "A local directory, a Hub id, or the name of a tiny Python model inside the package:"
DEVICE_HELP = "cpu, cuda, cuda:1 or any other PyTorch device; auto is a GPU where there is one."
DTYPE_HELP = (
    "Of the weights: float32, bfloat16 or float16; auto is float32 on the CPU and the checkpoint's own on a GPU."
)


def find_device(name: str) -> torch.device:
    """The device of ``--device``; exits where it cannot be used."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(
            f"{name!r} is no PyTorch device; use cpu, cuda, cuda:1 ...", param_hint="--device"
        ) from None
    try:
        torch.empty(0, device=device)
    except Exception as error:  # each device type fails with an error of its own
        fail(f"device {name} cannot be used here ({first_line(error)}); mamba2-hf env lists the devices")
    return device


def load_model(
    model: str | None, device: torch.device, dtype: DType, *, reads_text: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A model in eval mode, and its tokenizer; None is the tiny Mamba-2. Exits where it cannot be loaded.

    A tokenizer may be missing, and is None then, unless the command ``reads_text``.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .. import pretrained
    from ..checkpoints.hub import is_reachable

    path = str(pretrained.shipped_model_path()) if model is None else str(Path(model).expanduser())
    if model in pretrained.SHIPPED and not Path(path).exists():
        path = str(pretrained.shipped_model_path(model))
    if model is None or Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            fail(f"no config.json in {path}; give a directory that a model was saved to, or a Hub id")
    elif Path(path).exists():
        fail(f"{path} is a file; give the directory that holds it, with its config.json and tokenizer")
    elif model.startswith((".", "/", "~")) or (os.sep != "/" and os.sep in model) or model.count("/") > 1:
        fail(f"no such directory: {path}; give a directory that a model was saved to, or a Hub id such as owner/name")
    else:
        path = model
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer, local = None, Path(path).is_dir() or not is_reachable(path)
    kind: Any = torch.float32 if dtype is DType.auto and device.type == "cpu" else dtype.value
    try:
        with busy("loading"):
            with nullcontext() if reads_text else suppress(Exception):
                tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local)
            net = AutoModelForCausalLM.from_pretrained(path, dtype=kind, local_files_only=local).to(device).eval()
    except Exception as error:  # broken files surface as errors of json, safetensors, tokenizers, torch ...
        remedy = "check that the directory is complete"
        if not Path(path).is_dir():
            remedy = "the Hub cannot be reached: check the id and the connection" if local else "check the id"
        fail(f"cannot load a model from {path}: {first_line(error)} ({remedy})")
    if tokenizer is not None and net.generation_config.pad_token_id is None:
        net.generation_config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    return net, tokenizer
