"""Graphs of a model for other runtimes: ONNX with and without states, OpenVINO, TorchScript traces of any length."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hybrids import make_hybrid
from torch import Tensor, nn

from mamba2_hf import Mamba2Cache, export_onnx
from mamba2_hf.errors import ArgumentError

Make = Callable[..., Any]
Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]
CLOSE = {"rtol": 0, "atol": 1e-4}
pytestmark = pytest.mark.filterwarnings("ignore")  # from the exporters


class Logits(nn.Module):
    """A model as a function of tensors alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=False)[0]


@pytest.fixture(scope="module")
def model(tiny_model: Make) -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def small(tiny_model: Make) -> Any:
    """Of one layer: the exporter takes seconds for each."""
    return tiny_model(num_hidden_layers=1)


@pytest.fixture(scope="module")
def paths(small: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return export_onnx(small, tmp_path_factory.mktemp("onnx") / "model")


def in_onnxruntime(path: Path) -> tuple[list[str], list[str], Run]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [[tensor.name for tensor in tensors] for tensors in (session.get_inputs(), session.get_outputs())]
    return names[0], names[1], lambda feed: session.run(None, feed)


def in_openvino(path: Path) -> tuple[list[str], list[str], Run]:
    import openvino

    compiled = openvino.compile_model(openvino.convert_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [[tensor.any_name for tensor in tensors] for tensors in (compiled.inputs, compiled.outputs)]
    return names[0], names[1], lambda feed: [compiled(feed)[output] for output in compiled.outputs]


@pytest.mark.parametrize(
    "load",
    [
        in_onnxruntime,
        pytest.param(
            in_openvino,
            marks=pytest.mark.skipif(not importlib.util.find_spec("openvino"), reason="openvino is not installed"),
        ),
    ],
)
def test_prefill_and_steps_go_on_from_each_other(small: Any, paths: tuple[Path, Path], load: Any) -> None:
    states = ["conv_0", "ssm_0"]
    inputs, outputs, prefill = load(paths[0])
    assert inputs == ["input_ids", "attention_mask"]
    assert outputs == ["logits", *states]
    inputs, outputs, step = load(paths[1])
    assert inputs == ["input_ids", *states]
    assert outputs == ["logits", *(f"new_{name}" for name in states)]
    for rows, tokens in ((2, 6), (3, 70), (1, 2)):
        ids = torch.randint(3, 61, (rows, tokens + 3), generator=torch.Generator().manual_seed(tokens))
        mask = torch.ones_like(ids)
        mask[0, : tokens // 2] = 0
        with torch.no_grad():
            expected = small(ids, attention_mask=mask).logits[:, tokens - 1 :]
        found = prefill({"input_ids": ids[:, :tokens].numpy(), "attention_mask": mask[:, :tokens].numpy()})
        logits = [found[0]]
        for column in range(tokens, tokens + 3):
            found = step(
                {"input_ids": ids[:, column : column + 1].numpy(), **dict(zip(states, found[1:], strict=True))}
            )
            logits.append(found[0])
        torch.testing.assert_close(torch.from_numpy(np.concatenate(logits, 1)), expected, **CLOSE)


def test_states_of_every_layer_are_named(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In what the exporter is given: the names of each graph, and what its module makes of tensors."""
    given: list[tuple[nn.Module, list[str], list[str]]] = []

    def export(module: nn.Module, arguments: Any, **options: Any) -> None:
        given.append((module, options["input_names"], options["output_names"]))

    monkeypatch.setattr(torch.onnx, "export", export)
    export_onnx(model, tmp_path)
    (prefill, inputs, outputs), (step, its_inputs, its_outputs) = given
    states = ["conv_0", "ssm_0", "conv_1", "ssm_1"]
    assert inputs == ["input_ids", "attention_mask"]
    assert outputs == ["logits", *states]
    assert its_inputs == ["input_ids", *states]
    assert its_outputs == ["logits", *(f"new_{name}" for name in states)]
    ids = torch.randint(3, 61, (2, 7))
    with torch.no_grad():
        expected = model(ids[:, :-1]).past_key_values
        found = prefill(ids[:, :-1], torch.ones_like(ids[:, :-1]))[1:]
        assert_states(found, expected)
        logits, *found = step(ids[:, -1:], list(found))
        torch.testing.assert_close(logits, model(ids[:, -1:], past_key_values=expected).logits, **CLOSE)
        assert_states(found, expected)


def assert_states(found: Sequence[Tensor], cache: Mamba2Cache) -> None:
    expected = [state for layer in cache.layers for state in (layer.conv, layer.ssm)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.slow
def test_a_forward_of_a_hybrid_with_a_mask_is_a_graph(tmp_path: Path) -> None:
    model = make_hybrid()
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", min=2)}
    example = torch.randint(3, 61, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    example[1][0, :3] = 0
    with torch.no_grad():
        torch.onnx.export(
            *(Logits(model), example),
            f=tmp_path / "model.onnx",
            input_names=["ids", "mask"],
            dynamo=True,
            verbose=False,
            dynamic_shapes=(dims, dims),
        )
    run = in_onnxruntime(tmp_path / "model.onnx")[2]
    for rows, tokens in ((2, 9), (3, 17)):
        ids, mask = torch.randint(3, 61, (rows, tokens)), torch.ones(rows, tokens, dtype=torch.long)
        mask[0, :2] = mask[-1, -1:] = 0
        [logits] = run({"ids": ids.numpy(), "mask": mask.numpy()})
        with torch.no_grad():
            expected = model(ids, attention_mask=mask).logits
        keep = mask.bool()
        torch.testing.assert_close(torch.from_numpy(logits)[keep], expected[keep], **CLOSE)


@pytest.mark.parametrize("traced", [50, 700])
def test_a_trace_takes_any_length(model: Any, traced: int) -> None:
    with torch.no_grad():
        graph = torch.jit.trace(Logits(model), torch.randint(3, 61, (2, traced)), check_trace=False)
        for rows, tokens in ((2, traced), (2, 1), (3, 65), (1, 700)):
            ids = torch.randint(3, 61, (rows, tokens))
            torch.testing.assert_close(graph(ids), model(ids).logits, **CLOSE)


def test_refusals(tiny_model: Make, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="this one has attention, ssd"):
        export_onnx(make_hybrid("plain"), tmp_path / "model")
    with pytest.raises(ArgumentError, match=r"training mode: export model.eval\(\).cpu\(\)"):
        export_onnx(tiny_model().train(), tmp_path / "model")
    assert not (tmp_path / "model").exists()
