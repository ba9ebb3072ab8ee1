"""Processes that wait to be a rank: with Python, Ray and torch loaded, which is most of what starting one takes.

Knows actors without a number; what becomes of one that is taken is the group's. One waits for each pipeline stage,
where that stage lies, and takes some 0.3 GB of memory and no time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import ray
from ray.exceptions import RayError

logger = logging.getLogger(__name__)

CALM_SECONDS = 10.0  # after a start or a repair: importing torch would slow down who has waited for it
IDLE_SECONDS = 2.0  # without a step: as long as that import takes
PATIENCE_SECONDS = 60.0  # after a start: then it is made under load, which loses a core for that time
ANSWER_SECONDS = 5.0


class Standbys:
    """`prepare` after each start and repair, `stop` at the end.

    `create(stage)` starts an actor with `free_address`; `idle_seconds()` says how long ago the ranks had a step.
    """

    def __init__(
        self, num_stages: int, create: Callable[[int], Awaitable[Any]], idle_seconds: Callable[[], float]
    ) -> None:
        self._num_stages = num_stages
        self._create = create
        self._idle_seconds = idle_seconds
        self._actors: dict[int, Any] = {}
        self._preparing: asyncio.Task[None] | None = None

    def prepare(self, *, waits_for_idle: bool) -> None:
        """Have one wait for each stage, in a while; returns at once. Not in use at first, if it `waits_for_idle`."""
        self._end_preparing()
        self._preparing = asyncio.create_task(self._prepare(PATIENCE_SECONDS if waits_for_idle else 0.0))

    async def take(self, stage: int) -> Any | None:
        """The stage's actor, which from now on is the caller's. None if there is none, or if it does not answer."""
        self._end_preparing()
        actor = self._actors.pop(stage, None)
        if actor is None:
            return None
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await actor.free_address.remote()
        except (RayError, TimeoutError) as error:
            logger.warning("the process that waited to be a rank of stage %d is no good: %r", stage, error)
            await _kill(actor)
            return None
        return actor

    async def stop(self) -> None:
        """Ends them all."""
        self._end_preparing()
        actors, self._actors = list(self._actors.values()), {}
        await asyncio.gather(*(_kill(actor) for actor in actors))

    def _end_preparing(self) -> None:
        if self._preparing is not None:
            self._preparing.cancel()
            self._preparing = None

    async def _prepare(self, patience: float) -> None:
        patient_until = time.monotonic() + patience
        wait = CALM_SECONDS
        while True:
            await asyncio.sleep(wait)
            wait = min(IDLE_SECONDS - self._idle_seconds(), patient_until - time.monotonic())
            if wait <= 0:
                break
        for stage in range(self._num_stages):
            if stage not in self._actors:
                try:
                    self._actors[stage] = await self._create(stage)
                except (RayError, OSError) as error:
                    logger.warning("no process waits to be a rank of stage %d: %s", stage, error)


async def _kill(actor: Any) -> None:
    with contextlib.suppress(Exception):  # Ray's own, of several kinds: the GCS is away
        await asyncio.to_thread(ray.kill, actor)
