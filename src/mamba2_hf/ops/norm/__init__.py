"""The gated RMS norm: contract, PyTorch and Triton."""
