"""How long a step may take before a replica counts as stuck, learned from the steps that it has run.

A limit in seconds that suits a GPU declares a large model on a CPU dead in its first long prompt. What is known is the
fastest step (all weights read once, few tokens): a full step computes at most some hundred times as long.
"""

from __future__ import annotations

AT_LEAST = 30.0
UNKNOWN = 600.0  # before the first step
OF_FASTEST = 300.0
OF_SLOWEST = 10.0


class Patience:
    def __init__(self) -> None:
        self._fastest: float | None = None
        self._slowest = 0.0

    def learn(self, step_seconds: float) -> None:
        self._fastest = step_seconds if self._fastest is None else min(self._fastest, step_seconds)
        self._slowest = max(self._slowest, step_seconds)

    @property
    def seconds(self) -> float:
        if self._fastest is None:
            return UNKNOWN
        return max(AT_LEAST, OF_FASTEST * self._fastest, OF_SLOWEST * self._slowest)
