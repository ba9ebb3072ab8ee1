"""Schemathesis over the server's own OpenAPI document: 2,000 requests, no 5xx, none that hangs, memory flat."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos import memory
from chaos.memory import MIB, Memory
from conftest import FLAGS
from environments import environment
from programs_run import run
from served import serving

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
NUM_REQUESTS = 2000
EXAMPLES = 40  # of an operation, beside those that every run makes
REQUEST_SECONDS = 60
QUIET_SECONDS = 10.0  # in which memory is looked at, after each half
GROWTH = 0.05  # of any process, while the second half runs
NOTHING = 16 * MIB  # is what allocators may take in the meantime


@pytest.fixture
def short_url(model_path: Path) -> Iterator[str]:
    """Its answers end soon, whatever is asked."""
    with serving(str(model_path), *FLAGS, "--max-model-len", "256") as url:
        yield url


async def test_2000_requests(short_url: str, tmp_path: Path) -> None:
    num_requests = 0
    quiet: list[float] = []
    async with Memory(period=0.5) as seen:
        for seed in (1, 2):
            num_requests += await asyncio.to_thread(fuzz, short_url, seed=seed, folder=tmp_path)
            await asyncio.sleep(QUIET_SECONDS)
            quiet.append(time.monotonic() - QUIET_SECONDS / 2)
    growth = seen.growth(*quiet, width=QUIET_SECONDS)
    memory.show(f"{num_requests} requests; memory after one half, and after both", growth)
    assert num_requests >= NUM_REQUESTS
    assert any("RankActor" in name for name in growth)
    limits = {name: first + max(first * GROWTH, NOTHING) for name, (first, _) in growth.items()}
    assert {name: sizes for name, sizes in growth.items() if sizes[1] > limits[name]} == {}


def fuzz(url: str, *, seed: int, folder: Path) -> int:
    """How many requests it has made."""
    said = run(
        str(environment("schemathesis") / "bin" / "schemathesis"),
        *("run", f"{url}/openapi.json", "--checks", CHECKS, "--max-examples", str(EXAMPLES), "--seed", str(seed)),
        *("--phases", "coverage,fuzzing", "--request-timeout", str(REQUEST_SECONDS), "--continue-on-failure"),
        *("--suppress-health-check", "all", "--no-shrink", "--report-dir", str(folder)),
        cwd=folder,  # it keeps notes where it runs
    )
    found = re.search(r"([\d,]+) generated", said)
    assert found is not None, said
    return int(found[1].replace(",", ""))
