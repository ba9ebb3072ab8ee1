"""The loop: keep `depth` steps in flight, hand each result to the scheduler, publish what came of it.

Token ids in, token ids out. Knows asyncio and nothing of what an executor is. One event loop: every method is called
from the one that `run()` runs in.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from qwen_ray.core.errors import RankFailed
from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.request import GenerateRequest, TokenDelta
from qwen_ray.core.stats import EngineStats, RequestTimes, StepStats
from qwen_ray.core.step import StepBatch, StepResult
from qwen_ray.engine.executor import Executor
from qwen_ray.engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """A step in flight. Times in seconds of `time.perf_counter`."""

    batch: StepBatch
    result: asyncio.Future[StepResult]
    schedule_seconds: float
    submitted: float


def _ignore(_: object) -> None:
    pass


class Engine:
    """Continues the sequences it is given until each has ended.

    `publish` gets the deltas of all requests, once per step; `on_step` and `on_finished` are for histograms. All three
    are called from the loop and must be quick.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        publish: Callable[[list[TokenDelta]], None],
        on_step: Callable[[StepStats], None] = _ignore,
        on_finished: Callable[[RequestTimes], None] = _ignore,
    ) -> None:
        self._config = config
        self._executor = executor
        self._publish = publish
        self._on_step = on_step
        self._scheduler = Scheduler(config, on_finished)
        self._inflight: deque[_Step] = deque()
        self._work = asyncio.Event()
        self._is_stopping = False
        self._last_progress = time.monotonic()

    def add(self, request: GenerateRequest) -> None:
        """Queue one sequence. Raises InvalidRequest, ContextLengthExceeded or Overloaded."""
        if self._scheduler.is_idle:
            self._last_progress = time.monotonic()
        self._scheduler.add(request)
        self._work.set()

    def abort(self, request_id: str) -> None:
        """End it at once, with a last delta that says "abort"; unknown and ended ones are passed over in silence."""
        self._scheduler.abort(request_id)
        self._work.set()

    def stop(self) -> None:
        """Let `run()` return when the steps in flight are done. Sequences stay; another `run()` would go on."""
        self._is_stopping = True
        self._work.set()

    def stats(self) -> EngineStats:
        return self._scheduler.stats()

    @property
    def stalled_seconds(self) -> float:
        """Time since a step was finished while there was work to do; 0 for an idle engine."""
        return 0.0 if self._scheduler.is_idle else time.monotonic() - self._last_progress

    async def run(self) -> None:
        """Work until `stop()`; an idle engine waits and costs nothing.

        Raises RankFailed when a step fails. Then no request is lost or ended: all of them are in the queue again, as
        `prompt + tokens so far`. `run()` may be called again once the ranks are repaired; they must have forgotten
        every sequence. The exception is a request that the ranks died under once more while it ran alone: it ends.
        """
        try:
            while True:
                self._work.clear()
                self._fill()
                if self._inflight:
                    await self._finish_oldest()
                elif self._is_stopping:
                    return
                else:
                    await self._work.wait()
        except RankFailed:
            self._scheduler.reset(ranks_died=True)
            self._publish_ends()
            raise
        except BaseException:
            self._scheduler.reset()
            raise
        finally:
            self._is_stopping = False
            self._abandon_steps()

    def _fill(self) -> None:
        """Submit until `depth` steps are in flight."""
        while not self._is_stopping and len(self._inflight) < self._config.depth:
            start = time.perf_counter()
            batch = self._scheduler.schedule()
            if batch is None:
                break
            submitted = time.perf_counter()
            result = asyncio.ensure_future(self._executor.submit(batch))
            self._inflight.append(
                _Step(batch=batch, result=result, schedule_seconds=submitted - start, submitted=submitted)
            )
        self._publish_ends()

    def _publish_ends(self) -> None:
        """Of what has ended outside of a step."""
        if deltas := self._scheduler.take_deltas():
            self._publish(deltas)

    async def _finish_oldest(self) -> None:
        step = self._inflight[0]
        result = await step.result
        if result.step_id != step.batch.step_id:
            raise RankFailed(-1, f"answered step {result.step_id} in place of step {step.batch.step_id}")
        self._inflight.popleft()
        self._last_progress = time.monotonic()
        step_seconds = time.perf_counter() - step.submitted
        if deltas := self._scheduler.update(step.batch, result):
            self._publish(deltas)
        self._on_step(
            StepStats(
                num_sequences=len(step.batch.chunks),
                num_tokens=step.batch.num_tokens,
                num_output_tokens=sum(not sample.pooled for sample in result.samples),
                schedule_seconds=step.schedule_seconds,
                step_seconds=step_seconds,
                rank_seconds=result.seconds,
            )
        )
        # An executor whose results are there at once would keep everybody else off the event loop.
        await asyncio.sleep(0)

    def _abandon_steps(self) -> None:
        """Steps behind a failed one. Asking a failed future for its exception keeps asyncio from warning about it."""
        for step in self._inflight:
            if not step.result.cancel() and not step.result.cancelled():
                step.result.exception()
        self._inflight.clear()
