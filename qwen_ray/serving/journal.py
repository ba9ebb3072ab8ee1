"""The journal of a request: what was asked, every token that has come, and the stream that its reader sees.

Knows one HTTP request's sequences; not replicas, and not how tokens travel.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace

from qwen_ray.core.errors import RequestError
from qwen_ray.core.request import GenerateRequest, TokenDelta
from qwen_ray.serving.link import Link


class Stream:
    """The deltas of one HTTP request's sequences. Close it however the reading ends: `with dispatcher.open(…)`."""

    def __init__(self, request_ids: Iterable[str], abort: Callable[[Iterable[str]], None]) -> None:
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

    __slots__ = ("deadline", "link", "num_attempts", "num_fruitless", "request", "stream", "tokens")

    def __init__(self, request: GenerateRequest, stream: Stream) -> None:
        self.request = request
        self.stream = stream
        self.tokens: list[int] = list(request.output_token_ids)
        self.link: Link | None = None
        self.num_attempts = 0
        self.num_fruitless = 0
        self.deadline: float | None = None  # monotonic; set while it waits for a replica

    @property
    def id(self) -> str:
        """On the wire. Every attempt has its own: what is left of an earlier one is never taken for this one's."""
        return f"{self.request.request_id}#{self.num_attempts}"

    def next_attempt(self) -> GenerateRequest:
        self.num_attempts += 1
        request = replace(self.request, request_id=self.id)
        if not self.tokens:
            return request
        # The prompt's log-probabilities came with the first delta; they are not computed again.
        request = replace(request, sampling=replace(request.sampling, prompt_logprobs=None))
        return request.resumed(tuple(self.tokens))

    def take(self, delta: TokenDelta) -> None:
        self.tokens.extend(delta.token_ids)
        self.num_fruitless = 0
        self.stream.put(self.request.request_id, delta)
