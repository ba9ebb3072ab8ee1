"""The ranks of one replica, from placement to the last process gone.

Knows actors, channels and their ends; not what a step computes. A group starts whole or not at all. The first rank
that fails fails the group (`failure`): steps in flight end with it, at once. The placement, the actors and the
channels are kept apart by rank, and every meeting has a new name, so that one rank can be replaced while the others
keep their weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup

from qwen_ray.cluster.actor import WATCH, WORKER, RankActor
from qwen_ray.cluster.channel import Channel, Listener, listen
from qwen_ray.cluster.placement import actor_options, place, release
from qwen_ray.cluster.rank_messages import RANK_CODEC, Failed, Hello, Progress, RankMessage, Released, Stop
from qwen_ray.cluster.wire import ChannelClosed
from qwen_ray.core.errors import QwenRayError, RankFailed
from qwen_ray.core.plan import Rendezvous, ReplicaSpec
from qwen_ray.core.stats import RankStats
from qwen_ray.core.step import StepResult

logger = logging.getLogger(__name__)

PLACEMENT_SECONDS = 60.0
FAREWELL_SECONDS = 2.0  # for ranks to let go in peace; then they are killed
KILL_SECONDS = 3.0
STATS_SECONDS = 2.0
BLAME_SECONDS = 0.1


class _Rank:
    """One rank as its group sees it."""

    def __init__(self, actor: Any, dp_rank: int) -> None:
        self.actor = actor
        self.dp_rank = dp_rank
        self.channel: Channel[RankMessage] | None = None
        self.progress: Progress | None = None
        self.connected = asyncio.Event()
        self.released = asyncio.Event()
        self.ended = asyncio.Event()

    @property
    def open_channel(self) -> Channel[RankMessage]:
        if self.channel is None:
            raise ChannelClosed("not connected")
        return self.channel


class RankGroup:
    """Use `await RankGroup.start(spec)`. `on_result` and `on_failure` belong to the executor that drives the group."""

    def __init__(self, spec: ReplicaSpec, *, worker: str, on_progress: Callable[[int, int], None] | None) -> None:
        self.spec = spec
        self.failure: RankFailed | None = None
        self.on_result: Callable[[StepResult], None] = lambda result: None
        self.on_failure: Callable[[RankFailed], None] = lambda failure: None
        self._name = f"{spec.name}-{secrets.token_hex(3)}"
        self._worker = worker
        self._secret = secrets.token_bytes(32)
        self._num_meetings = 0
        self._placement: PlacementGroup | None = None
        self._listener: Listener[RankMessage] | None = None
        self._ranks: dict[int, _Rank] = {}
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
        group = cls(spec, worker=worker, on_progress=on_progress)
        try:
            await group._start(placement_seconds)
        except BaseException:
            await group.stop()
            raise
        return group

    def send(self, frames: Sequence[bytes]) -> None:
        """An encoded message for each dp rank, to all of its ranks, without waiting. Raises RankFailed."""
        if self.failure is not None:
            raise self.failure
        for number, rank in self._ranks.items():
            try:
                rank.open_channel.write(frames[rank.dp_rank])
            except ChannelClosed as error:
                self._fail(number, str(error))
                raise RankFailed(number, str(error)) from error

    async def stats(self) -> list[RankStats]:
        """Of every rank that answers within 2 s, by rank; also while steps run, and after a failure."""
        calls = [asyncio.wait_for(self._call(rank, "stats"), STATS_SECONDS) for rank in self._ranks]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, RankStats)]

    async def stop(self) -> None:
        """Ends every rank and frees its place, within 5 s whatever state they are in. Safe to call twice."""
        self._is_stopping = True
        ranks = list(self._ranks.values())
        if self._is_serving and self.failure is None:  # otherwise some may hang, waiting for the one that failed
            farewell = RANK_CODEC.encode(Stop())
            for rank in ranks:
                with contextlib.suppress(ChannelClosed):
                    rank.open_channel.write(farewell)
            await _wait_all([rank.released for rank in ranks], FAREWELL_SECONDS)
        for rank in ranks:
            ray.kill(rank.actor)
        # The end of a rank's channel is the end of its process.
        await _wait_all([rank.ended for rank in ranks if rank.connected.is_set()], KILL_SECONDS)
        if self._listener is not None:
            await self._listener.close()
        if self._placement is not None:
            release(self._placement)
            self._placement = None
        self._ranks.clear()

    async def _start(self, placement_seconds: float) -> None:
        self._placement = await place(self.spec, seconds=placement_seconds)
        self._listener = await listen(ray.util.get_node_ip_address(), self._secret, self._follow, RANK_CODEC)
        for number in range(self.spec.plan.world_size):
            dp_rank = self.spec.plan.shard(self.spec.config, number).dp_rank
            self._ranks[number] = _Rank(self._create_actor(number, self._placement), dp_rank)
        meeting_points = await self._call_all("connect", self._listener.address, self._secret)
        await asyncio.gather(*(rank.connected.wait() for rank in self._ranks.values()))
        self._num_meetings += 1
        rendezvous = Rendezvous(address=meeting_points[0], name=f"{self._name}-{self._num_meetings}")
        await self._call_all("join", rendezvous)
        await self._call_all("load")
        await self._call_all("allocate")
        await self._call_all("serve")
        self._is_serving = True

    def _create_actor(self, number: int, placement: PlacementGroup) -> Any:
        options = actor_options(self.spec, placement, number, name=f"{self._name}-rank-{number}")
        as_actor: Any = ray.remote  # its type wants one overload per option
        return as_actor(concurrency_groups={WATCH: 1}, **options)(RankActor).remote(self.spec, number, self._worker)

    async def _call_all(self, method: str, *args: object) -> list[Any]:
        """The ranks' answers, by rank; the first error at once, without waiting for the others."""
        return await asyncio.gather(*(self._call(number, method, *args) for number in self._ranks))

    async def _call(self, number: int, method: str, *args: object) -> Any:
        try:
            return await getattr(self._ranks[number].actor, method).remote(*args)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, QwenRayError):
                raise cause from None
            raise RankFailed(number, f"{method}: {type(cause).__name__}: {cause}") from error
        except RayActorError as error:
            raise RankFailed(number, f"{method}: {error}") from error

    async def _follow(self, channel: Channel[RankMessage]) -> None:
        """One rank's channel, from its first message to the end of its process."""
        hello = await anext(channel, None)
        if not isinstance(hello, Hello) or hello.rank not in self._ranks:
            return
        rank = self._ranks[hello.rank]
        rank.channel = channel
        rank.connected.set()
        async for message in channel:
            match message:
                case StepResult():
                    self.on_result(message)
                case Progress():
                    rank.progress = message
                    self._report_progress()
                case Failed():
                    # A rank that dies makes its peers raise: give the news of a death time to come first.
                    asyncio.get_running_loop().call_later(BLAME_SECONDS, self._fail, hello.rank, message.reason)
                case Released():
                    rank.released.set()
                case _:
                    logger.warning("rank %d sent a %s", hello.rank, type(message).__name__)
        rank.released.set()
        rank.ended.set()
        if not self._is_stopping:
            self._fail(hello.rank, f"its process ended: {channel.reason}")

    def _report_progress(self) -> None:
        known = [rank.progress for rank in self._ranks.values() if rank.progress is not None]
        if self._on_progress is not None and len(known) == len(self._ranks):
            self._on_progress(sum(p.done for p in known), sum(p.total for p in known))

    def _fail(self, number: int, reason: str) -> None:
        if self.failure is None:
            self.failure = RankFailed(number, reason)
            logger.error("%s: %s", self._name, self.failure)
            self.on_failure(self.failure)


async def _wait_all(events: list[asyncio.Event], seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.gather(*(event.wait() for event in events))
