"""`qwen-ray batch` and SIGKILL: of the command, of an engine, of a rank. Every custom_id once, whatever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_tiny_model

from qwen_ray.commands.process_tree import descendants

NUM_REQUESTS = 500
SECONDS = 900
BAD = {3: {"temperature": -1}, 77: {"model": "other"}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    with path.open("w") as file:
        for i in range(NUM_REQUESTS):
            body: dict[str, Any] = {"model": "tiny", "max_tokens": 3 + i % 20, "ignore_eos": True, "seed": i}
            if i % 2:
                body["prompt"] = f"Number {i}"
            else:
                body["messages"] = [{"role": "user", "content": f"Number {i}"}]
            url = "/v1/completions" if i % 2 else "/v1/chat/completions"
            line = {"custom_id": f"request-{i}", "method": "POST", "url": url, "body": {**body, **BAD.get(i, {})}}
            file.write(json.dumps(line) + "\n")
    return path


@contextmanager
def batch(tiny: Path, requests: Path, answers: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "qwen_ray.cli", "batch", str(requests), str(answers), "-m", str(tiny)]
    flags = ["--served-model-name", "tiny", "--kv-cache-memory", "4MiB", "--max-num-seqs", "16"]
    process = subprocess.Popen(
        [*command, *flags, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)


def until(condition: Any, process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def of_kind(process: subprocess.Popen[str], name: str) -> list[int]:
    """Living descendants whose command line, which Ray writes, begins so."""
    return [pid for pid in descendants(process.pid) if _command_line(pid).startswith(name)]


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def check(answers: Path) -> None:
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert Counter(line["custom_id"] for line in lines) == {f"request-{i}": 1 for i in range(NUM_REQUESTS)}
    responses = {line["custom_id"]: line["response"] for line in lines}
    statuses = Counter(response["status_code"] for response in responses.values())
    assert statuses == {200: NUM_REQUESTS - len(BAD), 400: 1, 404: 1}
    assert responses["request-3"]["body"]["error"]["param"] == "temperature"
    for i in range(NUM_REQUESTS):
        if i not in BAD:
            assert responses[f"request-{i}"]["body"]["usage"]["completion_tokens"] == 3 + i % 20


def test_killed_in_the_middle_and_started_again(tiny: Path, requests: Path, tmp_path: Path) -> None:
    answers = tmp_path / "out.jsonl"
    with batch(tiny, requests, answers) as process:
        until(lambda: num_lines(answers) >= NUM_REQUESTS // 4, process)
        started = descendants(process.pid)
        process.kill()
        process.communicate()
    before = num_lines(answers)
    assert before < NUM_REQUESTS
    with batch(tiny, requests, answers) as process:
        output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output
    assert f"{NUM_REQUESTS} answers, {len(BAD)} of them errors" in output
    check(answers)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))

    with batch(tiny, requests, answers) as process:  # nothing is left to do: nothing is started
        output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output
    assert num_lines(answers) == NUM_REQUESTS


def test_a_rank_and_an_engine_are_killed_on_the_way(tiny: Path, requests: Path, tmp_path: Path) -> None:
    answers = tmp_path / "out.jsonl"
    with batch(tiny, requests, answers, "--tp", "2") as process:
        for name, share in (("ray::RankActor", 0.2), ("ray::MapWorker", 0.5)):
            until(lambda share=share: num_lines(answers) >= share * NUM_REQUESTS, process)
            os.kill(of_kind(process, name)[0], signal.SIGKILL)
        output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output
    check(answers)


def test_a_file_that_cannot_be_worked_with_is_told_at_once(tiny: Path, tmp_path: Path) -> None:
    requests = tmp_path / "in.jsonl"
    requests.write_text('{"custom_id": "a"}\n{"custom_id": "a"}\n{\n')
    with batch(tiny, requests, tmp_path / "out.jsonl") as process:
        output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "line 2: custom_id 'a' is line 1's already; line 3: is not JSON" in output
    assert not (tmp_path / "out.jsonl").exists()
