"""Two devices whose memory is that of one process, for tests of what a kernel sends and of what it makes of answers."""

from __future__ import annotations

import torch
from torch import Tensor

from mamba2_hf.distributed.peer_memory import PeerMemory

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


def _number(sums: int) -> Tensor:
    """What is beside the values of a sum: an odd number of 32 bits."""
    return torch.tensor(2 * sums + 1).to(torch.int32).long()


def _part(buffer: Tensor, sums: int, sender: int) -> Tensor:
    return buffer.view(2, 2, WORDS)[sums % 2, sender]
