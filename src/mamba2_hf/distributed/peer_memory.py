"""Memory in which the GPUs of a group's processes store what they send each other (``ops/runtime/peers.py``)."""

from __future__ import annotations

import hashlib
import platform
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ProcessError
from ..ops import Peers

if TYPE_CHECKING:
    from .groups import Group

MOST_PROCESSES = 8
MOST_SENT = 2**21
"""Bytes that a process sends at once, beyond which bandwidth counts more than latency, and NCCL is as fast."""
WORD = 8
SECONDS = 600.0
"""To wait for another process, where the group does not say how long."""


class PeerMemory:
    """What a group's processes can store in each other's memory with.

    Args:
        buffers: of every process, ``(2 * size * words,)`` int64, zeros, as this process sees them.
        rank: of this process.
        words: see :class:`Peers`.
        seconds: to wait for another process.
        kept: for as long as the buffers are in use.
    """

    def __init__(self, buffers: list[Tensor], rank: int, words: int, seconds: float, kept: Any = None) -> None:
        self.device, self.buffers, self.seconds, self._kept = buffers[rank].device, buffers, seconds, kept
        self.failed = torch.zeros(1, dtype=torch.int32, pin_memory=self.device.type == "cuda")  # a kernel writes to it
        entries = [0, 0, self.failed.data_ptr(), int(1e9 * seconds), *(buffer.data_ptr() for buffer in buffers)]
        table = torch.tensor(entries, dtype=torch.int64, device=self.device)
        self.peers = Peers(table, rank, len(buffers), words)

    @classmethod
    def of(cls, group: Group, device: torch.device) -> PeerMemory | None:
        """That of the group's GPUs; None where they do not reach each other's memory. All processes call it."""
        if not 1 < group.size <= MOST_PROCESSES or not _are_beside(group, device):
            return None
        words = MOST_SENT // WORD // (group.size - 1)
        made = None
        try:
            import torch.distributed._symmetric_memory as symmetric

            with torch.cuda.device(device), torch.inference_mode(False):
                own = symmetric.empty(2 * group.size * words, dtype=torch.int64, device=device)
                handle: Any = symmetric.rendezvous(own, group.process_group.group_name)
                own.zero_()
                buffers = [
                    own if rank == group.rank else handle.get_buffer(rank, tuple(own.shape), own.dtype)
                    for rank in range(group.size)
                ]
                made = cls(buffers, group.rank, words, _patience(group), handle)
        except (ImportError, AttributeError, RuntimeError):  # no such build, driver or connection
            pass
        # Nobody sends before everybody's memory is there, and zero.
        ready = group.gather(torch.tensor([made is not None], dtype=torch.int32, device=device))
        return made if bool(ready.all()) else None

    def check(self) -> None:
        """Raises a :class:`ProcessError` if another process did not send in time what a kernel waited for."""
        if self.failed.item():
            raise ProcessError(
                f"another of the {self.peers.size} processes that share the model did not answer within "
                f"{self.seconds:g} s: its own error says why; start all of them again. If it was at work for so long, "
                "give init_process_group, or the group, a longer timeout"
            )


def _are_beside(group: Group, device: torch.device) -> bool:
    """Whether the processes have a GPU each of one machine, by CUDA, that reach each other; called by all of them."""
    import torch.distributed as dist

    if torch.version.hip is not None or "nccl" not in dist.get_backend(group.process_group):
        return False
    host = int.from_bytes(hashlib.sha256(platform.node().encode()).digest()[:7], "big")
    found = group.gather(torch.tensor([host, device.index], dtype=torch.int64, device=device)).tolist()
    if any(other != host for other, _ in found):
        return False
    seen = {index for _, index in found}
    if len(seen) < group.size or max(seen) >= torch.cuda.device_count():  # each process sees its own GPU only
        return True
    return all(torch.cuda.can_device_access_peer(device, index) for index in seen if index != device.index)


def _patience(group: Group) -> float:
    """Seconds after which the group's own operations give up."""
    try:
        options: Any = group.process_group._get_backend(torch.device("cuda")).options
        return float(options._timeout.total_seconds())
    except (AttributeError, RuntimeError):
        return SECONDS
