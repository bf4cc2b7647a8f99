"""The SSD scan over sequences and its single step: contract, PyTorch, Triton, kernels and oracle."""
