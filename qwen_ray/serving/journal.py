"""The journal of a request: what was asked, every token that has come, and the stream that its reader sees.

Knows one HTTP request's sequences; not replicas, and not how tokens travel.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from qwen_ray.core.errors import RequestError
from qwen_ray.core.request import GenerateRequest, TokenDelta
from qwen_ray.serving.link import Link
from qwen_ray.serving.trail import Trail

PATIENCE_OF_BEGUN = 10  # a large model takes minutes to load, and nobody wants half an answer
MAX_FRUITLESS = 2  # deaths of its replicas, without progress in between: then the request itself is suspected
MAX_NEAR = 3  # deaths that a suspect was near, and perhaps not in: a replica that dies at once says nothing of it
# Tokens: coming back gives one, from a prefill; the second is the first of a step such as the one that may have killed.
PROGRESS = 2


class Stream:
    """The deltas of one HTTP request's sequences. Close it however the reading ends: `with dispatcher.open(…)`."""

    def __init__(
        self, request_ids: Iterable[str], abort: Callable[[Iterable[str]], None], trail: Trail | None = None
    ) -> None:
        self.trail = trail or Trail()
        self._open = set(request_ids)
        self._abort = abort
        self._deltas: list[tuple[str, TokenDelta]] = []
        self._error: RequestError | None = None
        self._arrived = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Whether some sequence has not finished yet."""
        return bool(self._open)

    async def take(self) -> list[tuple[str, TokenDelta]]:
        """All that has come since the last call, at least one, each with the id of its request.

        Raises the RequestError of a sequence that failed.
        """
        await self._arrived.wait()
        deltas, self._deltas = self._deltas, []
        if not deltas and self._error is not None:
            raise self._error
        if self._error is None:
            self._arrived.clear()
        self._open -= {request_id for request_id, delta in deltas if delta.finish_reason is not None}
        return deltas

    def drop(self, request_id: str) -> None:
        """Ends one sequence early: its text is complete."""
        if request_id in self._open:
            self._open.discard(request_id)
            self._abort([request_id])

    def put(self, request_id: str, delta: TokenDelta) -> None:
        self._deltas.append((request_id, delta))
        self._arrived.set()

    def fail(self, error: RequestError) -> None:
        self._error = error
        self._arrived.set()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._abort(self._open)
        self._open.clear()


class Journal:
    """One sequence: what was asked, what has come, who is on it."""

    __slots__ = (
        "cleared_at",
        "has_been_accepted",
        "has_been_sent",
        "has_started",
        "link",
        "num_attempts",
        "num_fruitless",
        "num_near",
        "request",
        "stream",
        "tokens",
        "waits_until",
    )

    def __init__(self, request: GenerateRequest, stream: Stream) -> None:
        self.request = request
        self.stream = stream
        self.tokens: list[int] = list(request.output_token_ids)
        self.link: Link | None = None
        self.num_attempts = 0
        self.num_fruitless = 0  # deaths of replicas that ran it, without progress in between
        self.num_near = 0  # deaths of replicas that it waited on as a suspect, not started as far as one was told
        self.cleared_at = 0  # tokens with which it has made progress
        self.has_started = False  # this attempt, as far as one is told
        self.has_been_accepted = False  # it had a place in a queue before: a full one cannot refuse it
        self.has_been_sent = False
        self.waits_until = math.inf  # monotonic; set while it waits for a replica

    @property
    def id(self) -> str:
        """On the wire. Every attempt has its own: what is left of an earlier one is never taken for this one's."""
        return f"{self.request.request_id}#{self.num_attempts}"

    @property
    def is_suspect(self) -> bool:
        """It may be what replicas die of: it is run alone."""
        return self.num_fruitless >= MAX_FRUITLESS

    @property
    def is_given_up(self) -> bool:
        return self.num_fruitless > MAX_FRUITLESS

    def wait(self, seconds: float) -> None:
        """Nobody is on it; for so long at most, or longer where a part of the answer is out."""
        self.link, self.has_been_accepted = None, True
        if self.waits_until == math.inf:
            self.waits_until = time.monotonic() + seconds * (PATIENCE_OF_BEGUN if self.tokens else 1)

    def sent(self, link: Link) -> None:
        self.link, self.waits_until, self.has_started = link, math.inf, False
        self.stream.trail.placed(link.replica, is_move=self.has_been_sent)
        self.has_been_sent = True

    def blame(self) -> None:
        """Its replica has died. A suspect that had not started is innocent, unless that happens again and again."""
        if self.is_suspect and not self.has_started:
            self.num_near += 1
            if self.num_near < MAX_NEAR:
                return
        self.num_fruitless += 1
        self.cleared_at = len(self.tokens) + PROGRESS

    def next_attempt(self) -> GenerateRequest:
        self.num_attempts += 1
        request = replace(self.request, request_id=self.id, is_suspect=self.is_suspect)
        return request.resumed(tuple(self.tokens))

    def take(self, delta: TokenDelta) -> None:
        self.has_started = True
        if delta.scheduled:
            self.stream.trail.was_scheduled(delta.scheduled)
        if not delta.token_ids and delta.finish_reason is None:
            return
        self.tokens.extend(delta.token_ids)
        if len(self.tokens) >= self.cleared_at:
            self.num_fruitless = self.num_near = 0
        self.stream.put(self.request.request_id, delta)
