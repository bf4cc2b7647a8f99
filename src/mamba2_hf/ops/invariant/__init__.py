"""The batch-invariant backend: what a sequence gives does not depend on what is computed beside it, on how its tokens
are divided among calls, or on whether one was read in a prompt or stepped. Not differentiable.

Every result is a function of its own row, by sums whose order depends on the sizes of the model and on a token's place
in its sequence alone:

- products (``runtime/products.py``) are taken for one fixed number of rows at a time, filled up by zeros;
- the scan is the recurrence, token by token, and the convolution a sum over taps in their order (``mixer.py``);
- attention takes each query alone, over its own keys from the first that it sees on (``attention.py``);
- norms sum over one row, in a way that knows nothing of the others;
- functions that PyTorch computes in one way for most elements, and in another for the last ones of a tensor (SiLU,
  softplus and GELU on a CPU), are put together from those that it computes in one way (``elementwise.py``).

On a CPU that is PyTorch; on a GPU norms, recurrence and attention are Triton kernels of one shape each.
"""

from __future__ import annotations

from .attention import rotary as rotary
from .elementwise import gated_activation as gated_activation
from .elementwise import gated_rms_norm as gated_rms_norm
from .mixer import causal_conv1d as causal_conv1d
from .mixer import causal_conv1d_update as causal_conv1d_update
from .mixer import mamba2_inner as mamba2_inner
from .mixer import mamba2_layer as mamba2_layer
from .mixer import mamba2_layer_step as mamba2_layer_step
from .mixer import mamba2_step as mamba2_step
from .mixer import new_ring as new_ring
from .mixer import ssd_chunk_scan as ssd_chunk_scan
from .mixer import ssd_state_update as ssd_state_update
