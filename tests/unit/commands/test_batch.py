"""What `qwen-ray batch` says before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ray.commands import batch
from qwen_ray.config import Settings
from qwen_ray.core.errors import QwenRayError


def test_without_ray_data_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def found(name: str) -> object | None:
        return None if name == "pyarrow" else object()

    monkeypatch.setattr(batch, "find_spec", found)
    with pytest.raises(QwenRayError, match=r"pip install 'qwen-ray\[batch\]'"):
        batch.run_batch(Settings(), tmp_path / "in.jsonl", tmp_path / "out.jsonl", 1)
