"""How much one request may be, and how many there may be at once: beyond it an answer, never a crash."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError

from qwen_ray.config import HttpSettings
from qwen_ray.core.errors import InvalidRequest
from qwen_ray.serving import errors, middleware
from qwen_ray.serving.message_schema import MAX_MESSAGES, MAX_PARTS
from qwen_ray.serving.schema import MAX_DEPTH

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGE = {"role": "user", "content": "x"}
HI = {"messages": [MESSAGE]}
JSON = {"Content-Type": "application/json"}


def nested(depth: int) -> Any:
    value: Any = 1
    for number in range(depth):
        value = {"a": value} if number % 2 else [value]
    return value


@pytest.mark.parametrize("depth", [MAX_DEPTH, 300, 900, 990, 1_000, 3_000, 100_000])
async def test_nesting(start_server: Any, depth: int) -> None:
    server = await start_server(http=HttpSettings(max_body_bytes=2**20))
    opened = "".join('{"a":' if number % 2 else "[" for number in range(depth))
    deep = opened + "1" + "".join("}" if number % 2 else "]" for number in reversed(range(depth)))
    for field in ("chat_template_kwargs", "metadata", "messages", "stop", "unheard_of", "tools", "response_format"):
        for value in (deep, f'{{"x": {deep}}}', f'[{{"role": "user", "content": {deep}}}]'):
            body = f'{{"messages": [{json.dumps(MESSAGE)}], "{field}": {value}}}'
            response = await server.client.post(CHAT, content=body, headers=JSON)
            assert response.status_code == 400, (depth, field, response.text)
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    for body in ("[" * depth, '{"a":' * depth, deep):
        assert (await server.client.post(CHAT, content=body, headers=JSON)).status_code == 400
    assert server.is_idle()
    ordinary = {**HI, "max_tokens": 1, "chat_template_kwargs": {"x": nested(MAX_DEPTH - 3)}}
    assert (await server.client.post(CHAT, json=ordinary)).status_code == 200


async def test_lists_that_are_too_long(server: Any) -> None:
    parts = [{"type": "text", "text": "x"}] * (MAX_PARTS + 1)
    for path, body, param in (
        (CHAT, {"messages": [{"role": "user", "content": ""}] * (MAX_MESSAGES + 1)}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": parts}]}, "messages.0.content"),
        ("/tokenize", {"messages": [{"role": "user", "content": ""}] * (MAX_MESSAGES + 1)}, "messages"),
        (TEXT, {"prompt": ["x"] * 1025}, "prompt"),
        (TEXT, {"prompt": ["x"] * 9, "n": 128}, "prompt"),
    ):
        response = await server.client.post(path, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (413, param), response.text
    assert server.is_idle()


async def test_only_the_first_mistake_of_millions_is_kept(start_server: Any) -> None:
    server = await start_server(http=HttpSettings(max_body_bytes=2**20))
    message = {"role": "user", "content": "x"}
    for path, body in (
        (TEXT, {"prompt": [1.5] * 100_000}),
        (TEXT, {"prompt": [["a"]] * 100_000}),
        (TEXT, {"prompt": [True]}),
        (TEXT, {"prompt": [[1], "a"]}),
        (TEXT, {"prompt": "x", "stop_token_ids": ["a"] * 100_000}),
        (TEXT, {"prompt": "x", "stop": [1] * 100_000}),
        (TEXT, {"prompt": "x", "logit_bias": {str(number): "a" for number in range(50_000)}}),
        (TEXT, {"prompt": "x", **{str(number): 1 for number in range(50_000)}}),
        (CHAT, {"messages": [1] * 100_000}),
        (CHAT, {"messages": [{**message, **{str(number): 1 for number in range(50_000)}}]}),
        ("/detokenize", {"tokens": ["a"] * 100_000}),
    ):
        response = await server.client.post(path, json=body)
        assert response.status_code == 400, (path, str(body)[:50], response.text)
        assert len(response.text) < 1000
    found: list[int] = []

    def count(error: RequestValidationError) -> InvalidRequest:
        found.append(len(error.errors()))
        return InvalidRequest("wrong")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(errors, "from_validation", count)
        for body in ({"messages": [1] * 100_000}, {"messages": [{**message, "content": [1] * 100_000}]}):
            await server.client.post(CHAT, json=body)
        await server.client.post("/detokenize", json={"tokens": ["a"] * 100_000})
    assert len(found) == 3
    assert max(found) <= 4


async def test_headers(server: Any) -> None:
    for headers in ({f"x-{number}": "y" for number in range(120)}, {"x-large": "y" * 40_000}):
        response = await server.client.post(CHAT, json=HI, headers=headers)
        assert response.status_code == 431
        assert response.json()["error"]["code"] == "headers_too_large"
    many = {f"x-{number}": "y" for number in range(80)}
    assert (await server.client.post(CHAT, json={**HI, "max_tokens": 1}, headers=many)).status_code == 200


async def test_open_requests_are_bounded_and_health_is_not(start_server: Any) -> None:
    server = await start_server(http=HttpSettings(max_open_requests=3, max_body_bytes=200_000))
    server.replicas[0].ranks.seconds = 0.02
    body = {"prompt": "x", "max_tokens": 10}
    calls = [asyncio.create_task(server.client.post(TEXT, json={**body, "stream": bool(i % 2)})) for i in range(12)]
    await server.until(lambda: server.service.open_requests.count == 3)
    assert (await server.client.get("/health")).status_code == 200
    assert (await server.client.get("/metrics")).status_code == 200
    responses = await asyncio.gather(*calls)
    statuses = [response.status_code for response in responses]
    assert (statuses.count(200), statuses.count(429)) == (3, 9)
    for response in responses:
        if response.status_code == 429:
            assert 1 <= int(response.headers["retry-after"]) <= 60
            assert response.json()["error"]["type"] == "overloaded_error"
    await server.until(lambda: server.service.open_requests.count == 0)
    assert (await server.client.post(TEXT, json={**body, "stream": True})).status_code == 200
    assert server.is_idle()


async def test_large_bodies_at_once_are_429(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODIES_AT_ONCE", 1)
    server.replicas[0].ranks.seconds = 0.02
    body = {"prompt": "x", "max_tokens": 20, "metadata": {"x": "y" * 120_000}}
    first = asyncio.create_task(server.client.post(TEXT, json=body))
    await server.until(lambda: server.dispatcher.num_sequences == 1)
    refused = await server.client.post(TEXT, json=body)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert (await first).status_code == 200
    assert (await server.client.post(TEXT, json=body)).status_code == 200


async def test_a_body_that_never_comes(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.1)
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{{".encode()
    )
    async with asyncio.timeout(10):
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body_timeout" in answer
    writer.close()
    await server.until(lambda: server.service.open_requests.count == 0)


async def test_timeouts(server: Any) -> None:
    replica = server.replicas[0]
    for timeout in (0, -1, 5e-324, 0.0009, "1", True, float(10**9)):
        wrong = await server.client.post(TEXT, json={"prompt": "x", "timeout": timeout})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "timeout"), timeout
    answer = await server.client.post(TEXT, json={"prompt": "x", "max_tokens": 2, "timeout": 30})
    assert answer.status_code == 200
    request = replica.requests[-1]
    assert 25 < request.deadline - request.arrival <= 30
    assert server.is_idle()


async def test_a_deadline_passes_also_when_no_replica_says_so(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_ray.serving.call.GRACE_SECONDS", 0.0)
    server.replicas[0].ranks.seconds = 2.0
    for stream in (False, True):
        late = await server.client.post(TEXT, json={"prompt": "x", "timeout": 0.1, "stream": stream})
        assert late.status_code == 408, late.text
        assert late.json()["error"] == {
            "message": "The request's timeout of 0.1 s has passed.",
            "type": "timeout_error",
            "param": None,
            "code": "deadline_exceeded",
        }
    await server.until(server.is_idle)


async def test_what_runs_at_its_deadline_ends_with_what_it_has(server: Any) -> None:
    server.replicas[0].ranks.seconds = 0.1
    answer = await server.client.post(TEXT, json={"prompt": "x", "timeout": 1.5, "max_tokens": 70})
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert 0 < answer.json()["usage"]["completion_tokens"] < 60
    await server.until(server.is_idle)
