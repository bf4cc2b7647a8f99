"""Checkpoints: stock's format both ways, the original's, and a refusal for what is incomplete or broken."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers import (
    Mamba2ForCausalLM as StockForCausalLM,
)
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config as StockConfig
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from mamba2_hf import Mamba2Config, Mamba2ForCausalLM, Mamba2ForSequenceClassification, Mamba2Model
from mamba2_hf.errors import CheckpointError, ConfigurationError

Make = Callable[..., Any]
FP32 = ("A_log", "D", "dt_bias")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 61, (2, 19), generator=torch.Generator().manual_seed(1))


def is_fp32(name: str) -> bool:
    return name.rpartition(".")[2] in FP32


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0, msg=name)


def write(folder: Path, state_dict: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """A checkpoint from whatever tensors and keys a test needs."""
    folder.mkdir(exist_ok=True)
    contiguous = {name: tensor.detach().clone().contiguous() for name, tensor in state_dict.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def agree(ours: Any, stock: Any, ids: Tensor) -> None:
    if ours.config.n_groups == 1 or "group_size" in inspect.signature(MambaRMSNormGated).parameters:
        torch.testing.assert_close(logits(ours, ids), logits(stock, ids), rtol=0, atol=2e-5)
    # else this transformers still norms all groups as one


VARIANTS: dict[str, dict[str, Any]] = {
    "biases": {"use_bias": True},
    "no_biases": {"use_bias": False, "use_conv_bias": False},
    "one_group": {"n_groups": 1},
    "eight_groups_tied": {"n_groups": 8, "tie_word_embeddings": True},
    "limits": {
        "time_step_limit": (0.01, 0.05),
        "residual_in_fp32": False,
        "conv_kernel": 3,
        "layer_norm_epsilon": 1e-3,
    },
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_what_is_saved_here_loads_in_stock(
    tiny_model: Make, tmp_path: Path, ids: Tensor, changes: dict[str, Any]
) -> None:
    ours = tiny_model(**changes)
    ours.save_pretrained(tmp_path)
    stock, info = StockForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    same_tensors(dict(stock.state_dict()), dict(ours.state_dict()))
    agree(ours, stock, ids)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_what_stock_saves_loads_here(tiny_config: Make, tmp_path: Path, ids: Tensor, changes: dict[str, Any]) -> None:
    torch.manual_seed(3)
    config = {**tiny_config(**changes).to_dict(), "initializer_range": 0.1, "rescale_prenorm_residual": True}
    stock = StockForCausalLM(StockConfig(**config)).eval()
    stock.save_pretrained(tmp_path / "stock")
    ours, info = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert type(ours) is Mamba2ForCausalLM
    assert not any(info.values())
    same_tensors(dict(ours.state_dict()), dict(stock.state_dict()))
    agree(ours, stock, ids)
    ours.save_pretrained(tmp_path / "ours")
    same_tensors(weights(tmp_path / "ours"), weights(tmp_path / "stock"))  # names and shapes, to the bit


def test_importing_the_package_leaves_stock_alone(tiny_config: Make, tmp_path: Path) -> None:
    stock = StockForCausalLM(StockConfig(**tiny_config().to_dict()))
    assert type(stock).__module__.startswith("transformers.")
    stock.save_pretrained(tmp_path)
    assert weights(tmp_path).keys() == stock.state_dict().keys()


def test_shards(tiny_model: Make, tmp_path: Path, ids: Tensor) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = Mamba2ForCausalLM.from_pretrained(tmp_path)
    same_tensors(dict(loaded.state_dict()), dict(model.state_dict()))
    assert StockForCausalLM.from_pretrained(tmp_path).num_parameters() == model.num_parameters()


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_decay_skip_and_step_bias_load_exactly(self, tiny_model: Make, tmp_path: Path, dtype: torch.dtype) -> None:
        model = tiny_model()
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert loaded.dtype == dtype
        for name, tensor in loaded.state_dict().items():
            expected = model.state_dict()[name]
            torch.testing.assert_close(tensor, expected if is_fp32(name) else expected.to(dtype), rtol=0, atol=0)

    @pytest.mark.parametrize("cast", ["bfloat16", "half", "to"])
    def test_casts_leave_them_exact(self, tiny_model: Make, cast: str) -> None:
        model, expected = tiny_model(), tiny_model().state_dict()
        model = model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == (torch.float32 if is_fp32(name) else model.dtype), name
            if is_fp32(name):
                assert torch.equal(tensor, expected[name])
        assert model.double().state_dict()["backbone.layers.0.mixer.A_log"].dtype == torch.float64

    def test_new_half_precision_models_draw_them_in_fp32(self, tiny_config: Make) -> None:
        model = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if is_fp32(name) else torch.bfloat16), name
        A_log = model.backbone.layers[0].mixer.A_log
        assert not torch.equal(A_log, A_log.bfloat16().float())

    def test_a_half_precision_checkpoint_round_trips(self, tiny_model: Make, tmp_path: Path, ids: Tensor) -> None:
        model = tiny_model().bfloat16()
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.dtype == loaded.config.dtype == torch.bfloat16
        same_tensors(dict(loaded.state_dict()), dict(model.state_dict()))
        torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=0, atol=0)

    def test_bf16_is_closer_to_fp32_than_stock(self, tiny_model: Make, tmp_path: Path, ids: Tensor) -> None:
        exact = tiny_model()
        exact.save_pretrained(tmp_path)
        expected = logits(exact, ids)
        errors = [
            (logits(cls.from_pretrained(tmp_path, dtype=torch.bfloat16), ids) - expected).abs().mean()
            for cls in (Mamba2ForCausalLM, StockForCausalLM)
        ]
        assert errors[0] < errors[1]

    def test_device_map(self, tiny_model: Make, tmp_path: Path, ids: Tensor) -> None:
        model = tiny_model()
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.float32)
        torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=0, atol=0)


class TestLegacyKeys:
    """``backbone.embedding.weight``, as state-spaces and early conversions name it."""

    @pytest.fixture(params=["safetensors", "bin", "shards"])
    def save(self, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[dict[str, Tensor], Any], Path]:
        def save(state_dict: dict[str, Tensor], config: Any) -> Path:
            folder = write(tmp_path / "legacy", state_dict, config.to_dict())
            file = folder / "model.safetensors"
            if request.param == "bin":
                torch.save(load_file(file), folder / "pytorch_model.bin")
                file.unlink()
            elif request.param == "shards":
                tensors, shards = (
                    load_file(file),
                    ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
                )
                parts = {name: shards[index % 2] for index, name in enumerate(tensors)}
                for shard in shards:
                    part = {name: tensors[name] for name in tensors if parts[name] == shard}
                    save_file(part, folder / shard, metadata={"format": "pt"})
                index = {"metadata": {"total_size": 1}, "weight_map": parts}
                (folder / "model.safetensors.index.json").write_text(json.dumps(index))
                file.unlink()
            return folder

        return save

    @pytest.mark.parametrize("tied", [False, True])
    def test_loads_and_is_saved_under_the_modern_names(
        self, tiny_model: Make, save: Make, tmp_path: Path, ids: Tensor, tied: bool
    ) -> None:
        model = tiny_model(tie_word_embeddings=tied)
        old = {name.replace("embeddings", "embedding"): tensor for name, tensor in model.state_dict().items()}
        folder = save(old, model.config)
        for cls in (Mamba2ForCausalLM, AutoModelForCausalLM):
            loaded, info = cls.from_pretrained(folder, output_loading_info=True)
            assert not any(info.values())
            torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=0, atol=0)
        loaded.save_pretrained(tmp_path / "again")
        model.save_pretrained(tmp_path / "modern")
        same_tensors(weights(tmp_path / "again"), weights(tmp_path / "modern"))
        assert "backbone.embeddings.weight" in weights(tmp_path / "again")
        base = AutoModel.from_pretrained(folder)
        assert torch.equal(base.embeddings.weight, model.backbone.embeddings.weight)

    def test_base_models_and_state_dicts(self, tiny_model: Make, tmp_path: Path) -> None:
        base = tiny_model(Mamba2Model)
        old = {name.replace("embeddings", "embedding"): tensor for name, tensor in base.state_dict().items()}
        folder = write(tmp_path / "legacy", old, base.config.to_dict())
        same_tensors(dict(Mamba2Model.from_pretrained(folder).state_dict()), dict(base.state_dict()))
        head = Mamba2ForCausalLM.from_pretrained(folder)
        assert torch.equal(head.backbone.embeddings.weight, base.embeddings.weight)
        other = tiny_model(Mamba2Model, seed=7)
        other.load_state_dict(old)
        same_tensors(dict(other.state_dict()), dict(base.state_dict()))
        causal = tiny_model(seed=8)
        result = causal.load_state_dict({f"backbone.{name}": tensor for name, tensor in old.items()}, strict=False)
        assert result.missing_keys == ["lm_head.weight"]
        assert torch.equal(causal.backbone.embeddings.weight, base.embeddings.weight)

    def test_a_key_mapping_of_the_callers_is_applied_too(self, tiny_model: Make, tmp_path: Path) -> None:
        model = tiny_model()
        odd = {
            name.replace("embeddings", "embedding").replace("mixer", "blender"): tensor
            for name, tensor in model.state_dict().items()
        }
        folder = write(tmp_path / "odd", odd, model.config.to_dict())
        loaded = Mamba2ForCausalLM.from_pretrained(folder, key_mapping={r"blender": "mixer"})
        same_tensors(dict(loaded.state_dict()), dict(model.state_dict()))


class TestStateSpaces:
    """A folder as ``mamba_ssm`` writes it: no model_type, its own key of the embedding, a padded vocabulary."""

    CONFIG: dict[str, Any] = {
        **{"d_model": 32, "d_intermediate": 0, "n_layer": 2, "vocab_size": 61, "rms_norm": True},
        **{"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16, "tie_embeddings": True},
        **{"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 8}, "attn_layer_idx": [], "attn_cfg": {}},
    }

    def folder(self, tmp_path: Path, model: Any, **changes: Any) -> Path:
        old = {name.replace("embeddings", "embedding"): tensor for name, tensor in model.state_dict().items()}
        torch.save(old, tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text(json.dumps({**self.CONFIG, **changes}))
        return tmp_path

    def test_loads(self, tiny_model: Make, tmp_path: Path, ids: Tensor) -> None:
        sizes = {"vocab_size": 64, "n_groups": 1, "use_bias": False, "tie_word_embeddings": True}
        model = tiny_model(**sizes)
        loaded, info = Mamba2ForCausalLM.from_pretrained(self.folder(tmp_path, model), output_loading_info=True)
        assert not any(info.values())
        assert loaded.lm_head.weight is loaded.backbone.embeddings.weight
        torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=0, atol=0)
        loaded.save_pretrained(tmp_path / "modern")
        stock = StockForCausalLM.from_pretrained(tmp_path / "modern")
        torch.testing.assert_close(logits(stock, ids), logits(model, ids), rtol=0, atol=2e-5)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"ssm_cfg": {}}, "Mamba1"),
            ({"attn_layer_idx": [1]}, "hybrid"),
            ({"d_intermediate": 64}, "hybrid"),
            ({"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "rmsnorm": False}}, "rmsnorm"),
        ],
    )
    def test_refuses_other_models_by_name(
        self, tiny_model: Make, tmp_path: Path, changes: dict[str, Any], match: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=match):
            Mamba2ForCausalLM.from_pretrained(self.folder(tmp_path, tiny_model(), **changes))


class TestBrokenCheckpoints:
    @pytest.mark.parametrize("missing", ["layers.0.mixer.A_log", "layers.1.norm.weight", "embeddings.weight"])
    @pytest.mark.parametrize("cls", [Mamba2ForCausalLM, Mamba2ForSequenceClassification, Mamba2Model])
    def test_a_missing_weight_is_named(self, tiny_model: Make, tmp_path: Path, cls: type[Any], missing: str) -> None:
        model = tiny_model()
        rest = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(missing)}
        folder = write(tmp_path / "cut", rest, model.config.to_dict())
        with pytest.raises(CheckpointError, match=f"{folder}: .*{missing} is missing"):
            cls.from_pretrained(folder)
        assert cls.from_pretrained(folder, ignore_mismatched_sizes=True).num_parameters()

    def test_many_are_counted(self, tiny_model: Make, tmp_path: Path) -> None:
        config = {**tiny_model().config.to_dict(), "num_hidden_layers": 4}
        folder = write(tmp_path / "short", dict(tiny_model().state_dict()), config)
        with pytest.raises(CheckpointError, match=r"layers\.2\.mixer\.A_log is missing; .* \(and \d+ more\)"):
            Mamba2ForCausalLM.from_pretrained(folder)

    @pytest.mark.parametrize("name", ["backbone.layers.1.mixer.D", "lm_head.weight"])
    def test_a_wrong_shape_is_named(self, tiny_model: Make, tmp_path: Path, name: str) -> None:
        model = tiny_model()
        state_dict = {**model.state_dict(), name: model.state_dict()[name][:-1]}
        folder = write(tmp_path / "odd", state_dict, model.config.to_dict())
        found, expected = (str(tuple(tensors[name].shape)) for tensors in (state_dict, model.state_dict()))
        with pytest.raises(CheckpointError) as caught:
            Mamba2ForCausalLM.from_pretrained(folder)
        assert f"{folder}: {name} has shape {found}, the model expects {expected}" in str(caught.value)
        loaded, info = Mamba2ForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True)
        assert {key for key, *_ in info["mismatched_keys"]} == {name}
        assert loaded.state_dict()[name].shape == model.state_dict()[name].shape

    @pytest.mark.parametrize("name", FP32)
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_value_that_is_not_finite_is_named(
        self, tiny_model: Make, tmp_path: Path, name: str, value: float
    ) -> None:
        model = tiny_model()
        key = f"backbone.layers.1.mixer.{name}"
        state_dict = {**model.state_dict(), key: model.state_dict()[key].clone().index_fill(0, torch.tensor(3), value)}
        folder = write(tmp_path / "bad", state_dict, model.config.to_dict())
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(CheckpointError, match=f"{folder}: {key} holds NaN or Inf"):
                AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def test_a_state_dict_is_held_to_the_same(self, tiny_model: Make) -> None:
        model = tiny_model()
        state_dict = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("1.mixer.D")}
        with pytest.raises(CheckpointError, match=r"the state dict: backbone\.layers\.1\.mixer\.D is missing"):
            Mamba2ForCausalLM.from_pretrained(None, config=model.config, state_dict=state_dict)

    def test_a_head_may_be_new(self, tiny_model: Make, tmp_path: Path) -> None:
        base = tiny_model(Mamba2Model)
        base.save_pretrained(tmp_path)
        for cls, head in ((Mamba2ForCausalLM, "lm_head"), (AutoModelForSequenceClassification, "score")):
            loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
            assert info["missing_keys"] == {f"{head}.weight"}
            same_tensors(dict(loaded.backbone.state_dict()), dict(base.state_dict()))
            assert torch.isfinite(getattr(loaded, head).weight).all()

    def test_loading_info_comes_only_when_asked_for(self, tiny_model: Make, tmp_path: Path) -> None:
        tiny_model().save_pretrained(tmp_path)
        assert isinstance(Mamba2ForCausalLM.from_pretrained(tmp_path), Mamba2ForCausalLM)
        _, info = Mamba2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert set(info) == {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}


class TestInitialization:
    SIZES: dict[str, Any] = {"hidden_size": 64, "num_heads": 16, "vocab_size": 997, "num_hidden_layers": 4}

    @pytest.fixture
    def config(self, tiny_config: Make) -> Mamba2Config:
        return tiny_config(**self.SIZES)

    def test_new_models_start_as_the_original(self, config: Mamba2Config) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        assert model.backbone.embeddings.weight.std().item() == pytest.approx(0.02, rel=0.03)
        mixers = [layer.mixer for layer in model.backbone.layers]
        A = -torch.stack([mixer.A for mixer in mixers])
        assert A.min() >= 1
        assert A.max() <= 16
        assert A.mean().item() == pytest.approx(8.5, abs=1.5)  # uniform, not a ramp
        assert len(A.unique()) > 60
        dt = torch.nn.functional.softplus(torch.stack([mixer.dt_bias for mixer in mixers])).log10()
        assert dt.min() >= -3.001
        assert dt.max() <= -0.999
        assert dt.mean().item() == pytest.approx(-2, abs=0.3)  # uniform in the logarithm
        for mixer in mixers:
            assert mixer.in_proj.weight.abs().max().item() == pytest.approx(64**-0.5, rel=0.01)
            assert mixer.out_proj.weight.abs().max().item() == pytest.approx((128 * 4) ** -0.5, rel=0.01)
            assert mixer.conv1d.weight.abs().max().item() == pytest.approx(0.5, rel=0.02)
            assert mixer.conv1d.bias.abs().max() <= 0.5
            assert not mixer.in_proj.bias.any()
            assert not mixer.out_proj.bias.any()
            for ones in (mixer.D, mixer.norm.weight):
                assert torch.equal(ones, torch.ones_like(ones))
        assert model.lm_head.weight.abs().max().item() == pytest.approx(64**-0.5, rel=0.01)

    def test_options(self, tiny_config: Make) -> None:
        options = {"initializer_range": 0.5, "time_step_min": 0.2, "time_step_max": 0.3, "time_step_floor": 0.25}
        model = Mamba2ForCausalLM(tiny_config(**self.SIZES, **options, rescale_prenorm_residual=False))
        assert model.backbone.embeddings.weight.std().item() == pytest.approx(0.5, rel=0.03)
        mixer = model.backbone.layers[0].mixer
        dt = torch.nn.functional.softplus(mixer.dt_bias)
        assert dt.min() >= 0.2499
        assert dt.max() <= 0.3001
        assert mixer.out_proj.weight.abs().max().item() == pytest.approx(128**-0.5, rel=0.01)

    def test_a_seed_says_it_all(self, config: Mamba2Config) -> None:
        first, second, third = (self.seeded(config, seed) for seed in (5, 5, 6))
        same_tensors(first, second)
        assert not torch.equal(first["lm_head.weight"], third["lm_head.weight"])

    @staticmethod
    def seeded(config: Mamba2Config, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return dict(AutoModelForCausalLM.from_config(config).state_dict())

    def test_running_it_again_rescales_nothing_twice(self, config: Mamba2Config) -> None:
        model = Mamba2ForCausalLM(config)
        for _ in range(3):
            model._init_weights(model.backbone.layers[0].mixer)
        bound = model.backbone.layers[0].mixer.out_proj.weight.abs().max().item()
        assert bound == pytest.approx((128 * 4) ** -0.5, rel=0.01)

    def test_loading_changes_no_weight(self, tiny_model: Make, tmp_path: Path) -> None:
        """Whatever the file says about initialization: three generations are equal to the bit."""
        model = tiny_model()
        config = {**model.config.to_dict(), "rescale_prenorm_residual": True, "initializer_range": 3.0}
        folder = write(tmp_path / "0", dict(model.state_dict()), config)
        for generation in range(1, 4):
            loaded = Mamba2ForCausalLM.from_pretrained(folder)
            same_tensors(dict(loaded.state_dict()), dict(model.state_dict()))
            folder = tmp_path / str(generation)
            loaded.save_pretrained(folder)
        assert not json.loads((folder / "config.json").read_text())["rescale_prenorm_residual"]
        same_tensors(dict(StockForCausalLM.from_pretrained(folder).state_dict()), dict(model.state_dict()))

    def test_saving_leaves_the_config_of_the_model_alone(self, config: Mamba2Config, tmp_path: Path) -> None:
        model = Mamba2ForCausalLM(config)
        model.save_pretrained(tmp_path)
        assert model.config.rescale_prenorm_residual
        with pytest.raises(TypeError):
            model.save_pretrained()
        assert model.config.rescale_prenorm_residual

    def test_modules_of_a_subclass_are_initialized(self, tiny_model: Make, tmp_path: Path) -> None:
        class WithHead(Mamba2Model):
            def __init__(self, config: Mamba2Config) -> None:
                super().__init__(config)
                self.head = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.LayerNorm(8), torch.nn.Embedding(3, 8))
                self.post_init()

        tiny_model(Mamba2Model).save_pretrained(tmp_path)
        loaded = WithHead.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
        assert torch.equal(loaded.head[1].weight, torch.ones(8))
        assert all(torch.isfinite(parameter).all() for parameter in loaded.head.parameters())
