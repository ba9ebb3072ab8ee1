"""The audit log: a JSON line for every request, in a file that is only ever appended to, and rotated by size.

Several ingresses of one machine may share a file: each line is one write, and a lock keeps them from rotating it twice.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen_ray.core.errors import SettingsError

logger = logging.getLogger(__name__)

NUM_KEPT = 9  # FILE.1 is the newest of them
OWNER_ONLY = 0o600


class AuditLog:
    """`keeps_contents`: whether prompts and answers belong into it."""

    def __init__(self, path: Path, max_bytes: int, *, keeps_contents: bool = False) -> None:
        """Raises SettingsError when it cannot be written to."""
        self.keeps_contents = keeps_contents
        self._path = path
        self._max_bytes = max_bytes
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _open(path.with_name(f"{path.name}.lock"))
            self._file = _open(path)
        except OSError as error:
            message = f"{path}: cannot be written: {error.strerror}."
            raise SettingsError(message, field="observability.audit_log") from error

    def write(self, record: Mapping[str, Any]) -> None:
        """A line that cannot be written is an error in the log, and no reason to refuse a request."""
        line = json.dumps(record, ensure_ascii=True, separators=(",", ":"), default=str).encode() + b"\n"
        try:
            with self._locked():
                self._rotate(len(line))
                os.write(self._file, line)
        except OSError as error:
            logger.error("the audit log lacks a line: %s", error)

    def close(self) -> None:
        os.close(self._file)
        os.close(self._lock)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _rotate(self, num_more: int) -> None:
        if not self._is_current():  # another process has rotated it, or somebody has moved it
            self._reopen()
        size = os.fstat(self._file).st_size
        if size and size + num_more > self._max_bytes:
            for number in range(NUM_KEPT - 1, 0, -1):
                older = self._numbered(number)
                if older.exists():
                    older.replace(self._numbered(number + 1))
            self._path.replace(self._numbered(1))
            self._reopen()

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), self._path.stat())
        except FileNotFoundError:
            return False

    def _reopen(self) -> None:
        new = _open(self._path)
        os.close(self._file)
        self._file = new

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, OWNER_ONLY)
