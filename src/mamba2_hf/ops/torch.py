"""The PyTorch backend: runs wherever PyTorch runs, differentiable, exportable, one graph under ``torch.compile``."""

from __future__ import annotations

from .attention.torch import attend_one as attend_one
from .attention.torch import attention_step as attention_step
from .attention.torch import rotary as rotary
from .conv.torch import causal_conv1d as causal_conv1d
from .conv.torch import causal_conv1d_update as causal_conv1d_update
from .cross_entropy.torch import cross_entropy_rows as cross_entropy_rows
from .mixer.torch import fold as fold
from .mixer.torch import joined as joined
from .mixer.torch import mamba2_block_step as mamba2_block_step
from .mixer.torch import mamba2_inner as mamba2_inner
from .mixer.torch import mamba2_layer as mamba2_layer
from .mixer.torch import mamba2_layer_step as mamba2_layer_step
from .mixer.torch import mamba2_step as mamba2_step
from .mixer.torch import new_ring as new_ring
from .mixer.torch import sums_over_peers as sums_over_peers
from .mlp.torch import experts_step as experts_step
from .mlp.torch import gated_activation as gated_activation
from .mlp.torch import mlp_step as mlp_step
from .norm.torch import gated_rms_norm as gated_rms_norm
from .scan.torch import ssd_chunk_scan as ssd_chunk_scan
from .scan.torch import ssd_state_update as ssd_state_update
