"""What goes wrong, by name: processes of a running server found, killed, stopped, slowed, cut off. Not a test."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from qwen_ray.commands.process_tree import descendants

PIDFD_GETFD = 438  # of Linux's system calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    replica: str
    rank: int
    pid: int
    num_loads: int
    num_steps: int


def ranks(url: str) -> list[Rank]:
    """Of all replicas, as `/status` says; empty while nobody answers."""
    with contextlib.suppress(httpx.HTTPError):
        return [
            Rank(
                replica=replica["replica"],
                rank=rank["rank"],
                pid=rank["pid"],
                num_loads=rank["num_loads"],
                num_steps=rank["num_steps"],
            )
            for replica in status(url)["replicas"]
            for rank in replica["ranks"]
        ]
    return []


def status(url: str) -> dict[str, Any]:
    return httpx.get(f"{url}/status", timeout=10).raise_for_status().json()


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def stop(pid: int) -> None:
    """As a process in an endless system call: there, and silent."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)


def go_on(pid: int) -> None:
    """One that was stopped; one that is gone is none to care about."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def cut(pid: int) -> int:
    """End all its TCP connections, as a network that fails does. Returns how many there were."""
    process, num_cut = os.pidfd_open(pid), 0
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{entry}").startswith("socket:"):
                with _socket_of(process, int(entry)) as one:
                    if one.family in (socket.AF_INET, socket.AF_INET6) and one.getpeername():
                        one.shutdown(socket.SHUT_RDWR)
                        num_cut += 1
    os.close(process)
    return num_cut


def _socket_of(process: int, number: int) -> socket.socket:
    """Another process's. Raises OSError."""
    number = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, process, number, 0)
    if number < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return socket.socket(fileno=number)


def slow_down(pid: int, *, seconds: float, share: float = 0.8) -> None:
    """Let it run for a part of the time only, as on a crowded machine."""
    end = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.05 * share)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.05 * (1 - share))


def named(root: int, name: str) -> list[int]:
    """Processes below `root` whose title has `name` in it: `ray::RankActor`, `ServeReplica:qwen-ray:Replica`."""
    found: list[int] = []
    for pid in descendants(root):
        with contextlib.suppress(OSError):
            if name in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                found.append(pid)
    return found
