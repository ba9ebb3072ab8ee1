"""Which replica runs a request, and the journal that lets another one carry it on.

Sends each request to the least loaded ready replica, and writes down every token that comes back. When a replica
dies, drains or hangs, its requests are handed over as `prompt + tokens so far`: what the reader of a `Stream` sees has
no gap and no repetition. Where nobody is ready but somebody will be, requests wait. Knows nothing of text or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from qwen_ray.cluster.channel import Channel
from qwen_ray.cluster.directory import Entry
from qwen_ray.core.errors import (
    DEADLINE_EXCEEDED,
    DeadlineExceeded,
    NotReady,
    Overloaded,
    RequestError,
    RequestFailed,
)
from qwen_ray.core.request import GenerateRequest, TokenDelta
from qwen_ray.serving.journal import Journal, Stream
from qwen_ray.serving.link import Link
from qwen_ray.serving.links import Links
from qwen_ray.serving.messages import Abort, Deltas, Refusal, ReplicaStatus, Submit
from qwen_ray.serving.trail import Trail

logger = logging.getLogger(__name__)

QUEUE_SECONDS = 120.0
MAX_WAITING = 1024
RETRY_SECONDS = 5.0


class Dispatcher:
    """`start`, `open` for every HTTP request, `close`. Lives on one event loop.

    `fingerprint`: of the model that requests are made for, they go to no other. `queue_seconds`: how long one waits for
    a replica, and `max_waiting`: how many may. `in_place`: there is no room for a replica beside those that are there,
    so what drains is let go of as soon as another one starts.
    """

    def __init__(
        self,
        find: Callable[[], Awaitable[list[Entry]]],
        connect: Callable[[Entry], Awaitable[Channel[Any]]],
        on_hand_over: Callable[[], None] = lambda: None,
        *,
        fingerprint: str = "",
        queue_seconds: float = QUEUE_SECONDS,
        max_waiting: int = MAX_WAITING,
        in_place: bool = False,
    ) -> None:
        self._on_hand_over = on_hand_over
        self._queue_seconds = queue_seconds
        self._max_waiting = max_waiting
        self._in_place = in_place
        self._links = Links(
            find, connect, fingerprint, on_message=self._take, on_change=self._look_round, on_lost=self._lost
        )
        self._is_ready = asyncio.Event()
        self._journals: dict[str, Journal] = {}  # by the request's id
        self._sent: dict[str, Journal] = {}  # by the id of the attempt that is under way
        self._waiting: dict[str, Journal] = {}  # by the request's id, the first come first

    async def start(self) -> None:
        await self._links.start()

    async def close(self) -> None:
        for journal in list(self._journals.values()):
            journal.stream.fail(NotReady("This server is shutting down."))
        await self._links.close()

    @property
    def links(self) -> list[Link]:
        return list(self._links)

    @property
    def statuses(self) -> list[ReplicaStatus]:
        """What every connected replica last said about itself."""
        return [link.status for link in self._links if link.status is not None]

    @property
    def num_sequences(self) -> int:
        return len(self._journals)

    @property
    def num_waiting(self) -> int:
        """Of the sequences, those that wait for a replica."""
        return len(self._waiting)

    def check_ready(self) -> None:
        """Raises NotReady, saying why, unless some replica can take requests and makes progress."""
        if self._takers:
            return
        said = [f"{link.replica} is {link.trouble or 'of another model'}" for link in self._links]
        raise NotReady(f"No replica can take requests now: {'; '.join(said) or 'none has announced itself'}.")

    async def until_ready(self) -> None:
        """Until some replica of the model is ready for requests."""
        await self._is_ready.wait()

    def open(self, requests: Sequence[GenerateRequest], trail: Trail | None = None) -> Stream:
        """Sends every one of `requests` on its way, or lets it wait where some replica will be ready.

        `trail` is told where they go.

        Raises NotReady where there is nothing to wait for, Overloaded where too many wait.
        """
        if not self._takers:
            if not self._links.are_expected:
                self.check_ready()
            if len(self._waiting) + len(requests) > self._max_waiting:
                raise Overloaded(
                    f"No replica is ready yet, and {len(self._waiting)} requests wait for one; "
                    f"{self._max_waiting} may.",
                    retry_after=RETRY_SECONDS,
                )
        stream = Stream([request.request_id for request in requests], self.abort, trail)
        for request in requests:
            journal = Journal(request, stream)
            self._journals[request.request_id] = journal
            self._send(journal)
        return stream

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forgets sequences and tells their replicas; unknown ids are ignored."""
        known = [journal for request_id in request_ids if (journal := self._journals.get(request_id))]
        for journal in known:
            self._forget(journal)
        self._withdraw(known)

    @property
    def _takers(self) -> list[Link]:
        """Replicas that requests can go to: ready ones, or where there will be none, those that drain."""
        usable = self._links.usable
        if usable or self._in_place or self._links.are_expected:
            return usable
        return [link for link in self._links if link.is_ours and link.is_draining]

    def _send(self, journal: Journal) -> None:
        """To the least loaded replica that takes it; without one, it waits until `_look_round`."""
        for link in sorted(self._takers, key=lambda link: (link.is_repairing, *link.load())):
            if link.is_full and journal.has_been_accepted:
                continue
            if journal.is_suspect and self._has_suspect(link):
                continue
            request = journal.next_attempt()
            if link.try_send(Submit(requests=(request,))):
                journal.sent(link)
                self._sent[journal.id] = journal
                link.submitted(len(request.prompt_token_ids) + len(request.output_token_ids))
                return
        self._wait(journal)

    def _wait(self, journal: Journal) -> None:
        journal.wait(self._queue_seconds)
        self._waiting[journal.request.request_id] = journal
        self._links.look_now()

    def _has_suspect(self, link: Link) -> bool:
        """Suspects go to a replica one by one: then it is clear which of them it died of."""
        return any(journal.link is link and journal.is_suspect for journal in self._journals.values())

    def _look_round(self) -> None:
        """A replica has said how it is, or time has passed: who can go on elsewhere, who need not wait any more?"""
        if self._links.usable:
            self._is_ready.set()
        for link in self._links:
            if link.lets_go:
                self._relieve(link)
        waiting, self._waiting = self._waiting, {}
        for journal in waiting.values():
            if not self._is_too_late(journal):
                self._send(journal)

    def _is_too_late(self, journal: Journal) -> bool:
        """Whether it has waited for too long; then it is ended."""
        deadline = journal.request.deadline
        if deadline is not None and time.time() > deadline:
            if journal.tokens:
                self._forget(journal)
                journal.take(TokenDelta(request_id=journal.id, finish_reason="length", code=DEADLINE_EXCEEDED))
            else:
                self._fail(journal, DeadlineExceeded("The request's time was up before a replica was ready."))
        elif time.monotonic() > journal.waits_until:
            self._fail(journal, NotReady("No replica became ready in time."))
        else:
            return False
        return True

    def _relieve(self, link: Link) -> None:
        """Take over what runs on a replica that is not well, if there is a better place for it."""
        is_needed = link.is_ours and not self._links.usable
        if is_needed and not (self._in_place and link.is_draining and self._links.are_expected):
            return
        self._hand_over([journal for journal in self._journals.values() if journal.link is link])
        if link.is_draining:
            self._links.release(link)

    def _hand_over(self, journals: list[Journal]) -> None:
        """From living replicas, which are told to forget them."""
        self._withdraw(journals)
        for journal in journals:
            self._sent.pop(journal.id, None)
            self._on_hand_over()
            journal.link, journal.has_been_accepted = None, True
            self._send(journal)

    def _withdraw(self, journals: Iterable[Journal]) -> None:
        by_link: dict[Link, list[str]] = {}
        for journal in journals:
            if journal.link is not None:
                by_link.setdefault(journal.link, []).append(journal.id)
        for link, ids in by_link.items():
            link.try_send(Abort(request_ids=tuple(ids)))

    def _forget(self, journal: Journal) -> None:
        self._journals.pop(journal.request.request_id, None)
        self._waiting.pop(journal.request.request_id, None)
        self._sent.pop(journal.id, None)

    def _fail(self, journal: Journal, error: RequestError) -> None:
        self._forget(journal)
        journal.stream.fail(error)

    def _take(self, link: Link, message: Deltas | Refusal) -> None:
        if isinstance(message, Refusal):
            self._refused(link, message)
            return
        for delta in message.deltas:
            journal = self._sent.get(delta.request_id)
            if journal is None:  # aborted, or handed over, a moment ago
                continue
            if delta.finish_reason == "error":
                self._fail(journal, delta.to_error())
                continue
            if delta.finish_reason is not None:
                self._forget(journal)
            journal.take(delta)

    def _refused(self, link: Link, refusal: Refusal) -> None:
        journal = self._sent.get(refusal.request_id)
        if journal is None:
            return
        error = refusal.to_error()
        if isinstance(error, Overloaded) and journal.has_been_accepted:
            # It had a place before, and has not given it up.
            del self._sent[journal.id]
            link.was_full()
            self._wait(journal)
        else:
            self._fail(journal, error)

    def _lost(self, link: Link) -> None:
        """Its channel broke: every sequence it ran is handed over."""
        orphans = [journal for journal in self._journals.values() if journal.link is link]
        logger.warning("replica %s is lost (%s); %d sequences to hand over", link.replica, link.reason, len(orphans))
        for journal in orphans:
            journal.link = None
            if not link.is_draining:
                journal.blame()
        for journal in orphans:
            if journal.is_given_up:
                message = f"Its replica failed {journal.num_fruitless} times while it ran this request."
                self._fail(journal, RequestFailed(message))
        self._hand_over([journal for journal in orphans if not journal.is_given_up])
