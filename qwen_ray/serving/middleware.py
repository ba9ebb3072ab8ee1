"""Around every HTTP request: the limit on its body, and its place in the count of requests.

Plain ASGI, so that streams pass through untouched.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_ray.core.errors import RequestTooLarge
from qwen_ray.serving.errors import error_response

DISCARD_BYTES = 64 * 2**20
DISCARD_SECONDS = 5.0

ARRIVAL = "qwen_ray.arrival"  # in the scope: seconds since the epoch


class BodyLimit:
    """413 for a body of more than `max_bytes`, whether its header says so or it goes on and on. None of it is kept."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        message = f"The body is larger than {self._max_bytes} bytes, the limit of this server."
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > self._max_bytes:
            await _discard(receive)
            response = error_response(RequestTooLarge(message, code="request_too_large"))
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        num_bytes = 0

        async def count() -> Message:
            nonlocal num_bytes
            event = await receive()
            num_bytes += len(event.get("body", b""))
            if num_bytes > self._max_bytes:
                await _discard(receive)
                raise HTTPException(413, message, headers={"Connection": "close"})
            return event

        await self._app(scope, count, send)


async def _discard(receive: Receive) -> None:
    """Takes what a client goes on sending, within bounds: cut off in its sentence, it would not read the answer."""
    num_bytes = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while num_bytes < DISCARD_BYTES and (event := await receive()).get("more_body"):
                num_bytes += len(event["body"])


class CountRequests:
    """Tells `on_response(route, status)` of every response that has started; notes when the request arrived."""

    def __init__(self, app: ASGIApp, on_response: Callable[[str, int], None]) -> None:
        self._app = app
        self._on_response = on_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[ARRIVAL] = time.time()

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Only routes of ours: paths that strangers make up would each become a series.
                route = scope.get("route")
                self._on_response(getattr(route, "path", "other"), message["status"])
            await send(message)

        await self._app(scope, receive, watch)
