"""One server as a process: started, watched while it loads and answers, and ended with everything that came of it.

Knows processes and memory; a launch and a log file are given.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.peers.client import Endpoint, RequestFailed, complete
from benchmarks.peers.peer import Launch
from benchmarks.peers.workloads import Send
from qwen_ray.commands import process_tree

START_SECONDS = 900.0
STOP_SECONDS = 30.0
ASK_EVERY = 0.05
WATCH_EVERY = 1.0
FIRST_PROMPT = [1000, 2000, 3000, 4000]
KIB = 1024


@dataclass(slots=True, kw_only=True)
class Memory:
    """Bytes of a process and its descendants, Ray's included. Pages that several hold count for each in `rss`."""

    rss: int = 0  # the most at any time
    largest: int = 0  # the most that a single process has held
    pss: int = 0  # at the end, shared pages divided among those that hold them

    @property
    def figures(self) -> dict[str, float]:
        return {"peak_rss_gb": self.rss / 1e9, "largest_rss_gb": self.largest / 1e9, "pss_gb": self.pss / 1e9}


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    endpoint: Endpoint
    seconds_to_first_token: float  # from the start of the process
    memory: Memory
    root: int  # process id

    @property
    def send(self) -> Send:
        return lambda prompt, num_tokens: complete(self.endpoint, prompt, num_tokens)

    def measure_end(self) -> None:
        self.memory.pss = sum(_kib(pid, "smaps_rollup", "Pss:") for pid in _tree(self.root)) * KIB


@asynccontextmanager
async def running(launch: Launch, port: int, log: IO[bytes]) -> AsyncIterator[Running]:
    """Raises RequestFailed or TimeoutError when no first token comes. Nothing is left afterwards."""
    memory = Memory()
    endpoint = Endpoint(port=port, model=launch.model, extra_body=dict(launch.extra_body))
    with _process(launch, log) as pid:
        begun = time.perf_counter()
        watching = asyncio.create_task(_watch(pid, memory))
        try:
            await _first_token(endpoint, pid)
            seconds = time.perf_counter() - begun
            yield Running(endpoint=endpoint, seconds_to_first_token=seconds, memory=memory, root=pid)
        finally:
            watching.cancel()


@contextmanager
def _process(launch: Launch, log: IO[bytes]) -> Iterator[int]:
    # Both streams go to the log: nobody would read a pipe.
    arguments = ["/bin/sh", "-c", 'exec "$@" >&2', "sh", *launch.arguments]
    child = process_tree.start(arguments, launch.environment, log)
    try:
        yield child.pid
    finally:
        process_tree.stop(child, seconds=STOP_SECONDS)


async def _first_token(endpoint: Endpoint, pid: int) -> None:
    """Ask until it is answered: what refuses, or says that it loads, is asked again."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            await complete(endpoint, FIRST_PROMPT, 1)
            return
        except RequestFailed as error:
            if _has_ended(pid):
                raise RequestFailed("the server ended before it answered") from error
            if time.monotonic() > deadline:
                raise TimeoutError(f"no token in {START_SECONDS:.0f} s: {error}") from error
        await asyncio.sleep(ASK_EVERY)


async def _watch(pid: int, memory: Memory) -> None:
    def look() -> None:
        tree = _tree(pid)
        memory.rss = max(memory.rss, sum(_kib(one, "status", "VmRSS:") for one in tree) * KIB)
        memory.largest = max(memory.largest, *(_kib(one, "status", "VmHWM:") * KIB for one in tree))

    while True:
        await asyncio.to_thread(look)  # the loop takes the time of chunks meanwhile
        await asyncio.sleep(WATCH_EVERY)


def _tree(pid: int) -> set[int]:
    return {pid} | process_tree.descendants(pid)


def _kib(pid: int, file: str, field: str) -> int:
    """A number of /proc/PID/FILE; 0 when the process has gone."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def _has_ended(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"
