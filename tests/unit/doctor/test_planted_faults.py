"""Every check finds what was planted for it, and says what to do; without the fault it is content."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_ray.doctor import checks, reach
from qwen_ray.doctor.checks import Question
from qwen_ray.doctor.compare import compare_clocks, compare_versions
from qwen_ray.doctor.finding import Finding, guarded
from qwen_ray.doctor.network import interfaces
from qwen_ray.doctor.probe import versions
from qwen_ray.kernels.cpu import library

CLI = """
import sys
from qwen_ray.doctor.checks import CHECKS, Question
(found,) = CHECKS[sys.argv[1]](Question(cache_dir="/tmp"))
print(found.verdict, found.message, found.advice)
"""


@pytest.fixture
def question(tmp_path: Path) -> Question:
    return Question(cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder where programs are looked for: empty."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def script(file: Path, text: str) -> None:
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o700)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        yield one.getsockname()[1]


def one(findings: list[Finding]) -> Finding:
    assert len(findings) == 1
    return findings[0]


def test_a_port_that_is_taken_and_by_whom(question: Question, taken: int) -> None:
    found = one(checks.ports(replace(question, port=taken)))
    assert found.verdict == "fail"
    assert f"port {taken}" in found.message
    assert f"process {os.getpid()}" in found.message
    assert "--port" in found.advice
    elsewhere = one(checks.ports(replace(question, port=taken, host="127.0.0.9")))
    assert elsewhere.verdict == "ok"
    nowhere = one(checks.ports(replace(question, port=taken, host="198.51.100.7")))
    assert "--host" in nowhere.advice


def test_a_cache_that_cannot_be_written_to(question: Question, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = one(checks.disk(replace(question, cache_dir=str(tmp_path / "file" / "cache"))))
    assert (found.verdict, found.check) == ("fail", "disk")
    assert "--cache-dir" in found.advice
    assert one(checks.disk(question)).verdict == "ok"


def test_a_disk_that_is_too_full(question: Question) -> None:
    room = shutil.disk_usage("/").total
    found = one(checks.disk(replace(question, model="big", fetch_bytes=100 * room)))
    assert found.verdict == "fail"
    assert "big needs" in found.message
    assert one(checks.disk(replace(question, model="small", fetch_bytes=1))).verdict == "ok"


def test_shared_memory_that_is_tiny() -> None:
    """Really so: a file system of 16 MB in its place, in a namespace of its own."""
    mount = 'mount -t tmpfs -o size=16m tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-Urm", "sh", "-c", mount, "sh", sys.executable, "-c", CLI, "shared memory"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith("fail /dev/shm has 17 MB free")
    assert "--shm-size" in said


def test_a_gpu_that_torch_cannot_see(question: Question, programs: Path) -> None:
    script(programs / "nvidia-smi", 'echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)"')
    found = one(checks.gpus(question))
    assert found.verdict == "fail"
    assert "the driver has 1, torch" in found.message
    assert found.advice


def test_no_compiler(question: Question, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "folders", lambda: [tmp_path])
    monkeypatch.setattr(checks, "processor_flags", lambda: library.AVX2)
    found = one(checks.kernels(question))
    assert (found.verdict, found.advice) == ("warn", "apt-get install g++")
    script(programs / "g++", "echo 'no such header' >&2; exit 1")
    assert "no such header" in one(checks.kernels(question)).message
    script(programs / "g++", "exit 0")
    assert one(checks.kernels(question)).verdict == "ok"


def test_no_haproxy(question: Question, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "haproxy", lambda: None)
    assert one(checks.proxy(question)).verdict == "fail"
    monkeypatch.setattr(checks, "haproxy", lambda: programs / "haproxy")
    script(programs / "haproxy", "echo 'missing library' >&2; exit 127")
    assert "missing library" in one(checks.proxy(question)).message
    script(programs / "haproxy", "echo 'HAProxy version 2.8.1 - https://haproxy.org/'")
    found = one(checks.proxy(question))
    assert (found.verdict, found.message) == ("ok", f"HAProxy version 2.8.1 ({programs / 'haproxy'})")


def test_a_version_that_differs_on_one_node(tmp_path: Path) -> None:
    """Its environment really has another one, as far as Python's own tables say."""
    folder = tmp_path / "ray-2.50.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 2.50.0\n")
    ask = "import json; from qwen_ray.doctor.probe import versions; print(versions()['ray'])"
    path = os.pathsep.join((str(tmp_path), str(Path.cwd())))
    answer = subprocess.run(
        [sys.executable, "-c", ask], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    here = versions()
    there = {**here, "ray": answer.stdout.strip()}
    found = one(compare_versions({"a": here, "b": there, "c": here}))
    assert (found.verdict, found.node) == ("fail", "b")
    assert found.message == f"ray 2.50.0 in place of {here['ray']}"
    assert one(compare_versions({"a": here, "c": here, "silent": {}})).verdict == "ok"
    assert "not installed" in one(compare_versions({"a": {"torch": "missing"}})).message


def test_a_clock_that_differs() -> None:
    found = compare_clocks({"a": (0.1, 0.01), "b": (-7.0, 0.2), "c": (1.0, 0.1), "far": (3.0, 2.9)})
    assert [(one.node, one.verdict) for one in found] == [("b", "fail"), ("c", "warn")]
    assert "7.00 s behind" in found[0].message
    assert one(compare_clocks({"a": (0.0, 0.1)})).verdict == "ok"


def test_a_node_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "MEETING_SECONDS", 0.3)
    closed = reach.free_port("127.0.0.1")
    met = reach.meet(reach.Meeting(rank=1, host="127.0.0.1", port=closed, own="127.0.0.1"))
    assert "refused" in met.error
    alone = reach.meet(reach.Meeting(rank=0, host="127.0.0.1", port=closed, own="127.0.0.1"))
    assert "in time" in alone.error


def test_interfaces_are_those_that_are_up() -> None:
    assert interfaces()["lo"] == "127.0.0.1"


def test_a_check_that_breaks_or_hangs_is_a_finding() -> None:
    def breaks() -> list[Finding]:
        raise ValueError("bad\nluck")

    assert "ValueError: bad luck" in one(guarded("one", 5, breaks)).message
    hung = one(guarded("two", 0.05, lambda: time.sleep(1) or []))
    assert (hung.check, hung.verdict) == ("two", "fail")
