"""A replica's end of its channels: which ingress gets which deltas, and what a replica answers when asked.

Knows channels and request ids; the engine is three functions to it. When a channel ends, its sequences are aborted:
whoever wants them to go on has the journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from qwen_ray.cluster.channel import Channel
from qwen_ray.cluster.wire import ChannelClosed
from qwen_ray.core.errors import RequestError
from qwen_ray.core.request import GenerateRequest, TokenDelta
from qwen_ray.serving.messages import Abort, Answer, Ask, Deltas, Refusal, ReplicaStatus, Submit

logger = logging.getLogger(__name__)


class Sessions:
    def __init__(
        self,
        add: Callable[[GenerateRequest], None],
        abort: Callable[[str], None],
        status: Callable[[], ReplicaStatus],
        answer: Callable[[Ask], Awaitable[Answer]],
    ) -> None:
        """`add` raises RequestError for what it does not take."""
        self._add = add
        self._abort = abort
        self._status = status
        self._answer = answer
        self._channels: dict[Channel[Any], int] = {}  # and how many requests each has brought
        self._owners: dict[str, Channel[Any]] = {}
        self._released = asyncio.Event()
        self._answering: set[asyncio.Task[None]] = set()

    async def handle(self, channel: Channel[Any]) -> None:
        """One ingress, from its first message to its last. A Listener's handler."""
        self._channels[channel] = 0
        self._released.clear()
        try:
            channel.send(self._status())
            async for message in channel:
                self._take(channel, message)
        finally:
            del self._channels[channel]
            if not self._channels:
                self._released.set()
            orphans = [request_id for request_id, owner in self._owners.items() if owner is channel]
            for request_id in orphans:
                del self._owners[request_id]
                self._abort(request_id)

    def publish(self, deltas: Sequence[TokenDelta]) -> None:
        """One message to every ingress that has a part in it."""
        parts: dict[Channel[Any], list[TokenDelta]] = {}
        for delta in deltas:
            channel = self._owners.get(delta.request_id)
            if channel is None:  # its ingress is gone, or has aborted it
                continue
            if delta.finish_reason is not None:
                del self._owners[delta.request_id]
            parts.setdefault(channel, []).append(delta)
        for channel, part in parts.items():
            self._send(channel, Deltas(deltas=tuple(part)))

    async def until_released(self, seconds: float) -> None:
        """Until no ingress needs this replica any more; for so long at most."""
        if self._channels:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._released.wait()

    def push(self, status: ReplicaStatus) -> None:
        for channel in tuple(self._channels):
            self._send(channel, replace(status, num_received=self._channels[channel]))

    def _take(self, channel: Channel[Any], message: object) -> None:
        match message:
            case Submit():
                self._channels[channel] += len(message.requests)
                for request in message.requests:
                    self._submit(channel, request)
            case Abort():
                for request_id in message.request_ids:
                    if self._owners.pop(request_id, None) is not None:
                        self._abort(request_id)
            case Ask():
                # Asking the ranks takes a while; tokens do not wait for it.
                task = asyncio.create_task(self._reply(channel, message))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)
            case _:
                logger.warning("an ingress sent a %s", type(message).__name__)

    def _submit(self, channel: Channel[Any], request: GenerateRequest) -> None:
        try:
            self._add(request)
        except RequestError as error:
            self._send(channel, Refusal.of(request.request_id, error))
        else:
            self._owners[request.request_id] = channel

    async def _reply(self, channel: Channel[Any], ask: Ask) -> None:
        self._send(channel, await self._answer(ask))

    def _send(self, channel: Channel[Any], message: object) -> None:
        try:
            channel.send(message)
        except ChannelClosed as error:
            logger.info("an ingress is gone: %s", error)  # `handle` ends and aborts what it had
        except ValueError:
            logger.exception("a message that is too long; its channel is closed so that nothing waits for it")
            channel.close()
