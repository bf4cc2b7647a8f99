"""Two devices whose memory is that of one process, for tests of what a kernel sends and of what it makes of answers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mamba2_hf.distributed.peer_memory import PeerMemory
from mamba2_hf.ops import Peers

WORDS = 4096


def two_devices(rank: int, answer: Tensor | None = None, sums: int = 0, seconds: float = 1e-4) -> PeerMemory:
    """The memory of device ``rank`` of two, after so many ``sums``, in which the other has already stored its part."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    buffers = [torch.zeros(4 * WORDS, dtype=torch.int64, device=device) for _ in range(2)]
    memory = PeerMemory(buffers, rank, WORDS, seconds)
    memory.peers.table[0] = sums << 20
    if answer is not None:
        words = answer.flatten().float().view(torch.int32).long() & 0xFFFFFFFF
        _part(buffers[rank], sums, 1 - rank)[: answer.numel()] = words | _number(sums) << 32
    return memory


def words_sent(memory: PeerMemory) -> Tensor:
    """The numbers that a kernel has sent for its sum, the last one that the memory is for."""
    rank, sums = memory.peers.rank, (int(memory.peers.table[0]) >> 20) - 1
    words = _part(memory.buffers[1 - rank], sums, rank)
    return words[words >> 32 == _number(sums)].to(torch.int32).view(torch.float32)


def found_by_two_devices(
    step: Callable[[int, Callable[[Tensor], Tensor], Peers], Tensor], sends: bool
) -> tuple[Tensor, ...]:
    """What each of two devices finds in the step of a layer that they share.

    Args:
        step: runs it for a device's rank, with what sums over both, and what kernels that send have to know.
        sends: whether a kernel sends what is summed otherwise, which it is to find the same by.
    """
    sent: list[Tensor] = []
    for rank in range(2):
        step(rank, lambda part: sent.append(part.clone()) or part, Peers())  # type: ignore[func-returns-value]
    found = [step(rank, lambda _: sent[0] + sent[1], Peers()) for rank in range(2)]

    def never(part: Tensor) -> Tensor:
        raise AssertionError("what a kernel sends is sent again")

    for rank in range(2) if sends else ():
        memory = two_devices(rank, sent[1 - rank])
        found.append(step(rank, never, memory.peers))
        assert torch.equal(words_sent(memory), sent[rank].flatten())
        assert not memory.failed.item()
    return tuple(found)


def _number(sums: int) -> Tensor:
    """What is beside the values of a sum: an odd number of 32 bits."""
    return torch.tensor(2 * sums + 1).to(torch.int32).long()


def _part(buffer: Tensor, sums: int, sender: int) -> Tensor:
    return buffer.view(2, 2, WORDS)[sums % 2, sender]
