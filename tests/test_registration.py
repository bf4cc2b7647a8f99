"""What importing the package changes, that it changes nothing else, and that a changed upstream breaks no import."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hybrids import make_hybrid
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import Modality
from transformers.models.auto import modeling_auto

import mamba2_hf
from mamba2_hf import registration
from mamba2_hf.registration import when_imported

AUTO_CLASSES = {
    AutoModel: mamba2_hf.Mamba2Model,
    AutoModelForCausalLM: mamba2_hf.Mamba2ForCausalLM,
    AutoModelForPreTraining: mamba2_hf.Mamba2ForCausalLM,
    AutoModelForSequenceClassification: mamba2_hf.Mamba2ForSequenceClassification,
}


@pytest.fixture
def config() -> Any:
    return mamba2_hf.Mamba2Config(
        vocab_size=13, hidden_size=8, num_hidden_layers=1, num_heads=2, head_dim=8, n_groups=1, state_size=4
    )


class TestAutoClasses:
    @pytest.mark.parametrize("auto", AUTO_CLASSES)
    def test_build_our_models_from_our_config(self, auto: Any, config: Any) -> None:
        assert type(auto.from_config(config)) is AUTO_CLASSES[auto]

    @pytest.mark.parametrize("auto", AUTO_CLASSES)
    def test_build_our_models_from_stock_files(self, auto: Any, config: Any, tmp_path: Path) -> None:
        stock = transformers.Mamba2Config.from_dict(config.to_dict())
        transformers.Mamba2ForCausalLM(stock).save_pretrained(tmp_path)
        assert type(AutoConfig.from_pretrained(tmp_path)) is mamba2_hf.Mamba2Config
        assert type(auto.from_pretrained(tmp_path)) is AUTO_CLASSES[auto]

    def test_stock_classes_stay_reachable(self, config: Any, tmp_path: Path) -> None:
        mamba2_hf.Mamba2ForCausalLM(config).save_pretrained(tmp_path)
        stock = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path)
        assert type(stock).__module__.startswith("transformers.")
        assert type(stock.config).__module__.startswith("transformers.")

    def test_registering_again_changes_nothing(self, config: Any) -> None:
        finders = list(sys.meta_path)
        mamba2_hf.register()
        mamba2_hf.register()
        assert sys.meta_path == finders
        assert type(AutoModelForCausalLM.from_config(config)) is mamba2_hf.Mamba2ForCausalLM


class TestTables:
    """Of model types and class names, which other code reads directly."""

    def test_list_hybrids_where_pure_models_are(self) -> None:
        tables = {
            name: table
            for name, table in vars(modeling_auto).items()
            if name.startswith("MODEL_") and name.endswith("_NAMES") and "mamba2" in table
        }
        assert {"MODEL_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"} <= tables.keys()
        for table in tables.values():
            name = table["mamba2_hybrid"]
            assert name == table["mamba2"].replace("Mamba2", "Mamba2Hybrid")
            assert hasattr(mamba2_hf, name)

    def test_name_nothing_that_the_auto_classes_would_look_for(self) -> None:
        """Walking through one imports every class of the table."""
        mapping = AutoModelForCausalLM._model_mapping
        assert mapping[mamba2_hf.Mamba2HybridConfig] is mamba2_hf.Mamba2HybridForCausalLM
        assert set(mapping._model_mapping) & set(mapping._config_mapping) >= {"mamba2", "llama"}
        assert "mamba2_hybrid" not in mapping._config_mapping


class TestClassesByName:
    """What reads ``architectures`` builds what the Auto class builds, and never more leniently."""

    @pytest.fixture(params=["pure", "hybrid"])
    def folder(self, request: pytest.FixtureRequest, config: Any, tmp_path: Path) -> Path:
        model = mamba2_hf.Mamba2ForCausalLM(config) if request.param == "pure" else make_hybrid()
        model.save_pretrained(tmp_path)
        tokenizer = Tokenizer(WordLevel({"<pad>": 0, "a": 1}, unk_token="<pad>"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(tmp_path)
        return tmp_path

    def test_in_transformers_serve(self, folder: Path) -> None:
        manager = ModelManager(device="cpu", dtype="auto")
        model = manager._load_model(f"{folder}@main")
        assert type(model) is type(AutoModelForCausalLM.from_pretrained(folder))
        assert manager.get_model_modality(model) == Modality.LLM

    def test_in_pipelines(self, folder: Path) -> None:
        expected = type(AutoModelForCausalLM.from_pretrained(folder))
        loaded = pipeline("text-generation", str(folder), assistant_model=str(folder), device="cpu")
        assert type(loaded.model) is type(loaded.assistant_model) is expected

    def test_no_pipeline_builds_what_was_refused(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        lost = next(name for name in weights if name.endswith("A_log"))
        del weights[lost]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"{lost} is missing"):
            pipeline("text-generation", str(folder), device="cpu")

    def test_stock_s_own_names_give_stock_s_classes(self) -> None:
        module = SimpleNamespace(transformers=transformers)
        registration._find_ours_by_name(module)
        once = module.transformers
        registration._find_ours_by_name(module)
        assert module.transformers is once
        assert once.Mamba2ForCausalLM is mamba2_hf.Mamba2ForCausalLM
        assert once.LlamaForCausalLM is transformers.LlamaForCausalLM
        assert once.__version__ == transformers.__version__
        assert not hasattr(once, "NoSuchModel")
        assert transformers.Mamba2ForCausalLM is not mamba2_hf.Mamba2ForCausalLM


class TestWhenImported:
    @pytest.fixture
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        """A package with a submodule, importable and forgotten afterwards."""
        name = "package_that_only_this_test_knows"
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("from .part import number\n")
        (tmp_path / name / "part.py").write_text("number = 1\n")
        (tmp_path / name / "broken.py").write_text("raise RuntimeError('broken')\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        yield name
        for module in [module for module in sys.modules if module.startswith(name)]:
            del sys.modules[module]
        for waiting in [waiting for waiting in registration._finder.then if waiting.startswith(name)]:
            del registration._finder.then[waiting]

    def test_calls_back_after_the_module_was_executed(self, package: str) -> None:
        seen: list[int] = []
        when_imported(f"{package}.part", lambda module: seen.append(module.number))
        assert seen == []
        importlib.import_module(package)
        assert seen == [1]
        importlib.import_module(f"{package}.part")
        assert seen == [1]

    def test_calls_back_whoever_asked_once(self, package: str) -> None:
        one: list[ModuleType] = []
        other: list[ModuleType] = []
        for then in (one.append, other.append):
            when_imported(package, then)
        when_imported(package, other.append)
        module = importlib.import_module(package)
        assert (one, other) == ([module], [module])

    def test_calls_back_at_once_if_it_is_imported_already(self, package: str) -> None:
        part = importlib.import_module(f"{package}.part")
        seen: list[ModuleType] = []
        when_imported(f"{package}.part", seen.append)
        assert seen == [part]

    def test_looking_a_module_up_does_not_use_the_callback_up(self, package: str) -> None:
        seen: list[ModuleType] = []
        when_imported(package, seen.append)
        assert importlib.util.find_spec(package) is not None
        assert importlib.util.find_spec(package) is not None
        assert seen == []
        importlib.import_module(package)
        assert len(seen) == 1

    def test_calls_back_after_a_reload(self, package: str, tmp_path: Path) -> None:
        seen: list[int] = []
        part = importlib.import_module(f"{package}.part")
        when_imported(f"{package}.part", lambda module: seen.append(module.number))
        (tmp_path / package / "part.py").write_text("number = 'two'\n")
        importlib.reload(part)
        assert seen == [1, "two"]

    def test_calls_back_once_for_many_threads(self, package: str) -> None:
        seen: list[ModuleType] = []
        when_imported(package, seen.append)
        threads = [threading.Thread(target=importlib.import_module, args=(package,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) == 1

    def test_missing_and_broken_modules_fail_as_ever(self, package: str) -> None:
        when_imported(f"{package}.missing", pytest.fail)
        when_imported(f"{package}.broken", pytest.fail)
        with pytest.raises(ModuleNotFoundError, match="missing"):
            importlib.import_module(f"{package}.missing")
        with pytest.raises(RuntimeError, match="broken"):
            importlib.import_module(f"{package}.broken")

    def test_the_module_looks_as_if_nothing_had_happened(self, package: str) -> None:
        when_imported(f"{package}.part", lambda module: None)
        part = importlib.import_module(f"{package}.part")
        assert part.__spec__ is not None
        assert type(part.__loader__).__name__ == "SourceFileLoader"
        assert part.__loader__.get_source(part.__name__) == "number = 1\n"


class TestChangedUpstream:
    """Functions that are wrapped may go away: that must not break the import that they are part of."""

    def test_trainer_without_the_function_warns(self) -> None:
        for trainer in (SimpleNamespace(), SimpleNamespace(Trainer=type("Trainer", (), {}))):
            with pytest.warns(UserWarning, match="mamba2_hf.parameter_groups"):
                registration._keep_decay_off(trainer)

    def test_peft_without_refusals_needs_nothing(self) -> None:
        module = SimpleNamespace()
        registration._allow_lora_everywhere(module)
        registration._name_lora_targets(module)
        assert vars(module) == {}

    def test_sft_that_reads_logits_in_training_gets_them(self, config: Any) -> None:
        class Trainer:
            args = SimpleNamespace(loss_type="nll")

            def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False) -> Any:
                return model(**inputs).logits

        registration._return_logits_to_sft(SimpleNamespace(SFTTrainer=Trainer))
        ids = torch.arange(5)[None]
        model = mamba2_hf.Mamba2ForCausalLM(config).train()
        assert "logits" not in model(ids, labels=ids)
        assert Trainer().compute_loss(model, {"input_ids": ids, "labels": ids}, return_outputs=True).shape == (1, 5, 13)
        stock = transformers.Mamba2ForCausalLM(transformers.Mamba2Config.from_dict(config.to_dict()))
        assert Trainer().compute_loss(stock, {"input_ids": ids}).shape == (1, 5, 13)

    def test_sft_with_a_fused_head_is_left_alone(self) -> None:
        trainer = type("Trainer", (), {"compute_loss": lambda self: None})
        before = trainer.compute_loss
        registration._return_logits_to_sft(SimpleNamespace(SFTTrainer=trainer, add_fused_lm_head=None))
        assert trainer.compute_loss is before

    def test_what_looks_no_class_up_needs_nothing(self) -> None:
        module = SimpleNamespace()
        registration._find_ours_by_name(module)
        registration._load_ours_in_pipelines(module)
        registration._refuse_cached_prompts(module)
        assert vars(module) == {}

    def test_peft_s_own_defaults_stand(self) -> None:
        mapping = {"mamba2": ["in_proj"]}
        registration._name_lora_targets(SimpleNamespace(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING=mapping))
        assert mapping["mamba2"] == ["in_proj"]

    def test_wrapping_twice_is_wrapping_once(self) -> None:
        class Trainer:
            def get_decay_parameter_names(self, model: Any) -> list[str]:
                return [name for name, _ in model.named_parameters()]

        module = SimpleNamespace(Trainer=Trainer)
        registration._keep_decay_off(module)
        once = Trainer.get_decay_parameter_names
        registration._keep_decay_off(module)
        assert Trainer.get_decay_parameter_names is once
