"""Makes a group of ranks whole again: broken ranks are replaced, the others keep their weights.

Knows the order of things. Every rank that is not broken leaves its step; every one that is broken is ended for
certain, and a new one takes its place and loads its shard; all at the same time. A death meanwhile is one more to
replace. How actors are made, and how all meet in the end, is the group's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from qwen_ray.cluster.rank_handle import RankHandle
from qwen_ray.cluster.rank_messages import ExpertSlots
from qwen_ray.core.errors import RankFailed
from qwen_ray.core.plan import ExpertPlacement
from qwen_ray.core.stats import RepairTimes

logger = logging.getLogger(__name__)

MAX_LIVES = 3  # of one rank in one repair
PHASES = ("killed", "started", "loaded")


class Repair:
    """`run`, and again if the ranks could not meet after it. `ranks`, by number, are the group's own.

    `create(number)` puts the handle of a new actor among them, `connect` waits until it is there.
    """

    def __init__(
        self,
        ranks: dict[int, RankHandle],
        experts: ExpertPlacement | None,
        create: Callable[[int], Awaitable[RankHandle]],
        connect: Callable[[RankHandle], Awaitable[None]],
    ) -> None:
        """`experts`: where they were told to lie, None for a dense model; later, where they do lie."""
        self.experts = experts
        self.replaced: Counter[int] = Counter()
        self._ranks = ranks
        self._create = create
        self._connect = connect
        self._changed = asyncio.Event()
        self._paused: dict[int, ExpertSlots] = {}  # ranks that are through; where they say that their experts lie
        self._are_agreed = asyncio.Event()
        self._began = time.monotonic()
        self._marks: dict[str, float] = {}  # when the last rank was through with a phase

    def changed(self) -> None:
        """Some rank has broken."""
        self._changed.set()

    async def run(self, patience: float) -> None:
        """All ranks loaded and paused. `patience` in seconds, for a rank to leave the step that it is in.

        Raises RankFailed when one died too often, and what loading raises.
        """
        self._paused.clear()
        working: dict[int, asyncio.Task[None]] = {}
        try:
            while True:
                self._changed.clear()
                self._agree()
                for number, rank in self._ranks.items():
                    if number not in working and (rank.is_broken or number not in self._paused):
                        work = self._replace(rank) if rank.is_broken else self._pause(rank, patience)
                        working[number] = asyncio.create_task(work)
                if not working:
                    return
                await self._wait(working)
        finally:
            for task in working.values():
                task.cancel()
            await asyncio.gather(*working.values(), return_exceptions=True)

    def times(self) -> RepairTimes:
        """Now that all have met."""
        seconds: dict[str, float] = {}
        before = self._began
        for phase in PHASES:
            mark = max(before, self._marks.get(phase, before))
            seconds[phase] = mark - before
            before = mark
        return RepairTimes(**seconds, joined=time.monotonic() - before)

    async def _wait(self, working: dict[int, asyncio.Task[None]]) -> None:
        """Until a rank is through, or one more has broken. Raises what a rank's task raised."""
        changed = asyncio.create_task(self._changed.wait())
        await asyncio.wait((changed, *working.values()), return_when=asyncio.FIRST_COMPLETED)
        changed.cancel()
        for number in [number for number, task in working.items() if task.done()]:
            working.pop(number).result()

    async def _pause(self, rank: RankHandle, patience: float) -> None:
        try:
            self._paused[rank.number] = (await rank.pause(patience)).experts
        except RankFailed:
            if not rank.is_broken:
                raise

    async def _replace(self, rank: RankHandle) -> None:
        number = rank.number
        self._paused.pop(number, None)
        self.replaced[number] += 1
        if self.replaced[number] > MAX_LIVES:
            raise RankFailed(number, f"{MAX_LIVES} new ones failed in its place; the last one: {rank.reason}")
        logger.warning("rank %d is replaced: %s", number, rank.reason)
        await rank.kill()
        self._mark("killed")
        try:
            new = await self._create(number)
            await self._connect(new)
            self._mark("started")
            if self.experts is not None:
                await new.unless_broken(self._are_agreed.wait())
            await new.load(self.experts)
        except RankFailed:
            if not self._ranks[number].is_broken:
                raise
        else:
            self._mark("loaded")
            self._paused[number] = {}

    def _agree(self) -> None:
        """On where the experts lie, as soon as all ranks that stay are paused.

        They may have failed amid a move that some have made and others have not. Then those that do not agree with the
        first are replaced too.
        """
        staying = [rank for number, rank in self._ranks.items() if number not in self.replaced and not rank.is_broken]
        if self._are_agreed.is_set() or any(rank.number not in self._paused for rank in staying):
            return
        experts = self.experts
        agreed: ExpertSlots = {}
        for rank in staying:
            for layer, slots in self._paused[rank.number].items():
                if agreed.setdefault(layer, slots) != slots:
                    rank.break_(f"it has other experts in layer {layer} than the others know of")
                elif experts is not None:
                    experts = experts.with_layer(layer, slots)
        self.experts = experts
        self._are_agreed.set()

    def _mark(self, phase: str) -> None:
        self._marks[phase] = time.monotonic()
