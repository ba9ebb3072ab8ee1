"""Who runs a step. The engine knows nothing else about ranks, devices or networks."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol

from qwen_ray.core.step import StepBatch, StepResult


class Executor(Protocol):
    """Runs step batches in the order in which they were submitted.

    `submit` must send the batch before it returns, so that several steps can be in flight; awaiting what it returns
    gives that step's result. Raises RankFailed, from the awaitable, when the step will never be answered.
    """

    def submit(self, batch: StepBatch) -> Awaitable[StepResult]: ...
