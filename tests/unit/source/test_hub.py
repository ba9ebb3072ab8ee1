"""Against a small stand-in for the Hub on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from qwen_ray.core.errors import SourceError
from qwen_ray.source import hub
from qwen_ray.source.resolve import resolve

SHA = "a" * 40
FILES = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    ).encode(),
    "m-1.safetensors": b"one" * 1000,
    "m-2.safetensors": b"two" * 1000,
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"x",
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"code",
    "original/consolidated.safetensors": b"again",
    "README.md": b"#",
}


@dataclass
class FakeHub:
    url: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    requests: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])  # (path, user agent)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    fake = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            fake.requests.append((path, self.headers["User-Agent"]))
            body = self.body(path)
            self.send_response(404 if body is None else 200)
            if body is None:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body or b"")))
            self.send_header("X-Repo-Commit", SHA)
            self.send_header("ETag", f'"{hashlib.sha256(body or b"").hexdigest()}"')
            self.end_headers()
            if with_body:
                self.wfile.write(body or b"")

        def body(self, path: str) -> bytes | None:
            if path.startswith("/api/models/own/er/") or not path.startswith(("/api/models/own/m", "/own/m/")):
                return None
            entries = [{"path": name, "size": len(data)} for name, data in fake.files.items()]
            if path.startswith("/api/models/own/m/tree/"):
                return json.dumps([{"type": "file", "oid": e["path"], **e} for e in entries]).encode()
            if path.startswith("/api/"):
                siblings = [{"rfilename": e["path"], "size": e["size"]} for e in entries]
                return json.dumps({"id": "own/m", "sha": SHA, "siblings": siblings}).encode()
            return fake.files.get(path.split(f"/{SHA}/")[-1])

        def log_message(self, format: str, *args: object) -> None:
            pass

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "theirs"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        fake.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield fake
        close_session()
        server.shutdown()
        thread.join()


def test_fetches_weights_and_texts_but_no_code_and_tells_nothing_of_itself(fake: FakeHub, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    folder = hub.fetch("own/m", tmp_path, endpoint=fake.url, on_progress=lambda *call: calls.append(call))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == dict(list(FILES.items())[:6])
    assert all(agent.startswith("unknown/None; hf_hub/") for _, agent in fake.requests)
    assert not any(word in agent for _, agent in fake.requests for word in ("torch", "agent/"))
    assert all(what == "download own/m" and done <= total for done, total, what in calls)


def test_of_folders_those_of_sentence_transformers_modules_come_too(fake: FakeHub, tmp_path: Path) -> None:
    fake.files |= {"1_Pooling/config.json": b"{}", "onnx/config.json": b"{}", "2_Dense/model.safetensors": b"w"}
    folder = hub.fetch("own/m", tmp_path, endpoint=fake.url)
    assert [path.relative_to(folder).as_posix() for path in folder.glob("*/*")] == ["1_Pooling/config.json"]


def test_a_copy_that_does_not_say_how_it_pools_is_not_whole(fake: FakeHub, tmp_path: Path) -> None:
    modules = [
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},  # has no file
    ]
    fake.files |= {"modules.json": json.dumps(modules).encode(), "1_Pooling/config.json": b"{}"}
    folder = hub.fetch("own/m", tmp_path, endpoint=fake.url)
    assert hub.cached("own/m", tmp_path / "hub") == folder
    (folder / "1_Pooling" / "config.json").unlink()
    assert hub.cached("own/m", tmp_path / "hub") is None
    assert (hub.fetch("own/m", tmp_path, endpoint=fake.url) / "1_Pooling" / "config.json").is_file()


def test_what_is_cached_needs_no_network(fake: FakeHub, tmp_path: Path) -> None:
    folder = hub.fetch("own/m", tmp_path, endpoint=fake.url)
    fake.requests.clear()
    assert hub.fetch("own/m", tmp_path, endpoint=fake.url) == folder
    assert resolve("own/m", tmp_path) == folder
    assert fake.requests == []


def test_the_hubs_own_cache_is_used_too(fake: FakeHub, tmp_path: Path) -> None:
    repo = tmp_path / "theirs" / "models--own--m"
    snapshot = repo / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(SHA)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
    assert hub.fetch("own/m", tmp_path, endpoint=fake.url) == snapshot
    assert fake.requests == []


def test_a_copy_with_a_file_missing_is_completed(fake: FakeHub, tmp_path: Path) -> None:
    folder = hub.fetch("own/m", tmp_path, endpoint=fake.url)
    (folder / "m-2.safetensors").unlink()
    assert hub.cached("own/m", tmp_path / "hub") is None
    assert (hub.fetch("own/m", tmp_path, endpoint=fake.url) / "m-2.safetensors").read_bytes() == b"two" * 1000


def test_an_unknown_name_is_said_to_be_unknown(fake: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"own/other does not exist on {fake.url}"):
        hub.fetch("own/other", tmp_path, endpoint=fake.url)


def test_a_repository_without_safetensors_is_refused(fake: FakeHub, tmp_path: Path) -> None:
    fake.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    with pytest.raises(SourceError, match=r"has no \*\.safetensors"):
        hub.fetch("own/m", tmp_path, endpoint=fake.url)


def test_without_a_network_the_error_says_what_where_and_what_to_do(fake: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        hub.fetch("own/m", tmp_path, endpoint="http://127.0.0.1:1")
    message = str(caught.value)
    for part in ("'own/m'", str(tmp_path / "hub"), str(tmp_path / "theirs"), "http://127.0.0.1:1", "HF_ENDPOINT"):
        assert part in message
    assert "qwen-ray pull own/m" in message
