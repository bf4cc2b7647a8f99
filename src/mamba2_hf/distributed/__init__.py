"""Models on several devices at once: what processes send each other, and who holds what.

``torch.distributed`` is imported where it is used: not every build of PyTorch has it.
"""

from __future__ import annotations

from .context_parallel import Context, context_parallel
from .groups import Group

__all__ = ["Context", "Group", "context_parallel"]
