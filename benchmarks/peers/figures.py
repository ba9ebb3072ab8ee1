"""What is told of a workload: names, units, which way is better, and the statistics behind them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    name: str
    unit: str
    more_is_better: bool = True

    def ratio(self, ours: float, other: float) -> float:
        """How many times as good as `other` ours is."""
        return ours / other if self.more_is_better else other / ours


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One figure over its rounds."""

    median: float
    spread: float  # half of what lies between the least and the most, as a part of the median
    num_rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Measured:
        median = statistics.median(values)
        spread = (max(values) - min(values)) / 2 / median if median else 0.0
        return cls(median=median, spread=spread, num_rounds=len(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
