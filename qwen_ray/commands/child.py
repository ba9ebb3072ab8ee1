"""A server or a batch as this process's child: told its settings, heard, ended; signals and its log meanwhile.

The other end is `serving/child.py`. Imports neither torch nor Ray.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from qwen_ray.commands.console import err
from qwen_ray.config import Settings
from qwen_ray.core.errors import QwenRayError

Event = dict[str, Any]


class ChildFailed(QwenRayError):
    """The child ended or gave up; the exit code is the one that it named."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # pyright: ignore[reportAttributeAccessIssue]


class Stopped(BaseException):
    """Ctrl-C or SIGTERM."""


def talk(child: subprocess.Popen[bytes], settings: Settings) -> queue.SimpleQueue[Event]:
    """Hand over the settings and hear the events; the last is `end`. The child stops when its stdin is closed."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps(settings.to_dict()).encode() + b"\n")
    child.stdin.flush()
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    lines = child.stdout

    def read() -> None:
        for line in lines:
            if line.startswith(b'{"event"'):
                events.put(json.loads(line))
            else:  # what Ray forwards from other processes at log level debug
                err.print(line.decode(errors="replace").rstrip(), markup=False)
        events.put({"event": "end"})

    threading.Thread(target=read, daemon=True).start()
    return events


def check(child: subprocess.Popen[bytes], event: Event) -> None:
    """Raises ChildFailed for the events that say so."""
    if event["event"] == "error":
        raise ChildFailed(event["message"], event["exit_code"])
    if event["event"] == "end":
        code = child.wait()
        raise ChildFailed(f"Its process ended unexpectedly (exit code {code}).", 1)


@contextmanager
def log_file(settings: Settings, name: str) -> Iterator[Any]:
    """Where the child writes; with log level debug the terminal. Its end is shown when the child failed."""
    if settings.observability.log_level == "debug":
        yield None
        return
    path = Path(settings.cache_dir) / "logs" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as log:
        try:
            yield log
        except ChildFailed:
            err.print(f"Its log is {path}; Ray's logs are in /tmp/ray/session_latest/logs.", markup=False)
            raise


@contextmanager
def signals_raise() -> Iterator[None]:
    def stop(_number: int, _frame: FrameType | None) -> None:
        ignore_signals()
        raise Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """A second Ctrl-C must not interrupt the cleaning up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
