"""Tile sizes by shape and chip: a static table, so that two runs launch the same kernels and give the same bits."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from triton import knobs


class Chip(NamedTuple):
    """What the tables depend on."""

    backend: str  # "cuda" or "hip"
    capability: int  # 80, 90, ... on CUDA
    processors: int
    interpreted: bool = False

    @property
    def is_hopper(self) -> bool:
        """The chip the tables were timed on."""
        return self.backend == "cuda" and self.capability == 90

    @property
    def has_tma(self) -> bool:
        """Whether tiles can be copied by descriptor."""
        return self.backend == "cuda" and self.capability >= 90


class Config(NamedTuple):
    """Launch parameters of one SSD kernel."""

    Q: int  # tokens of a chunk
    BP: int  # channels of a tile
    BN: int  # states of a tile
    warps: int
    stages: int  # of the software pipeline
    heads: int = 1  # most heads a program takes one after another


@functools.cache
def _chip(device: int) -> Chip:
    target = triton.runtime.driver.active.get_current_target()
    properties = torch.cuda.get_device_properties(device)
    capability = target.arch if isinstance(target.arch, int) else 0
    return Chip(target.backend, capability, properties.multi_processor_count)


def current_chip() -> Chip:
    """The chip that kernels launched now run on; the interpreter plays a Hopper."""
    if knobs.runtime.interpret:
        return Chip("cuda", 90, 4, interpreted=True)
    return _chip(torch.cuda.current_device())


def tile(size: int, largest: int) -> int:
    """The power of two that covers ``size``, between what a matrix product needs and ``largest``."""
    return min(max(triton.next_power_of_2(size), 16), largest)


def precision(chip: Chip, dtype: torch.dtype) -> str:
    """How fp32 tiles are multiplied: three tf32 products on CUDA carry fp32's digits at the tensor cores."""
    if chip.interpreted or dtype != torch.float32:
        return "ieee"
    return "tf32x3" if chip.backend == "cuda" else "ieee"


def walk(chip: Chip, dtype: torch.dtype, P: int, N: int) -> Config:
    """``walk_kernel``: the whole state column, ``N x BP`` fp32, stays in registers."""
    bn = tile(N, 256)
    if dtype == torch.float32:
        return Config(Q=32, BP=tile(P, 32), BN=bn, warps=4, stages=1)
    narrow = bn > 128
    return Config(
        Q=64, BP=tile(P, 32 if narrow else 64), BN=bn, warps=_warps(chip, 4), stages=_stages(chip, 1 if narrow else 2)
    )


def state(chip: Chip, dtype: torch.dtype, P: int, N: int, Q: int) -> Config:
    """``state_kernel``."""
    wide = 64 if dtype != torch.float32 else 32
    return Config(Q=Q, BP=tile(P, wide), BN=tile(N, wide), warps=4, stages=_stages(chip, 2))


def inputs_backward(chip: Chip, dtype: torch.dtype, P: int, N: int) -> Config:
    """``inputs_backward_kernel``; its Q is that of the whole backward."""
    bn = tile(N, 256)
    if dtype == torch.float32:
        return Config(Q=32, BP=tile(P, 32), BN=bn, warps=4, stages=1, heads=8)
    stages = _stages(chip, 2 if P <= 64 and bn <= 128 else 1)
    return Config(Q=64, BP=tile(P, 64), BN=bn, warps=_warps(chip, 4), stages=stages, heads=20)


def maps_backward(chip: Chip, dtype: torch.dtype, P: int, N: int, Q: int) -> Config:
    """``maps_backward_kernel``."""
    if dtype == torch.float32:
        return Config(Q=Q, BP=tile(P, 32), BN=tile(N, 64), warps=4, stages=1, heads=8)
    return Config(Q=Q, BP=tile(P, 64), BN=tile(N, 128), warps=8, stages=_stages(chip, 3 if P <= 64 else 1), heads=40)


def _stages(chip: Chip, stages: int) -> int:
    """Several tiles in flight on A100 and Hopper only.

    AMD and consumer chips have 64 to 100 KiB of shared memory; on Blackwell, Triton 3.6 cannot pipeline these loops.
    """
    return stages if chip.backend == "cuda" and chip.capability in (80, 90) else 1


def _warps(chip: Chip, warps: int) -> int:
    """Before Hopper matrix products take their operands from registers: twice the threads hold them."""
    return 2 * warps if chip.backend == "cuda" and chip.capability < 90 else warps


def heads_per_program(per_group: int, most: int) -> int:
    """The largest divisor of a group's heads that is at most ``most``."""
    return next(n for n in range(min(per_group, most), 0, -1) if per_group % n == 0)


SEGMENT = 2048  # tokens under which a sequence is not cut


def segment_tokens(chip: Chip, programs: int, tokens: int) -> int:
    """How many tokens one program walks where ``programs`` would walk ``tokens`` each.

    Sequences are cut only as far as needed to give every processor four programs: each cut costs a pass over x and B.
    """
    wanted = -(-4 * chip.processors // programs)
    segments = max(min(wanted, tokens // SEGMENT), 1)
    return -(-tokens // (segments * 256)) * 256  # whole chunks of any size in the tables
