"""One life of one rank, as its group sees it: its actor, its channel, its signs of life, and its certain end.

Knows one process; who its peers are and what becomes of them is the group's. A rank that dies, or that is given up, is
`broken` for good: its group puts another life in its place, with a handle of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qwen_ray.cluster.channel import Channel
from qwen_ray.cluster.rank_messages import (
    Beat,
    Failed,
    Hello,
    Join,
    Joined,
    Pause,
    Paused,
    Progress,
    RankMessage,
    Released,
)
from qwen_ray.cluster.wire import ChannelClosed
from qwen_ray.core.errors import QwenRayError, RankFailed
from qwen_ray.core.plan import ExpertPlacement

logger = logging.getLogger(__name__)

T = TypeVar("T")

SILENT_SECONDS = 5.0  # without a heartbeat
SILENT_LOADING_SECONDS = 30.0  # likewise, while it reads weights: that may keep the interpreter for long
KILL_SECONDS = 2.0


class RankHandle:
    """`on_broken` is called once, with this, whatever broke it."""

    def __init__(
        self, number: int, dp_rank: int, life: int, actor: Any, on_broken: Callable[[RankHandle], None]
    ) -> None:
        self.number = number
        self.dp_rank = dp_rank
        self.life = life
        self.actor = actor
        self.progress: Progress | None = None
        self.beat: Beat | None = None
        self.reason = ""  # why it is broken
        self.connected = asyncio.Event()
        self.released = asyncio.Event()
        self.ended = asyncio.Event()
        self._broken = asyncio.Event()
        self._on_broken = on_broken
        self._channel: Channel[RankMessage] | None = None
        self._hello: Hello | None = None
        self._is_loaded = False
        self._silent_seconds = 0.0
        self._answer: asyncio.Future[Any] | None = None
        self._answer_types: tuple[type, ...] = ()

    @property
    def is_broken(self) -> bool:
        return self._broken.is_set()

    def break_(self, reason: str) -> None:
        if not self.is_broken:
            self.reason = reason
            self._broken.set()
            self._on_broken(self)

    async def follow(self, channel: Channel[RankMessage], hello: Hello, take: Callable[[RankMessage], None]) -> None:
        """Its channel, until its process ends. `take` gets what is its group's business."""
        self._channel, self._hello = channel, hello
        self.connected.set()
        async for message in channel:
            self._silent_seconds = 0.0
            if not self._take(message):
                take(message)
        self.released.set()
        self.ended.set()
        self.break_(f"its process ended: {channel.reason}")

    def _take(self, message: RankMessage) -> bool:
        match message:
            case Beat():
                self.beat = message
            case Progress():
                self.progress = message
                return False
            case Released():
                self.released.set()
            case Failed() if message.is_lost:
                self.break_(message.reason)
            case Paused() | Joined() | Failed():
                future = self._answer
                is_awaited = future is not None and not future.done() and isinstance(message, self._answer_types)
                if future is not None and is_awaited:
                    future.set_result(message)
                return is_awaited
            case _:
                return False
        return True

    def listen(self, seconds: float) -> None:
        """That much time has passed. A rank that has been silent for too long is broken."""
        self._silent_seconds += seconds
        limit = SILENT_SECONDS if self._is_loaded else SILENT_LOADING_SECONDS
        if self.connected.is_set() and self._silent_seconds > limit:
            self.break_(f"it has given no sign of life for {self._silent_seconds:.0f} s")

    def write(self, frame: bytes) -> None:
        """Raises ChannelClosed."""
        if self._channel is None:
            raise ChannelClosed("not connected")
        self._channel.write(frame)

    async def call(self, method: str, *args: object) -> Any:
        """Through Ray. Raises the rank's own QwenRayError, or RankFailed."""
        try:
            return await self.unless_broken(getattr(self.actor, method).remote(*args))
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, QwenRayError):
                raise cause from None
            raise RankFailed(self.number, f"{method}: {type(cause).__name__}: {cause}") from error
        except RayActorError as error:
            self.break_(f"{method}: {error}")
            raise RankFailed(self.number, self.reason) from error

    async def load(self, experts: ExpertPlacement | None) -> None:
        """Its shard; then it waits to join. Raises what loading raises."""
        await self.call("load", experts)
        await self.call("serve")
        self._is_loaded = True

    async def pause(self, seconds: float) -> Paused:
        """Ends the step that is under way. Raises RankFailed; then it is broken."""
        try:
            async with asyncio.timeout(seconds):
                await self.call("abort")
                return await self._ask(Pause(), Paused)
        except TimeoutError:
            self.break_(f"it did not leave its step within {seconds:.0f} s")
            raise RankFailed(self.number, self.reason) from None

    async def join(self, message: Join) -> Joined:
        """Raises RankFailed; then it is broken, or another one has kept it from joining."""
        answer = await self._ask(message, Joined, Failed)
        if isinstance(answer, Failed):
            raise RankFailed(self.number, f"meeting the other ranks: {answer.reason}")
        return answer

    async def _ask(self, message: Pause | Join, *answer_types: type[T]) -> T:
        self._answer = asyncio.get_running_loop().create_future()
        self._answer_types = answer_types
        assert self._channel is not None, "it has connected"
        try:
            self._channel.send(message)
        except ChannelClosed as error:
            self.break_(str(error))
        return await self.unless_broken(self._answer)

    async def unless_broken(self, awaitable: Awaitable[T]) -> T:
        """Raises RankFailed as soon as the rank breaks."""
        task = asyncio.ensure_future(awaitable)
        broken = asyncio.ensure_future(self._broken.wait())
        try:
            await asyncio.wait((task, broken), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise RankFailed(self.number, self.reason)
        finally:
            broken.cancel()
            task.cancel()

    async def kill(self) -> None:
        """Returns when the process is gone, in whatever state it was; or when its machine does not answer."""
        self.break_("its group has ended it")
        try:
            await asyncio.to_thread(ray.kill, self.actor)
        except Exception as error:  # Ray's own, of several kinds: the GCS is away
            logger.warning("rank %d: Ray does not end it: %s", self.number, error)
        hello = self._hello
        if hello is None or self.ended.is_set():
            return
        # Ray asks a process to end itself; one that is stopped it ends only 5 s later.
        if hello.node_id == ray.get_runtime_context().get_node_id():
            end_process(hello.pid)
        elif not await self._ends():
            where = NodeAffinitySchedulingStrategy(hello.node_id, soft=False)
            end = ray.remote(end_process).options(num_cpus=0, scheduling_strategy=where, max_retries=0)
            with contextlib.suppress(Exception):  # Ray's own, of several kinds: the node is gone
                await asyncio.wait_for(end.remote(hello.pid), KILL_SECONDS)
        if not await self._ends():
            logger.warning("rank %d: process %d has not ended yet; nobody listens to it", self.number, hello.pid)
        if self._channel is not None:
            self._channel.close()

    async def _ends(self) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KILL_SECONDS):
                await self.ended.wait()
        return self.ended.is_set()


def end_process(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
