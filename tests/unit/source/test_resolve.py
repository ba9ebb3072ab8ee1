from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ray.core.errors import SourceError
from qwen_ray.source import demo, hub
from qwen_ray.source.resolve import resolve


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("nothing may be fetched here")

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(demo.subprocess, "Popen", refuse)
    monkeypatch.chdir(tmp_path)


def test_a_directory_with_a_config_is_itself(tmp_path: Path) -> None:
    model = tmp_path / "own" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    assert resolve(str(model), tmp_path / "cache") == model
    assert resolve("own/model", tmp_path / "cache") == model  # a path goes before an id


def test_a_gguf_file_is_itself_and_so_is_the_only_one_of_a_directory(tmp_path: Path) -> None:
    file = tmp_path / "m" / "x.gguf"
    file.parent.mkdir()
    file.write_text("")
    assert resolve("m/x.gguf", tmp_path / "cache") == file
    assert resolve("./m", tmp_path / "cache") == file
    (tmp_path / "m" / "y.gguf").write_text("")
    with pytest.raises(SourceError, match=r"config\.json, which is missing; it holds 2 \.gguf files, give one"):
        resolve("./m", tmp_path / "cache")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.gguf").write_text("")
    assert resolve("~/x.gguf", tmp_path / "cache") == tmp_path / "x.gguf"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("/no/such/place", "'/no/such/place': no such directory or file"),
        ("./nothing", "no such directory or file"),
        ("nothing.gguf", "no such directory or file"),
        ("Qwen2.5-0.5B", "no Hugging Face id"),
        ("a/b/c", "no Hugging Face id"),
        ("", "no such directory|config.json, which is missing"),
        ("empty", "a model's directory needs config.json, which is missing; it holds no .gguf file either"),
        ("notes.txt", r"is a file, but no \.gguf"),
    ],
)
def test_what_is_not_there_is_said_to_be_missing(tmp_path: Path, source: str, says: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(SourceError, match=says):
        resolve(source, tmp_path / "cache")


def test_demo_is_the_built_in_model_even_beside_a_directory_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.json").write_text("{}")
    monkeypatch.setattr(demo, "pull", lambda cache_dir, _progress: cache_dir / "pulled")
    assert resolve("demo", tmp_path / "cache") == tmp_path / "cache" / "pulled"
    assert resolve("./demo", tmp_path / "cache") == tmp_path / "demo"
