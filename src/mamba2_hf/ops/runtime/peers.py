"""Sums of small tensors over devices that reach each other's memory, inside of the kernels that make the tensors.

What a sum of some kilobytes takes is the way there, once, if nobody waits for an answer. So every device stores its
part in the memory of all others, and then looks at its own until theirs have come. A part goes as words of 8 bytes,
which arrive whole: a value, and the number of the sum it belongs to. Nothing else says that it is there, so that no
store has to wait for another.

Sums are counted in the memory of each device, from its first one on, also where a graph repeats them. A device's words
lie there twice, for even and for odd sums: who sends for the sum after the next has seen everybody's part of the next,
and they had all of this one before they sent it. All devices add parts in the same order, so all have the same bits.

A program waits for those of the same number on other devices. That ends because programs start in the order of their
numbers, and send before they wait.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

from ..spec import Peers
from . import tables
from .launch import launch
from .op import op
from .tables import cdiv

FAILED, TOLD, LIMIT, ADDRESSES = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)  # in the table


@triton.jit
def sum_number(table, program, programs):
    """The number of the sum that this kernel is for. Each of ``programs`` asks once, with a number of its own; together
    they raise the count by ``2 ** 20``, whatever their order.
    """
    share = 1048576 // programs + tl.where(program == 0, 1048576 % programs, 0)
    return tl.atomic_add(table, share.to(tl.int64), sem="relaxed") >> 20


@triton.jit
def _words(table, number, of, by, PLACES: tl.constexpr, WORDS: tl.constexpr):
    """Where the words are, in the memory of device ``of``, that device ``by`` stores for a sum."""
    memory = tl.load(table + ADDRESSES + of).to(tl.pointer_type(tl.int64))
    return memory + ((number & 1) * PLACES + by) * WORDS


@triton.jit
def send(table, number, at, value, mask, PLACE: tl.constexpr, PLACES: tl.constexpr, WORDS: tl.constexpr):
    """Sends the fp32 ``value`` to all others, to be found ``at`` these places of it."""
    word = ((2 * number + 1) << 32) | (value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
    for other in tl.static_range(PLACES):
        if other != PLACE:
            tl.store(_words(table, number, other, PLACE, PLACES, WORDS) + at, word, mask=mask, cache_modifier=".wt")


@triton.jit
def _is_missing(words, number, mask):
    """Whether one of the words has not come: those of earlier sums have other numbers, and no number is zero."""
    return tl.max((((words >> 32).to(tl.int32) != (2 * number + 1).to(tl.int32)) & mask).to(tl.int32)) > 0


@triton.jit
def receive(table, number, at, mask, sender, PLACE: tl.constexpr, PLACES: tl.constexpr, WORDS: tl.constexpr,
            CLOCK: tl.constexpr):  # fmt: skip
    """What ``sender`` has sent here, fp32; anything, if it does not come in time. ``CLOCK`` says whether there is one;
    else every look counts as a microsecond.
    """
    places = _words(table, number, PLACE, sender, PLACES, WORDS) + at
    words = tl.load(places, mask=mask, other=0, volatile=True)
    missing = _is_missing(words, number, mask)
    if missing:
        began = globaltimer() if CLOCK else tl.full([], 0, tl.int64)
        passed = tl.full([], 0, tl.int64)
        limit = tl.load(table + LIMIT)
        while missing & (passed < limit):
            words = tl.load(places, mask=mask, other=0, volatile=True)
            missing = _is_missing(words, number, mask)
            passed = globaltimer() - began if CLOCK else passed + 1000
            passed = tl.where(tl.load(table + FAILED, volatile=True) != 0, limit, passed)
        if missing:
            tl.store(table + FAILED, 1)
            tl.store(tl.load(table + TOLD).to(tl.pointer_type(tl.int32)), 1)
    return (words & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def total(table, number, at, value, mask, PLACE: tl.constexpr, PLACES: tl.constexpr, WORDS: tl.constexpr,
          CLOCK: tl.constexpr):  # fmt: skip
    """The sum over all devices of a ``value`` that has been sent."""
    found = tl.zeros_like(value)
    for sender in tl.static_range(PLACES):
        if sender == PLACE:
            found += value
        else:
            found += receive(table, number, at, mask, sender, PLACE, PLACES, WORDS, CLOCK)
    return found


def constants(peers: Peers) -> dict[str, Any]:
    """Constants of a kernel that adds up over ``peers``."""
    clock = False
    if peers.size > 1:
        chip = tables.current_chip()
        clock = chip.backend == "cuda" and not chip.interpreted
    return {"PLACE": peers.rank, "PLACES": peers.size, "WORDS": peers.words, "CLOCK": clock}


class Exchange(NamedTuple):
    """Arguments of :func:`exchange`."""

    part: Tensor
    """``(..., n)`` of this device."""
    peers: Peers
    beside: bool
    """Whether parts are put side by side rather than added up."""


@triton.jit
def exchange_kernel(part, table, y, size, width, BESIDE: tl.constexpr, PLACE: tl.constexpr, PLACES: tl.constexpr,
                    WORDS: tl.constexpr, CLOCK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The sum of all devices' ``part``, or with ``BESIDE`` their rows of ``width`` side by side."""
    pid = tl.program_id(0)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    value = tl.load(part + i, mask=mask, other=0.0).to(tl.float32)
    number = sum_number(table, pid, tl.num_programs(0))
    send(table, number, i, value, mask, PLACE, PLACES, WORDS)
    if BESIDE:
        at = y + i // width * (PLACES * width) + i % width
        for sender in tl.static_range(PLACES):
            if sender == PLACE:
                found = value
            else:
                found = receive(table, number, i, mask, sender, PLACE, PLACES, WORDS, CLOCK)
            tl.store(at + sender * width, found.to(y.dtype.element_ty), mask=mask)
    else:
        found = total(table, number, i, value, mask, PLACE, PLACES, WORDS, CLOCK)
        tl.store(y + i, found.to(y.dtype.element_ty), mask=mask)


def _like_result(call: Exchange) -> Tensor:
    *rest, width = call.part.shape
    return call.part.new_empty(*rest, width * call.peers.size if call.beside else width)


@op("exchange", fake=_like_result)
def exchange(call: Exchange) -> Tensor:
    """The sum of a tensor of a floating dtype, 32 bits at most, over all devices, or what they have side by side: to
    ``(..., n)`` or ``(..., size * n)``, the same in all of them. They call it with as many elements, ``words`` at most.
    """
    part, (table, *_), beside = call
    part, y = part.contiguous(), _like_result(call)
    size, (block, warps) = part.numel(), tables.EXCHANGE
    launch(
        exchange_kernel,
        (cdiv(size, block),),
        *(part, table, y, size, part.shape[-1]),
        BESIDE=beside,
        BLOCK=block,
        num_warps=warps,
        **constants(call.peers),
    )
    return y


def serves(part: Tensor) -> bool:
    """Whether :func:`exchange` takes tensors of this dtype."""
    return part.dtype in tables.DTYPES
