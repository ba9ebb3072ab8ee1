"""Ranks that take steps from an engine in another process, over real channels. Not a test itself."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from rank_processes import Ranks, free_address

from qwen_ray.cluster.channel import BlockingChannel, Channel, listen
from qwen_ray.cluster.rank_messages import RANK_CODEC, Hello, RankMessage, Stop
from qwen_ray.core.errors import RankFailed
from qwen_ray.core.plan import Rendezvous, ReplicaSpec
from qwen_ray.core.stats import RankStats
from qwen_ray.core.step import StepBatch, StepResult
from qwen_ray.worker.worker import Worker

SECRET = b"s" * 32


def serve(rank: int, spec: ReplicaSpec, address: str, channel_address: str) -> RankStats:
    """One rank's life, as an actor lives it: until Stop. What it says of itself at the end."""
    channel = BlockingChannel.connect(channel_address, SECRET, RANK_CODEC)
    worker = Worker(spec, rank)
    try:
        worker.load()
        worker.join(Rendezvous(address=address, name="test-steps"))
        worker.warm_up()
        channel.send(Hello(rank=rank, life=1, pid=os.getpid(), node_id=""))
        while not isinstance(message := channel.receive(), Stop):
            result = worker.execute(message) if isinstance(message, StepBatch) else worker.move_experts(message)
            if result is not None:
                channel.send(result)
        return worker.stats()
    finally:
        worker.close()
        channel.close()


class ProcessGroup:
    """To an executor, a `cluster.group.RankGroup`: of processes that are no actors. `stats` are there after the end."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self.spec = spec
        self.stats: list[RankStats] = []
        self.on_result: Callable[[StepResult], None] = print
        self.on_failure: Callable[[RankFailed], None] = print
        self._channels: dict[int, Channel[RankMessage]] = {}
        self._all_are_here = asyncio.Event()
        self._is_stopping = False

    @classmethod
    @asynccontextmanager
    async def running(cls, ranks: Ranks, spec: ReplicaSpec) -> AsyncIterator[ProcessGroup]:
        group = cls(spec)
        listener = await listen("127.0.0.1", SECRET, group._follow, RANK_CODEC)
        arguments = (spec, free_address(), listener.address)
        lives = asyncio.ensure_future(asyncio.to_thread(ranks.run, spec.plan.world_size, serve, *arguments))
        started = asyncio.ensure_future(group._all_are_here.wait())
        try:
            await asyncio.wait([lives, started], return_when=asyncio.FIRST_COMPLETED)
            if started.done():
                yield group
        finally:
            started.cancel()
            group._is_stopping = True
            for channel in group._channels.values():
                if not channel.is_closed:
                    channel.send(Stop())
            group.stats = await lives  # with the traceback of a rank that failed
            await listener.close()

    def send(self, frames: Sequence[bytes]) -> None:
        for rank, channel in self._channels.items():
            channel.write(frames[self.spec.plan.shard(self.spec.config, rank).dp_rank])

    async def _follow(self, channel: Channel[RankMessage]) -> None:
        hello = await anext(channel)
        assert isinstance(hello, Hello)
        self._channels[hello.rank] = channel
        if len(self._channels) == self.spec.plan.world_size:
            self._all_are_here.set()
        async for message in channel:
            assert isinstance(message, StepResult)
            self.on_result(message)
        if not self._is_stopping:
            self.on_failure(RankFailed(hello.rank, channel.reason))
