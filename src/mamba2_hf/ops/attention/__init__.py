"""What PyTorch has no kernel for in attention: rotary embedding, and one query a sequence over many keys."""
