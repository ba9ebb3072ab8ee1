"""Around every HTTP request: the limit on its body, and its place in the count of requests.

Plain ASGI, so that streams pass through untouched.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_ray.core.errors import RequestTooLarge
from qwen_ray.serving.errors import error_response

ARRIVAL = "qwen_ray.arrival"  # in the scope: seconds since the epoch


class BodyLimit:
    """413 for a body of more than `max_bytes`: at once if it says so, or when that many have come."""

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
            response = error_response(RequestTooLarge(message, code="request_too_large"))
            # What the client goes on sending is not read; the connection is of no more use.
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        num_bytes = 0

        async def count() -> Message:
            nonlocal num_bytes
            event = await receive()
            num_bytes += len(event.get("body", b""))
            if num_bytes > self._max_bytes:
                raise HTTPException(413, message, headers={"Connection": "close"})
            return event

        await self._app(scope, count, send)


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
