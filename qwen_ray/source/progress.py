"""How far a download is, told to whoever draws the bar."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

# (bytes done, bytes in all or 0 while unknown, what is being done)
Progress = Callable[[int, int, str], None]
POLL_SECONDS = 0.1


def no_progress(_done: int, _total: int, _what: str) -> None:
    """For callers that draw none."""


def folder_bytes(folder: Path) -> int:
    """All files under `folder`; one that vanishes meanwhile counts nothing."""
    return sum(file_bytes(path) for path in folder.rglob("*"))


def file_bytes(path: Path) -> int:
    try:
        return path.lstat().st_size if path.is_file() else 0
    except OSError:
        return 0
