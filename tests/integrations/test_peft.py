"""LoRA on every linear of our models: trained, saved, reloaded, merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hybrids import make_hybrid
from peft import (
    CartridgeConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from mamba2_hf import Mamba2ForCausalLM, Mamba2ForSequenceClassification
from mamba2_hf.errors import ArgumentError, CacheError
from mamba2_hf.layers import mixer
from mamba2_hf.models import prefill
from mamba2_hf.models.outputs import CACHE
from mamba2_hf.ops import LayerWeights
from mamba2_hf.pretrained import shipped_model_path

pytestmark = [
    # PEFT looks for the base model's config on the Hub when it saves.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # PEFT reads it
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1"),
]

WITH_CACHE = pytest.mark.skipif(
    CACHE != "past_key_values", reason="PEFT looks for a cache by the name it had before transformers 5.24"
)

VARIANTS: dict[str, dict[str, Any]] = {
    "no target_modules": {},
    "all-linear": {"target_modules": "all-linear"},
    "out_proj": {"target_modules": ["out_proj"]},
    "in_proj": {"target_modules": ["in_proj"]},
    "pattern": {"target_modules": r".*\.layers\.1\.mixer\.(in|out)_proj"},
    "embeddings": {"target_modules": ["embeddings", "out_proj"]},
    "DoRA": {"target_modules": ["in_proj", "out_proj"], "use_dora": True},
    "rsLoRA": {"target_modules": ["in_proj", "out_proj"], "use_rslora": True},
}


def adapt(model: nn.Module, **config: Any) -> Any:
    """An adapter whose effect is far from zero."""
    adapted = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, **{"r": 4, **config}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=0.3, generator=generator)
    return adapted.eval()


def test_heads_guess_for_a_batch_of_an_adapted_model() -> None:
    heads = {"num_mtp_layers": 2, "mtp_layer_blocks": ["attention", "mlp"]}
    model = adapt(make_hybrid("plain", vocab_size=5, **heads), target_modules="all-linear")
    ids = torch.randint(3, 5, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) >= torch.tensor([[5], [0], [2]])).long()
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    guess = {"use_mtp": True, "num_assistant_tokens": 3, "assistant_confidence_threshold": 0.0}
    expected = model.generate(do_sample=False, **options)
    assert torch.equal(model.generate(do_sample=False, **guess, **options), expected)


@pytest.mark.parametrize("variant", VARIANTS)
class TestVariants:
    def test_changes_the_logits_and_merges_into_the_same(
        self, variant: str, make_model: Callable[..., Any], input_ids: Tensor
    ) -> None:
        with torch.no_grad():
            plain = make_model()(input_ids).logits
            adapted = adapt(make_model(), **VARIANTS[variant])
            logits = adapted(input_ids).logits
            merged = adapted.merge_and_unload()
            assert type(merged) is Mamba2ForCausalLM
            assert not any("lora" in name for name, _ in merged.named_modules())
            assert (logits - plain).abs().max() > 0.1
            torch.testing.assert_close(merged(input_ids).logits, logits, atol=1e-5, rtol=0)

    def test_every_adapter_gets_a_gradient_and_nothing_else_does(
        self, variant: str, make_model: Callable[..., Any], input_ids: Tensor
    ) -> None:
        adapted = adapt(make_model(), **VARIANTS[variant]).train()
        adapted(input_ids, labels=input_ids).loss.backward()
        for name, parameter in adapted.named_parameters():
            assert parameter.requires_grad == ("lora_" in name), name
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert parameter.grad.abs().max() > 0, name
            else:
                assert parameter.grad is None, name


def adapted_modules(model: nn.Module) -> set[str]:
    return {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_modules() if ".lora_A" in name}


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_default_targets_are_both_projections(targets: str | None, make_model: Callable[..., Any]) -> None:
    assert adapted_modules(adapt(make_model(), target_modules=targets)) == {"in_proj", "out_proj"}


def test_the_head_of_a_classifier_stays_trainable(make_model: Callable[..., Any], input_ids: Tensor) -> None:
    model = make_model(Mamba2ForSequenceClassification, num_labels=3)
    adapted = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=4))
    assert adapted_modules(adapted) == {"in_proj", "out_proj"}
    adapted(input_ids, labels=torch.tensor([0, 2])).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert "base_model.model.score.modules_to_save.default.weight" in trained


def test_generation_decodes_what_a_whole_forward_predicts(make_model: Callable[..., Any], input_ids: Tensor) -> None:
    adapted = adapt(make_model())
    with torch.no_grad():
        tokens = adapted.generate(input_ids=input_ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
        predicted = adapted(tokens).logits[:, input_ids.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(tokens[:, input_ids.shape[1] :], predicted)


@pytest.mark.parametrize("variant", ["all-linear", "DoRA", "rsLoRA"])
def test_saved_adapter_gives_the_same_logits(
    variant: str, make_model: Callable[..., Any], input_ids: Tensor, tmp_path: Path
) -> None:
    make_model().save_pretrained(tmp_path / "base")
    adapted = adapt(Mamba2ForCausalLM.from_pretrained(tmp_path / "base"), **VARIANTS[variant])
    adapted.save_pretrained(tmp_path / "adapter")
    base = Mamba2ForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids).logits, adapted(input_ids).logits)
        with again.disable_adapter():
            assert torch.equal(again(input_ids).logits, make_model()(input_ids).logits)


def test_merged_model_is_an_ordinary_checkpoint(
    make_model: Callable[..., Any], input_ids: Tensor, tmp_path: Path
) -> None:
    merged = adapt(make_model()).merge_and_unload()
    merged.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = Mamba2ForCausalLM.from_pretrained(tmp_path)(input_ids).logits
        assert torch.equal(loaded, merged(input_ids).logits)


def test_adapters_of_transformers_itself(make_model: Callable[..., Any], input_ids: Tensor, tmp_path: Path) -> None:
    model = make_model()
    plain = model(input_ids).logits
    model.add_adapter(LoraConfig(r=4, target_modules=["out_proj"], init_lora_weights=False))
    logits = model(input_ids).logits
    assert (logits - plain).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = make_model()
    again.load_adapter(str(tmp_path))
    torch.testing.assert_close(again.eval()(input_ids).logits, logits)


def test_bf16_base_with_adapters_on_every_linear(make_model: Callable[..., Any], input_ids: Tensor) -> None:
    adapted = adapt(make_model().bfloat16())
    with torch.no_grad():
        logits = adapted(input_ids).logits
        expected = adapt(make_model())(input_ids).logits
    assert adapted.base_model.model.backbone.layers[0].mixer.A_log.dtype == torch.float32
    assert (logits - expected).norm() / expected.norm() < 0.03


READ: dict[str, tuple[dict[str, Any], bool]] = {  # options of the adapter, and whether its factors are read
    "plain": ({}, True),
    "one projection": ({"target_modules": ["out_proj"]}, True),
    "rsLoRA": ({"use_rslora": True}, True),
    "DoRA": ({"use_dora": True}, False),
    "dropout": ({"lora_dropout": 0.3}, False),
    "bias": ({"lora_bias": True}, False),
}


class TestPrefixTuning:
    """Keys and values of tokens that nobody read: an SSD layer has no place for them."""

    CONFIG = {"task_type": TaskType.CAUSAL_LM, "num_virtual_tokens": 4}

    @pytest.mark.parametrize("config", [PrefixTuningConfig, CartridgeConfig])
    @pytest.mark.parametrize("hybrid", [False, True])
    def test_is_refused_when_the_adapter_is_made(
        self, hybrid: bool, config: Any, make_model: Callable[..., Any]
    ) -> None:
        model = make_hybrid() if hybrid else make_model()
        with pytest.raises(ArgumentError, match=rf"{config.__name__}: .*Use PromptTuningConfig"):
            get_peft_model(model, config(**self.CONFIG))

    def test_is_refused_as_another_adapter(self, make_model: Callable[..., Any]) -> None:
        adapted = get_peft_model(make_model(), PromptTuningConfig(**self.CONFIG))
        with pytest.raises(ArgumentError, match="PREFIX_TUNING learns keys and values"):
            adapted.add_adapter("other", PrefixTuningConfig(**self.CONFIG))

    def test_others_are_left_alone(self, input_ids: Tensor) -> None:
        sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
        llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
        adapted = get_peft_model(llama, PrefixTuningConfig(**self.CONFIG))
        assert adapted(input_ids).logits.shape == (2, 17, 61)


class TestTraining:
    """LoRA of the common kind is a part of the op of a whole layer; every other kind is called."""

    @pytest.fixture
    def loras(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """What the op was given."""
        found: list[Any] = []
        whole = mixer.ops.layer

        def layer(stream: Tensor, weights: LayerWeights, *args: Any, **options: Any) -> Tensor:
            loras = (weights.in_proj.lora, weights.out_proj.lora)
            found.extend(lora for lora in loras if lora is not None)
            return whole(stream, weights, *args, **options)

        monkeypatch.setattr(mixer.ops, "layer", layer)
        return found

    @staticmethod
    def gradients(model: Any, ids: Tensor) -> list[Tensor]:
        """The loss and all gradients."""
        torch.manual_seed(3)
        model.zero_grad(set_to_none=True)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    def compare_with_calls(self, model: Any, ids: Tensor, loras: list[Any], read: bool) -> None:
        """With hooks that do nothing every module has to be called."""
        actual = self.gradients(model, ids)
        assert bool(loras) == read
        layers = [m for name, m in model.named_modules() if name.endswith(("in_proj", "out_proj"))]
        hooks = [layer.register_forward_hook(lambda *_: None) for layer in layers]
        loras.clear()
        expected = self.gradients(model, ids)
        assert not loras
        for hook in hooks:
            hook.remove()
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, atol=1e-6, rtol=1e-4)

    @pytest.mark.parametrize("variant", READ)
    def test_read_or_called_the_gradients_are_the_same(
        self, variant: str, make_model: Callable[..., Any], input_ids: Tensor, loras: list[Any]
    ) -> None:
        options, read = READ[variant]
        model = adapt(make_model(use_bias=True), **{"target_modules": "all-linear", **options})
        self.compare_with_calls(model.train(), input_ids, loras, read)
        loras.clear()
        if variant == "dropout":  # none in eval mode
            self.compare_with_calls(model.eval(), input_ids, loras, True)

    def test_of_several_adapters_the_active_one(
        self, make_model: Callable[..., Any], input_ids: Tensor, loras: list[Any]
    ) -> None:
        model = adapt(make_model(), target_modules="all-linear")
        model.add_adapter("second", LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, target_modules=["in_proj"]))
        self.compare_with_calls(model.train(), input_ids, loras, True)
        model.base_model.set_adapter("second")
        loras.clear()
        self.compare_with_calls(model, input_ids, loras, True)
        model.base_model.set_adapter(["default", "second"])
        self.compare_with_calls(model, input_ids, loras, False)

    def test_disabled_and_merged_adapters(
        self, make_model: Callable[..., Any], input_ids: Tensor, loras: list[Any]
    ) -> None:
        model = adapt(make_model(), target_modules="all-linear").train()
        loss = model(input_ids, labels=input_ids).loss.item()
        assert loras
        loras.clear()
        with model.disable_adapter():
            plain = model(input_ids, labels=input_ids).loss.item()
        assert abs(plain - make_model()(input_ids, labels=input_ids).loss.item()) < 1e-5
        model.merge_adapter()
        merged = model(input_ids, labels=input_ids).loss.item()
        assert abs(merged - loss) < 1e-4 < abs(plain - loss)
        assert not loras

    def test_factors_in_fp32_beside_bf16_weights_are_multiplied_in_fp32(
        self, make_model: Callable[..., Any], input_ids: Tensor, loras: list[Any]
    ) -> None:
        """That is what PEFT does with them, unless autocast says otherwise."""
        model = adapt(make_model().bfloat16(), target_modules="all-linear").train()
        model(input_ids, labels=input_ids).loss.backward()
        assert not loras
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids, labels=input_ids).loss.backward()
        assert loras
        assert {lora.down.grad.dtype for lora in loras} == {torch.float32}


class TestConv1d:
    def test_a_rank_that_grouped_convolutions_cannot_have_is_peft_s_to_refuse(
        self, make_model: Callable[..., Any]
    ) -> None:
        with pytest.raises(ValueError, match="divisible by groups"):
            adapt(make_model(), target_modules=["conv1d"])

    def test_an_adapted_convolution_is_called(self, make_model: Callable[..., Any], input_ids: Tensor) -> None:
        model = make_model()
        channels = model.backbone.layers[0].mixer.conv_size
        adapted = adapt(model, target_modules=["conv1d"], r=channels)
        with torch.no_grad():
            logits = adapted(input_ids).logits
            assert (logits - make_model()(input_ids).logits).abs().max() > 0.01
            cache = adapted(input_ids[:, :9], use_cache=True).past_key_values
            steps = [adapted(input_ids[:, t : t + 1], past_key_values=cache).logits for t in range(9, 17)]
        torch.testing.assert_close(torch.cat(steps, 1), logits[:, 9:], atol=1e-5, rtol=1e-5)


def test_adapters_over_4_bit_weights(make_model: Callable[..., Any], input_ids: Tensor, tmp_path: Path) -> None:
    """QLoRA; bitsandbytes' CPU kernels serve training mode."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("bitsandbytes")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    make_model(hidden_size=64, num_heads=16).save_pretrained(tmp_path / "base")

    def load() -> Any:
        options = {"quantization_config": four_bits, "dtype": torch.bfloat16}
        return Mamba2ForCausalLM.from_pretrained(tmp_path / "base", **options)

    plain = Mamba2ForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).train()
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules="all-linear")
    adapted = get_peft_model(load(), config).train()
    mixer = adapted.base_model.model.backbone.layers[0].mixer
    assert "4bit" in type(mixer.in_proj.base_layer).__name__
    assert mixer.A_log.dtype == torch.float32
    out = adapted(input_ids, labels=input_ids)
    assert "logits" not in out
    assert out.loss.item() == pytest.approx(plain(input_ids, labels=input_ids).loss.item(), rel=0.05)
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=0.02)
    for _ in range(5):
        adapted(input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = adapted(input_ids, labels=input_ids).loss
    assert trained < 0.95 * out.loss
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter").train()
    torch.testing.assert_close(again(input_ids, labels=input_ids).loss, trained)


@pytest.mark.parametrize("name", ["mamba2", "hybrid"])
def test_adapters_over_int8_weights_of_torchao(name: str, input_ids: Tensor, tmp_path: Path) -> None:
    # No dependency of the tests: wherever it is installed, importing transformers writes five lines about it.
    quantization = pytest.importorskip("torchao.quantization")
    path = shipped_model_path(name)
    int8 = TorchAoConfig(quantization.Int8WeightOnlyConfig())

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(path, quantization_config=int8, dtype=torch.float32)

    model = load()
    mixer = next(module for module in model.modules() if hasattr(module, "A_log"))
    assert type(mixer.in_proj.weight) is not nn.Parameter
    assert type(mixer.A_log) is nn.Parameter
    with torch.no_grad():
        logits = model(input_ids).logits
        expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(input_ids).logits
        assert 0 < (logits - expected).norm() < 0.02 * expected.norm()
        model.save_pretrained(tmp_path / "int8")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
        torch.testing.assert_close(again(input_ids).logits, logits, atol=1e-4, rtol=1e-4)

    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules="all-linear")
    adapted = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for _ in range(5):
        loss = adapted(input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    adapted.eval().save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(reloaded(input_ids).logits, adapted(input_ids).logits)


class TestPromptsInPieces:
    """What PEFT does to a prompt in ``generate`` is the same however much of it is read at once."""

    GREEDY: ClassVar[dict[str, Any]] = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None}
    INVOCATION: ClassVar[list[int]] = [5, 6, 7]

    def adapted(self, kind: str, tuner: str, make_model: Callable[..., Any]) -> Any:
        torch.manual_seed(0)
        if kind == "llama":
            sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
            model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, pad_token_id=0))
        else:
            model = make_model() if kind == "pure" else make_hybrid("plain")
        width = model.config.hidden_size
        shape = {"num_virtual_tokens": 8, "token_dim": width, "num_layers": 2, "num_attention_heads": 4}
        config = {
            "prompt tuning": lambda: PromptTuningConfig(task_type=TaskType.CAUSAL_LM, **shape),
            "p-tuning": lambda: PromptEncoderConfig(task_type=TaskType.CAUSAL_LM, encoder_hidden_size=16, **shape),
            "LoRA": lambda: LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules="all-linear"),
            "activated LoRA": lambda: LoraConfig(
                task_type=TaskType.CAUSAL_LM, target_modules="all-linear", alora_invocation_tokens=self.INVOCATION
            ),
        }[tuner]()
        adapted = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.5 if "LoRA" not in tuner else 0.2, generator=generator)
        return adapted.eval()

    def logits(self, model: Any, **options: Any) -> Tensor:
        out = model.generate(**options, **self.GREEDY, return_dict_in_generate=True, output_logits=True)
        return torch.stack(out.logits, 1)

    @pytest.mark.parametrize("tuner", ["prompt tuning", "p-tuning", "LoRA", "activated LoRA"])
    @pytest.mark.parametrize("kind", ["pure", "hybrid"])
    def test_they_give_what_one_call_gives(
        self, kind: str, tuner: str, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = self.adapted(kind, tuner, make_model)
        ids = torch.randint(8, 61, (3, 300), generator=torch.Generator().manual_seed(0))
        ids[:, 100:103] = torch.tensor(self.INVOCATION)
        mask = torch.ones_like(ids)
        if tuner != "activated LoRA":
            mask[1, :40] = 0
        prompt = {"input_ids": ids, "attention_mask": mask}
        expected = self.logits(model, **prompt)
        for size in (1, 64, 299):
            torch.testing.assert_close(
                self.logits(model, **prompt, prefill_chunk_size=size), expected, rtol=0, atol=1e-5
            )
        beams = self.logits(model, **prompt, num_beams=2) if tuner != "activated LoRA" else None
        monkeypatch.setattr(prefill, "TOKENS_AT_ONCE", 256)
        torch.testing.assert_close(self.logits(model, **prompt), expected, rtol=0, atol=1e-5)
        if beams is not None:
            torch.testing.assert_close(self.logits(model, **prompt, num_beams=2), beams, rtol=0, atol=1e-5)

    @pytest.mark.filterwarnings("ignore:Position ids are not supported")  # Llama has them
    @pytest.mark.parametrize(
        "tuner", [pytest.param("prompt tuning", marks=WITH_CACHE), pytest.param("p-tuning", marks=WITH_CACHE), "LoRA"]
    )
    @pytest.mark.parametrize("kind", ["pure", "hybrid", "llama"])
    def test_generation_continues_what_the_adapted_forward_gives(
        self, kind: str, tuner: str, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = self.adapted(kind, tuner, make_model)
        ids = torch.randint(8, 61, (64, 30), generator=torch.Generator().manual_seed(0))
        monkeypatch.setattr(prefill, "TOKENS_AT_ONCE", 64)
        monkeypatch.setattr(prefill, "_MULTIPLE", 16)
        out = model.generate(input_ids=ids, **self.GREEDY, return_dict_in_generate=True, output_logits=True)
        with torch.no_grad():
            whole = model(out.sequences).logits[:, -4:-1]
        torch.testing.assert_close(torch.stack(out.logits, 1), whole, rtol=0, atol=1e-5)

    @WITH_CACHE
    def test_soft_prompts_do_not_continue_a_cache(self, make_model: Callable[..., Any], input_ids: Tensor) -> None:
        """PEFT feeds the last token only, once a cache holds any."""
        model = self.adapted("pure", "prompt tuning", make_model)
        out = model.generate(input_ids=input_ids, **self.GREEDY, return_dict_in_generate=True)
        more = torch.cat([out.sequences, input_ids], 1)
        prompt = {"input_ids": more, "attention_mask": torch.ones_like(more)}
        with pytest.raises(CacheError, match=r"makes 1 of 18 new tokens.*PEFT's soft prompts cannot continue a cache"):
            model.generate(**prompt, past_key_values=out.past_key_values, **self.GREEDY)
        with pytest.raises(ArgumentError, match="8 soft tokens of what wraps the model"):
            model.generate(input_ids=input_ids[:1], prompt_lookup_num_tokens=2, **self.GREEDY)
