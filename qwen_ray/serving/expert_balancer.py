"""Keeps the experts of a replica where their load is even: watches what each computes, moves them while serving.

Knows loads and placements. How experts travel is the ranks' business; that they do so between the same two steps on
all of them, the executor's. One layer moves at a time, so that no step waits for more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from qwen_ray.core.errors import RankFailed
from qwen_ray.core.plan import ExpertPlacement, ParallelPlan
from qwen_ray.core.stats import ExpertLoad, RankStats
from qwen_ray.core.step import MoveExperts
from qwen_ray.planner.experts import balance

logger = logging.getLogger(__name__)

WATCH_SECONDS = 10.0
PAUSE_SECONDS = 0.05  # between two layers, for steps
MIN_TOKENS_PER_EXPERT = 16  # and layer, on average: what fewer say is noise


class ExpertBalancer:
    """`placement` is where the experts are now: what ranks that start anew are to load."""

    def __init__(self, plan: ParallelPlan, *, interval: float | None) -> None:
        """`interval`: seconds between two looks, None to look and never to move."""
        assert plan.experts is not None, "a dense model has nothing to balance"
        self.placement: ExpertPlacement = plan.experts
        self.imbalance = 1.0  # of the last interval in which there was something to do
        self.num_rebalances = 0
        self._ep = plan.ep
        self._world_size = plan.world_size
        self._interval = interval
        self._last = ExpertLoad()  # counts when an interval began

    async def run(
        self, stats: Callable[[], Awaitable[Sequence[RankStats]]], move: Callable[[MoveExperts], None]
    ) -> None:
        """Until cancelled. `stats` are those of the ranks that can be asked now; `move` tells all of
        them, or raises RankFailed."""
        while True:
            await asyncio.sleep(self._interval or WATCH_SECONDS)
            ranks = await stats()
            if len(ranks) < self._world_size:
                continue
            changes = self.look(ranks)
            try:
                for change in changes:
                    move(change)
                    self.placement = self.placement.with_layer(change.layer, change.slots)
                    await asyncio.sleep(PAUSE_SECONDS)
            except RankFailed:
                continue
            self.num_rebalances += bool(changes)

    def look(self, ranks: Sequence[RankStats]) -> list[MoveExperts]:
        """Take in what the ranks have counted; what is to move now."""
        counts = ExpertLoad.of(ranks)
        load = counts.since(self._last)
        num_experts = sum(map(len, load.by_expert))
        if load.num_tokens < MIN_TOKENS_PER_EXPERT * num_experts or not num_experts:
            return []  # the interval goes on
        self._last = counts
        self.imbalance = load.imbalance
        if self._interval is None:
            return []
        num_slots = [self.placement.num_slots(rank) for rank in range(self._ep)]
        better = balance(load.by_expert, ep=self._ep, num_slots=num_slots, current=self.placement)
        changes = [
            MoveExperts(layer=i, slots=slots)
            for i, (slots, old) in enumerate(zip(better.slots, self.placement.slots, strict=True))
            if slots != old
        ]
        if changes:
            logger.info("experts of %d layers move; imbalance was %.2f", len(changes), self.imbalance)
        return changes
