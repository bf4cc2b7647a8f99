"""The Hub, with its client replaced: what would be fetched, what would be sent."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import layouts
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

from mamba2_hf.checkpoints import convert, hub
from mamba2_hf.errors import CheckpointError, ConfigurationError

STATE_SPACES = ["config.json", "pytorch_model.bin", "README.md", ".gitattributes"]
CODESTRAL = [
    *("config.json", "params.json", "consolidated.safetensors", "tokenizer.json", "tokenizer.model.v3"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
]


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (STATE_SPACES, {"pytorch_model.bin"}),
        (CODESTRAL, {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}),
        (["params.json", "consolidated.safetensors", "model.gguf"], {"consolidated.safetensors"}),
        (["config.json", "model.safetensors", "pytorch_model.bin", "flax.msgpack"], {"model.safetensors"}),
        (["config.json", "model.safetensors", "original/consolidated.00.pth"], {"model.safetensors"}),
        (["README.md"], set()),
    ],
)
def test_one_set_of_weights_is_fetched(names: list[str], weights: set[str]) -> None:
    large = (".safetensors", ".bin", ".gguf", ".msgpack", ".pth")
    wanted = hub.wanted_files(names)
    assert {name for name in wanted if name.endswith(large)} == weights
    assert set(wanted) - weights == {name for name in names if not name.endswith(large)}
    assert not {name for name in hub.wanted_files(names, weights=False) if name.endswith(large)}


class TestFetching:
    def test_a_hub_id_is_downloaded_and_converted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        layouts.state_spaces(tmp_path / "snapshot")
        asked: dict[str, Any] = {}

        def download(name: str, **options: Any) -> str:
            asked.update(name=name, **options)
            return str(tmp_path / "snapshot")

        monkeypatch.setattr(hub, "is_reachable", lambda name: True)
        monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda *_, **__: STATE_SPACES)
        monkeypatch.setattr(hub, "snapshot_download", download)
        assert convert("state-spaces/tiny", tmp_path / "out", revision="v1").source == "mamba_ssm"
        assert asked["name"] == "state-spaces/tiny"
        assert asked["revision"] == "v1"
        assert "pytorch_model.bin" in asked["allow_patterns"]

    @pytest.mark.parametrize(
        "error", [OfflineModeIsEnabled("offline"), OSError("no route"), RuntimeError("of a library")]
    )
    def test_without_a_connection_the_cache_serves(
        self, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After one look."""
        asked = []

        def offline(*_: Any, **__: Any) -> None:
            asked.append(1)
            raise error

        monkeypatch.setattr(hub.HfApi, "model_info", offline)
        monkeypatch.setattr(
            hub, "snapshot_download", lambda name, **options: str(tmp_path / str(options["local_files_only"]))
        )
        assert hub.local_folder("a/b") == tmp_path / "True"
        assert len(asked) == 1

    def test_what_cannot_be_had_says_so(self) -> None:
        with pytest.raises(CheckpointError, match="nobody/nothing: no such folder here"):
            hub.local_folder("nobody/nothing")

    @pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "nowhere", "a/b/c"])
    def test_a_path_is_no_hub_id(self, name: str) -> None:
        with pytest.raises(CheckpointError, match=r"nowhere|a/b/c"):
            hub.local_folder(name)


class Api:
    """Stands for the Hub's client and keeps what it is given."""

    calls: list[tuple[str, Any]] = []

    def create_repo(self, name: str, **options: Any) -> None:
        self.calls.append(("create", (name, options)))

    def upload_folder(self, **options: Any) -> str:
        self.calls.append(("upload", options))
        return "https://hub.example/commit/1"


@pytest.fixture(name="calls")
def _calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    Api.calls = []
    monkeypatch.setattr(hub, "HfApi", Api)
    return Api.calls


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    layouts.stock(tmp_path / "source", shards=True)
    layouts.add_companions(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", with_code=True, max_shard_size="20KB")
    (tmp_path / "out/README.md").write_text("# A card")
    (tmp_path / "out/optimizer.pt").write_bytes(b"not for others")
    (tmp_path / "out/runs").mkdir()
    return tmp_path / "out"


class TestPushing:
    def test_by_default_nothing_is_sent(self, folder: Path, calls: list[Any]) -> None:
        upload = hub.push(folder, "me/mine")
        assert upload.url is None
        assert not calls
        assert upload.left == ["optimizer.pt", "runs"]
        assert {"README.md", "LICENSE", "config.json", "tokenizer.json", "modeling_mamba2_hf.py"} <= upload.files.keys()
        assert all((folder / name).stat().st_size == size for name, size in upload.files.items())
        assert {path.name for path in folder.iterdir()} == {*upload.files, *upload.left}

    def test_what_was_shown_is_sent(self, folder: Path, calls: list[Any]) -> None:
        shown = hub.push(folder, "me/mine")
        upload = hub.push(folder, "me/mine", dry_run=False, private=True, message="First")
        assert upload.url == "https://hub.example/commit/1"
        assert [name for name, _ in calls] == ["create", "upload"]
        assert calls[0][1] == ("me/mine", {"private": True, "exist_ok": True})
        assert calls[1][1]["allow_patterns"] == list(shown.files)
        assert calls[1][1]["commit_message"] == "First"

    def test_a_broken_checkpoint_stays_here(self, folder: Path, calls: list[Any]) -> None:
        tensors = layouts.make_model().state_dict()
        tensors["backbone.norm_f.weight"][0] = float("nan")
        for shard in folder.glob("model*"):
            shard.unlink()
        layouts.write_safetensors(folder / "model.safetensors", tensors)
        with pytest.raises(CheckpointError, match="norm_f"):
            hub.push(folder, "me/mine", dry_run=False)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises((CheckpointError, ConfigurationError), match="llama"):
            hub.push(folder, "me/mine", dry_run=False)
        assert not calls

    def test_a_card_is_needed(self, folder: Path, calls: list[Any]) -> None:
        (folder / "README.md").unlink()
        with pytest.raises(CheckpointError, match=r"has no README\.md; write the card first"):
            hub.push(folder, "me/mine", dry_run=False)
        assert not calls

    def test_links_out_of_the_folder_are_not_followed(self, folder: Path, tmp_path: Path, calls: list[Any]) -> None:
        shutil.copy(folder / "LICENSE", tmp_path / "secret")
        (folder / "LICENSE").unlink()
        (folder / "LICENSE").symlink_to(tmp_path / "secret")
        with pytest.raises(CheckpointError, match="LICENSE: is a link out of its folder"):
            hub.push(folder, "me/mine", dry_run=False)
        assert not calls

    def test_a_refusal_of_the_hub_is_one_error(
        self, folder: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

        monkeypatch.setattr(Api, "create_repo", refuse)
        with pytest.raises(CheckpointError, match="me/mine: the Hub did not take it"):
            hub.push(folder, "me/mine", dry_run=False)
