"""An ingress's channels to all replicas: found in the directory, opened, listened to, watched for silence.

Knows which replicas there are and how they are; not what runs on them. The directory may be away for as long as it
likes: what is connected stays connected.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from qwen_ray.cluster.channel import Channel
from qwen_ray.cluster.directory import Entry
from qwen_ray.cluster.wire import ChannelClosed
from qwen_ray.serving.link import Link
from qwen_ray.serving.messages import Answer, ReplicaStatus

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between two looks into the directory
TICK_SECONDS = 0.5
# A replica that has died is there again so soon, if it comes back at all: Serve notices within 2 s, a process starts.
RETURN_SECONDS = 30.0


class Links:
    """`start`, `close`, and in between iterate. `on_message(link, message)` gets what is not about the replica itself;
    `on_change` is called when a replica has said how it is, and twice a second; `on_lost(link)` when a channel ended.
    """

    def __init__(
        self,
        find: Callable[[], Awaitable[list[Entry]]],
        connect: Callable[[Entry], Awaitable[Channel[Any]]],
        fingerprint: str,
        *,
        on_message: Callable[[Link, Any], None],
        on_change: Callable[[], None],
        on_lost: Callable[[Link], None],
    ) -> None:
        self._find = find
        self._connect = connect
        self._fingerprint = fingerprint
        self._on_message = on_message
        self._on_change = on_change
        self._on_lost = on_lost
        self._links: dict[str, Link] = {}
        self._opening: set[str] = set()
        self._released: set[str] = set()
        self._expected_until = time.monotonic() + RETURN_SECONDS
        self._look_now = asyncio.Event()
        self._tasks: set[asyncio.Future[None]] = set()

    def __iter__(self) -> Iterator[Link]:
        return iter(list(self._links.values()))

    async def start(self) -> None:
        self._spawn(self._look())
        self._spawn(self._watch())

    async def close(self) -> None:
        for link in self:
            link.channel.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def look_now(self) -> None:
        self._look_now.set()

    @property
    def usable(self) -> list[Link]:
        return [link for link in self._links.values() if link.is_usable]

    @property
    def are_expected(self) -> bool:
        """Whether there is a replica to wait for: one that loads, repairs itself, or has died a moment ago."""
        return time.monotonic() < self._expected_until or any(link.is_on_its_way for link in self._links.values())

    def release(self, link: Link) -> None:
        """It is not needed any more, and never again: a draining replica is done when all have let go of it."""
        self._released.add(link.replica)
        link.channel.close()

    async def _look(self) -> None:
        """Connects to new replicas. The directory may take its time to answer."""
        while True:
            self._look_now.clear()
            try:
                entries = await self._find()
            except Exception as error:  # the GCS is away: Ray's own errors, of several kinds
                logger.warning("directory not readable: %s", error)
                entries = []
            for entry in entries:
                if entry.id not in self._links and entry.id not in self._opening | self._released:
                    self._opening.add(entry.id)
                    self._spawn(self._open(entry))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    # Something waits for a replica: look again soon, but not in a tight loop.
                    await self._look_now.wait()
                    await asyncio.sleep(LOOK_SECONDS / 5)

    async def _watch(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(TICK_SECONDS)
            late = time.monotonic() - before - TICK_SECONDS
            for link in self:
                if late > TICK_SECONDS:  # this process stood still, and with it its ears
                    link.excuse_silence(late)
                elif link.is_silent and not link.channel.is_closed:
                    logger.warning("replica %s has been silent for %.0f s", link.replica, link.silent_seconds)
                    link.channel.close()
            self._on_change()

    async def _open(self, entry: Entry) -> None:
        try:
            channel = await self._connect(entry)
        except ChannelClosed as error:  # look again until its entry is gone
            logger.info("replica %s cannot be reached: %s", entry.id, error)
            return
        finally:
            self._opening.discard(entry.id)
        link = Link(entry.id, channel, self._fingerprint)
        self._links[entry.id] = link
        self._spawn(self._read(link))

    async def _read(self, link: Link) -> None:
        try:
            async for message in link.channel:
                link.heard()
                if not isinstance(message, ReplicaStatus | Answer):
                    self._on_message(link, message)
                elif link.take(message):
                    self._on_change()
        except Exception:
            logger.exception("what replica %s sent could not be taken", link.replica)
            link.channel.close()
        del self._links[link.replica]
        link.lost()
        if link.is_ours and not link.is_draining:
            self._expected_until = time.monotonic() + RETURN_SECONDS
        self._on_lost(link)

    def _spawn(self, coroutine: Awaitable[None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
