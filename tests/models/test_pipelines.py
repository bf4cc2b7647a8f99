"""transformers' pipelines and AutoTokenizer on saved models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    pipeline,
)

from mamba2_hf import Mamba2ForCausalLM, Mamba2ForSequenceClassification, Mamba2Model

TEXTS = ["w1 w2 w3", "w9", "w5 w6 w7 w8", "w4 w1"]
CHAT = "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}{% endfor %}"


def make_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """One token per word, w0 to w56."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, *(f"w{index}" for index in range(57))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **options)


@pytest.fixture(scope="module")
def saved(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a model with a tokenizer."""

    def save(cls: type[Any], padding_side: str = "left", **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("model")
        model = tiny_model(cls, seed=3, **changes)
        if cls is Mamba2ForCausalLM:  # the special tokens are no words
            model.lm_head.weight.data[:4] = 0
        model.save_pretrained(folder)
        make_tokenizer(padding_side=padding_side, chat_template=CHAT).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def language_model(saved: Callable[..., Path]) -> Path:
    return saved(Mamba2ForCausalLM)


def test_tokenizer_loads_from_the_folder(language_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert batch.input_ids[0].tolist() == [0, 5, 6, 7]
    with torch.no_grad():  # what a tokenizer returns is what the models take
        for auto in (AutoModel, AutoModelForCausalLM):
            assert auto.from_pretrained(language_model)(**batch)[0].shape[:2] == (4, 4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_generation_in_batches_of_any_padding(language_model: Path, side: str) -> None:
    pipe = pipeline("text-generation", model=str(language_model))
    assert type(pipe.model) is Mamba2ForCausalLM
    pipe.tokenizer.padding_side = side
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    single = [pipe(text, **options) for text in TEXTS]
    assert len({answer[0]["generated_text"] for answer in single}) > 1
    assert pipe(TEXTS, batch_size=2, **options) == single
    assert pipe(TEXTS, batch_size=4, **options) == single
    full = pipe(TEXTS[0], max_new_tokens=6, do_sample=False)[0]["generated_text"]
    assert full == TEXTS[0] + single[0][0]["generated_text"]


def test_text_generation_with_several_answers(language_model: Path) -> None:
    pipe = pipeline("text-generation", model=str(language_model))
    answers = pipe(TEXTS[:2], max_new_tokens=4, num_beams=3, num_return_sequences=2, do_sample=False)
    assert [len(answer) for answer in answers] == [2, 2]
    torch.manual_seed(0)
    assert len(pipe(TEXTS[0], max_new_tokens=4, do_sample=True, num_return_sequences=3)) == 3


def test_text_generation_from_a_chat(language_model: Path) -> None:
    pipe = pipeline("text-generation", model=str(language_model))
    chat = [{"role": "w7", "content": "w1 w2"}, {"role": "w8", "content": "w3"}]
    answer = pipe(chat, max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert answer[:2] == chat
    assert answer[2]["role"] == "assistant"
    plain = pipe("w7 w1 w2 w8 w3", max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert answer[2]["content"] == plain


def test_text_streams_as_it_is_written(language_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    model = AutoModelForCausalLM.from_pretrained(language_model)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    prompt = tokenizer(TEXTS[0], return_tensors="pt")
    out = model.generate(**prompt, streamer=streamer, max_new_tokens=6, do_sample=False)
    assert "".join(streamer) == tokenizer.decode(out[0, 3:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_classification(saved: Callable[..., Path], side: str) -> None:
    folder = saved(Mamba2ForSequenceClassification, side, num_labels=3)
    assert type(AutoModelForSequenceClassification.from_pretrained(folder)) is Mamba2ForSequenceClassification
    pipe = pipeline("text-classification", model=str(folder), top_k=None)
    single = [pipe(text) for text in TEXTS]
    batched = pipe(TEXTS, batch_size=4)
    for alone, together in zip(single, batched, strict=True):
        scores = {entry["label"]: entry["score"] for entry in alone[0]}
        assert {entry["label"]: entry["score"] for entry in together} == pytest.approx(scores, abs=1e-5)
        assert sum(scores.values()) == pytest.approx(1)


def test_feature_extraction(language_model: Path) -> None:
    pipe = pipeline("feature-extraction", model=str(language_model))
    assert type(pipe.model) is Mamba2Model
    single = [pipe(text, return_tensors=True) for text in TEXTS]
    batched = pipe(TEXTS, return_tensors=True, batch_size=4)
    for text, alone, together in zip(TEXTS, single, batched, strict=True):
        count = len(text.split())
        assert alone.shape == (1, count, 32)
        torch.testing.assert_close(together[:, -count:], alone, rtol=0, atol=1e-5)
