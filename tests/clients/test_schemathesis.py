"""Schemathesis over the server's own OpenAPI document: 2,000 requests, no 5xx, none that hangs, memory flat."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import FLAGS
from environments import environment
from programs_run import run
from served import serving

from qwen_ray.commands.process_tree import descendants

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
NUM_REQUESTS = 2000
EXAMPLES = 40  # of an operation, beside those that every run makes
REQUEST_SECONDS = 60
GROWTH = 0.05  # of a process, while the second half runs
GROWTH_BYTES = 16 * 2**20  # or so much
OURS = ("ray::ServeReplica", "ray::RankActor", "haproxy")


@pytest.fixture
def short_url(model_path: Path) -> Iterator[str]:
    """Its answers end soon, whatever is asked."""
    with serving(str(model_path), *FLAGS, "--max-model-len", "256") as url:
        yield url


def test_2000_requests(short_url: str, tmp_path: Path) -> None:
    num_requests = fuzz(short_url, seed=1, folder=tmp_path)
    before = resident()
    num_requests += fuzz(short_url, seed=2, folder=tmp_path)
    after = resident()
    assert num_requests >= NUM_REQUESTS
    assert before
    grown = {
        name: (size, after[name])
        for name, size in before.items()
        if after[name] > size + max(GROWTH * size, GROWTH_BYTES)
    }
    assert grown == {}


def fuzz(url: str, *, seed: int, folder: Path) -> int:
    """How many requests it has made."""
    said = run(
        str(environment("schemathesis") / "bin" / "schemathesis"),
        *("--config-file", str(Path(__file__).with_name("schemathesis.toml"))),
        *("run", f"{url}/openapi.json", "--checks", CHECKS, "--max-examples", str(EXAMPLES), "--seed", str(seed)),
        *("--phases", "coverage,fuzzing", "--request-timeout", str(REQUEST_SECONDS), "--continue-on-failure"),
        *("--suppress-health-check", "all", "--no-shrink", "--report-dir", str(folder)),
        cwd=folder,  # it keeps notes where it runs
    )
    found = re.search(r"([\d,]+) generated", said)
    assert found is not None, said
    return int(found[1].replace(",", ""))


def resident() -> dict[tuple[int, str], int]:
    """Bytes of each of the server's own processes."""
    found: dict[tuple[int, str], int] = {}
    for pid in descendants():
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().split(" ")[0]
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:  # it has just ended
            continue
        if title.startswith(OURS) and (size := re.search(r"VmRSS:\s+(\d+)", status)):
            found[pid, title] = int(size[1]) * 1024
    return found
