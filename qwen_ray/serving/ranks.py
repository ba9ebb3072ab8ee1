"""The ranks of one replica over its whole life: started, watched, repaired, started anew, ended.

To the engine, an executor that runs steps on whichever ranks there are now. Knows groups and how long they may take;
not why the engine wants to go on, nor whom the replica tells how it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from qwen_ray.cluster.executor import RayExecutor
from qwen_ray.cluster.group import RankGroup
from qwen_ray.core.errors import QwenRayError, RankFailed
from qwen_ray.core.plan import ReplicaSpec
from qwen_ray.core.stats import EngineStats, RankStats, RepairTimes, StartTimes, StepStats
from qwen_ray.core.step import MoveExperts, StepBatch, StepResult
from qwen_ray.serving.expert_balancer import ExpertBalancer
from qwen_ray.serving.patience import Patience

logger = logging.getLogger(__name__)

PLACEMENT_SECONDS = 600.0  # a cluster that scales with its load may have to start a machine first
# Failures without a step in between. One request that kills every rank it runs on is ended by the engine after three.
MAX_FRUITLESS_REPAIRS = 4
MAX_FRUITLESS = 6  # those that are answered by starting all ranks anew among them; then there is no hope
COLD = 3.0  # so many times as long may the first step after a repair take


class Ranks:
    """`start`, then `recover` after every RankFailed that a step ends with, then `stop`."""

    def __init__(self, spec: ReplicaSpec, balancer: ExpertBalancer | None, on_failure: Callable[[], None]) -> None:
        """`on_failure` is called when they fail between two steps: in a step, whoever waits for it hears of it."""
        self.stage = "starting"
        self.bytes = (0, 0)  # of weights: read, and in all, 0 while unknown
        self.load_seconds = 0.0
        self.start_times = StartTimes()  # of it
        self.num_repairs = 0
        self.num_restarts = 0
        self.repair_times = RepairTimes()  # of the last one
        self.stalled_seconds = 0.0  # with work to do and no step done, watched by `look`
        self.patience = Patience(spec.engine.depth)
        self._spec = spec
        self._balancer = balancer
        self._on_failure = on_failure
        self._group: RankGroup | None = None
        self._executor: RayExecutor | None = None
        self._stages: dict[str, float] = {}  # of the start under way, monotonic
        self._num_fruitless = 0
        self._num_steps = 0
        self._num_poisonous = 0
        self._num_in_flight = 0
        self._progressed = 0.0  # monotonic: when the last step was done, or one was submitted after a rest
        self._repaired: float | None = None  # monotonic; until the first step after it

    # The engine's executor.

    def submit(self, batch: StepBatch) -> asyncio.Future[StepResult]:
        executor = self._running()
        self.patience.expect(batch.num_tokens)
        if self._num_in_flight == 0:
            self._progressed = time.monotonic()
        self._num_in_flight += 1
        return executor.submit(batch)

    def move_experts(self, move: MoveExperts) -> None:
        self._running().move_experts(move)

    def _running(self) -> RayExecutor:
        if self._executor is None:
            raise RankFailed(-1, "no ranks are running")
        return self._executor

    @property
    def failure(self) -> RankFailed | None:
        return self._group.failure if self._group is not None else None

    async def stats(self) -> tuple[RankStats, ...]:
        """Of the ranks that answer, by rank; none while they start."""
        group = self._group
        return () if group is None else tuple(await group.stats())

    # Their life.

    async def start(self) -> None:
        """Raises RankFailed when they have failed too often without a step in between; other errors at once."""
        while True:
            try:
                await self._start_once()
                return
            except RankFailed as failure:
                self._num_fruitless += 1
                if self._num_fruitless >= MAX_FRUITLESS:
                    raise
                logger.error("%s; once more", failure)

    async def recover(self, failure: RankFailed, on_restart: Callable[[], None]) -> None:
        """Ranks that work, after `failure`; `on_restart` is called when all have to start anew. Raises when there is
        no hope."""
        self._num_fruitless += 1
        if self._num_fruitless > MAX_FRUITLESS:
            raise failure
        if self._num_fruitless <= MAX_FRUITLESS_REPAIRS and await self._repair():
            return
        logger.error("%s; all ranks are started anew", failure)
        on_restart()
        await self.stop()
        self.num_restarts += 1
        await self.start()

    async def stop(self) -> None:
        self._executor = None
        self._num_in_flight = 0
        self._repaired = None
        group, self._group = self._group, None
        if group is not None:
            await group.stop()

    def look(self, seconds: float, engine: EngineStats) -> None:
        """So much time has passed. Ranks that have work and take longer for it than they may have failed."""
        has_work = engine.num_running + engine.num_waiting > 0
        has_progress = engine.steps_total != self._num_steps
        self._num_steps = engine.steps_total
        if engine.poisonous_total != self._num_poisonous:  # one request less that ranks die of
            self._num_poisonous = engine.poisonous_total
            self._num_fruitless = 0
        self.stalled_seconds = self.stalled_seconds + seconds if has_work and not has_progress else 0.0
        group = self._group
        # New ranks have not warmed up.
        limit = self.patience.seconds * (1 if self._repaired is None else COLD)
        if group is not None and group.failure is None and self.stalled_seconds > limit:
            group.blame(self.stalled_seconds)

    def step_done(self, stats: StepStats) -> None:
        self._num_fruitless = 0
        self._num_in_flight -= 1
        self._progressed = time.monotonic()
        self.patience.learn(stats.num_tokens, stats.step_seconds)
        if self._repaired is not None:
            self.repair_times = replace(self.repair_times, first_step=self._progressed - self._repaired)
            self._repaired = None
            logger.info("steps again after a repair: %s", self.repair_times)

    async def _start_once(self) -> None:
        started = time.monotonic()
        self.stage, self.bytes = "starting", (0, 0)
        self._stages = {}
        spec = self._spec
        if self._balancer is not None:
            spec = replace(spec, plan=replace(spec.plan, experts=self._balancer.placement))
        group = await RankGroup.start(spec, on_progress=self._progress, placement_seconds=PLACEMENT_SECONDS)
        self._executor = executor = RayExecutor(group)

        def fail(failure: RankFailed) -> None:
            executor.fail(failure)
            if not self._num_in_flight:
                self._on_failure()

        group.on_failure = fail
        self._group = group
        self.patience.learn(group.warm_up.num_tokens, group.warm_up.seconds)
        ready = time.monotonic()
        read = self._stages.get("warming up", ready)
        placed = self._stages.get("reading weights", read)
        self.start_times = StartTimes(placed=placed - started, read=read - placed, warmed_up=ready - read)
        self.load_seconds = ready - started
        self.stalled_seconds = 0.0
        self.stage = "ready"

    async def _repair(self) -> bool:
        """Whether it could be done."""
        group = self._group
        if group is None:
            return False
        noticed = time.monotonic() - self._progressed if self._num_in_flight else 0.0
        self._num_in_flight = 0
        self.stage = "repairing"
        try:
            times = await group.repair(self.patience.seconds)
        except QwenRayError as error:
            logger.error("the ranks cannot be repaired: %s", error)
            return False
        except Exception:  # Ray's own, of several kinds
            logger.exception("the ranks cannot be repaired")
            return False
        if self._balancer is not None and group.experts is not None:
            self._balancer.placement = group.experts
        self.repair_times = replace(times, noticed=noticed)
        self.num_repairs += 1
        self._repaired = time.monotonic()
        self.stalled_seconds = 0.0
        self.stage = "ready"
        return True

    def _progress(self, done: int, total: int) -> None:
        self.bytes = (done, total)
        if self.stage != "repairing":
            self.stage = "reading weights" if done < total else "warming up"
            self._stages.setdefault(self.stage, time.monotonic())
