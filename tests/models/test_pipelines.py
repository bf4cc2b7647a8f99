"""transformers' pipelines and AutoTokenizer on saved models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrids import make_hybrid
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
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
    """One token per word, w0 to w55 and one that transformers tries on a tokenizer that is to find stop strings."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, *(f"w{index}" for index in range(56)), "abcdef"])}
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


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "pieces": {"prefill_chunk_size": 2},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("kind", ["pure", "hybrid"])
@pytest.mark.parametrize("way", WAYS)
def test_what_generate_takes_for_itself_does_not_reach_the_forward(
    way: str, kind: str, tiny_model: Callable[..., Any]
) -> None:
    """A tokenizer, for one: stop strings end the text where one is first complete."""
    model = tiny_model(seed=3) if kind == "pure" else make_hybrid("sliding")
    tokenizer = make_tokenizer(padding_side="left")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **WAYS[way]}

    def write(prompts: Any, **more: Any) -> Tensor:
        torch.manual_seed(0)
        return model.generate(**prompts, **options, **more)

    one = tokenizer(TEXTS[:1], return_tensors="pt")
    expected = write(one)[0].tolist()
    assert write(one, tokenizer=tokenizer, synced_gpus=False, nothing=None)[0].tolist() == expected
    if "num_beams" in options:
        return
    words = tokenizer.convert_ids_to_tokens(expected)
    stop = words[5]
    end = next(place for place in range(3, len(words)) if stop in words[place]) + 1
    assert write(one, tokenizer=tokenizer, stop_strings=[stop])[0].tolist() == expected[:end]
    if way not in ("sampling", "prompt lookup"):
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
        rows = write(batch, tokenizer=tokenizer, stop_strings=[stop])
        start = batch.input_ids.shape[1]
        assert rows[0, start : start + end - 3].tolist() == expected[3:end]


def test_misspelt_arguments_of_generate_are_refused(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"not used by the model: \['max_new_token'\]"):
        tiny_model().generate(torch.tensor([[5, 6]]), max_new_token=3, tokenizer=make_tokenizer())


def test_healing_of_the_last_token(tiny_model: Callable[..., Any]) -> None:
    model, tokenizer = tiny_model(seed=3), make_tokenizer()
    ids = tokenizer("w1 w2 w3", return_tensors="pt").input_ids
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    healed = model.heal_tokens(ids, tokenizer)
    assert healed[0, :2].tolist() == ids[0, :2].tolist()
    assert tokenizer.convert_ids_to_tokens(int(healed[0, 2])).startswith("w3")
    out = model.generate(ids, token_healing=True, tokenizer=tokenizer, **options)
    assert torch.equal(out, model.generate(healed, **options))


def test_text_generation_stops_at_a_sequence(language_model: Path) -> None:
    pipe = pipeline("text-generation", model=str(language_model))
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    words = pipe(TEXTS[0], **options)[0]["generated_text"].split()
    stopped = pipe(TEXTS[0], stop_sequence=words[3], **options)[0]["generated_text"].split()
    assert stopped == words[: words.index(words[3]) + 1]


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
