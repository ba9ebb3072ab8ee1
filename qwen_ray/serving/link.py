"""An ingress's end of the channel to one replica: what the replica last said, and questions under way.

Knows how loaded the replica must be by now; not what runs on it.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from typing import Any, Literal

from qwen_ray.cluster.channel import Channel
from qwen_ray.cluster.wire import ChannelClosed
from qwen_ray.serving.messages import Answer, Ask, ReplicaStatus

SILENT_SECONDS = 10.0  # a replica speaks every 2 s; one that is silent for this long is stuck or out of reach
FULL_SECONDS = 1.0  # a replica whose queue was full is not asked again before


class Link:
    """`fingerprint` is that of the model whose requests are sent: a replica of another is none for them."""

    def __init__(self, replica: str, channel: Channel[Any], fingerprint: str = "") -> None:
        self.replica = replica
        self.channel = channel
        self.status: ReplicaStatus | None = None
        self._fingerprint = fingerprint
        self._heard = time.monotonic()
        self._full_until = 0.0
        self._asked: dict[int, asyncio.Future[Answer]] = {}
        self._ids = itertools.count()
        # What the last status could not yet count: tokens of each request that it crossed, or that came after it.
        self._new: deque[int] = deque()
        self._new_tokens = 0
        self._num_received = 0

    @property
    def reason(self) -> str:
        return self.channel.reason

    @property
    def silent_seconds(self) -> float:
        return time.monotonic() - self._heard

    @property
    def is_ours(self) -> bool:
        """It serves the same model; not known before it has spoken."""
        return self.status is not None and self.status.fingerprint == self._fingerprint

    @property
    def is_usable(self) -> bool:
        """It is ready for requests."""
        return self.is_ours and self.trouble is None

    @property
    def is_on_its_way(self) -> bool:
        """It will be usable, as far as one can tell."""
        if self.channel.is_closed:
            return False
        return self.status is None or (self.is_ours and self.status.is_on_its_way)

    @property
    def is_draining(self) -> bool:
        return self.status is not None and self.status.state == "draining"

    @property
    def is_repairing(self) -> bool:
        """It takes requests, and will run them some seconds later than others would."""
        return self.status is not None and self.status.state == "repairing"

    @property
    def lets_go(self) -> bool:
        """What runs there is better carried on elsewhere: it goes away, starts anew, or hangs.

        A short repair is none of these: it is over sooner than its sequences would be computed again.
        """
        return self.status is not None and self.trouble is not None

    @property
    def is_silent(self) -> bool:
        return self.silent_seconds > SILENT_SECONDS

    @property
    def trouble(self) -> str | None:
        if self.status is None:
            return "unknown"
        if self.channel.is_closed or self.is_silent:
            return f"silent for {self.silent_seconds:.0f} s"
        return self.status.trouble

    @property
    def is_full(self) -> bool:
        """Its queue was, a moment ago."""
        return time.monotonic() < self._full_until

    def load(self) -> tuple[int, int]:
        """(prompt tokens still to be computed, sequences): the smaller, the sooner a new request runs."""
        engine = self.status.engine if self.status else None
        if engine is None:
            return self._new_tokens, len(self._new)
        sequences = engine.num_running + engine.num_waiting
        return engine.num_waiting_tokens + self._new_tokens, sequences + len(self._new)

    def submitted(self, num_tokens: int) -> None:
        self._new.append(num_tokens)
        self._new_tokens += num_tokens

    def was_full(self) -> None:
        self._full_until = time.monotonic() + FULL_SECONDS

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
            for _ in range(message.num_received - self._num_received):
                self._new_tokens -= self._new.popleft()
            self._num_received = message.num_received
            return True
        future = self._asked.pop(message.ask_id, None)
        if future is not None and not future.done():
            future.set_result(message)
        return False

    def heard(self) -> None:
        self._heard = time.monotonic()

    def excuse_silence(self, seconds: float) -> None:
        """That nobody listened for so long is not held against it."""
        self._heard += seconds

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
