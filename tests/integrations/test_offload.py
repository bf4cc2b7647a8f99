"""Weights that are elsewhere between calls: accelerate's offloading and device maps change no result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor

from mamba2_hf import (
    Mamba2Cache,
    Mamba2ForCausalLM,
    Mamba2ForSequenceClassification,
    Request,
    generate_batch,
)
from mamba2_hf.errors import CheckpointError
from mamba2_hf.layers import Mamba2Mixer
from mamba2_hf.layers.sequence import sequence_layout

pytestmark = [
    pytest.mark.filterwarnings("ignore:`.*` was set to a device map"),
    # transformers before 5.20 takes offloaded weights for a model on another device.
    pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on a device type"),
]
CPU = torch.device("cpu")


def from_cpu(model: Any, folder: Path) -> Any:
    cpu_offload(model, execution_device=CPU)
    return model


def from_disk(model: Any, folder: Path) -> Any:
    disk_offload(model, str(folder), execution_device=CPU)
    return model


def by_blocks(model: Any, folder: Path) -> Any:
    """A block brings the weights of all that is in it, which nothing inside knows."""
    disk_offload(model, str(folder), execution_device=CPU, preload_module_classes=["Mamba2Block"])
    return model


def dispatched(model: Any, folder: Path) -> Any:
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


def mapped(device_map: Any, **options: Any) -> Callable[[Any, Path], Any]:
    def load(model: Any, folder: Path) -> Any:
        model.save_pretrained(folder / "model")
        options.setdefault("offload_folder", str(folder / "offload"))
        return type(model).from_pretrained(folder / "model", device_map=device_map, **options)

    return load


SPLIT = {
    "backbone.embeddings": "cpu",
    "backbone.layers.0": "cpu",
    "backbone.layers.1": "disk",
    "backbone.norm_f": "cpu",
    "lm_head": "disk",
}
PLACEMENTS: dict[str, Callable[[Any, Path], Any]] = {
    "cpu_offload": from_cpu,
    "disk_offload": from_disk,
    "disk_offload of whole blocks": by_blocks,
    "dispatch_model": dispatched,
    "device_map of the cpu": mapped({"": "cpu"}),
    "device_map auto": mapped("auto"),
    "device_map auto, all on disk": mapped("auto", max_memory={"cpu": "20KB"}),
    "device_map auto, over cpu and disk": mapped("auto", max_memory={"cpu": "45KB"}),
    "device_map that splits the layers": mapped(SPLIT),
}


@pytest.mark.parametrize("placement", PLACEMENTS)
class TestPlacements:
    @pytest.fixture
    def models(self, placement: str, make_model: Callable[..., Any], tmp_path: Path) -> Iterator[tuple[Any, Any]]:
        """The same weights, placed and plain."""
        placed = PLACEMENTS[placement](make_model(), tmp_path)
        if "disk" in placement or "offload" in placement:
            assert any(parameter.is_meta for parameter in placed.parameters())
        with torch.no_grad():
            yield placed, make_model()

    def test_logits(self, models: tuple[Any, Any], input_ids: Tensor) -> None:
        placed, plain = models
        torch.testing.assert_close(placed(input_ids).logits, plain(input_ids).logits, atol=1e-5, rtol=1e-5)

    def test_logits_of_padded_and_packed_batches(self, models: tuple[Any, Any], input_ids: Tensor) -> None:
        placed, plain = models
        mask = torch.ones_like(input_ids)
        mask[0, :5] = 0
        documents = (torch.arange(input_ids.shape[1]) // 6).expand_as(input_ids)
        for named in ({"attention_mask": mask}, {"seq_idx": documents}):
            expected = plain(input_ids, **named).logits
            torch.testing.assert_close(placed(input_ids, **named).logits, expected, atol=1e-5, rtol=1e-5)

    def test_cached_steps(self, models: tuple[Any, Any], input_ids: Tensor) -> None:
        placed, plain = models
        cache = placed(input_ids[:, :9], use_cache=True).past_key_values
        steps = [placed(part, past_key_values=cache).logits for part in input_ids[:, 9:].split([1, 1, 4, 1, 1], 1)]
        torch.testing.assert_close(torch.cat(steps, 1), plain(input_ids).logits[:, 9:], atol=1e-5, rtol=1e-5)

    def test_generation(self, models: tuple[Any, Any], input_ids: Tensor) -> None:
        placed, plain = models
        for options in ({}, {"num_beams": 3}):
            options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **options}
            assert torch.equal(placed.generate(input_ids, **options), plain.generate(input_ids, **options))

    @pytest.mark.parametrize("way", ["lookup", "its own assistant", "another assistant"])
    def test_assisted_generation(
        self, models: tuple[Any, Any], make_model: Callable[..., Any], input_ids: Tensor, way: str
    ) -> None:
        placed, plain = models
        ids = torch.cat([input_ids[:1], input_ids[:1, :9]], 1)  # something to look up
        assert placed.device == plain.device
        guesses: dict[str, Any] = {
            "lookup": {"prompt_lookup_num_tokens": 4},
            "its own assistant": {"assistant_model": placed},
            "another assistant": {"assistant_model": make_model(seed=1)},
        }[way]
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        expected = plain.generate(ids, **options)
        assert torch.equal(placed.generate(ids, **guesses, **options), expected)
        if way == "its own assistant":
            assert torch.equal(plain.generate(ids, **guesses, **options), expected)

    def test_tokens_that_are_taken_back(self, models: tuple[Any, Any], input_ids: Tensor) -> None:
        placed, plain = models
        cache = placed(input_ids[:, :5]).past_key_values
        for start, stop, stay in ((5, 6, 6), (6, 10, 8), (8, 12, 8), (8, 9, 8), (8, 9, 9)):
            cache.activate_past_recording()
            placed(input_ids[:, start:stop], past_key_values=cache)
            cache.crop(stay - stop)
        cache.stop_recording()
        found = placed(input_ids[:, 9:], past_key_values=cache).logits
        torch.testing.assert_close(found, plain(input_ids).logits[:, 9:], atol=1e-5, rtol=1e-5)

    def test_states_that_are_kept(self, models: tuple[Any, Any], input_ids: Tensor, tmp_path: Path) -> None:
        """A placed model makes and takes the files of a plain one."""
        expected = models[1](input_ids).logits[:, 9:]
        for writer, reader in (models, models[::-1]):
            writer.read(input_ids[:, :9]).save(tmp_path / "state.safetensors", writer)
            cache = Mamba2Cache.load(tmp_path / "state.safetensors", reader)
            found = reader(input_ids[:, 9:], past_key_values=cache).logits
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    def test_continuous_batching(self, models: tuple[Any, Any], input_ids: Tensor) -> None:
        settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        requests = [Request(input_ids[0], settings), Request(input_ids[1, :9], settings)]
        placed, plain = (generate_batch(model, requests) for model in models)
        assert placed == plain

    def test_attention_matrices(self, models: tuple[Any, Any], input_ids: Tensor) -> None:
        placed, plain = models
        expected = plain(input_ids, output_attentions=True).attentions
        matrices = placed(input_ids, output_attentions=True).attentions
        torch.testing.assert_close(matrices, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("place", [from_cpu, from_disk])
def test_classification(
    place: Callable[[Any, Path], Any], make_model: Callable[..., Any], input_ids: Tensor, tmp_path: Path
) -> None:
    placed = place(make_model(Mamba2ForSequenceClassification), tmp_path)
    plain = make_model(Mamba2ForSequenceClassification)
    with torch.no_grad():
        torch.testing.assert_close(placed(input_ids).logits, plain(input_ids).logits, atol=1e-5, rtol=1e-5)


def test_tied_embeddings(make_model: Callable[..., Any], input_ids: Tensor, tmp_path: Path) -> None:
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    placed = Mamba2ForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": "20KB"}, offload_folder=str(tmp_path / "offload")
    )
    with torch.no_grad():
        expected = make_model(tie_word_embeddings=True)(input_ids).logits
        torch.testing.assert_close(placed(input_ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_offloaded_bf16_model_brings_its_fp32_parameters_in_fp32(
    make_model: Callable[..., Any], input_ids: Tensor, tmp_path: Path
) -> None:
    make_model().save_pretrained(tmp_path / "model")
    options = {"dtype": torch.bfloat16, "device_map": "auto"}
    placed = Mamba2ForCausalLM.from_pretrained(
        tmp_path / "model", max_memory={"cpu": "10KB"}, offload_folder=str(tmp_path / "offload"), **options
    )
    plain = Mamba2ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    seen: dict[str, Any] = {}

    class Look(ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            seen.update({name: getattr(module, name).dtype for name in module.fp32_parameters})
            return args, kwargs

    add_hook_to_module(placed.backbone.layers[0].mixer, Look(), append=True)
    with torch.no_grad():
        torch.testing.assert_close(placed(input_ids).logits, plain(input_ids).logits, atol=0.02, rtol=0.02)
    assert seen == dict.fromkeys(Mamba2Mixer.fp32_parameters, torch.float32)


def test_layouts_and_states_follow_their_layer_to_its_device(make_model: Callable[..., Any], input_ids: Tensor) -> None:
    """What accelerate does to the inputs of a layer on another device; "meta" stands in for one."""
    mask = torch.ones_like(input_ids)
    mask[0, :5] = 0
    documents = (torch.arange(input_ids.shape[1]) // 6).expand_as(input_ids)
    for named in ({"attention_mask": mask}, {"seq_idx": documents}, {"attention_mask": mask, "seq_idx": documents}):
        layout = sequence_layout(2, 17, **named)
        moved = layout.to("meta")
        tensors = {name: tensor for name, tensor in vars(layout).items() if tensor is not None}
        assert tensors
        assert all(getattr(moved, name).is_meta for name in tensors)
        assert moved.to("meta") is moved
        hidden = layout.pack(torch.ones(2, 17, 3))
        assert layout.unpack(hidden.to("meta")).shape == (2, 17, 3)
    plain = sequence_layout(2, 17)
    assert plain.to("meta") is plain
    cache = make_model()(input_ids, use_cache=True).past_key_values
    state = cache.layers[0]
    assert state.to("meta") is state
    assert state.ssm.is_meta
    assert cache.to("meta") is cache
    assert cache.layers[1].conv.is_meta
    recorded = make_model()(input_ids, use_cache=True).past_key_values
    recorded.activate_past_recording()
    make_model()(input_ids[:, :2], past_key_values=recorded)
    recorded.to("meta")
    recorded.crop(-1)
    assert recorded.layers[0].ssm.is_meta


@pytest.mark.parametrize("name", Mamba2Mixer.fp32_parameters)
def test_a_value_that_is_not_finite_is_named_also_where_it_stays_on_disk(
    make_model: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    model = make_model()
    with torch.no_grad():
        getattr(model.backbone.layers[1].mixer, name)[2] = float("nan")
    with pytest.raises(CheckpointError, match=rf"backbone\.layers\.1\.mixer\.{name} holds NaN or Inf"):
        mapped(SPLIT)(model, tmp_path)
