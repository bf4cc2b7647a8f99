"""Gluon as every supported Triton release offers it: a few calls have changed their names."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "TensorDescriptor",
    "async_copy",
    "barrier",
    "copy_async",
    "fence_async_shared",
    "gl",
    "gluon",
    "load_tile",
    "mbarrier",
    "store_tile",
    "tma",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]


barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
if hasattr(tma, "async_load"):
    copy_async, load_tile, store_tile = async_copy.async_load, tma.async_load, tma.async_store
else:
    copy_async = async_copy.async_copy_global_to_shared
    load_tile, store_tile = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
