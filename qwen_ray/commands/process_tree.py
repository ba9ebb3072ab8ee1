"""A child process and everything that comes of it: started apart from the terminal, ended without a trace.

Knows Linux's process table. Descendants whose parents have died become children of this process, so that none is ever
out of reach.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_PR_SET_CHILD_SUBREAPER = 36
_POLL_SECONDS = 0.05


def start(
    arguments: Sequence[str], environment: Mapping[str, str], log: IO[bytes] | None, *, without: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """In a session of its own: Ctrl-C in the terminal does not reach it.

    `environment` comes on top of ours, less the variables `without`.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    changes = [*(f"--unset={name}" for name in without), *(f"{name}={value}" for name, value in environment.items())]
    return subprocess.Popen(
        ["/usr/bin/env", *changes, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        start_new_session=True,
    )


def stop(child: subprocess.Popen[bytes], *, seconds: float) -> None:
    """Ask the child to end, and after `seconds` end all that is left of it by force. Returns when all are gone."""
    known = descendants()
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
    _end(known | descendants())


def descendants(root: int | None = None) -> set[int]:
    """Process ids of all children of `root` (None: this process), and of theirs."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    todo = [os.getpid() if root is None else root]
    while todo:
        new = [pid for pid in children.get(todo.pop(), ()) if pid not in found]
        found.update(new)
        todo += new
    return found


def _end(pids: set[int]) -> None:
    """Kill descendants, whoever they have become children of meanwhile, and collect them."""
    while left := pids & descendants():
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        pids |= descendants()


def _parent(entry: Path) -> int | None:
    try:
        # pid (name, which may hold anything) state parent ...
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None
