"""Around every HTTP request: its record, who may come in, how many at once, the limits on headers and body, its turn.

Plain ASGI, so that streams pass through untouched.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_ray.core.errors import HeadersTooLarge, InvalidRequest, Overloaded, RequestError, RequestTooLarge
from qwen_ray.core.logs import REQUEST_ID
from qwen_ray.serving.audit import AuditLog
from qwen_ray.serving.call import SCOPE_KEY, Call
from qwen_ray.serving.errors import Refused, error_response
from qwen_ray.serving.keys import KeyRing
from qwen_ray.serving.limits import OpenRequests
from qwen_ray.serving.request_log import REQUEST_ID_HEADER, log_request, sane_request_id
from qwen_ray.serving.request_trace import trace_context, trace_request
from qwen_ray.serving.turns import Turns
from qwen_ray.tracing import Tracer

DISCARD_BYTES = 64 * 2**20
DISCARD_SECONDS = 5.0
BODY_SECONDS = 120.0  # for all of a body
BODIES_AT_ONCE = 32  # of the largest size; many more small ones

MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 * 2**10
MAX_SHOWN = 200  # characters of a path in records

# Of the server, and asked by machines that have no key: whether it lives, and can take requests.
OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/health/startup"})
NOT_AUDITED = OPEN_PATHS | {"/metrics", "/metrics/targets"}


class Watch:
    """Outermost: makes the Call, tells `on_response(route, status)` of every response that has started, logs,
    traces (where there is a `tracer`) and audits.

    `behind_serve`: what stands before answers with the client's X-Request-Id itself, and makes one up where there is
    none.
    """

    def __init__(
        self,
        app: ASGIApp,
        on_response: Callable[[str, int], None],
        audit: AuditLog | None,
        *,
        tracer: Tracer | None,
        behind_serve: bool,
    ) -> None:
        self._app = app
        self._tracer = tracer
        self._behind_serve = behind_serve
        self._on_response = on_response
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given_id = dict(scope["headers"]).get(REQUEST_ID_HEADER.encode(), b"").decode("latin-1")
        request_id = sane_request_id(given_id)
        REQUEST_ID.set(request_id)
        call = scope[SCOPE_KEY] = Call(
            method=scope["method"],
            path=scope["path"][:MAX_SHOWN],
            request_id=request_id,
            keeps_contents=self._audit is not None and self._audit.keeps_contents,
        )
        status: int | None = None

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not (self._behind_serve and request_id == given_id):
                    MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
                # Only routes of ours: paths that strangers make up would each become a series.
                route = scope.get("route")
                self._on_response(getattr(route, "path", "other"), message["status"])
                if call.caller.meter is not None and call.method == "POST":
                    MutableHeaders(scope=message).update(call.caller.meter.headers())
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            if scope["path"] not in NOT_AUDITED:
                self._end(call, scope, status)

    def _end(self, call: Call, scope: Scope, status: int | None) -> None:
        route, ended = getattr(scope.get("route"), "path", "other"), time.time()
        trace_id = ""
        if self._tracer is not None:
            trace_id = trace_request(self._tracer, call, route, status, ended, trace_context(scope["headers"]))
        log_request(call, route, status, ended, trace_id)
        if self._audit is not None:
            self._audit.write(call.record(status))


class Gate:
    """401 for whoever has no key, on every path but those of health; then what a key, and all together, may take.

    Only what makes work is counted: whoever looks after the server gets in also when it is full.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, open_requests: OpenRequests) -> None:
        self._app = app
        self._keys = keys
        self._open = open_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = Call.of(scope)
        try:
            _check_headers(scope["headers"])
            if scope["path"] not in OPEN_PATHS:
                call.caller = self._keys.caller(dict(scope["headers"]).get(b"authorization", b""))
            if call.method != "POST":
                entered = None
            else:
                if call.caller.meter is not None:
                    call.caller.meter.request()
                entered = self._open.enter(call.caller.id)
        except RequestError as error:
            call.outcome = error.code or error.kind
            await _refuse(error, scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            if entered is not None:
                self._open.leave(call.caller.id, entered)


class BodyLimit:
    """413 for a body of more than `max_bytes`, whether its header says so or it goes on and on. None of it is kept.

    What bodies hold together is bounded too, so that many at once are 429 and not the end of the memory.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._num_held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        message = f"The body is larger than {self._max_bytes} bytes, the limit of this server."
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > self._max_bytes:
            await _refuse(RequestTooLarge(message, code="request_too_large"), scope, receive, send)
            return
        num_bytes = 0
        is_whole = False
        due = asyncio.get_running_loop().time() + BODY_SECONDS

        async def count() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout_at(due):
                    event = await receive()
            except TimeoutError:
                late = InvalidRequest(f"The body took more than {BODY_SECONDS:.0f} s.", code="body_timeout")
                raise Refused(late, status=408) from None
            is_whole = not event.get("more_body")
            more = len(event.get("body", b""))
            num_bytes += more
            self._num_held += more
            is_large = num_bytes > self._max_bytes
            if not is_large and self._num_held <= BODIES_AT_ONCE * self._max_bytes:
                return event
            if not is_whole:
                await _discard(receive)
            if is_large:
                raise Refused(RequestTooLarge(message, code="request_too_large"))
            raise Refused(Overloaded("Too many large bodies at once.", retry_after=DISCARD_SECONDS))

        try:
            await self._app(scope, count, send)
        finally:
            self._num_held -= num_bytes


class InTurn:
    """When there are many requests, their tenants take turns: to come in, and to be worked on once the body is here.

    Only what makes work: whoever looks after the server does not wait behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._turns = Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        tenant = Call.of(scope).caller.id

        async def in_turn() -> Message:
            event = await receive()
            if event["type"] == "http.request" and not event.get("more_body"):
                await self._turns.next(tenant)
            return event

        await self._turns.next(tenant)
        await self._app(scope, in_turn, send)


def _check_headers(headers: list[tuple[bytes, bytes]]) -> None:
    """Raises HeadersTooLarge."""
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        message = f"At most {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes together are taken."
        raise HeadersTooLarge(message, code="headers_too_large")


async def _refuse(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    """Before anything has been read."""
    await _discard(receive)
    response = error_response(error)
    if isinstance(error, RequestTooLarge):
        response.headers["Connection"] = "close"
    await response(scope, receive, send)


async def _discard(receive: Receive) -> None:
    """Takes what a client goes on sending, within bounds: cut off in its sentence, it would not read the answer."""
    num_bytes = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while num_bytes < DISCARD_BYTES and (event := await receive()).get("more_body"):
                num_bytes += len(event["body"])
