"""What came of it: requests failed or wrong, what was left over, how long it took to go on. Not a test."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import httpx
from chaos.load import Seen
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table


@dataclass(slots=True, kw_only=True)
class Verdict:
    """`recoveries`: seconds from each blow to the next piece of any stream that came after one of silence."""

    name: str
    num_requests: int = 0
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)
    num_blows: int = 0

    @property
    def is_clean(self) -> bool:
        return not (self.failed or self.wrong or self.left_over)

    def __str__(self) -> str:
        return "; ".join([*self.failed[:3], *self.wrong[:3], *self.left_over]) or "clean"


def judge(name: str, seen: Iterable[Seen], expected: Mapping[str, Seen], blows: Sequence[float] = ()) -> Verdict:
    """`blows`: when something was done to a process, in monotonic seconds."""
    verdict = Verdict(name=name, num_blows=len(blows))
    pieces: list[float] = []
    for one in seen:
        verdict.num_requests += 1
        pieces += one.times
        if one.error is not None:
            verdict.failed.append(f"{one.ask.name}: {one.error}")
        elif difference := one.differs(expected[one.ask.name]):
            verdict.wrong.append(f"{one.ask.name}: {difference}")
    verdict.recoveries = [seconds for blow in blows if (seconds := recovery(blow, pieces)) is not None]
    return verdict


def recovery(blow: float, pieces: Sequence[float], *, window: float = 60.0) -> float | None:
    """The end of the longest silence that began soon after `blow`, in seconds after it; None without pieces."""
    times = [blow, *sorted(t for t in pieces if blow < t < blow + window)]
    if len(times) < 2:
        return None
    gaps = [(b - a, b) for a, b in pairwise(times) if a - blow < 2.0]
    return max(gaps)[1] - blow


def left_over(url: str, *, patience: float = 60.0) -> list[str]:
    """Sequences, blocks and journals that are still held, once nobody asks for anything."""
    end = time.monotonic() + patience
    while True:
        held = {
            f"{sample.name}{sorted(sample.labels.items())}": sample.value
            for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=10).text)
            for sample in family.samples
            if sample.value and is_held(sample.name, sample.labels)
        }
        if not held or time.monotonic() > end:
            return [f"{name} = {value:g}" for name, value in held.items()]
        time.sleep(0.5)


def is_held(name: str, labels: Mapping[str, str]) -> bool:
    return name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "qwen_ray_open_sequences") or (
        name == "qwen_ray_kv_blocks" and labels["state"] == "used"
    )


def show(verdicts: Sequence[Verdict]) -> None:
    table = Table(title="chaos")
    for column in ("scenario", "blows", "requests", "failed", "wrong", "left over", "recovery s (median, worst)"):
        table.add_column(column, justify="left" if column == "scenario" else "right")
    for verdict in verdicts:
        times = sorted(verdict.recoveries)
        median = f"{times[len(times) // 2]:.1f}, {times[-1]:.1f}" if times else "-"
        counts = (
            verdict.num_blows,
            verdict.num_requests,
            *map(len, (verdict.failed, verdict.wrong, verdict.left_over)),
        )
        table.add_row(verdict.name, *map(str, counts), median)
    console = Console(width=140)
    console.print(table)
    for verdict in verdicts:
        kinds = Counter(line.split("/")[0] for line in verdict.failed + verdict.wrong)
        if kinds:
            console.print(f"{verdict.name}: {dict(kinds)}; {verdict}", markup=False)
