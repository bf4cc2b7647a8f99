"""Processes that work on one thing together, as a dimension of a device mesh names them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ArgumentError, ProcessError
from ..ops import Peers

PEER_MEMORY = "MAMBA2_HF_PEER_MEMORY"
"""Environment variable: 1 for sums of small tensors in the memory of other GPUs, alike in all processes."""

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .peer_memory import PeerMemory


class Group:
    """A process group and this process's place in it.

    Every method is a collective: all processes of the group call it, with tensors of the same shape and dtype. None of
    them is differentiable; see ``collectives.py``.

    Args:
        process_group: of ``torch.distributed``.
        rank: of this process in the group.
        size: how many processes it has.
    """

    def __init__(self, process_group: Any, rank: int, size: int) -> None:
        self.process_group, self.rank, self.size = process_group, rank, size
        self.memory: PeerMemory | None = None
        asked = os.environ.get(PEER_MEMORY, "0") == "1"
        self._alone = size == 1 or not asked  # or not connected so that memory could be shared

    @classmethod
    def of(cls, mesh: DeviceMesh, name: str) -> Group:
        """The group of this process along the dimension ``name`` of a mesh; a mesh of one dimension may have any name.

        Raises:
            ArgumentError: the mesh has no such dimension.
        """
        names = mesh.mesh_dim_names
        if mesh.ndim > 1:
            if name not in (names or ()):
                raise ArgumentError(
                    f"the mesh has the dimensions {names}, and {name!r} is needed: init_device_mesh(..., "
                    f"mesh_dim_names=(..., {name!r})), or pass the mesh of one dimension that is meant"
                )
            mesh = mesh[name]
        return cls(mesh.get_group(), mesh.get_local_rank(), mesh.size())

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self  # a copy of a model works with the same processes

    def gather(self, tensor: Tensor) -> Tensor:
        """What all processes have, ``(size, ...)``."""
        import torch.distributed as dist

        gathered = tensor.new_empty(self.size * tensor.numel())
        # By its name from torch 2.13 on, or the one before.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(gathered, tensor.flatten(), group=self.process_group)
        return gathered.view(self.size, *tensor.shape)

    def gather_objects(self, value: Any) -> list[Any]:
        """What all processes have, anything that pickle takes."""
        import torch.distributed as dist

        found = [None] * self.size
        dist.all_gather_object(found, value, group=self.process_group)
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """For what every process does by itself before all go on: where one fails, all do, and none waits for it.

        Raises:
            ProcessError: in the others, with the error of the first one that failed.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        said = self.gather_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, message in enumerate(said):
            if message is not None:
                raise ProcessError(f"process {rank} of the {self.size} that share the model failed: {message}")

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.sum_(tensor.clone(memory_format=torch.contiguous_format))

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in the place of a dense ``tensor``."""
        import torch.distributed as dist

        dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def begin_sum_(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begins :meth:`sum_`; what is returned waits for it, and gives it. On a GPU only its stream waits."""
        import torch.distributed as dist

        work = dist.all_reduce(tensor, group=self.process_group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return tensor

        return wait

    def total(self, part: Tensor) -> Tensor:
        """The sum over all processes of a tensor that nobody else reads, in its place or not."""
        peers = self.peers(part)
        if 0 < part.numel() <= peers.words:
            from ..ops.runtime.peers import Exchange, exchange, serves

            if serves(part):
                return exchange(Exchange(part, peers, False))  # type: ignore[no-any-return]
        return self.sum_(part)

    def gather_columns(self, tensor: Tensor) -> Tensor:
        """``(..., n)`` of all processes side by side, ``(..., size * n)``."""
        peers = self.peers(tensor)
        if 0 < tensor.numel() <= peers.words:
            from ..ops.runtime.peers import Exchange, exchange, serves

            if serves(tensor):
                return exchange(Exchange(tensor, peers, True))  # type: ignore[no-any-return]
        return self.gather(tensor).movedim(0, -2).flatten(-2)

    def peers(self, like: Tensor) -> Peers:
        """What kernels have to know to add up small tensors over the processes where ``like`` is: nothing, where these
        do not reach each other's memory, or nobody set ``MAMBA2_HF_PEER_MEMORY=1``. All processes ask for the first
        time together.

        Raises:
            ProcessError: see :meth:`check`.
        """
        if self.memory is None and not self._alone and like.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return Peers()
            from .peer_memory import PeerMemory

            self.memory = PeerMemory.of(self, like.device)
            self._alone = self.memory is None
        if self.memory is None or like.device != self.memory.device:
            return Peers()
        self.memory.check()
        return self.memory.peers

    def check(self) -> None:
        """Nothing, unless a process was waited for in vain inside of a kernel.

        Raises:
            ProcessError: then.
        """
        if self.memory is not None:
            self.memory.check()

    def sum_of_parts(self, tensor: Tensor) -> Tensor:
        """From ``(size, ...)`` in all processes the sum of this process's entries, ``(...)``."""
        import torch.distributed as dist

        total = tensor.new_empty(tensor[0].numel())
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(total, tensor.flatten(), group=self.process_group)
        return total.view(tensor.shape[1:])

    def exchange(self, tensor: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Sends the first ``sent[0]`` rows of ``tensor (R, ...)`` to process 0, and so on; returns what comes, by rank.

        Args:
            tensor: ``(sum(sent), ...)``.
            sent, received: rows to and from each process.
        """
        import torch.distributed as dist

        found = tensor.new_empty(sum(received), *tensor.shape[1:])
        dist.all_to_all_single(found, tensor.contiguous(), received, sent, group=self.process_group)
        return found
