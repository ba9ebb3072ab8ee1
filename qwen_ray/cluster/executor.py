"""Steps to a group of ranks: one frame to each, one result back from each dp rank.

Satisfies `engine.executor.Executor`. Knows which steps are in flight, and nothing of what is in them.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from qwen_ray.cluster.group import RankGroup
from qwen_ray.cluster.rank_messages import RANK_CODEC
from qwen_ray.core.errors import RankFailed
from qwen_ray.core.step import MoveExperts, StepBatch, StepResult


@dataclass(slots=True)
class _Step:
    """A step in flight, and what dp ranks have answered so far."""

    result: asyncio.Future[StepResult]
    parts: list[StepResult] = field(default_factory=list[StepResult])


class RayExecutor:
    """The one driver of a group. When a rank fails, every step in flight and every later one ends with RankFailed."""

    def __init__(self, group: RankGroup) -> None:
        self._group = group
        self._num_dp_ranks = group.spec.plan.dp_attention
        self._in_flight: dict[int, _Step] = {}
        group.on_result = self._resolve
        group.on_failure = self.fail

    def submit(self, batch: StepBatch) -> asyncio.Future[StepResult]:
        """Sends the batch, encoded once for each dp rank, before it returns."""
        future: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        self._in_flight[batch.step_id] = _Step(future)
        parts = [batch] if self._num_dp_ranks == 1 else [batch.part(i) for i in range(self._num_dp_ranks)]
        try:
            self._group.send([RANK_CODEC.encode(part) for part in parts])
        except RankFailed as failure:
            self.fail(failure)
        return future

    def move_experts(self, move: MoveExperts) -> None:
        """All ranks do it between the last step submitted and the next. Raises RankFailed where a step would; what
        fails while they move, the steps hear."""
        self._group.send([RANK_CODEC.encode(move)] * self._num_dp_ranks)

    def _resolve(self, part: StepResult) -> None:
        step = self._in_flight.get(part.step_id)
        if step is None:
            return
        step.parts.append(part)
        if len(step.parts) < self._num_dp_ranks:
            return
        del self._in_flight[part.step_id]
        if not step.result.done():
            step.result.set_result(part if self._num_dp_ranks == 1 else StepResult.joined(step.parts))

    def fail(self, failure: RankFailed) -> None:
        """Ends every step in flight."""
        steps, self._in_flight = self._in_flight, {}
        for step in steps.values():
            if not step.result.done():
                step.result.set_exception(RankFailed(failure.rank, failure.reason))
                step.result.exception()  # an engine that stops may leave some unawaited
