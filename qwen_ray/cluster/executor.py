"""Steps to a group of ranks: one frame to each, one result back.

Satisfies `engine.executor.Executor`. Knows which steps are in flight, and nothing of what is in them.
"""

from __future__ import annotations

import asyncio

from qwen_ray.cluster.group import RankGroup
from qwen_ray.cluster.rank_messages import RANK_CODEC
from qwen_ray.core.errors import RankFailed
from qwen_ray.core.step import StepBatch, StepResult


class RayExecutor:
    """The one driver of a group. When a rank fails, every step in flight and every later one ends with RankFailed."""

    def __init__(self, group: RankGroup) -> None:
        self._group = group
        self._in_flight: dict[int, asyncio.Future[StepResult]] = {}
        group.on_result = self._resolve
        group.on_failure = self._fail

    def submit(self, batch: StepBatch) -> asyncio.Future[StepResult]:
        """Sends the batch, encoded once, before it returns."""
        future: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        self._in_flight[batch.step_id] = future
        try:
            self._group.broadcast(RANK_CODEC.encode(batch))
        except RankFailed as failure:
            self._fail(failure)
        return future

    def _resolve(self, result: StepResult) -> None:
        future = self._in_flight.pop(result.step_id, None)
        if future is not None and not future.done():
            future.set_result(result)

    def _fail(self, failure: RankFailed) -> None:
        futures, self._in_flight = self._in_flight, {}
        for future in futures.values():
            if not future.done():
                future.set_exception(RankFailed(failure.rank, failure.reason))
                future.exception()  # an engine that stops may leave some unawaited
