"""The ranks of one replica, from placement to the last process gone.

Knows placement, actors, channels and meetings; not what a step computes. A group starts whole or not at all. The first
rank that fails fails the group (`failure`): steps in flight end with it, at once. Then `repair` replaces the ranks that
are broken while the others keep their weights, or `stop` ends them all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import ray
from ray.util.placement_group import PlacementGroup

from qwen_ray.cluster.actor import WATCH, WORKER, RankActor
from qwen_ray.cluster.channel import Channel, Listener, listen
from qwen_ray.cluster.placement import actor_options, place, release
from qwen_ray.cluster.rank_handle import RankHandle
from qwen_ray.cluster.rank_messages import RANK_CODEC, Beat, Failed, Hello, Join, Joined, Progress, RankMessage, Stop
from qwen_ray.cluster.repair import Repair
from qwen_ray.cluster.standby import Standbys
from qwen_ray.cluster.wire import ChannelClosed
from qwen_ray.core.errors import RankFailed
from qwen_ray.core.plan import ReplicaSpec
from qwen_ray.core.stats import RankStats, RepairTimes
from qwen_ray.core.step import StepResult

logger = logging.getLogger(__name__)

T = TypeVar("T")

PLACEMENT_SECONDS = 60.0
FAREWELL_SECONDS = 2.0  # for ranks to let go in peace; then they are killed
STATS_SECONDS = 2.0
BLAME_SECONDS = 0.1
WATCH_SECONDS = 0.5  # between two looks at the signs of life
MAX_MEETINGS = 3  # in one repair


def idle_seconds(beats: Sequence[Beat | None], last_step: float) -> float:
    """Since `last_step`, when ranks began or ended one; 0 while any is in one, however long that takes."""
    if any(beat is not None and beat.step_seconds for beat in beats):
        return 0.0
    return time.monotonic() - last_step


class RankGroup:
    """Use `await RankGroup.start(spec)`. `on_result` and `on_failure` belong to the executor that drives the group."""

    def __init__(
        self,
        spec: ReplicaSpec,
        *,
        worker: str,
        on_progress: Callable[[int, int], None] | None,
        placement_seconds: float,
    ) -> None:
        self.spec = spec
        self.experts = spec.plan.experts  # where they lay when the ranks started, or were repaired
        self.warm_up = Joined()  # the first step that all took when they started: its tokens, and its time
        self.failure: RankFailed | None = None
        self.on_result: Callable[[StepResult], None] = lambda result: None
        self.on_failure: Callable[[RankFailed], None] = lambda failure: None
        self._name = f"{spec.name}-{secrets.token_hex(3)}"
        self._worker = worker
        self._secret = secrets.token_bytes(32)
        self._num_meetings = 0
        self._num_lives = 0
        self._placement_seconds = placement_seconds
        self._placement: PlacementGroup | None = None
        self._listener: Listener[RankMessage] | None = None
        self._ranks: dict[int, RankHandle] = {}
        self._repair: Repair | None = None
        self._last_step = 0.0  # when the ranks were given one, or had done it
        num_stages = spec.plan.pp if spec.standby_ranks else 0
        self._standbys = Standbys(
            num_stages,
            self._new_standby,
            lambda: idle_seconds([rank.beat for rank in self._ranks.values()], self._last_step),
        )
        self._watching: asyncio.Task[None] | None = None
        self._on_progress = on_progress
        self._is_serving = False
        self._is_stopping = False

    @classmethod
    async def start(
        cls,
        spec: ReplicaSpec,
        *,
        on_progress: Callable[[int, int], None] | None = None,
        worker: str = WORKER,
        placement_seconds: float = PLACEMENT_SECONDS,
    ) -> RankGroup:
        """All ranks loaded, warmed up and waiting for steps.

        `on_progress(done, total)`: bytes of all shards together, from when every rank knows its own; called in the
        event loop. Raises what a rank raised (CheckpointError, say), RankFailed if one died, PlanRefused if there is
        no place for them; then nothing is left of the group.
        """
        group = cls(spec, worker=worker, on_progress=on_progress, placement_seconds=placement_seconds)
        try:
            await group._start()
        except BaseException:
            await group.stop()
            raise
        return group

    def send(self, frames: Sequence[bytes]) -> None:
        """An encoded message for each dp rank, to all of its ranks, without waiting. Raises RankFailed."""
        if self.failure is not None:
            raise self.failure
        self._last_step = time.monotonic()
        for number, rank in self._ranks.items():
            try:
                rank.write(frames[rank.dp_rank])
            except ChannelClosed as error:
                rank.break_(str(error))
                raise RankFailed(number, str(error)) from error

    async def stats(self) -> list[RankStats]:
        """Of every rank that answers within 2 s, by rank; also while steps run, and after a failure."""
        calls = [asyncio.wait_for(rank.call("stats"), STATS_SECONDS) for _, rank in sorted(self._ranks.items())]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, RankStats)]

    async def repair(self, patience: float) -> RepairTimes:
        """After a failure: broken ranks are replaced, all meet anew and forget their sequences.

        `patience` in seconds, for a rank to leave its step. Raises RankFailed, or what loading raises, when there is
        no use in going on; then the group is to be stopped.
        """
        self.failure = self.failure or RankFailed(-1, "the ranks meet anew")  # no step until they have
        self._is_serving = False
        self._repair = repair = Repair(self._ranks, self.experts, self._create, self._connect)
        for _ in range(MAX_MEETINGS):
            await repair.run(patience)
            self.experts = repair.experts
            try:
                await self._meet(warm_up=False)
            except RankFailed as failure:
                logger.warning("%s: %s; once more", self._name, failure)
                self.failure = failure
                continue
            if not any(rank.is_broken for rank in self._ranks.values()):
                self._repair = self.failure = None
                self._standbys.prepare(waits_for_idle=False)  # what failed once may fail again
                return repair.times()
        raise self.failure

    def blame(self, seconds: float) -> None:
        """No step has ended for `seconds` although there is one to do: fails the group.

        Broken are the ranks that are in a step and do not wait for others; all, where there is none.
        """
        beats = {number: rank.beat for number, rank in self._ranks.items()}
        guilty = [n for n, beat in beats.items() if beat is not None and beat.step_seconds and not beat.is_waiting]
        for number in guilty or beats:
            self._ranks[number].break_(f"no progress for {seconds:.0f} s")

    async def stop(self) -> None:
        """Ends every rank and frees its place, within 5 s whatever state they are in. Safe to call twice."""
        self._is_stopping = True
        if self._watching is not None:
            self._watching.cancel()
        ranks = list(self._ranks.values())
        if self._is_serving and self.failure is None:  # otherwise some may hang, waiting for the one that failed
            farewell = RANK_CODEC.encode(Stop())
            for rank in ranks:
                with contextlib.suppress(ChannelClosed):
                    rank.write(farewell)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL_SECONDS):
                    await asyncio.gather(*(rank.released.wait() for rank in ranks))
        await asyncio.gather(self._standbys.stop(), *(rank.kill() for rank in ranks))
        if self._listener is not None:
            await self._listener.close()
        if self._placement is not None:
            release(self._placement)
            self._placement = None
        self._ranks.clear()

    async def _start(self) -> None:
        self._placement = await place(self.spec, seconds=self._placement_seconds)
        self._listener = await listen(ray.util.get_node_ip_address(), self._secret, self._follow, RANK_CODEC)
        self._watching = asyncio.create_task(self._watch())
        ranks = await _all(self._create(number) for number in range(self.spec.plan.world_size))
        await _all(self._connect(rank) for rank in ranks)
        await _all(rank.load(None) for rank in ranks)
        joined = await self._meet(warm_up=True)
        self.warm_up = max(joined, key=lambda answer: answer.seconds)
        self._standbys.prepare(waits_for_idle=True)

    async def _create(self, number: int) -> RankHandle:
        """An actor in the place of that rank: the one that stands by, or a new one."""
        self._num_lives += 1
        life = self._num_lives
        shard = self.spec.plan.shard(self.spec.config, number)
        actor = await self._standbys.take(shard.stage)
        if actor is None:
            actor = await self._new_actor(shard.stage, f"rank-{number}-{life}")
        self._ranks[number] = RankHandle(number, shard.dp_rank, life, actor, self._broke)
        return self._ranks[number]

    async def _new_standby(self, stage: int) -> Any:
        return await self._new_actor(stage, f"standby-{stage}-{secrets.token_hex(3)}", is_standby=True)

    async def _new_actor(self, stage: int, name: str, *, is_standby: bool = False) -> Any:
        assert self._placement is not None, "placed first"
        name = f"{self._name}-{name}"
        options = actor_options(self.spec, self._placement, stage, name=name, is_standby=is_standby)
        as_actor: Any = ray.remote  # its type wants one overload per option
        make = as_actor(concurrency_groups={WATCH: 1}, **options)(RankActor).remote
        # Ray asks the GCS: in a thread, since that may be on its way back.
        return await asyncio.to_thread(make, self._worker)

    async def _connect(self, rank: RankHandle) -> None:
        assert self._listener is not None, "listened first"
        try:
            async with asyncio.timeout(self._placement_seconds):
                address = self._listener.address
                await rank.call("connect", self.spec, rank.number, rank.life, address, self._secret)
                await rank.unless_broken(rank.connected.wait())
        except TimeoutError:
            rank.break_(f"it did not start within {self._placement_seconds:.0f} s")
            raise RankFailed(rank.number, rank.reason) from None

    async def _meet(self, *, warm_up: bool) -> list[Joined]:
        self._num_meetings += 1
        address = await self._ranks[0].call("free_address")
        join = Join(address=address, name=f"{self._name}-{self._num_meetings}", warm_up=warm_up)
        joined = await _all(rank.join(join) for rank in self._ranks.values())
        self._is_serving = True
        return joined

    async def _follow(self, channel: Channel[RankMessage]) -> None:
        """One rank's channel, from its first message to the end of its process."""
        hello = await anext(channel, None)
        if not isinstance(hello, Hello):
            return
        rank = self._ranks.get(hello.rank)
        if rank is not None and rank.life == hello.life:
            await rank.follow(channel, hello, lambda message: self._take(rank, message))

    def _take(self, rank: RankHandle, message: RankMessage) -> None:
        match message:
            case StepResult():
                self._last_step = time.monotonic()
                self.on_result(message)
            case Progress():
                self._report_progress()
            case Failed():
                # A rank that dies makes its peers raise: give the news of a death time to come first.
                meeting = self._num_meetings
                asyncio.get_running_loop().call_later(BLAME_SECONDS, self._fail, rank.number, message.reason, meeting)
            case _:
                logger.warning("rank %d sent a %s", rank.number, type(message).__name__)

    def _report_progress(self) -> None:
        known = [rank.progress for rank in self._ranks.values() if rank.progress is not None]
        if self._on_progress is not None and len(known) == len(self._ranks):
            self._on_progress(sum(p.done for p in known), sum(p.total for p in known))

    async def _watch(self) -> None:
        """Listens for signs of life. Time in which this very process did not run is held against nobody."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for rank in list(self._ranks.values()):
                if not rank.is_broken:
                    rank.listen(WATCH_SECONDS)

    def _broke(self, rank: RankHandle) -> None:
        if self._is_stopping or self._ranks.get(rank.number) is not rank:
            return
        if self._repair is not None:
            self._repair.changed()
        self._fail(rank.number, rank.reason, self._num_meetings)

    def _fail(self, number: int, reason: str, meeting: int) -> None:
        if self.failure is None and meeting == self._num_meetings and not self._is_stopping:
            self.failure = RankFailed(number, reason)
            logger.error("%s: %s", self._name, self.failure)
            self.on_failure(self.failure)


async def _all(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Their results; or the first error, and the others are cancelled."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
