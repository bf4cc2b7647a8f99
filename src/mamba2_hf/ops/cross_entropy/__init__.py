"""A language model's head and its loss as one op: contract, PyTorch and Triton."""
