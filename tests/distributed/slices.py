"""A group of threads in the place of a group of processes, for tests of what passes between devices."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mamba2_hf.distributed import Group


class Meeting:
    """Where the threads of a group lay down what they have for the others. One runs at a time: Triton's interpreter is
    not made for several.
    """

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.table = size, threading.Barrier(size, timeout=60), [None] * size
        self.turn = threading.Lock()

    def all(self, rank: int, value: Any) -> list[Any]:
        self.table[rank] = value
        self.wait()
        everyones = list(self.table)
        self.wait()
        return everyones

    def wait(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()


class Threads(Group):
    """A group of threads of one process."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        super().__init__(None, rank, meeting.size)
        self.meeting = meeting

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.meeting.all(self.rank, tensor.detach().clone()))

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(self.gather(tensor).sum(0))

    total = sum_

    def begin_sum_(self, tensor: Tensor) -> Callable[[], Tensor]:
        total = self.gather(tensor).sum(0)
        return lambda: tensor.copy_(total)

    def sum_of_parts(self, tensor: Tensor) -> Tensor:
        return self.gather(tensor)[:, self.rank].sum(0)

    def exchange(self, tensor: Tensor, sent: list[int], received: list[int]) -> Tensor:
        parts = self.meeting.all(self.rank, tensor.detach().clone().split(sent))
        found = [theirs[self.rank] for theirs in parts]
        assert [len(part) for part in found] == received
        return torch.cat(found)


def in_slices(size: int, run: Callable[[Group], Any]) -> list[Any]:
    """What ``run(group)`` returns in each of ``size`` threads."""
    meeting, results, errors = Meeting(size), [None] * size, []

    def work(rank: int) -> None:
        try:
            # Or all would share one thread for a GPU's backward.
            with meeting.turn, torch.autograd.set_multithreading_enabled(False):
                results[rank] = run(Threads(meeting, rank))
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return results
