"""Tile sizes by shape and chip: a static table, so that two runs launch the same kernels and give the same bits."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from triton import knobs

from ..spec import SSDShape


class Chip(NamedTuple):
    """A GPU, as far as the tables depend on it."""

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


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up. Triton's own, made for kernels too, takes microseconds."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


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
    return min(max(power_of_two(size), 16), largest)


def precision(chip: Chip, dtype: torch.dtype) -> str:
    """How fp32 tiles are multiplied: three tf32 products on CUDA carry fp32's digits at the tensor cores."""
    if chip.interpreted or dtype != torch.float32:
        return "ieee"
    return "tf32x3" if chip.backend == "cuda" else "ieee"


def walk(chip: Chip, dtype: torch.dtype, P: int, N: int) -> Config:
    """Launch parameters of ``walk_kernel``: the whole state column, ``N x BP`` fp32, stays in registers."""
    bn = tile(N, 256)
    if dtype == torch.float32:
        return Config(Q=32, BP=tile(P, 32), BN=bn, warps=4, stages=1)
    narrow = bn > 128
    return Config(
        Q=64, BP=tile(P, 32 if narrow else 64), BN=bn, warps=_warps(chip, 4), stages=_stages(chip, 1 if narrow else 2)
    )


def state(chip: Chip, dtype: torch.dtype, P: int, N: int, Q: int) -> Config:
    """Launch parameters of ``state_kernel``."""
    wide = 64 if dtype != torch.float32 else 32
    return Config(Q=Q, BP=tile(P, wide), BN=tile(N, wide), warps=4, stages=_stages(chip, 2))


def inputs_backward(chip: Chip, dtype: torch.dtype, P: int, N: int) -> Config:
    """Launch parameters of ``inputs_backward_kernel``; its Q is that of the whole backward."""
    bn = tile(N, 256)
    if dtype == torch.float32:
        return Config(Q=32, BP=tile(P, 32), BN=bn, warps=4, stages=1, heads=8)
    stages = _stages(chip, 2 if P <= 64 and bn <= 128 else 1)
    return Config(Q=64, BP=tile(P, 64), BN=bn, warps=_warps(chip, 4), stages=stages, heads=20)


def maps_backward(chip: Chip, dtype: torch.dtype, P: int, N: int, Q: int) -> Config:
    """Launch parameters of ``maps_backward_kernel``."""
    if dtype == torch.float32:
        return Config(Q=Q, BP=tile(P, 32), BN=tile(N, 64), warps=4, stages=1, heads=8)
    return Config(Q=Q, BP=tile(P, 64), BN=tile(N, 128), warps=8, stages=_stages(chip, 3 if P <= 64 else 1), heads=40)


def _stages(chip: Chip, stages: int) -> int:
    """How many tiles are in flight: several on A100 and Hopper only.

    AMD and consumer chips have 64 to 100 KiB of shared memory; on Blackwell, Triton 3.6 cannot pipeline these loops.
    """
    return stages if chip.backend == "cuda" and chip.capability in (80, 90) else 1


def _warps(chip: Chip, warps: int) -> int:
    """Twice the warps before Hopper, where matrix products take their operands from registers."""
    return 2 * warps if chip.backend == "cuda" and chip.capability < 90 else warps


def heads_per_program(per_group: int, most: int) -> int:
    """The largest divisor of a group's heads that is at most ``most``."""
    return next(n for n in range(min(per_group, most), 0, -1) if per_group % n == 0)


# The kernels for Hopper: their chunk, the width of a head, or of a piece of one, and the states that fit the registers.
HOPPER_CHUNK, HOPPER_HEAD, HOPPER_STATES = 64, 64, (16, 32, 64, 128, 256)


class HopperConfig(NamedTuple):
    """Launch parameters of a kernel with a producer and several consumers."""

    heads: int  # of a program: consumers side by side, or (gradients) heads one after another
    stages: int  # tiles in flight
    registers: int  # of a thread of the consumers but the first, which takes what is left
    launched: int  # registers of a thread before they are shared out


def hopper_kernels(chip: Chip, shape: SSDShape, dtype: torch.dtype) -> bool:
    """Whether there are kernels made for these sizes on this chip."""
    fits = shape.head_dim == HOPPER_HEAD and shape.state in HOPPER_STATES
    return fits and chip.is_hopper and not chip.interpreted and dtype in (torch.bfloat16, torch.float16)


def hopper_walk(per_group: int, N: int) -> HopperConfig:
    """Launch parameters of Hopper's ``walk_kernel``: two heads share B and C; states of 256 want all registers."""
    if per_group == 1:
        return HopperConfig(1, 2, 0, 168 if N == 256 else 128)
    return HopperConfig(2, 2, 240, 168) if N == 256 else HopperConfig(2, 3, 232, 168)


def hopper_state(per_group: int, N: int) -> HopperConfig:
    """Launch parameters of Hopper's ``state_kernel``: as :func:`hopper_walk`."""
    if per_group == 1:
        return HopperConfig(1, 2, 0, 160 if N == 256 else 96)
    return HopperConfig(2, 2 if N == 256 else 4, 232, 168)


def hopper_gradients(chip: Chip, per_group: int, N: int, rows: int) -> HopperConfig:
    """Launch parameters of ``chunk_backward_kernel``: as many heads a program as leave every processor two programs."""
    wanted = -(-2 * chip.processors // rows)
    blocks = next(n for n in range(1, per_group + 1) if per_group % n == 0 and (n >= wanted or n == per_group))
    return HopperConfig(per_group // blocks, 1 if N == 256 else 3, 232, 168)


LARGEST_16_BIT_STATE = 128


def takes_fp32(shape: SSDShape, dtype: torch.dtype) -> bool:
    """Whether 16-bit inputs of these sizes are too wide for the portable kernels, which take them in parts or as fp32.

    In the product that updates a wide 16-bit state, Triton 3.6 reads past shared memory on Hopper.
    """
    return dtype != torch.float32 and shape.state > LARGEST_16_BIT_STATE


SEGMENT = 1024  # tokens under which a sequence is not cut
SUMMARY_COST = 0.35  # a pass over x and B alone, against the whole walk
CUT_COST = 30  # two more launches, in chunks walked


def segment_tokens(chip: Chip, shape: SSDShape, dtype: torch.dtype) -> int:
    """How many tokens one program walks."""
    return _segment_tokens(chip, shape, dtype, SEGMENT, SUMMARY_COST, CUT_COST)


@functools.lru_cache(1024)
def _segment_tokens(
    chip: Chip, shape: SSDShape, dtype: torch.dtype, shortest: int, summary_cost: float, cut_cost: float
) -> int:
    """See :func:`segment_tokens`.

    Sequences are cut where their number does not fill the chip: time is counted in chunks, one program a processor
    (or four of the portable kernels, which have one head each) walking one after another.
    """
    if hopper_kernels(chip, shape, dtype):
        programs = shape.batch * shape.groups * -(-shape.heads // shape.groups // 2)
    else:
        tiles = -(-shape.head_dim // walk(chip, dtype, shape.head_dim, shape.state).BP)
        programs = -(-shape.batch * shape.heads * tiles // 4)
    chunks = -(-shape.tokens // 64)
    best, cheapest = 1, math.inf
    for segments in range(1, max(shape.tokens // shortest, 1) + 1):
        length = -(-chunks // segments)
        cost = -(-programs * segments // chip.processors) * length * 1.0
        if segments > 1:
            cost += summary_cost * -(-programs * (segments - 1) // chip.processors) * length + cut_cost
        if cost < cheapest:
            best, cheapest = segments, cost
        if programs * segments > 16 * chip.processors:
            break
    return -(-chunks // best) * 64


# Passes around the scan.

LAYOUT_BLOCK = 128  # chunks of a document at a time
PREP_HEADS = 16  # of a program
LINK_BLOCK = SUM_BLOCK = 1024  # elements of a program
GATE_BLOCK, GATE_ROWS = 512, 8  # channels and tokens of a program
SUM_ROWS, SUM_COLUMNS, SUM_WARPS = 256, 32, 8
ADD = 2048, 8  # elements and warps of a program that adds to the residual stream
EXCHANGE = 512, 4  # the same of one that adds up over devices
SUMMED_AT_ONCE, MOST_SUMS = 2**23, 4  # numbers that devices sum in one message, at least, and into how many one is cut


# The convolution.

MAX_TAPS = 8  # the taps are unrolled
# Channels and warps of a program, 8 bytes per thread and load in half precision, and tokens loaded together: the
# forward loads the next ones before it computes, the backward needs its registers.
CONV_FORWARD, CONV_BACKWARD = (256, 2, 4), (128, 1, 8)
CONV_PROGRAMS = 8192  # aimed at, to choose how many tokens a program walks
CONV_UPDATE_CHANNELS = 128
CONV_UPDATE_TOKENS = 16  # of an update that are unrolled


def conv_run(tokens: int, blocks: int) -> int:
    """Tokens that one program walks: long runs share the window's start, short ones fill the chip."""
    return min(256, max(4 * CONV_BACKWARD[2], power_of_two(tokens * blocks // CONV_PROGRAMS + 1)))


def rows_at_once(rows: int, width: int) -> int:
    """Rows of a product whose sum over devices begins while the product goes on."""
    return cdiv(rows, max(1, min(MOST_SUMS, rows * width // SUMMED_AT_ONCE)))


# Norms.

LARGEST_GROUP = 16384  # a group stays in registers
NORM_CHUNK = 1024  # channels of a chunk, at most
NORM_FORWARD, NORM_BACKWARD = (2048, 1536), (1024, 768)  # elements of a program, where groups are small, and of a warp
NORM_BACKWARD_WARPS = 1056  # of all programs: as many as Hopper has room for


class NormTile(NamedTuple):
    """How a program of a norm holds groups of channels."""

    rows: int
    block: int
    chunks: int
    warps: int


@functools.cache
def norm_tile(size: int, elements: int, per_warp: int) -> NormTile:
    """How a program holds groups of ``size`` channels, with how many ``elements`` in all and ``per_warp``."""
    block, exact = min(power_of_two(size), NORM_CHUNK), size & -size
    if 256 <= exact < block and size <= 8 * exact:
        block = exact
    chunks = cdiv(size, block)
    rows = max(1, power_of_two(elements // (block * chunks) + 1) // 2)
    warps = power_of_two(cdiv(rows * block * chunks, per_warp))
    return NormTile(rows, block, chunks, min(16, warps))


# The loss.

LOSS_BLOCK = 8192  # logits at a time


def loss_warps(chip: Chip, block: int) -> int:
    """``cross_entropy_kernel``: large programs, so that the rows of all that run stay in the L2 cache for the second
    pass, of at most 1024 threads with 8 logits each.
    """
    return max(1, min(block // 256, 16 if chip.backend == "hip" else 32))


# Steps of decoding.

NARROW_LAYER = 1536  # widest residual stream whose layers take two launches
NARROW_CHANNELS, NARROW_WARPS = 4, 2  # of a program of a head, in those
OUTPUTS = 4  # of a program of a projection
PER_THREAD = 8  # neighboring weights of an output that a thread reads: 16 bytes
MOST_WEIGHTS = 160  # that a thread keeps
SHIFT_BLOCK = 1024  # channels of a program that moves the convolution's state
FINISH_BLOCK = 1024  # channels of a program of the second launch of a mixer's step
# Several sequences:
ROWS_NORM_BLOCK = 1024  # channels of the norm at a time
ROWS_STATE_TILE = 4096  # elements of the state in a program, which is one warp
ROWS_CONV_BLOCK = 256  # channels of a program of the convolution
MANY_ROWS = 64  # sequences from which on a mixer's step convolves B and C once, in a launch of its own
RING = 16  # tokens whose inputs are kept beside a state that is not written: what costs the fewest bytes
RING_ROWS = {4: 8, 2: 16}  # by the bytes of a number of the state: sequences from which on that takes less time
RING_STATE_TILE, RING_CHANNELS = 8192, 32  # bytes of the state in a program, which is one warp, and most channels
RING_FOLD = 64  # columns of the state that are folded together
RING_REGISTERS = 168  # of a thread where more are wanted and not needed: room for 12 programs a processor
PARTS_BLOCK = 32  # parts of a sum of squares that are loaded side by side


def narrow_tile(inputs: int) -> int:
    """Inputs at a time of a narrow layer's first launch, where few threads would have none."""
    tile = PER_THREAD * 32 * NARROW_WARPS
    return tile if cdiv(inputs, tile) * tile <= 1.1 * inputs else tile // 2


def projection(inputs: int) -> tuple[int, int, int]:
    """Outputs of a program of a projection, inputs at a time, and warps.

    The threads lie side by side along the inputs, so that what a thread reads of these serves all of its outputs.
    """
    warps = 2 if inputs < 2048 else 4
    tile = PER_THREAD * 32 * warps
    kept = cdiv(inputs, tile) * PER_THREAD
    return max(1, min(OUTPUTS, power_of_two(MOST_WEIGHTS // kept + 1) // 2)), tile, warps


class Projection(NamedTuple):
    """Launch parameters of a projection of a few rows."""

    BM: int  # rows of a program
    BN: int  # outputs
    BK: int  # inputs at a time
    split: int  # programs that share the inputs of an output
    warps: int
    stages: int  # of the software pipeline
    ahead: int = 256  # inputs whose weights the L2 cache is asked for before the kernel may begin


MOST_SPLIT = 8  # programs that share the inputs of an output: the last one adds up what all have found


def enter(chip: Chip, dtype: torch.dtype, rows: int) -> Projection:
    """``enter_rows_kernel``: rows are read again for every tile of outputs, so that many rows want wide tiles."""
    bm = tile(rows, 64)
    if dtype == torch.float32:
        return Projection(bm, BN=64, BK=64, split=1, warps=4, stages=_stages(chip, 3))
    if bm < 64:
        return Projection(bm, BN=64, BK=128, split=1, warps=4, stages=_stages(chip, 4))
    return Projection(bm, BN=128, BK=128, split=1, warps=8, stages=_stages(chip, 4 if chip.is_hopper else 3))


def leave(chip: Chip, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> Projection:
    """``leave_rows_kernel``: three programs for two processors, as many as the L2 cache feeds."""
    bm, bn, bk = tile(rows, 64), 64, 64 if dtype == torch.float32 else 128
    split = round(chip.processors * 3 / 2 / (-(-outputs // bn) * -(-rows // bm)))
    split = max(1, min(split, MOST_SPLIT, inputs // (2 * bk)))
    return Projection(bm, bn, bk, split, warps=4, stages=_stages(chip, 3 if bm == 64 or dtype == torch.float32 else 4))


WIDE, NARROW = (64, 2), (16, 2)  # channels of a head and warps per program: to fill memory, or to fill the chip
WIDE_BLOCK, NARROW_BLOCK = (64, 8), (16, 4)  # for several tokens, which keep the taps in registers, too
CONVOLVE_BLOCK = 64  # channels of a program of `convolve_block_kernel`, for all tokens of a block
BLOCK_CHANNELS = 32  # of a program of `block_kernel`, for one sequence as for 64
BLOCK_TOKENS, BLOCK_COLUMNS = 32, 64  # that it has at a time, of a state the latter
BLOCK_WARPS = {16: 2, 32: 4}  # by how many tokens that are: more spill with two
FEW_ROWS = 8  # batch up to which programs are narrow
DENSE_WARPS = 8


def state_programs(batch: int, P: int, tokens: int = 1, dense: bool = False) -> tuple[int, int]:
    """Channels and warps of a program that moves a state on; a ``dense`` decay takes as many registers as the state."""
    few, many = (NARROW, WIDE) if tokens == 1 else (NARROW_BLOCK, WIDE_BLOCK)
    channels, warps = few if batch <= FEW_ROWS else many
    return min(channels, power_of_two(P)), DENSE_WARPS if dense else warps


def step_rows(chip: Chip) -> int:
    """Sequences up to which the step of a whole layer was timed, on Hopper, and found faster than its parts."""
    return 64 if chip.is_hopper else 1


def keeps_ring(chip: Chip, dtype: torch.dtype, rows: int, P: int, N: int) -> bool:
    """Whether states ``(rows, H, P, N)`` of this dtype are to be written once in ``RING`` tokens, not in each: where
    that was timed, on Hopper.
    """
    sizes = all(tile(size, LARGEST_STATE) == size for size in (P, N))
    return chip.is_hopper and sizes and RING_ROWS.get(dtype.itemsize, rows + 1) <= rows < 2**16


class RingTile(NamedTuple):
    """Launch parameters of a step with a ring."""

    BP: int  # channels of a program, which is one warp
    W: int  # columns of the state that are read together
    BN: int  # columns that are folded together
    registers: int | None  # of a thread, at most


def ring_tile(dtype: torch.dtype, kept: torch.dtype, P: int, N: int) -> RingTile:
    """How a program holds states ``(P, N)`` of one dtype, with inputs ``kept`` in another: it reads 128 bytes of a row
    of the state together.
    """
    channels = max(16, min(RING_STATE_TILE // (N * dtype.itemsize), RING_CHANNELS, P))
    narrow = {dtype, kept} == {torch.bfloat16} and N <= LARGEST_16_BIT_STATE
    return RingTile(
        channels, min(128 // dtype.itemsize, N), min(RING_FOLD, N), registers=RING_REGISTERS if narrow else None
    )


# One query a sequence over many keys.

ATTEND_KEYS = 64  # that a program looks at together
ATTEND_PROGRAMS = 2  # a processor, that all keys are split among


def attend_part(chip: Chip, sequences: int, keys: int) -> tuple[int, int]:
    """Keys of one program, and its warps; ``sequences`` counts them for every head of keys."""
    parts = max(1, min(chip.processors * ATTEND_PROGRAMS // sequences, cdiv(keys, ATTEND_KEYS)))
    return cdiv(cdiv(keys, parts), ATTEND_KEYS) * ATTEND_KEYS, 4


def attention_enter(chip: Chip, dtype: torch.dtype, rows: int, outputs: int) -> Projection:
    """``enter_rows_kernel`` of attention: queries, keys and values are few outputs, and each program has some."""
    bn, bk = tile(outputs // chip.processors, 64), 64 if dtype == torch.float32 else 128
    return Projection(tile(rows, 64), bn, bk, split=1, warps=4, stages=_stages(chip, 4))


# Where results are not to depend on the batch, tiles do not either.

RECUR = 16, 4  # channels of a head and warps of a program that walks all tokens
ATTEND_EACH = 64, 4  # keys of a sequence that a program looks at together, and warps


# What kernels serve at all.

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_STATE = 256  # head dim and state size: a state stays in registers
STEP_OPS = (
    *("ssd_state_update", "causal_conv1d_update", "mamba2_step", "mamba2_layer_step"),
    *("mlp_step", "experts_step", "attend_one", "attention_step"),
)


def refusals(
    op: str,
    *,
    dtype: torch.dtype,
    stream: torch.dtype | None = None,
    shape: SSDShape | None = None,
    taps: int = 0,
    group_size: int = 0,
    width: int = 0,
    differentiable: bool = False,
) -> Iterator[str]:
    """Why a call cannot be served: nothing where it can.

    Args:
        op: its name. dtype: of its tensors. stream: of the residual stream, where there is one.
        shape: of its scan. taps: of its convolution.
        group_size: of its gated norm. width: of the norm before the mixer.
        differentiable: whether gradients are wanted of an op that updates states in place.
    """
    if differentiable:
        yield "a step that updates its states in place has no gradient here"
    for kind in (dtype, stream):
        if kind is not None and kind not in DTYPES:
            yield f"dtype {kind} is not bfloat16, float16 or float32"
    if taps > MAX_TAPS:
        yield f"{taps} taps are more than {MAX_TAPS}"
    if shape is not None:
        if shape.head_dim > LARGEST_STATE:
            yield f"head_dim {shape.head_dim} is above {LARGEST_STATE}"
        if shape.state > LARGEST_STATE:
            yield f"state size {shape.state} is above {LARGEST_STATE}"
        if op == "mamba2_layer_step" and shape.tokens != 1:
            yield f"{shape.tokens} tokens of a sequence are more than one"
        if op in STEP_OPS and group_size % shape.head_dim:
            yield f"group_size {group_size} is no multiple of head_dim {shape.head_dim}"
    if op in ("attend_one", "attention_step") and width > LARGEST_STATE:
        yield f"{width} channels of a head are more than {LARGEST_STATE}"
    if op not in STEP_OPS and max(group_size, width) > LARGEST_GROUP:
        yield f"group_size {max(group_size, width)} is above {LARGEST_GROUP}"


def limits(op: str) -> str:
    """What :func:`refusals` goes by, in words."""
    found = ["one token"] if op == "mamba2_layer_step" else []
    if op.startswith(("ssd", "mamba2")):
        found.append(f"head_dim and state size up to {LARGEST_STATE}")
    if op.startswith(("causal_conv1d", "mamba2")):
        found.append(f"up to {MAX_TAPS} taps")
    if op in ("gated_rms_norm", "mamba2_inner", "mamba2_layer"):
        found.append(f"norm groups up to {LARGEST_GROUP} channels")
    if op in STEP_OPS:
        found.append("no gradient")
    return ", ".join(found)
