"""One server for all clients, behind its real proxy, with a tiny random model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from served import serving
from served_model import write_served_model

MODEL = "tiny"
FLAGS = ("--served-model-name", MODEL, "--kv-cache-memory", "64MiB", "--dtype", "float32")


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served_model(tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="session")
def url(model_path: Path) -> Iterator[str]:
    with serving(str(model_path), *FLAGS, "--max-model-len", "4096") as url:
        yield url
