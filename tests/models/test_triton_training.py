"""A short training run gives the same loss curve on both backends."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mamba2_hf
from mamba2_hf.ops import use_backend

STEPS, BATCH, TOKENS, WINDOW = 300, 16, 256, 25


def text() -> Tensor:
    """A few MB of Python's own library, as bytes."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8).long()


def losses(backend: str, seed: int = 0) -> Tensor:
    """Loss of each step, averaged over ``WINDOW`` steps; ``seed`` moves the initial weights by bf16's last bit."""
    torch.manual_seed(0)
    config = mamba2_hf.Mamba2Config(
        vocab_size=256, hidden_size=256, num_hidden_layers=3, num_heads=8, head_dim=64, state_size=64, n_groups=1
    )
    model = mamba2_hf.Mamba2ForCausalLM(config).cuda().train()
    if seed:
        noise = torch.Generator("cuda").manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                step = torch.randint(-1, 2, weight.shape, generator=noise, device="cuda") * 2**-9
                weight.mul_(1 + step)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    data, draw, found = text().cuda(), torch.Generator().manual_seed(1), []
    with use_backend(backend):
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 30)
            start = torch.randint(len(data) - TOKENS, (BATCH, 1), generator=draw).cuda()
            rows = data[start + torch.arange(TOKENS, device="cuda")]
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(rows, labels=rows).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            found.append(loss.detach())
    return torch.stack(found).view(-1, WINDOW).mean(1).cpu()


@pytest.mark.gpu
@pytest.mark.slow
def test_loss_curve() -> None:
    """They part no further than two runs on PyTorch whose weights differ by bf16's rounding."""
    reference, moved, triton = losses("torch"), losses("torch", seed=1), losses("triton")
    print(json.dumps({"torch": reference.tolist(), "moved": moved.tolist(), "triton": triton.tolist()}))
    assert triton[-1] < 0.6 * triton[0]
    assert (triton - reference).abs().max() <= 2 * (moved - reference).abs().max() + 0.01
