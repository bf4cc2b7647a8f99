"""A Mamba-2 mixer and the layer around it, in training and in steps: contract, PyTorch and Triton."""
