"""What every process of a running server holds, over time. Not a test."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qwen_ray.commands.process_tree import descendants

MIB = 2**20


@dataclass(slots=True, kw_only=True)
class Process:
    """`samples`: (monotonic seconds, resident bytes)."""

    pid: int
    title: str
    samples: list[tuple[float, int]] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return max(size for _, size in self.samples)

    def around(self, moment: float, *, width: float) -> float | None:
        """The median within half a `width` of `moment`; None without samples there."""
        near = [size for when, size in self.samples if abs(when - moment) <= width / 2]
        return statistics.median(near) if near else None


class Memory:
    """Looks at all processes below this one every `period` seconds, while it is entered."""

    def __init__(self, period: float) -> None:
        self.processes: dict[int, Process] = {}
        self._period = period

    async def __aenter__(self) -> Memory:
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watching.cancel()

    async def calm(self, *, seconds: float = 10.0, change: int = 4 * MIB) -> None:
        """Until all processes together have not changed by more than `change` for so long."""
        since, before = time.monotonic(), self._now()
        while time.monotonic() - since < seconds:
            await asyncio.sleep(self._period)
            if abs(self._now() - before) > change:
                since, before = time.monotonic(), self._now()

    def _now(self) -> int:
        return sum(process.samples[-1][1] for process in self.processes.values())

    def growth(self, begin: float, end: float, *, width: float) -> dict[str, tuple[float, float]]:
        """Of each process that was there at both: bytes around `begin` and around `end`, by title and pid."""
        found: dict[str, tuple[float, float]] = {}
        for process in self.processes.values():
            first, last = process.around(begin, width=width), process.around(end, width=width)
            if first is not None and last is not None:
                found[f"{process.title} ({process.pid})"] = first, last
        return found

    async def _watch(self) -> None:
        while True:
            await asyncio.to_thread(self._look)
            await asyncio.sleep(self._period)

    def _look(self) -> None:
        now = time.monotonic()
        for pid in descendants():
            with contextlib.suppress(OSError, IndexError, ValueError):
                status = Path(f"/proc/{pid}/status").read_text()
                size = int(status.split("VmRSS:")[1].split()[0]) * 1024
                if pid not in self.processes:
                    self.processes[pid] = Process(pid=pid, title=_title(pid))
                self.processes[pid].samples.append((now, size))


def _title(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
    first, *others = words
    name = first.rsplit("/", 1)[-1]
    if name.startswith("python"):  # its script or module says more
        name = next((word.rsplit("/", 1)[-1] for word in others if not word.startswith("-")), name)
    return name[:48]


def show(title: str, growth: dict[str, tuple[float, float]]) -> None:
    table = Table(title=title)
    for column in ("process", "before MiB", "after MiB", "change"):
        table.add_column(column, justify="left" if column == "process" else "right")
    for name, (first, last) in sorted(growth.items(), key=lambda item: -item[1][1]):
        table.add_row(name, f"{first / MIB:.1f}", f"{last / MIB:.1f}", f"{last / first - 1:+.1%}")
    Console(width=120).print(table)
