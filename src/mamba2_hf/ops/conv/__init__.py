"""The causal depthwise convolution and its update: contract, PyTorch and Triton."""
