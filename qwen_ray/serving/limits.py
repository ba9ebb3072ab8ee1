"""How much may come in: rates of one key, and the requests that an ingress has open at once.

Knows numbers and a clock; not HTTP, and not who is behind a key.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from qwen_ray.api_keys import ApiKey
from qwen_ray.core.errors import Overloaded, RateLimited
from qwen_ray.core.room import Room

Clock = Callable[[], float]

MINUTE = 60.0
REMEMBERED = 0.05  # weight of the newest request in the mean
MIN_WAIT, MAX_WAIT = 1.0, 60.0  # seconds that a refused client is told to wait


class Bucket:
    """`per_minute` drips in evenly; a minute's worth is kept, no more. It may owe: then nothing is let through."""

    def __init__(self, per_minute: float, clock: Clock) -> None:
        self.capacity = max(1.0, per_minute)
        self._rate = per_minute / MINUTE
        self._clock = clock
        self._level = self.capacity
        self._seen = clock()

    @property
    def level(self) -> float:
        now = self._clock()
        self._level = min(self.capacity, self._level + (now - self._seen) * self._rate)
        self._seen = now
        return self._level

    def seconds_until(self, amount: float) -> float:
        """0 if there is as much now. More than a full bucket is let through when it is full."""
        return max(0.0, min(amount, self.capacity) - self.level) / self._rate

    def take(self, amount: float) -> None:
        self._level = self.level - amount


class Meter:
    """What one key has used of its rates on this ingress, which allows `share` of them."""

    def __init__(self, key: ApiKey, share: float, clock: Clock = time.monotonic) -> None:
        self._name = key.id
        self._limits = {"requests": key.requests_per_minute, "tokens": key.tokens_per_minute}
        self._buckets = {
            kind: None if limit is None else Bucket(limit * share, clock) for kind, limit in self._limits.items()
        }

    def request(self) -> None:
        """Raises RateLimited. A request that owes tokens of earlier ones is not let in either."""
        self._check("tokens", 1)
        self._check("requests", 1)
        self._take("requests", 1)

    def prompt(self, num_tokens: int) -> None:
        """Raises RateLimited."""
        self._check("tokens", num_tokens)
        self._take("tokens", num_tokens)

    def answer(self, num_tokens: int) -> None:
        """What runs is not cut off: later requests wait for it."""
        self._take("tokens", num_tokens)

    def headers(self) -> dict[str, str]:
        """As OpenAI sends them, of the limits that there are; numbers are those of this ingress."""
        shown: dict[str, str] = {}
        for kind, bucket in self._buckets.items():
            if bucket is not None:
                shown[f"x-ratelimit-limit-{kind}"] = str(math.floor(bucket.capacity))
                shown[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(bucket.level)))
                shown[f"x-ratelimit-reset-{kind}"] = f"{bucket.seconds_until(bucket.capacity):.3f}s"
        return shown

    def _check(self, kind: str, amount: int) -> None:
        bucket = self._buckets[kind]
        if bucket is not None and (seconds := bucket.seconds_until(amount)):
            message = (
                f"The key {self._name} has used its {self._limits[kind]} {kind} per minute; "
                f"come back in {math.ceil(seconds)} s."
            )
            raise RateLimited(message, retry_after=seconds)

    def _take(self, kind: str, amount: int) -> None:
        bucket = self._buckets[kind]
        if bucket is not None:
            bucket.take(amount)


class OpenRequests:
    """`limit` at once, of which no tenant can take all."""

    def __init__(self, limit: int, clock: Clock = time.monotonic) -> None:
        self._room = Room(limit)
        self._clock = clock
        self._mean_seconds = MIN_WAIT

    @property
    def count(self) -> int:
        return self._room.count

    def enter(self, tenant: str) -> float:
        """To be handed to `leave`. Raises Overloaded: after the mean time of a request, those open now have gone."""
        if not self._room.has_place(tenant):
            wait = min(MAX_WAIT, max(MIN_WAIT, self._mean_seconds))
            raise Overloaded(f"{self.count} requests are open here; come back in {wait:.0f} s.", retry_after=wait)
        self._room.enter(tenant)
        return self._clock()

    def leave(self, tenant: str, entered: float) -> None:
        self._room.leave(tenant)
        self._mean_seconds += REMEMBERED * (self._clock() - entered - self._mean_seconds)
