"""Wrong requests get a status, OpenAI's body and the name of the field; the server goes on unharmed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

HI = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"

WRONG: list[tuple[str, dict[str, Any], int, str | None, str | None]] = [
    # path, body, status, param, code
    (CHAT, {"messages": HI, "model": "other"}, 404, "model", "model_not_found"),
    (CHAT, {"messages": HI, "max_tokens": -5}, 400, "max_tokens", None),
    (CHAT, {"messages": HI, "max_completion_tokens": -5}, 400, "max_completion_tokens", None),
    (CHAT, {"messages": HI, "temperature": "hot"}, 400, "temperature", "invalid_value"),
    (CHAT, {"messages": HI, "temperature": "0.5"}, 400, "temperature", "invalid_value"),
    (CHAT, {"messages": HI, "temperature": 3}, 400, "temperature", None),
    (CHAT, {"messages": HI, "n": 1000}, 400, "n", None),
    (CHAT, {"messages": HI, "n": True}, 400, "n", "invalid_value"),
    (CHAT, {"messages": HI, "stream": "yes"}, 400, "stream", "invalid_value"),
    (CHAT, {"messages": HI, "top_p": 0}, 400, "top_p", None),
    (CHAT, {"messages": HI, "logit_bias": {"x": 1}}, 400, "logit_bias", "invalid_value"),
    (CHAT, {"messages": HI, "logit_bias": {"99999": 1}}, 400, "logit_bias", None),
    (CHAT, {"messages": HI, "stop_token_ids": [99999]}, 400, "stop_token_ids", None),
    (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 30}, 400, "top_logprobs", None),
    (CHAT, {"messages": HI, "top_logprobs": 3}, 400, None, "invalid_value"),
    (CHAT, {"messages": HI, "max_tokens": 400}, 400, "messages", "context_length_exceeded"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 500}]}, 400, "messages", "context_length_exceeded"),
    (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, 400, "tools.0.function", "missing_required_parameter"),
    (CHAT, {"messages": HI, "chat_template": "{{ 1 }}"}, 400, "chat_template", "unsupported_parameter"),
    (CHAT, {"messages": HI, "store": True}, 400, "store", "unsupported_parameter"),
    (CHAT, {"messages": HI, "service_tier": "flex"}, 400, "service_tier", "invalid_value"),
    (CHAT, {"messages": HI, "temprature": 1}, 400, "temprature", "unknown_parameter"),
    (CHAT, {"messages": HI, "chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs", None),
    (CHAT, {"messages": []}, 400, "messages", "invalid_value"),
    (CHAT, {}, 400, "messages", "missing_required_parameter"),
    (CHAT, {"messages": [{"role": "wizard", "content": "Hi"}]}, 400, "messages.0.role", "invalid_value"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages.0", "invalid_value"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages.0.content",
        "invalid_value",
    ),
    (TEXT, {"prompt": "x", "suffix": "y"}, 400, "suffix", None),
    (TEXT, {"prompt": "x", "max_tokens": 0}, 400, "max_tokens", None),
    (TEXT, {"prompt": ""}, 400, "prompt", None),
    (TEXT, {"prompt": []}, 400, "prompt", "invalid_value"),
    (TEXT, {"prompt": [99999]}, 400, "prompt", None),
    (TEXT, {"prompt": {"a": 1}}, 400, "prompt", "invalid_value"),
    (TEXT, {"prompt": ["x"] * 2000}, 413, "prompt", "too_long"),
    ("/detokenize", {"tokens": [-1]}, 400, "tokens", None),
    ("/nowhere", {}, 404, None, "not_found"),
    ("/v1/models", {}, 405, None, "method_not_allowed"),
]


async def test_wrong_requests(server: Any) -> None:
    for path, body, status, param, code in WRONG:
        response = await server.client.post(path, json=body)
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (status, param, code), (path, body, error)
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert error["message"]
    assert server.is_idle()
    assert (await server.client.post(CHAT, json={"messages": HI})).status_code == 200


async def test_bodies_that_are_no_object(server: Any) -> None:
    for body in ("{not json", "[]", '"x"', ""):
        response = await server.client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


async def test_strange_bodies_are_the_client_s_fault(server: Any) -> None:
    deep = '{"a":' * 20_000 + "1" + "}" * 20_000
    for body in (
        '{"\\ud800": 1}',
        '{"messages": [], "model": "\\ud800"}',
        '{"prompt": "x", "seed": 1' + "0" * 400 + "}",
        '{"prompt": "x", "seed": 1' + "0" * 5000 + "}",
        '{"prompt": "x", "priority": 1' + "0" * 40 + "}",
        '{"prompt": [1' + "0" * 40 + "]}",
        '{"prompt": "x", "temperature": NaN}',
        '{"prompt": "x", "temperature": 1e999}',
        '{"prompt": "x", "logit_bias": {"5": NaN}}',
        '{"prompt": "x", "logit_bias": {"²": 1}}',
        '{"prompt": "x", "stop": ["a", 1]}',
        '{"prompt": "x", "stop": ""}',
        '{"prompt": [[1, 2], "x"]}',
        '{"prompt": [[]]}',
        deep,
        "\ufeff{}",
        "null",
    ):
        for path in (CHAT, TEXT):
            response = await server.client.post(path, content=body, headers={"Content-Type": "application/json"})
            assert response.status_code in (400, 404), (body[:80], response.text)
            assert response.json()["error"]["message"]
    for content in (b"\xff\xfe", b'{"prompt": "\xff"}'):
        response = await server.client.post(TEXT, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 400
    half = await server.client.post(TEXT, content='{"prompt": "\\ud800"}', headers={"Content-Type": "application/json"})
    assert half.status_code == 200
    assert server.is_idle()


async def test_a_body_that_is_too_large(server: Any) -> None:
    body = {"messages": [{"role": "user", "content": "x" * 300_000}]}
    response = await server.client.post(CHAT, json=body)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 10_000

    chunked = await server.client.post(CHAT, content=endless(), headers={"Content-Type": "application/json"})
    assert chunked.status_code == 413
    assert chunked.json()["error"]["code"] == "request_too_large"


async def test_a_full_queue_is_429_also_for_streams(server: Any) -> None:
    server.replicas[0].ranks.seconds = 0.01
    body = {"prompt": "x", "max_tokens": 40}
    calls = [server.client.post(TEXT, json={**body, "stream": bool(i % 2)}) for i in range(24)]
    responses = await asyncio.gather(*calls)
    statuses = [response.status_code for response in responses]
    assert statuses.count(200) >= 8
    refused = [response for response in responses if response.status_code == 429]
    assert len(refused) == 24 - statuses.count(200) > 0
    assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
    assert {response.json()["error"]["type"] for response in refused} == {"overloaded_error"}
    assert server.is_idle()


async def test_no_replica_is_503(server: Any) -> None:
    replica = server.replicas[0]
    replica.state = "failed"
    server.dispatcher._links._expected_until = 0.0
    response = await server.until_status("/health/ready", 503)
    assert response.headers["retry-after"] == "5"
    assert "failed" in response.json()["error"]["message"]
    assert (await server.client.post(TEXT, json={"prompt": "x", "stream": True})).status_code == 503
    assert (await server.client.get("/health/live")).status_code == 200
    startup = await server.client.get("/health/startup")
    assert startup.status_code == 503
    assert startup.json()["replicas"][0]["state"] == "failed"
