from __future__ import annotations

from pathlib import Path

import minimal_mamba2
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mamba2_hf.pretrained import shipped_model_path

PROMPT = "def read_json(path):"


def test_the_shipped_model_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    minimal_mamba2.main([PROMPT, "--tokens", "12", "--temperature", "0"])
    model = AutoModelForCausalLM.from_pretrained(shipped_model_path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(shipped_model_path())
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = model.generate(ids, do_sample=False, max_new_tokens=12)
    assert capsys.readouterr().out == tokenizer.decode(expected[0]) + "\n"
    page = minimal_mamba2.Mamba2LM.from_pretrained(shipped_model_path()).eval()
    with torch.no_grad():
        torch.testing.assert_close(page(expected)[0], model(expected).logits, rtol=1e-4, atol=1e-4)


def test_samples(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    minimal_mamba2.main([PROMPT, "--tokens", "4"])
    assert capsys.readouterr().out.startswith(PROMPT)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_reads_what_is_published(tied: bool, tmp_path: Path) -> None:
    """Several files, weights of 16 bits, a limit of infinity, groups, with the head apart and not."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8, "num_hidden_layers": 3}
    config = Mamba2Config(vocab_size=61, use_bias=True, tie_word_embeddings=tied, chunk_size=4, **sizes)
    stock = Mamba2ForCausalLM(config).bfloat16().eval()
    stock.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    page, ids = minimal_mamba2.Mamba2LM.from_pretrained(tmp_path).eval(), torch.arange(13)[None]
    assert (page.lm_head.weight is page.backbone.embeddings.weight) is tied
    torch.testing.assert_close(page(ids)[0], stock.float()(ids).logits, rtol=0, atol=1e-4)
