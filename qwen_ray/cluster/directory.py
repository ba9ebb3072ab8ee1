"""Who is there: replicas and ingresses announce themselves in the GCS's key-value store, the others read it.

Knows entries and their heartbeats; opens no connection. What is announced survives a restart of the GCS (with Redis,
and without it from the next heartbeat on). Whoever can read the store can read the channel secrets in it: that is the
cluster's own boundary of trust.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, replace
from typing import Literal

import msgspec
from ray.experimental import internal_kv

logger = logging.getLogger(__name__)

Kind = Literal["replica", "ingress"]

NAMESPACE = "qwen-ray"
BEAT_SECONDS = 2.0
LOST_SECONDS = 15.0  # without a heartbeat, by the reader's own clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One process that can be spoken to. `state` is its own word for how it is (`starting`, `ready`, `draining`)."""

    kind: Kind
    id: str
    app: str
    address: str
    secret: bytes
    state: str
    actor_id: str = ""
    node_id: str = ""
    beat: int = 0

    @property
    def key(self) -> str:
        return f"{self.app}/{self.kind}/{self.id}"


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Entry)


class Directory:
    """One process's view. Calls to the GCS run in a thread: they can take seconds while it restarts.

    An entry whose heartbeat has stood still for 15 s is that of a dead process: it is left out, and removed.
    """

    def __init__(self, app: str) -> None:
        self.app = app
        self._own: Entry | None = None
        self._beating: asyncio.Task[None] | None = None
        self._put_lock = asyncio.Lock()
        self._seen: dict[str, tuple[int, float]] = {}  # key → (beat, when it was first seen)
        self._looked_at = 0.0

    async def announce(self, entry: Entry) -> None:
        """Puts the entry there, or replaces it (a new `state`), and keeps it alive until `withdraw`."""
        if entry.app != self.app:
            raise ValueError(f"an entry of {entry.app!r} in the directory of {self.app!r}")
        self._own = replace(entry, beat=self._own.beat + 1 if self._own else time.time_ns())
        await self._put_own()
        if self._beating is None:
            self._beating = asyncio.create_task(self._beat())

    async def withdraw(self) -> None:
        """Takes the entry away. Safe to call without one, or twice."""
        own, self._own = self._own, None
        if self._beating is not None:
            self._beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._beating
            self._beating = None
        if own is not None:
            async with self._put_lock:
                await asyncio.to_thread(internal_kv._internal_kv_del, own.key, namespace=NAMESPACE)

    async def list(self, kind: Kind) -> list[Entry]:
        """The living entries of one kind, by id."""
        entries = await asyncio.to_thread(_read, f"{self.app}/{kind}/")
        now = time.monotonic()
        # Time in which nobody could look (the GCS was down, the loop was busy) is not held against anyone.
        if now - self._looked_at > LOST_SECONDS / 3:
            self._seen.clear()
        self._looked_at = now
        living: list[Entry] = []
        for entry in entries:
            beat, since = self._seen.get(entry.key, (-1, now))
            if entry.beat != beat:
                since = now
            self._seen[entry.key] = (entry.beat, since)
            if now - since <= LOST_SECONDS:
                living.append(entry)
            else:
                await self.remove(entry)
        return living

    async def remove(self, entry: Entry) -> None:
        """Takes away the entry of a process that is known to be dead."""
        logger.info("%s %s is gone; removing its entry", entry.kind, entry.id)
        self._seen.pop(entry.key, None)
        await asyncio.to_thread(internal_kv._internal_kv_del, entry.key, namespace=NAMESPACE)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            if self._own is not None:
                self._own = replace(self._own, beat=self._own.beat + 1)
                try:
                    await self._put_own()
                except Exception as error:  # Ray's own errors, of several kinds: the GCS is away; the next beat tells
                    logger.warning("heartbeat failed: %s", error)

    async def _put_own(self) -> None:
        # One put at a time, each with the newest entry: a slow old one never overwrites a newer one, nor a withdrawal.
        async with self._put_lock:
            own = self._own
            if own is not None:
                await asyncio.to_thread(
                    internal_kv._internal_kv_put, own.key, _encoder.encode(own), True, namespace=NAMESPACE
                )


def _read(prefix: str) -> list[Entry]:
    entries: list[Entry] = []
    for key in sorted(internal_kv._internal_kv_list(prefix, namespace=NAMESPACE)):
        value = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
        if value is not None:  # withdrawn in between
            entries.append(_decoder.decode(value))
    return entries
