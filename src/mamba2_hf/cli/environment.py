"""``mamba2-hf env``: versions, devices, backends."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PACKAGES = (
    *("torch", "triton", "transformers", "tokenizers", "safetensors", "huggingface-hub"),
    *("peft", "accelerate", "datasets", "trl", "einops", "numpy"),
)
ENV_EXAMPLES = r"""[bold]Examples[/bold]

[cyan]mamba2-hf env[/cyan]

[cyan]mamba2-hf env --json | jq '.ops[] | select(.backend == "torch")'[/cyan]
"""


def env(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for machines.")] = False,
) -> None:
    """Show versions, devices, and which backend serves each op and why."""
    report = _environment()
    if as_json:
        print(json.dumps(report, indent=2))
        return
    console = Console(highlight=False)
    for heading, columns, rows in (
        (
            "Versions",
            ("package", "version"),
            [(name, text or "not installed") for name, text in report["versions"].items()],
        ),
        ("Devices", ("device", "name"), [(device["device"], device["name"]) for device in report["devices"]]),
        (
            "Backends",
            ("backend", "usable", "reason"),
            [
                (status["name"], "yes" if status["available"] else "no", status["reason"])
                for status in report["backends"]
            ],
        ),
        (
            "Ops",
            ("op", "device", "backend", "reason"),
            [(op["op"], op["device"], op["backend"] or "none", op["reason"]) for op in report["ops"]],
        ),
    ):
        table = Table(*columns, title=heading, title_justify="left", title_style="bold", pad_edge=False, box=None)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        console.print()
    for name, value in report["environment"].items():
        console.print(f"{name}={value}" if value else f"{name} is not set: the fastest usable backend is chosen")


def _environment() -> dict[str, Any]:
    import torch

    from ..errors import BackendError
    from ..ops import dispatch

    devices = [("cpu", platform.processor() or platform.machine())]
    devices += [(f"cuda:{i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    ops = []
    for op in dispatch.OPS:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            try:
                backend, reason = dispatch.choose(op, torch.device(device))
            except BackendError as error:
                backend, reason = None, str(error)
            ops.append({"op": op, "device": device, "backend": backend, "reason": reason})
    return {
        "versions": {
            "mamba2-hf": metadata.version("mamba2-hf"),
            "python": platform.python_version(),
            **{name: version_of(name) for name in PACKAGES},
        },
        "platform": platform.platform(),
        "devices": [{"device": device, "name": name} for device, name in devices],
        "backends": [status._asdict() for status in dispatch.report()],
        "ops": ops,
        "environment": {dispatch.ENVIRONMENT_VARIABLE: os.environ.get(dispatch.ENVIRONMENT_VARIABLE)},
    }


def version_of(package: str) -> str | None:
    """The installed version of a package, None without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
