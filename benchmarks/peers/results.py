"""What has been measured, kept in one JSON file after every workload: a run that was broken off goes on from there.

Knows cells and their keys; nothing of servers.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.figures import Measured

START = "start"  # a cell beside the workloads: seconds until the first token
MEMORY = "memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    server: str
    model: str
    precision: str
    workload: str
    round: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One workload once. `bandwidth` (bytes/s) was read just before its server was started."""

    key: Key
    figures: dict[str, float]
    seconds: float  # that it took
    form: str  # the server's own name for the precision
    version: str
    bandwidth: float
    load_average: float
    at: str  # date and time


@dataclass(slots=True, kw_only=True)
class Results:
    machine: dict[str, Any] = field(default_factory=dict[str, Any])
    cells: dict[Key, Cell] = field(default_factory=dict[Key, Cell])
    failures: dict[str, str] = field(default_factory=dict[str, str])  # by server, model, precision: the last one
    rates: dict[str, float] = field(default_factory=dict[str, float])  # requests/s of W5, by model and precision

    @classmethod
    def load(cls, path: Path) -> Results:
        if not path.exists():
            return cls()
        data = json.loads(path.read_text())
        cells = [Cell(**{**cell, "key": Key(**cell["key"])}) for cell in data["cells"]]
        return cls(
            machine=data["machine"],
            cells={cell.key: cell for cell in cells},
            failures=data["failures"],
            rates=data["rates"],
        )

    def save(self, path: Path) -> None:
        data = {
            "machine": self.machine,
            "rates": self.rates,
            "failures": self.failures,
            "cells": [asdict(cell) for cell in self.cells.values()],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(data, indent=1) + "\n")
        partial.replace(path)

    def forget(self, servers: Iterable[str]) -> None:
        """Cells and failures of these are measured again."""
        names = set(servers)
        self.cells = {key: cell for key, cell in self.cells.items() if key.server not in names}
        self.failures = {name: why for name, why in self.failures.items() if name.split(" ")[0] not in names}

    def of(self, server: str, model: str, precision: str, workload: str) -> list[Cell]:
        """Every round."""
        wanted = (server, model, precision, workload)
        return [c for k, c in self.cells.items() if (k.server, k.model, k.precision, k.workload) == wanted]

    def measured(self, server: str, model: str, precision: str, workload: str, figure: str) -> Measured | None:
        cells = self.of(server, model, precision, workload)
        values = [cell.figures[figure] for cell in cells if figure in cell.figures]
        return Measured.of(values) if values else None

    def typical_seconds(self, where: Callable[[Key], bool]) -> float | None:
        """The median that such a cell took."""
        seconds = [cell.seconds for key, cell in self.cells.items() if where(key)]
        return statistics.median(seconds) if seconds else None


def failure_name(server: str, model: str, precision: str) -> str:
    return f"{server} {model} {precision}"
