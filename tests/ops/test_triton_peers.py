"""Sums over devices by kernels: words, their numbers, and answers that do not come."""

from __future__ import annotations

import pytest
import torch
from peers import WORDS, two_devices, words_sent
from torch import Tensor

from mamba2_hf.errors import ProcessError
from mamba2_hf.ops.runtime.peers import Exchange, exchange

pytestmark = pytest.mark.usefixtures("triton_serves")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    one, other = (torch.randn(*shape, generator=source).to(device, dtype) for _ in range(2))
    return one, other


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 1, 300), (2, 1030)])
def test_parts_are_added_or_put_side_by_side(shape: tuple[int, ...], dtype: torch.dtype, rank: int) -> None:
    both = draw(*shape, dtype=dtype)
    own, other = both[rank], both[1 - rank]
    for sums, beside, expected in (
        (0, False, (both[0].float() + both[1].float()).to(dtype)),
        (1, True, torch.cat(both, -1)),
        (2**31 - 1, False, (both[0].float() + both[1].float()).to(dtype)),
        (2**31 + 2, True, torch.cat(both, -1)),
    ):
        memory = two_devices(rank, other, sums)
        assert torch.equal(exchange(Exchange(own, memory.peers, beside)), expected)
        assert int(memory.peers.table[0]) == (sums + 1) << 20
        assert not memory.failed.item()


def test_what_is_sent() -> None:
    own, other = draw(2, 1, 700)
    memory = two_devices(1, other, sums=5)
    exchange(Exchange(own, memory.peers, False))
    assert torch.equal(words_sent(memory), own.flatten())


@pytest.mark.parametrize("stale", [None, 0])
def test_an_answer_that_does_not_come_is_not_waited_for_twice(stale: int | None) -> None:
    """Words of an earlier sum are no answer."""
    own, other = draw(1, 1, WORDS)
    memory = two_devices(0, other, sums=0, seconds=0.2 if own.is_cuda else 1e-4)
    memory.peers.table[0] = 2 << 20
    if stale is None:
        memory.buffers[0].zero_()
    for _ in range(3):
        exchange(Exchange(own, memory.peers, False))
    assert int(memory.peers.table[0]) == 5 << 20
    if own.is_cuda:
        torch.cuda.synchronize()
    with pytest.raises(ProcessError, match=r"another of the 2 processes .* did not answer within .* s"):
        memory.check()
