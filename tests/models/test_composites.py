"""Models of transformers that hold one of ours: they reach for its parts by the names that most models give them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrids import make_config, make_hybrid
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from mamba2_hf import Mamba2Cache

IMAGE = 60
IDS = torch.tensor([[1, *[IMAGE] * 4, 5, 6, 7], [1, *[IMAGE] * 4, 9, 8, 7]])
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["pure", "plain", "rotary"])
def text_config(request: pytest.FixtureRequest, tiny_config: Callable[..., Any]) -> Any:
    make = tiny_config if request.param == "pure" else lambda **changes: make_config(request.param, **changes)
    return make(tie_word_embeddings=True)


@pytest.fixture
def llava(text_config: Any) -> Any:
    vision = CLIPVisionConfig(
        **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"image_size": 8, "patch_size": 4, "projection_dim": 16},
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


class TestLlavaWithTiedEmbeddings:
    def test_head_and_embedding_are_one(self, llava: Any) -> None:
        assert llava.lm_head.weight is llava.get_input_embeddings().weight
        assert llava.get_input_embeddings() is llava.model.language_model.embeddings
        llava.resize_token_embeddings(70, mean_resizing=False)
        assert llava.lm_head.weight is llava.model.language_model.embeddings.weight
        assert llava.lm_head.weight.shape[0] == 70

    def test_trains(self, llava: Any) -> None:
        llava.train()
        llava(IDS, pixel_values=PIXELS, labels=IDS.clone(), num_items_in_batch=torch.tensor(14)).loss.backward()
        assert all(p.grad is not None for p in llava.model.language_model.parameters())
        assert bool(llava.model.multi_modal_projector.linear_1.weight.grad.any())

    def test_generates_what_whole_forwards_predict(self, llava: Any) -> None:
        out = llava.generate(
            IDS,
            pixel_values=PIXELS,
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        expected = IDS
        with torch.no_grad():
            for _ in range(5):
                logits = llava(expected, pixel_values=PIXELS, use_cache=False).logits
                expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(out.sequences, expected)
        assert type(out.past_key_values) is Mamba2Cache

    def test_is_saved_under_our_names_and_loaded(self, llava: Any, tmp_path: Path) -> None:
        llava.save_pretrained(tmp_path)
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            names = [name for name in file.keys() if "language_model" in name or "lm_head" in name]  # noqa: SIM118
        assert sum("embeddings.weight" in name for name in names) == 1
        assert not [name for name in names if "embed_tokens" in name or "lm_head" in name]
        again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
        assert again.lm_head.weight is again.get_input_embeddings().weight
        with torch.no_grad():
            logits = [model(IDS, pixel_values=PIXELS).logits for model in (llava, again)]
        torch.testing.assert_close(*logits, rtol=0, atol=0)

    def test_is_offloaded_with_its_head(self, llava: Any, tmp_path: Path) -> None:
        llava.save_pretrained(tmp_path)
        places = {"vision_tower": "cpu", "multi_modal_projector": "cpu", "language_model": "disk"}
        offloaded = AutoModelForImageTextToText.from_pretrained(
            tmp_path,
            device_map={"lm_head": "disk", **{f"model.{name}": place for name, place in places.items()}},
            offload_folder=tmp_path / "offloaded",
        ).eval()
        with torch.no_grad():
            logits = [model(IDS, pixel_values=PIXELS).logits for model in (llava, offloaded)]
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [lambda tiny: tiny(), lambda tiny: make_hybrid()], ids=["pure", "hybrid"])
class TestNames:
    def test_lead_to_the_parts(self, make: Any, tiny_model: Callable[..., Any]) -> None:
        model = make(tiny_model)
        backbone = model.backbone
        assert model.model is model.get_decoder() is model.base_model is backbone
        assert backbone.embed_tokens is backbone.get_input_embeddings() is model.get_input_embeddings()
        assert backbone.embed_tokens is backbone.embeddings
        assert backbone.norm is backbone.norm_f
        assert model.get_output_embeddings() is model.lm_head
        assert model.get_parameter("model.embed_tokens.weight") is backbone.embeddings.weight

    def test_replace_the_parts_and_add_none(self, make: Any, tiny_model: Callable[..., Any]) -> None:
        model, ids = make(tiny_model), torch.arange(3, 9)[None]
        names, expected = list(model.state_dict()), model(ids).logits
        wider = torch.nn.Embedding.from_pretrained(2 * model.backbone.embeddings.weight.detach())
        model.model.embed_tokens = wider
        model.model.norm = model.model.norm
        model.model = model.backbone
        assert model.get_input_embeddings() is wider
        assert list(model.state_dict()) == names
        assert not torch.equal(model(ids).logits, expected)
