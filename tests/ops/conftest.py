"""Without a GPU, Triton kernels run in its interpreter; Triton reads this when the kernels are imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
