"""What several tiers of tests share."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for modules that tests share
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton asks when kernels are defined; without a GPU they are interpreted


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The demo model's file; fetched if it is not there."""
    from qwen_ray.config import Settings
    from qwen_ray.source.resolve import resolve

    return resolve("demo", Settings().cache_dir)


@pytest.fixture(scope="session")
def upcycled_demo(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with the demo model as a MoE whose experts are all alike: it says what the demo model says."""
    from upcycled import upcycle

    folder = upcycle(demo_gguf, tmp_path_factory.mktemp("upcycled-demo"))
    yield folder
    shutil.rmtree(folder)  # pytest would keep its 1.5 GB
