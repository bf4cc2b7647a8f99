"""What is shown of a model is what the model does; the page holds those numbers and works by itself."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hybrids import ARCHITECTURES, make_hybrid
from transformers import AutoModelForCausalLM, AutoTokenizer

from mamba2_hf import Mamba2ForSequenceClassification
from mamba2_hf.errors import ArgumentError
from mamba2_hf.inspect import Inspection, look, write_page
from mamba2_hf.layers import Mamba2Mixer
from mamba2_hf.layers.mixer import ScanInputs
from mamba2_hf.ops.scan.reference import ssd_attention_matrix, ssd_recurrent
from mamba2_hf.pretrained import shipped_model_path
from mamba2_hf.theory import duality, semiseparable

IDS = torch.randint(3, 61, (21,), generator=torch.Generator().manual_seed(1)).tolist()
EXACT = {"rtol": 1e-9, "atol": 1e-10}
Make = Callable[..., Any]


@pytest.fixture(params=["mamba2", *ARCHITECTURES])
def model(request: pytest.FixtureRequest, make_mamba2: Make) -> Any:
    made = make_mamba2() if request.param == "mamba2" else make_hybrid(request.param)
    return made.double()


@pytest.fixture(scope="module")
def make_mamba2() -> Make:
    from mamba2_hf import Mamba2Config, Mamba2ForCausalLM

    def make(cls: Any = Mamba2ForCausalLM, **changes: Any) -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "n_groups": 2}
        return cls(Mamba2Config(**{"vocab_size": 61, **sizes, "state_size": 8, "pad_token_id": 0, **changes})).eval()

    return make


def scans(model: Any, ids: list[int]) -> list[ScanInputs]:
    """What the scans of a model are given, in order."""
    found: list[ScanInputs] = []
    mixers = [module for module in model.modules() if isinstance(module, Mamba2Mixer)]
    handles = [m.register_forward_pre_hook(lambda m, args: found.append(m.scan_inputs(args[0]))) for m in mixers]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return found


class TestLook:
    def test_matrices_are_the_models(self, model: Any) -> None:
        with torch.no_grad():
            expected = model(torch.tensor([IDS]), output_attentions=True).attentions
        views = look(model, IDS).mixers
        if any("ssd+" in blocks for blocks in getattr(model.config, "layer_blocks", [])):
            views = sorted(views, key=lambda view: (view.layer, view.kind != "ssd"))  # side by side: SSD counts first
        assert len(views) == len(expected)
        for view, matrix in zip(views, expected, strict=True):
            torch.testing.assert_close(view.matrix, matrix[0], **EXACT)
            distance = torch.arange(21.0)[:, None] - torch.arange(21.0)
            weight = matrix[0].abs()
            torch.testing.assert_close(view.reach, (weight * distance).sum((1, 2)) / weight.sum((1, 2)), **EXACT)

    def test_states_steps_and_gates_are_the_models(self, model: Any) -> None:
        found = look(model, IDS)
        views = [view for view in found.mixers if view.kind == "ssd"]
        for view, (x, dt, A, B, C, z) in zip(views, scans(model, IDS), strict=True):
            torch.testing.assert_close(view.step, dt[0].T, **EXACT)
            halved = torch.exp(A[:, None] * dt[0].T * view.half_life)
            torch.testing.assert_close(halved, torch.full_like(halved, 0.5), **EXACT)
            torch.testing.assert_close(view.gate, F.silu(z[0]).square().mean(-1).sqrt().T, **EXACT)
            assert view.state_size == (x.shape[3], B.shape[3])
            for place, position in enumerate(found.positions):
                parts = (tensor[:, : position + 1] for tensor in (x, dt))
                _, state = ssd_recurrent(*parts, A, B[:, : position + 1], C[:, : position + 1])
                values = torch.linalg.svdvals(state[0])
                rank = values.square().sum(1).square() / values.pow(4).sum(1)
                torch.testing.assert_close(view.state_norm[:, place], values.square().sum(1).sqrt(), **EXACT)
                torch.testing.assert_close(view.state_rank[:, place], rank, **EXACT)

    def test_surprise_is_the_loss(self, model: Any) -> None:
        ids = torch.tensor([IDS])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        found = look(model, ids)
        assert found.surprise[0] == 0
        torch.testing.assert_close(found.surprise[1:].mean(), F.cross_entropy(logits, ids[0, 1:]), **EXACT)

    def test_nothing_is_changed(self, model: Any) -> None:
        model.train()
        frozen = model.backbone.layers[0].eval()
        ids = torch.tensor([IDS])
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        look(model, IDS)
        assert model.training
        assert not frozen.training
        assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        with torch.no_grad():
            assert model.eval()(ids, output_attentions=True).attentions[0].shape[-1] == 21

    def test_long_texts_are_shown_in_blocks_and_cut(self, make_mamba2: Make) -> None:
        model = make_mamba2()
        whole, ids = look(model, IDS), IDS * 2
        coarse = look(model, ids, max_tokens=21, cells=16 * 6 * 6)
        assert (coarse.left_out, coarse.block, whole.left_out, whole.block) == (21, 4, 0, 1)
        for fine, view in zip(whole.mixers, coarse.mixers, strict=True):
            assert view.matrix.shape == (8, 6, 6)
            for row in range(6):
                for column in range(6):
                    cell = fine.matrix[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten()
                    assert view.matrix[0, row, column] == cell[cell.abs().argmax()]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_models_in_half_precision(self, make_mamba2: Make, dtype: torch.dtype) -> None:
        for made in (make_mamba2(), make_hybrid("plain")):
            found = look(made.to(dtype), IDS)
            assert all(torch.isfinite(view.matrix).all() for view in found.mixers)

    def test_one_token(self, make_mamba2: Make, tmp_path: Path) -> None:
        found = look(make_mamba2(), [5])
        assert found.mixers[0].matrix.shape == (8, 1, 1)
        assert found.positions == [0]
        assert write_page(found, tmp_path / "page.html") > 0

    def test_what_cannot_be_looked_at_is_refused(self, make_mamba2: Make) -> None:
        model = make_mamba2()
        for given, message in (
            ("text", "a text needs its model's tokenizer"),
            ([], "no tokens"),
            ([3, 61], "ids go from 3 to 61, and the model knows those from 0 to 60"),
            ([-1], "ids go from -1"),
            (torch.ones(2, 3), r"ids have shape \(2, 3\)"),
        ):
            with pytest.raises(ArgumentError, match=message):
                look(model, given)
        with pytest.raises(ArgumentError, match="max_tokens is 0"):
            look(model, IDS, max_tokens=0)
        with pytest.raises(ArgumentError, match="a Linear is no language model"):
            look(torch.nn.Linear(2, 2), IDS)
        with pytest.raises(ArgumentError, match="a Mamba2ForSequenceClassification is no language model"):
            look(make_mamba2(Mamba2ForSequenceClassification), IDS)


class Page(HTMLParser):
    """Checks that elements are closed in order; keeps the data and what the page would ask for from elsewhere."""

    VOID = {"meta", "br", "input", "link", "img"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.data: Any = None
        self.asked: list[str] = []
        self._in_data = False
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.asked += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)
        self._in_data = ("id", "data") in attributes

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data, self._in_data = json.loads(data), False


def numbers(text: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(text), "<f4")


@pytest.fixture(scope="module")
def shipped() -> Inspection:
    path = shipped_model_path("hybrid")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return look(model, "def f(x):\n    return '</script><b>' & é", AutoTokenizer.from_pretrained(path))


class TestPage:
    def test_it_holds_the_numbers_and_asks_for_nothing(self, shipped: Inspection, tmp_path: Path) -> None:
        size = write_page(shipped, tmp_path / "page.html", "a <title>")
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert size == len(text.encode()) < 200_000
        assert "<title>a &lt;title&gt;</title>" in text
        page = Page(text)
        assert not page.asked
        assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
        data = page.data
        assert "".join(data["tokens"]) == "def f(x):\n    return '</script><b>' & é"
        assert (data["block"], data["span"], data["leftOut"]) == (1, 1, 0)
        np.testing.assert_array_equal(numbers(data["surprise"]), shipped.surprise.numpy())
        assert [(m["layer"], m["kind"]) for m in data["mixers"]] == [
            (layer, "attention" if layer == 2 else "ssd") for layer in range(5)
        ]
        for mixer, view in zip(data["mixers"], shipped.mixers, strict=True):
            scale = numbers(mixer["scale"])
            np.testing.assert_array_equal(scale, view.matrix.abs().amax((1, 2)).numpy())
            q = np.frombuffer(base64.b64decode(mixer["entries"]), np.int8).reshape(view.matrix.shape) / 127
            error = np.abs(np.sign(q) * q * q * scale[:, None, None] - view.matrix.numpy())
            assert (error <= scale[:, None, None] * (np.abs(q) + 0.01) / 120).all()
            np.testing.assert_array_equal(numbers(mixer["reach"]), view.reach.numpy())
            if view.kind == "ssd":
                for name, series in (("step", view.step), ("gate", view.gate), ("stateRank", view.state_rank)):
                    np.testing.assert_array_equal(numbers(mixer[name]).reshape(series.shape), series.numpy())
                half_life = numbers(mixer["halfLife"]).reshape(view.half_life.shape)
                np.testing.assert_allclose(half_life, view.half_life.numpy(), rtol=1e-6)
                median = numbers(mixer["memory"]).reshape(-1, 3)[:, 1]
                np.testing.assert_allclose(median, np.median(view.half_life.numpy(), 1), rtol=1e-6)

    def test_long_series_are_means(self, shipped: Inspection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mamba2_hf.inspect.page.SERIES", 1000)
        write_page(shipped, tmp_path / "page.html")
        data = Page((tmp_path / "page.html").read_text(encoding="utf-8")).data
        span, view = data["span"], shipped.mixers[0]
        assert span == math.ceil(3 * 32 * len(shipped.ids) / 1000)
        means = numbers(data["mixers"][0]["gate"]).reshape(8, -1)
        np.testing.assert_allclose(means[:, 0], view.gate[:, :span].mean(1).numpy(), rtol=1e-6)
        rates = numbers(data["mixers"][0]["halfLife"]).reshape(8, -1)
        np.testing.assert_allclose(1 / rates[:, 0], (1 / view.half_life[:, :span]).mean(1).numpy(), rtol=1e-5)

    def test_a_state_that_never_fades_is_a_number(self, make_mamba2: Make, tmp_path: Path) -> None:
        model = make_mamba2(time_step_limit=(0.0, 1.0))
        with torch.no_grad():
            model.backbone.layers[0].mixer.dt_bias.fill_(-1e4)
        found = look(model, IDS)
        assert torch.isinf(found.mixers[0].half_life).all()
        write_page(found, tmp_path / "page.html")
        mixer = Page((tmp_path / "page.html").read_text(encoding="utf-8")).data["mixers"][0]
        assert np.isfinite(numbers(mixer["memory"])).all()
        assert (numbers(mixer["memory"]) > 1e30).all()

    @pytest.mark.slow
    def test_a_browser_shows_it_and_clicks_through(self, shipped: Inspection, tmp_path: Path) -> None:
        names = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome")
        browser = next(filter(None, map(shutil.which, names)), None)
        if browser is None:
            pytest.skip("no Chromium is installed; that the page parses and holds the numbers is tested above")
        page = tmp_path / "page.html"
        write_page(shipped, page)
        text = page.read_text(encoding="utf-8").replace("</body>", f"<script>{CLICKS}</script></body>")
        watched = "<script>window.errors = []; addEventListener('error', (e) => errors.push(e.message));</script>"
        page.write_text(text.replace("<head>", f"<head>{watched}"), encoding="utf-8")
        root = ["--no-sandbox"] if getattr(os, "geteuid", lambda: 1)() == 0 else []
        options = [
            "--headless",
            "--disable-gpu",
            "--virtual-time-budget=20000",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        shown = subprocess.run(
            [browser, *root, *options, "--dump-dom", page.as_uri()],
            **{"capture_output": True, "text": True, "encoding": "utf-8", "check": True, "timeout": 120},
        ).stdout
        found = re.search(r'<pre id="report">(.*?)</pre>', shown, re.DOTALL)
        assert found is not None, shown[-2000:]
        report = json.loads(re.sub(r"&(lt|gt|amp);", lambda m: {"lt": "<", "gt": ">", "amp": "&"}[m[1]], found[1]))
        assert report["errors"] == []
        heads = [(view, head) for view in shipped.mixers for head in range(view.heads)]
        assert len(report["clicked"]) == len(heads)
        for clicked, (view, head) in zip(report["clicked"], heads, strict=True):
            kind = "SSD" if view.kind == "ssd" else "attention"
            assert clicked["title"] == f"Layer {view.layer}, {kind}, head {head}"
            assert clicked["pixels"] > 0
            assert clicked["curves"] == (2 * view.heads if view.kind == "ssd" else 0)
        view, token = shipped.mixers[-1], 4
        row = view.matrix[-1, token, : token + 1]
        first, *best = report["readout"].splitlines()
        assert first == f"{token} {json.dumps(shipped.tokens[token])} draws most on"
        assert best[0].startswith(f"  {int(row.abs().argmax())} ")
        assert float(best[0].rpartition(": ")[2]) == pytest.approx(float(row[row.abs().argmax()]), rel=0.02)
        assert all(count > 0 for count in report["coloured"].values()), report["coloured"]


CLICKS = """
const clicked = [], coloured = {};
for (const button of document.querySelectorAll("#heads button")) {
  button.click();
  const canvas = document.getElementById("matrix");
  const image = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  clicked.push({
    title: document.getElementById("title").textContent,
    pixels: image.filter((v, i) => i % 4 === 0 && v < 250).length,
    curves: document.querySelectorAll("#states polyline").length,
  });
}
document.querySelectorAll("#tokens span")[4].click();
const readout = document.getElementById("readout").textContent;
const select = document.getElementById("color");
for (const option of select.options) {
  select.value = option.value;
  select.dispatchEvent(new Event("change"));
  const colours = [...document.querySelectorAll("#tokens span")].map((s) => s.style.background);
  coloured[option.value] = colours.filter((c) => c !== "" && c !== "rgb(255, 255, 255)").length;
}
document.querySelector("#memory .mark").dispatchEvent(new Event("click"));
document.querySelector("#gates canvas").click();
document.getElementById("matrix").dispatchEvent(new MouseEvent("mousemove", { clientX: 5, clientY: 5 }));
document.getElementById("matrix").click();
const report = document.createElement("pre");
report.id = "report";
report.textContent = JSON.stringify({ errors: window.errors, clicked, readout, coloured });
document.body.append(report);
"""


@pytest.mark.parametrize("name", ["mamba2", "hybrid"])
def test_trained_layers_are_attention_and_come_back(name: str) -> None:
    """Duality both ways for the models that ship: matrices from states, states from matrices ("Transformers are SSMs",
    Section 5).
    """
    model = AutoModelForCausalLM.from_pretrained(shipped_model_path(name), dtype=torch.float64).eval()
    ids = AutoTokenizer.from_pretrained(shipped_model_path(name))("def read(path):\n    with open(path) as f:")[
        "input_ids"
    ]
    views = [view for view in look(model, ids).mixers if view.kind == "ssd"]
    for view, (x, dt, A, B, C, _) in zip(views, scans(model, ids), strict=True):
        y, final = ssd_recurrent(x, dt, A, B, C)
        form = duality.as_attention(x[0], dt[0], A, B[0], C[0])
        torch.testing.assert_close(form("quadratic"), y[0], **EXACT)
        torch.testing.assert_close(form.matrices(), ssd_attention_matrix(dt, A, B, C)[0], **EXACT)
        torch.testing.assert_close(form.matrices(), view.matrix, **EXACT)
        heads = duality.as_state_space(form)
        for head in (0, len(heads) - 1):
            torch.testing.assert_close(heads[head].matrix(), view.matrix[head], **EXACT)
            torch.testing.assert_close(heads[head].states(x[0, :, head])[-1], final[0, head], **EXACT)
            found = duality.from_matrix(view.matrix[head], 1e-14)
            torch.testing.assert_close(found(x[0, :, head]), y[0, :, head], **EXACT)
            assert semiseparable.order(view.matrix[head]) <= (len(ids) + 1) // 2
