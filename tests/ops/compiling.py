"""Compiles the kernels that a piece of launch code would launch, for any GPU, on a machine without one."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Kernel(NamedTuple):
    """What a compiled kernel needs."""

    name: str
    shared: int  # bytes of shared memory
    registers: int | None  # None for other targets than sm_90: asking takes longer than all else that is cached
    stack: int | None  # bytes of local memory a thread: what was spilled; None as well
    warps: int
    code: str  # a digest of its assembly, without what says where in the source it came from


class _Driver:
    """Stands in for a GPU's driver as far as compiling asks."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compile_only(target: str) -> Iterator[list[Kernel]]:
    """Inside, launching a kernel compiles it for ``target`` and adds it to the list; nothing runs."""
    kernels: dict[str, Kernel] = {}
    found: list[Kernel] = []
    run = JITFunction.run

    def compile_instead(self: JITFunction, *args: object, **kwargs: object) -> None:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        if kernel.hash not in kernels:
            kernels[kernel.hash] = _describe(kernel, target)
            found.append(kernels[kernel.hash])

    driver.set_active(_Driver(TARGETS[target]))
    JITFunction.run = compile_instead
    try:
        yield found
    finally:
        JITFunction.run = run
        driver._active = None


def _describe(kernel: object, target: str) -> Kernel:
    metadata = kernel.metadata
    registers = stack = None
    if target == "sm_90":
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    assembly = (kernel.asm.get("ptx") or kernel.asm["amdgcn"]).split("\t.section\t.debug")[0]
    lines = (
        re.sub(r"//.*|^\s*(\.loc|\.file)\b.*|\$L__tmp\d+:|^\.?Ltmp\d+:|^\s*;.*", "", line)
        for line in assembly.splitlines()
    )
    text = "\n".join(line for line in lines if line.strip()).replace(metadata.name, "kernel")
    code = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Kernel(metadata.name, metadata.shared, registers, stack, metadata.num_warps, code)
