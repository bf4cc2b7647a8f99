"""The experiments on toys: the corpus, the tasks, and runs that go on from where they stopped."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import compare
import corpus
import language
import numpy as np
import pytest
import recall
import torch
import torch.nn.functional as F
import trainer
import typer
import where
from trainer import Recipe, Shape
from transformers import AutoTokenizer
from typer.testing import CliRunner

from mamba2_hf.pretrained import shipped_model_path
from mamba2_hf.theory.heads import OWN
from mamba2_hf.training import no_decay_parameter_names

TOY = Shape("mamba2", 32, 1, state=16, head_dim=16)
MULTI_QUERY = dataclasses.replace(TOY, pattern="multi-query")
SEQUENTIAL = dataclasses.replace(TOY, projections="sequential")
PYTHON = """def a_function_named_{0}(value_of_{0}):
    return value_of_{0} * 12 + some_other_name_{0}


class ThingOfTheKind{0}(BaseOfThings):
    attribute_of_this_thing_{0} = None
"""


def wheel(folder: Path, name: str, licence: str, files: dict[str, str]) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{licence}\n"
        )
        for file, text in files.items():
            archive.writestr(f"{name}/{file}", text)
    return path


def invoke(main: Any, *arguments: object) -> Any:
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Token files of random tokens, in documents of 100."""
    folder = tmp_path / "data"
    folder.mkdir()
    for seed, (split, count) in enumerate({"train": 60, "validation": 10, "test": 10}.items()):
        tokens = np.random.default_rng(seed).integers(1, 48, (count, 100), dtype=np.uint16)
        tokens[:, [0, -1]] = 0
        np.save(folder / f"{split}.npy", tokens.ravel())
    return folder


# --- corpus ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("licence", "permissive"),
    [
        ("MIT", True),
        ("BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0", True),
        ("Python Software Foundation License", True),
        ("GNU Lesser General Public License v2 or later (LGPLv2+)", False),
        ("Public Domain; BSD License; GNU General Public License (GPL)", False),
        ("MPL-2.0", False),
        ("NVIDIA Proprietary Software", False),
        ("", False),
    ],
)
def test_only_permissive_licences_are_taken(licence: str, permissive: bool) -> None:
    assert corpus.is_permissive(licence) is permissive


def test_an_archive_says_its_licence_and_gives_its_python_files(tmp_path: Path) -> None:
    path = wheel(tmp_path, "thing", "Classifier: License :: OSI Approved :: MIT License", {"a.py": "1\n", "b.txt": "2"})
    project = corpus.read_archive(path)
    assert (project.name, project.version, project.licence) == ("thing", "1.0", "MIT License")
    assert project.files == {"thing/a.py": b"1\n"}


def test_a_repository_gives_what_its_project_wrote_under_its_licence(tmp_path: Path) -> None:
    folder = tmp_path / "owner" / "thing"
    gpl = "# GNU General Public License v3.0+\n1\n"
    files = {
        "a.py": "1\n",
        "pkg/b.py": "2\n",
        "c.txt": "3\n",
        "pkg/gpl.py": gpl,
        "pkg/vendor/d.py": "4\n",
        "e_pb2.py": "5\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "link.py").symlink_to("a.py")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "all"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "list.txt").write_text("# a comment\nowner/thing Apache-2.0 AND MIT\n")
    (project,) = corpus.read_repositories(tmp_path / "list.txt", tmp_path)
    assert (project.name, project.licence) == ("owner/thing", "Apache-2.0 AND MIT")
    assert project.files == {"a.py": b"1\n", "pkg/b.py": b"2\n"}
    assert len(project.version) == 40


def test_what_is_held_out_stays_and_its_copy_among_the_files_to_train_on_goes() -> None:
    held_out = next(name for name in map("project{}".format, range(999)) if corpus.split_of(name) == "test")
    trained = next(name for name in map("project{}".format, range(999)) if corpus.split_of(name) == "train")
    shared, own = PYTHON.format(1), PYTHON.format(2)
    projects = [
        corpus.Project(trained, "1", "MIT", "0", {"a.py": shared.encode(), "b.py": own.encode(), "c.py": b"\xff" * 30}),
        corpus.Project(held_out, "1", "MIT", "0", {"z.py": (shared + "# one line more, long enough\n").encode()}),
        corpus.Project("closed", "1", "proprietary", "0", {"d.py": PYTHON.format(3).encode()}),
    ]
    documents, manifest, skipped = corpus.collect(projects, None)
    assert {(d.project, d.path, d.split) for d in documents} == {(held_out, "z.py", "test"), (trained, "b.py", "train")}
    assert {row["project"]: row["files"] for row in manifest} == {held_out: 1, trained: 1}
    assert skipped["a copy of another file"] == 1
    assert skipped["not UTF-8"] == 1
    assert skipped["of a licence that is not known as permissive"] == 1


def test_tokens_give_the_documents_back(tmp_path: Path) -> None:
    names = {
        split: [n for n in map("project{}".format, range(999)) if corpus.split_of(n) == split][:2]
        for split in corpus.stdlib_corpus.SPLITS
    }
    documents = [
        corpus.Document(name, "a.py", PYTHON.format(name), name, split) for split in names for name in names[split]
    ]
    manifest = [{"project": "project", "split": "train"}]
    corpus.write(tmp_path, documents, manifest, corpus.Counter(), 0, shipped_model_path())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for split in names:
        stream = np.load(tmp_path / f"{split}.npy")
        assert stream.dtype == np.uint16
        read = [tokenizer.decode(part[1:]) for part in np.split(stream, np.flatnonzero(stream == 0)) if len(part) > 1]
        assert sorted(read) == sorted(d.text for d in documents if d.split == split)
    assert json.loads((tmp_path / "summary.json").read_text())["test"]["projects"] == 2


# --- batches --------------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_row_once() -> None:
    tokens = torch.arange(1, 1001, dtype=torch.int32)
    batches = language.Batches(tokens, window=10, batch=9, seed=0)
    first = torch.cat([batches(step)["input_ids"] for step in range(11)]).flatten()
    assert len(first.unique()) == len(first) == 990
    assert torch.equal(batches(3)["input_ids"], language.Batches(tokens, 10, 9, 0)(3)["input_ids"])
    assert not torch.equal(batches(3)["input_ids"], batches(14)["input_ids"])


def test_mqar_asks_each_key_once_for_the_value_that_came_after_it() -> None:
    setting = recall.Run("r", "mqar", TOY, 1e-3, length=64, asked=16, vocab_size=128, steps=1, batch=8)
    ids, where, answers = recall.mqar(setting, 64, 8, torch.Generator().manual_seed(0))
    for row, places, values in zip(ids, where, answers, strict=True):
        pairs = dict(row[:16].view(8, 2).tolist())
        assert len(pairs) == 8
        assert [pairs[int(row[place])] for place in places[:8]] == values[:8].tolist()
        assert places[:8].min() >= 16
        assert (values[8:] == -100).all()


def test_copying_and_induction_ask_for_what_is_there() -> None:
    setting = recall.Run("r", "copying", TOY, 1e-3, length=32, asked=4, vocab_size=16, steps=1, batch=8)
    ids, where, answers = recall.copying(setting, 32, 4, torch.Generator().manual_seed(0))
    for row, places, tokens in zip(ids, where, answers, strict=True):
        assert row[:32][row[:32] != 0].tolist() == tokens.tolist()
        assert (row[places] == 1).all()
    ids, where, answers = recall.induction(setting, 32, 4, torch.Generator().manual_seed(0))
    for row, places, tokens in zip(ids, where, answers, strict=True):
        assert int(row[places]) == 0
        assert row[int(torch.argmin(row[:-1])) + 1] == tokens


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [TOY, MULTI_QUERY, SEQUENTIAL], ids=["plain", "shared rows", "sequential"])
def test_a_run_that_was_stopped_gives_what_it_would_have_given(shape: Shape, data: Path, tmp_path: Path) -> None:
    tokens = language.stream(str(data), "train", "cpu")
    batches = language.Batches(tokens, window=32, batch=4, seed=0)
    recipe = Recipe(6, 1e-2)

    def run(checkpoint: Path | None, stop: int | None = None) -> tuple[torch.nn.Module, list[dict[str, float]]]:
        model = trainer.new_model(shape, 48, 0)

        def batch_at(step: int) -> trainer.Batch:
            if step == stop:
                raise KeyboardInterrupt
            return batches(step)

        return model, trainer.train(model, batch_at, recipe, checkpoint=checkpoint, every=2)

    whole, log = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "c.pt", stop=5)
    resumed, rest = run(tmp_path / "c.pt")
    assert [row["loss"] for row in rest] == [row["loss"] for row in log]
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    model = trainer.new_model(TOY, 48, 0)
    torch.nn.init.constant_(model.get_input_embeddings().weight, math.nan)
    ids = torch.ones(2, 8, dtype=torch.long)
    with pytest.raises(FloatingPointError, match=r"step 1: lower the learning rate"):
        trainer.train(model, lambda _: {"input_ids": ids, "labels": ids}, Recipe(2, 1e-3), every=1)


def test_shapes_that_are_compared_have_as_many_parameters() -> None:
    def sizes(runs: list[language.Run], kinds: tuple[str, ...]) -> list[int]:
        shapes = {run.shape for run in runs if run.shape.kind in kinds}
        return [sum(p.numel() for p in trainer.new_model(shape, 512, 0).parameters()) for shape in shapes]

    found = sizes(language.answer("data"), ("mamba2", "attention", "hybrid"))
    assert len(found) == 3
    assert max(found) < 1.01 * min(found)
    for width in (128, 192, 256):
        runs = [run for run in language.scaling("data") if run.shape.width == width]
        assert max(sizes(runs, ("mamba2", "attention"))) < 1.02 * min(sizes(runs, ("mamba2", "attention")))
    patterns = sizes([run for run in language.heads("data") if "multi" in run.name], ("mamba2",))
    assert len(patterns) == 4
    assert max(patterns) < 1.03 * min(patterns)
    blocks = sizes([run for run in language.block("data") if "mlp" not in run.name], ("mamba2",))
    assert len(blocks) == 4
    assert max(blocks) < 1.08 * min(blocks)


def test_language_from_the_command_line(data: Path, tmp_path: Path) -> None:
    options = ("--tiny", "--data", data, "--out", tmp_path / "out", "--results", tmp_path, "--device", "cpu")
    assert invoke(language.main, "length:-512", *options).exit_code == 0
    with (tmp_path / "length.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["length-16-512", "length-128-512"]
    assert all(math.isfinite(float(row["test"])) for row in rows)
    assert (tmp_path / "length.png").stat().st_size > 1000
    (written,) = (tmp_path / "out").glob("length-16-512-*.json")
    before = written.stat().st_mtime_ns
    assert len(json.loads(written.read_text())["positions"]) >= 32
    assert invoke(language.main, "length:-512", *options).exit_code == 0
    assert written.stat().st_mtime_ns == before  # what is there is not run again
    assert invoke(language.main, "length:16-512", "--tokens", 640, *options).exit_code == 0
    assert len(list((tmp_path / "out").glob("length-16-512-*.json"))) == 2  # a shorter run is another
    for wrong in ("nothing", "length:nothing"):
        assert invoke(language.main, wrong, *options).exit_code == 2


def test_ablations_from_the_command_line(data: Path, tmp_path: Path) -> None:
    options = ("--tiny", "--data", data, "--out", tmp_path / "out", "--results", tmp_path, "--device", "cpu")
    assert invoke(language.main, "heads:multi-key-s", "block:sequential-s0", *options).exit_code == 0
    with (tmp_path / "heads.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["pattern"]) for row in rows] == [
        ("heads-multi-key-s0", "multi-key"),
        ("heads-multi-key-s1", "multi-key"),
    ]
    with (tmp_path / "block.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["projections"], row["norm"]) == ("sequential", "none")
    for name in ("heads", "block"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_files_of_results_keep_their_names_when_shapes_get_further_settings() -> None:
    found = [trainer.stem(each) for each in language.answer("anywhere")[:3]]
    assert found == [
        "answer-mamba2-0.004-s0-730c9713",
        "answer-attention-0.001-s0-6b0f1eed",
        "answer-hybrid-0.004-s0-2c5e64a2",
    ]
    run = recall.Run("r", "mqar", TOY, 1e-3, length=64, asked=16, vocab_size=128, steps=1, batch=8)
    others = [dataclasses.replace(run, shape=shape) for shape in (MULTI_QUERY, SEQUENTIAL)]
    assert len({trainer.stem(each) for each in (run, *others)}) == 3


# --- mixers of the ablations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["multi-query", "multi-key"])
def test_heads_that_share_are_multi_head_with_equal_rows(pattern: str) -> None:
    ids = torch.randint(1, 48, (2, 24), generator=torch.Generator().manual_seed(0))
    shared, full = (
        trainer.new_model(dataclasses.replace(TOY, pattern=each), 48, 0).double() for each in (pattern, "multi-head")
    )
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            parameter.copy_(functools.reduce(getattr, name.split("."), shared))
    outputs = [model(input_ids=ids, labels=ids, return_logits=True) for model in (shared, full)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    expected, heads = dict(full.named_parameters()), 4
    for name, parameter in shared.named_parameters():
        gradient = expected[name.replace("parametrizations.", "").removesuffix(".original")].grad
        if "parametrizations" in name:
            names = ("z", *"xBC", "dt") if "in_proj" in name else tuple("xBC")  # 64 rows each, of dt one for each head
            summed = [
                part if each in ("z", "dt", *OWN[pattern]) else part.unflatten(0, (heads, -1)).sum(0)
                for each, part in zip(names, gradient.split(64), strict=True)
            ]
            gradient = torch.cat(summed)
        torch.testing.assert_close(parameter.grad, gradient, msg=name)
    inputs = shared.backbone.layers[0].blocks[0].mixer.scan_inputs(torch.randn(1, 8, 32, dtype=torch.float64))
    alike = {name for name in "xBC" if getattr(inputs, name).var(2).max() < 1e-20}  # over heads
    assert alike == set("xBC") - set(OWN[pattern])


def test_sequential_projections_make_B_C_and_steps_of_the_convolved_x() -> None:
    model = trainer.new_model(SEQUENTIAL, 48, 0).double()
    mixer = model.backbone.layers[0].blocks[0].mixer
    u = torch.randn(1, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z, x = mixer.in_proj(u).chunk(2, -1)
    x = F.silu(mixer.conv1d(x.mT)[..., :9].mT)
    B, C, dt = mixer.x_proj(x).split([16, 16, 4], -1)
    dt, x = F.softplus(dt + mixer.dt_bias), x.unflatten(-1, (4, 16))
    state, rows = torch.zeros(1, 4, 16, 16, dtype=torch.float64), []
    for t in range(9):
        step = dt[:, t, :, None, None]
        state = torch.exp(step * mixer.A[:, None, None]) * state + step * x[:, t, :, :, None] * B[:, t, None, None]
        rows.append((state @ C[:, t, None, :, None])[..., 0] + mixer.D[:, None] * x[:, t])
    gated = torch.stack(rows, 1).flatten(-2) * F.silu(z)
    normed = F.rms_norm(gated, (64,), mixer.norm.weight, mixer.norm.eps)
    torch.testing.assert_close(mixer(u), mixer.out_proj(normed))
    norm = model.backbone.layers[0].blocks[0].norm
    torch.testing.assert_close(mixer.layer(u, norm), u + mixer(norm(u)))
    with pytest.raises(NotImplementedError, match="use_cache=False"):
        model.eval()(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=True)


@pytest.mark.parametrize("shape", [MULTI_QUERY, SEQUENTIAL], ids=["shared rows", "sequential"])
def test_mixers_of_the_ablations_start_and_train_as_the_package_s(shape: Shape) -> None:
    model = trainer.new_model(shape, 48, 0)
    (mixer,) = (module for module in model.modules() if hasattr(module, "A_log"))
    assert ((mixer.A >= -16) & (mixer.A <= -1)).all()
    steps = F.softplus(mixer.dt_bias)
    assert ((steps >= 0.99e-3) & (steps <= 0.101)).all()
    bound = mixer.out_proj.in_features**-0.5
    assert 0.9 * bound < mixer.out_proj.weight.abs().max() <= bound  # one layer
    kept = {name.partition("mixer.")[2] for name in no_decay_parameter_names(model)}
    bias = "conv1d.parametrizations.bias.original" if shape is MULTI_QUERY else "conv1d.bias"
    assert kept >= {"A_log", "D", "dt_bias", "norm.weight", bias}
    ids = torch.randint(1, 48, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


# --- what was published ---------------------------------------------------------------------------------------------


def test_signs_of_differences_beside_those_as_published(tmp_path: Path) -> None:
    runs = {
        "heads": {
            "multi-value": (2.0, 2.1),
            "multi-query": (2.5, 2.4),
            "multi-key": (2.1, 2.0),
            "multi-head": (1.5, 1.4),
        },
        "scaling": {"mamba2-128": (2.0,), "attention-128": (2.5,)},
    }
    for experiment, losses in runs.items():
        trainer.write_csv(
            tmp_path / f"{experiment}.csv",
            [
                {"name": f"{experiment}-{name}" + f"-s{seed}" * (len(tests) > 1), "test": test}
                for name, tests in losses.items()
                for seed, test in enumerate(tests)
            ],
        )
    assert (
        "| table 5 | multi-value < multi-query | -0.079 | heads-multi-value - heads-multi-query | -0.400 |"
        in invoke(compare.main, "--results", tmp_path).output
    )
    with (tmp_path / "signs.csv").open() as file:
        lines = {row["claim"]: row for row in csv.DictReader(file)}
    verdicts = {name: row["verdict"] for name, row in lines.items()}
    assert verdicts["multi-value < multi-query"] == "agreed"
    assert verdicts["multi-value < multi-key"] == "within the seeds' spread"
    assert verdicts["multi-value < multi-head"] == "not agreed"
    assert verdicts["Mamba-2, width 128 ≤ Transformer++, width 128"] == "agreed, one seed"
    assert verdicts["6 of 48 < 0 of 48"] == "not run"
    line = lines["multi-value < multi-query"]
    assert float(line["published"]) == pytest.approx(math.log(11.66 / 12.62), abs=1e-4)
    assert float(line["here"]) == pytest.approx(-0.4)
    assert float(line["spread"]) == pytest.approx(0.1)
    assert (tmp_path / "signs.md").read_text().count("\n") == len(compare.CLAIMS) + 2


def test_every_published_row_that_has_a_run_here_names_one() -> None:
    names = {compare.without_seed(run.name) for make in language.EXPERIMENTS.values() for run in make("data")}
    for table in compare.TABLES.values():
        rows = compare.published(table)
        assert rows
        assert {row.run for row in rows.values() if row.run} <= names
    for claim in compare.CLAIMS:
        better, worse = (compare.published(claim.table)[row] for row in (claim.better, claim.worse))
        assert better.run
        assert worse.run
        if better.nats is not None and worse.nats is not None:
            assert better.nats < worse.nats


def test_recall_from_the_command_line(tmp_path: Path) -> None:
    options = ("--tiny", "--out", tmp_path / "out", "--results", tmp_path, "--device", "cpu")
    assert invoke(recall.main, "mqar:64-N16-0.005", *options).exit_code == 0
    assert invoke(recall.main, "copying:mamba2-s0", "induction:mamba2-s0", *options).exit_code == 0
    for name in ("mqar", "copying", "induction"):
        with (tmp_path / f"{name}.csv").open() as file:
            (row,) = csv.DictReader(file)
        assert 0 <= float(row["accuracy"]) <= 1
        assert (tmp_path / f"{name}.png").exists()


def test_every_setting_of_language_builds(data: Path) -> None:
    names: set[str] = set()
    for experiment in language.EXPERIMENTS.values():
        for setting in experiment(str(data)):
            assert setting.name not in names
            names.add(setting.name)
            trainer.new_model(language.tiny(setting).shape, 16, 0)


def test_a_repeat_is_a_token_that_followed_the_same_two_before() -> None:
    window = np.array([0, 5, 6, 7, 9, 5, 6, 7, 5, 6, 8, *range(10, 90), 5, 6, 7])
    found = where.kinds(window)
    assert len(found) == len(window) - 1
    assert [where.KINDS[k] for k in found[:10]] == ["new"] * 6 + ["repeat, up to 64 back"] + ["new"] * 3
    assert where.KINDS[found[-1]] == "repeat, up to 512 back"
    assert (found[10:-1] == 0).all()


def test_where_two_models_differ_from_the_command_line(tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.mkdir()
    for index in range(80):
        (library / f"module{index}.py").write_text(PYTHON.format(index) * 2)
    options = ("--stdlib", library, "--tokens", 400, "--results", tmp_path)
    assert invoke(where.main, *options).exit_code == 0
    with (tmp_path / "where.csv").open() as file:
        rows = list(csv.DictReader(file))
    for files in ("trained on", "held out"):
        for model in {row["model"] for row in rows}:
            mine = [row for row in rows if row["model"] == model and row["files"] == files]
            *parts, whole = mine
            assert sum(int(row["count"]) for row in parts) == int(whole["count"])
            mean = sum(int(row["count"]) * float(row["nats_per_token"]) for row in parts) / int(whole["count"])
            assert mean == pytest.approx(float(whole["nats_per_token"]), abs=1e-3)
            assert int(parts[1]["count"]) > 0
    assert (tmp_path / "where.png").exists()
