"""Which replica runs a request, and the journal that lets another one carry it on.

Keeps one channel open to every living replica, sends each request to the least loaded ready one, and writes down
every token that comes back. When a channel breaks, its requests are handed over as `prompt + tokens so far`: what the
reader of a `Stream` sees has no gap and no repetition. Knows nothing of text or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from qwen_ray.cluster.channel import Channel
from qwen_ray.cluster.directory import Entry
from qwen_ray.cluster.wire import ChannelClosed
from qwen_ray.core.errors import NotReady, RequestError, RequestFailed
from qwen_ray.core.request import GenerateRequest, TokenDelta
from qwen_ray.serving.journal import Journal, Stream
from qwen_ray.serving.link import SILENT_SECONDS, Link
from qwen_ray.serving.messages import Abort, Deltas, Refusal, ReplicaStatus, Submit

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between two looks into the directory
HAND_OVER_SECONDS = 120.0  # a request whose replica is gone waits this long for one to be ready
MAX_FRUITLESS_HAND_OVERS = 2  # without a token in between: then the request itself is suspected


class Dispatcher:
    """`start`, `open` for every HTTP request, `close`. Lives on one event loop."""

    def __init__(
        self,
        find: Callable[[], Awaitable[list[Entry]]],
        connect: Callable[[Entry], Awaitable[Channel]],
        on_hand_over: Callable[[], None] = lambda: None,
    ) -> None:
        self._find = find
        self._connect = connect
        self._on_hand_over = on_hand_over
        self._links: dict[str, Link] = {}
        self._journals: dict[str, Journal] = {}  # by the request's id
        self._sent: dict[str, Journal] = {}  # by the id of the attempt that is under way
        self._waiting: list[Journal] = []
        self._look_now = asyncio.Event()
        self._opening: set[str] = set()
        self._tasks: set[asyncio.Future[None]] = set()

    async def start(self) -> None:
        self._spawn(self._watch())

    async def close(self) -> None:
        for journal in list(self._journals.values()):
            journal.stream.fail(NotReady("This server is shutting down."))
        for link in self._links.values():
            link.channel.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def links(self) -> list[Link]:
        return list(self._links.values())

    @property
    def statuses(self) -> list[ReplicaStatus]:
        """What every connected replica last said about itself."""
        return [link.status for link in self._links.values() if link.status is not None]

    @property
    def num_sequences(self) -> int:
        return len(self._journals)

    def check_ready(self) -> None:
        """Raises NotReady, saying why, unless some replica can take requests and makes progress."""
        if any(link.is_usable for link in self._links.values()):
            return
        said = [f"{s.replica} is {s.trouble}" for s in self.statuses]
        raise NotReady(f"No replica can take requests now: {'; '.join(said) or 'none has announced itself'}.")

    def open(self, requests: Sequence[GenerateRequest]) -> Stream:
        """Sends every one of `requests` on its way. Raises NotReady."""
        self.check_ready()
        stream = Stream([request.request_id for request in requests], self.abort)
        for request in requests:
            journal = Journal(request, stream)
            self._journals[request.request_id] = journal
            self._send(journal)
        return stream

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forgets sequences and tells their replicas; unknown ids are ignored."""
        by_link: dict[Link, list[str]] = {}
        for request_id in request_ids:
            journal = self._journals.get(request_id)
            if journal is None:
                continue
            self._forget(journal)
            if journal.link is not None:
                by_link.setdefault(journal.link, []).append(journal.id)
            elif journal in self._waiting:
                self._waiting.remove(journal)
        for link, ids in by_link.items():
            link.try_send(Abort(request_ids=tuple(ids)))

    def _forget(self, journal: Journal) -> None:
        self._journals.pop(journal.request.request_id, None)
        self._sent.pop(journal.id, None)

    def _send(self, journal: Journal) -> None:
        """To the least loaded replica; without one, the journal waits for `_dispatch_waiting`."""
        usable = [link for link in self._links.values() if link.is_usable]
        for link in sorted(usable, key=Link.load):
            request = journal.next_attempt()
            if link.try_send(Submit(requests=(request,))):
                journal.link, journal.deadline = link, None
                self._sent[journal.id] = journal
                link.submitted(len(request.prompt_token_ids) + len(request.output_token_ids))
                return
        journal.link = None
        if journal.deadline is None:
            journal.deadline = time.monotonic() + HAND_OVER_SECONDS
        self._waiting.append(journal)
        self._look_now.set()

    def _dispatch_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for journal in waiting:
            if journal.deadline is not None and time.monotonic() > journal.deadline:
                self._fail(journal, NotReady(f"No replica was ready again within {HAND_OVER_SECONDS:.0f} s."))
            else:
                self._send(journal)

    def _fail(self, journal: Journal, error: RequestError) -> None:
        self._forget(journal)
        journal.stream.fail(error)

    async def _watch(self) -> None:
        """Connects to new replicas, gives waiting requests to ready ones."""
        while True:
            self._look_now.clear()
            try:
                entries = await self._find()
            except Exception as error:  # the GCS is away: Ray's own errors, of several kinds; what is connected goes on
                logger.warning("directory not readable: %s", error)
                entries = []
            for entry in entries:
                if entry.id not in self._links and entry.id not in self._opening:
                    self._opening.add(entry.id)
                    self._spawn(self._open(entry))
            for link in self._links.values():
                if link.silent_seconds > SILENT_SECONDS:
                    logger.warning("replica %s has been silent for %.0f s", link.replica, link.silent_seconds)
                    link.channel.close()
            self._dispatch_waiting()
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    # A request that waits has just lost its replica: look again soon, but not in a tight loop.
                    await self._look_now.wait()
                    await asyncio.sleep(LOOK_SECONDS / 5)
            except TimeoutError:
                continue

    async def _open(self, entry: Entry) -> None:
        try:
            channel = await self._connect(entry)
        except ChannelClosed as error:
            logger.info("replica %s cannot be reached: %s", entry.id, error)
            return
        finally:
            self._opening.discard(entry.id)
        link = Link(entry.id, channel)
        self._links[entry.id] = link
        self._spawn(self._read(link))

    async def _read(self, link: Link) -> None:
        async for message in link.channel:
            if isinstance(message, Deltas):
                self._take(message.deltas)
            elif isinstance(message, Refusal):
                journal = self._sent.get(message.request_id)
                if journal is not None:
                    self._fail(journal, message.to_error())
            elif link.take(message) and self._waiting:
                self._dispatch_waiting()
        self._lost(link)

    def _take(self, deltas: Iterable[TokenDelta]) -> None:
        for delta in deltas:
            journal = self._sent.get(delta.request_id)
            if journal is None:  # aborted a moment ago
                continue
            if delta.finish_reason == "error":
                self._fail(journal, RequestFailed(delta.error or "The engine failed while running this request."))
                continue
            if delta.finish_reason is not None:
                self._forget(journal)
            journal.take(delta)

    def _lost(self, link: Link) -> None:
        """Its channel broke: every sequence it ran is handed over."""
        del self._links[link.replica]
        link.lost()
        orphans = [journal for journal in self._journals.values() if journal.link is link]
        logger.warning("replica %s is lost (%s); %d sequences to hand over", link.replica, link.reason, len(orphans))
        for journal in orphans:
            del self._sent[journal.id]
            journal.num_fruitless += 1
            if journal.num_fruitless > MAX_FRUITLESS_HAND_OVERS:
                message = f"Its replica failed {journal.num_fruitless} times while it ran this request."
                self._fail(journal, RequestFailed(message))
                continue
            self._on_hand_over()
            self._send(journal)

    def _spawn(self, coroutine: Awaitable[None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
