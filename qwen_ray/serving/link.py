"""An ingress's end of the channel to one replica: what the replica last said, and questions under way.

Knows how loaded the replica must be by now; not what runs on it.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any, Literal

from qwen_ray.cluster.channel import Channel
from qwen_ray.cluster.wire import ChannelClosed
from qwen_ray.serving.messages import Answer, Ask, ReplicaStatus

SILENT_SECONDS = 30.0  # a replica speaks every 2 s; one that is silent for this long is stuck or out of reach


class Link:
    def __init__(self, replica: str, channel: Channel[Any]) -> None:
        self.replica = replica
        self.channel = channel
        self.status: ReplicaStatus | None = None
        self._heard = time.monotonic()
        self._asked: dict[int, asyncio.Future[Answer]] = {}
        self._ids = itertools.count()
        # Since the last status: what it could not yet count.
        self._new_sequences = 0
        self._new_tokens = 0

    @property
    def reason(self) -> str:
        return self.channel.reason

    @property
    def silent_seconds(self) -> float:
        return time.monotonic() - self._heard

    @property
    def is_usable(self) -> bool:
        return self.status is not None and self.status.trouble is None and self.silent_seconds < SILENT_SECONDS

    def load(self) -> tuple[int, int]:
        """(prompt tokens still to be computed, sequences): the smaller, the sooner a new request runs."""
        engine = self.status.engine if self.status else None
        if engine is None:
            return self._new_tokens, self._new_sequences
        sequences = engine.num_running + engine.num_waiting
        return engine.num_waiting_tokens + self._new_tokens, sequences + self._new_sequences

    def submitted(self, num_tokens: int) -> None:
        self._new_sequences += 1
        self._new_tokens += num_tokens

    def try_send(self, message: Any) -> bool:
        """False when the channel is broken; whoever reads it will notice and hand over."""
        try:
            self.channel.send(message)
        except ChannelClosed:
            return False
        return True

    def take(self, message: Any) -> bool:
        """Takes a status or an answer; True when it was a status."""
        if isinstance(message, ReplicaStatus):
            self.status = message
            self._heard = time.monotonic()
            self._new_sequences = self._new_tokens = 0
            return True
        future = self._asked.pop(message.ask_id, None)
        if future is not None and not future.done():
            future.set_result(message)
        return False

    async def ask(self, what: Literal["status", "metrics"], *, seconds: float) -> Answer:
        """Raises ChannelClosed when the replica is gone or does not answer in time."""
        ask_id = next(self._ids)
        future = asyncio.get_running_loop().create_future()
        self._asked[ask_id] = future
        try:
            self.channel.send(Ask(ask_id=ask_id, what=what))
            async with asyncio.timeout(seconds):
                return await future
        except TimeoutError as error:
            raise ChannelClosed(f"{self.replica} did not answer within {seconds} s") from error
        finally:
            self._asked.pop(ask_id, None)

    def lost(self) -> None:
        """Wakes whoever waits for an answer."""
        for future in self._asked.values():
            if not future.done():
                future.set_exception(ChannelClosed(self.reason))
