"""The table of the GPU benchmark: what a row says, how it is printed, what is kept of it.

Knows figures and text. Times are seconds, rates tokens/s, fractions those of what was measured of the chip.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

PEER = "transformers:"  # before the name of a model that transformers computes


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One thing that was measured of one model; None: it says nothing of that.

    A step takes `step_seconds` from one to the next: in `busy_seconds` the device computes, in `host_seconds` the rank
    does something else, in `between_seconds` the engine has its turn. Of a prefill, all steps together count as one.
    `more` is kept, and not printed.
    """

    model: str
    what: str
    tokens_per_second: float | None = None
    bandwidth_fraction: float | None = None
    rate_fraction: float | None = None
    step_seconds: float | None = None
    busy_seconds: float | None = None
    host_seconds: float | None = None
    between_seconds: float | None = None
    note: str = ""
    more: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    label: str
    field: str
    width: int  # negative: text begins at its left
    unit: float = 1.0
    digits: int = 0

    def text(self, row: Row) -> str:
        value = getattr(row, self.field)
        if isinstance(value, str):
            return value.ljust(-self.width)
        return ("" if value is None else f"{value / self.unit:,.{self.digits}f}").rjust(self.width)

    @property
    def head(self) -> str:
        return self.label.ljust(-self.width) if self.width < 0 else self.label.rjust(self.width)


COLUMNS = (
    Column(label="model", field="model", width=-25),
    Column(label="what", field="what", width=-17),
    Column(label="tokens/s", field="tokens_per_second", width=10, digits=1),
    Column(label="% of read", field="bandwidth_fraction", width=9, unit=1e-2, digits=1),
    Column(label="% of bf16", field="rate_fraction", width=9, unit=1e-2, digits=1),
    Column(label="step ms", field="step_seconds", width=9, unit=1e-3, digits=2),
    Column(label="busy ms", field="busy_seconds", width=9, unit=1e-3, digits=2),
    Column(label="host ms", field="host_seconds", width=8, unit=1e-3, digits=2),
    Column(label="between", field="between_seconds", width=8, unit=1e-3, digits=2),
    Column(label="", field="note", width=-1),
)


def head_line() -> str:
    return " ".join(column.head for column in COLUMNS).rstrip()


def line(row: Row) -> str:
    return " ".join(column.text(row) for column in COLUMNS).rstrip()


@dataclass(slots=True, kw_only=True)
class Kept:
    """What a file of results holds: of one device, the last rows of every model that was measured on it.

    `begin` comes first, with a "date" among what was measured.
    """

    path: Path
    device: dict[str, Any] = field(default_factory=dict[str, Any])
    rows: list[Row] = field(default_factory=list[Row])

    def begin(self, device: dict[str, str], measured: dict[str, Any]) -> None:
        """`device`: what it is, and by which versions. Takes over the file's rows if they are of the very same."""
        if self.path.exists():
            stored = json.loads(self.path.read_text())
            if device.items() <= stored["device"].items():
                self.rows = [Row(**row) for row in stored["rows"]]
        self.device = {**device, **measured}

    def forget(self, model: str) -> None:
        self.rows = [row for row in self.rows if row.model != model]

    def add(self, row: Row) -> Row:
        """With the ratio to the other's, where there are both; written at once."""
        row = self._compared(replace(row, more=row.more | {"date": self.device["date"]}))
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"device": self.device, "rows": [asdict(row) for row in self.rows]}
        self.path.write_text(json.dumps(kept, indent=1) + "\n")
        return row

    def _compared(self, row: Row) -> Row:
        peer = next((r for r in self.rows if r.model == row.model.removeprefix(PEER) and r.what == row.what), None)
        if not row.model.startswith(PEER) or peer is None or not (row.tokens_per_second and peer.tokens_per_second):
            return row
        ratio = peer.tokens_per_second / row.tokens_per_second
        return replace(row, note=f"qwen-ray: {ratio:.2f} times as many", more=row.more | {"ratio": ratio})
