"""One line of a batch to its answer, by the application that stands behind HTTP (`routes.py`), without HTTP.

So whatever a server answers, and refuses, a batch does in the same words. Knows no files, no Ray and no replicas.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.types import Message, Scope

from qwen_ray.core.errors import InvalidRequest, RequestError
from qwen_ray.serving.batch_file import answer_line
from qwen_ray.serving.errors import error_body
from qwen_ray.serving.routes import router

logger = logging.getLogger(__name__)

BUSY = {429, 503}  # nothing is wrong with the request: it is asked again
BUSY_SECONDS = 1.0  # in between
MAX_BUSY_SECONDS = 600.0  # then that is its answer
# What a batch may ask: whatever is posted to under /v1.
URLS = [
    route.path
    for route in router.routes
    if isinstance(route, APIRoute) and "POST" in (route.methods or ()) and route.path.startswith("/v1/")
]


async def answer(
    app: FastAPI, text: str, check_health: Callable[[], Awaitable[None]], *, pause: float = BUSY_SECONDS
) -> str:
    """The line of the output. Raises what `check_health` raises when nobody is there to answer."""
    line = json.loads(text)
    request_id = uuid.uuid4().hex
    try:
        check_line(line)
    except RequestError as error:
        status, body = error.status, error_body(error)
    else:
        data = json.dumps(line["body"]).encode()
        until = time.monotonic() + MAX_BUSY_SECONDS
        status, body = await post(app, line["url"], data, request_id)
        while status in BUSY and time.monotonic() < until:
            await check_health()
            await asyncio.sleep(pause)
            status, body = await post(app, line["url"], data, request_id)
    return answer_line(line["custom_id"], {"status_code": status, "request_id": request_id, "body": body})


def check_line(line: dict[str, Any]) -> None:
    """What is around the body. Raises InvalidRequest."""
    if line.get("method") != "POST":
        raise InvalidRequest(f"method must be POST, got {json.dumps(line.get('method'))[:40]}.", param="method")
    if line.get("url") not in URLS:
        message = f"url must be one of {', '.join(URLS)}, got {json.dumps(line.get('url'))[:80]}."
        raise InvalidRequest(message, param="url")
    body = line.get("body")
    if not isinstance(body, dict):
        raise InvalidRequest("body must be a JSON object.", param="body")
    if body.get("stream"):
        raise InvalidRequest("stream: a batch writes whole answers; leave it out.", param="stream")


async def post(app: FastAPI, path: str, body: bytes, request_id: str) -> tuple[int, Any]:
    """A POST without HTTP: the answer's status, and its JSON."""
    headers = {"content-type": "application/json", "content-length": str(len(body)), "x-request-id": request_id}
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": None,
        "server": None,
    }
    unread = [body]
    status = 0
    answer = bytearray()

    async def receive() -> Message:
        if not unread:
            await asyncio.Event().wait()  # this client never goes away
        return {"type": "http.request", "body": unread.pop(), "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        answer.extend(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:
        # Starlette answers with 500 and then raises once more, for servers to log.
        logger.exception("a request of the batch failed")
        if not answer:
            raise
    return status, json.loads(answer)
