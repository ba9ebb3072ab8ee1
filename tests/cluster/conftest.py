"""One small Ray of our own for each module of cluster tests that wants one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from served import Answer, demo_answers

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))  # for `tiny_ranks`


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local Ray that nobody else shares, without dashboard and telemetry; gone when the module's tests have ended."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(FOLDER), os.environ.get("PYTHONPATH"))))  # of ranks
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def answers_of_demo(demo_gguf: Path) -> list[Answer]:
    return demo_answers(demo_gguf)
