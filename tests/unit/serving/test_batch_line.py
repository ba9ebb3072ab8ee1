"""A batch's lines, answered by the application that answers HTTP."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from qwen_ray.serving.batch_line import URLS, answer
from qwen_ray.serving.routes import create_app

COMPLETION = {"model": "tiny", "prompt": "Hi", "max_tokens": 4}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}


async def is_well() -> None:
    """A replica in good health."""


async def ask(app: FastAPI, **line: Any) -> dict[str, Any]:
    asked = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": COMPLETION, **line}
    answered = json.loads(await answer(app, json.dumps(asked), is_well, pause=0.01))
    assert answered["custom_id"] == "a"
    assert answered["error"] is None
    assert answered["id"].startswith("batch_req_")
    assert answered["response"]["request_id"]
    return answered["response"]


async def test_answers_are_the_server_s(server: Any) -> None:
    app = create_app(server.service)
    for url, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        over_http = (await server.client.post(url, json=body)).json()
        response = await ask(app, url=url, body=body)
        assert response["status_code"] == 200
        for own in ("id", "created"):
            del over_http[own], response["body"][own]
        over_http["usage"].pop("prompt_tokens_details")  # the second one hits the prefix cache
        response["body"]["usage"].pop("prompt_tokens_details")
        assert response["body"] == over_http
    assert {"/v1/completions", "/v1/chat/completions"} <= set(URLS)


@pytest.mark.parametrize(
    ("wrong", "status", "param"),
    [
        ({"method": "GET"}, 400, "method"),
        ({"url": "/metrics"}, 400, "url"),
        ({"url": ["/v1/completions"]}, 400, "url"),
        ({"body": None}, 400, "body"),
        ({"body": {**COMPLETION, "stream": True}}, 400, "stream"),
        ({"body": {**COMPLETION, "temperature": -1}}, 400, "temperature"),
        ({"body": {**COMPLETION, "model": "other"}}, 404, "model"),
        ({"body": {"prompt": "x" * 300_000}}, 413, None),
        ({"body": {**COMPLETION, "prompt": "x" * 500}}, 400, "prompt"),
    ],
)
async def test_a_bad_line_is_its_own_answer(server: Any, wrong: dict[str, Any], status: int, param: str) -> None:
    app = create_app(server.service)
    bad, good = await asyncio.gather(ask(app, **wrong), ask(app))
    assert bad["status_code"] == status
    assert bad["body"]["error"]["param"] == param
    assert bad["body"]["error"]["message"]
    assert good["status_code"] == 200


async def test_what_is_only_too_much_at_once_is_asked_again(server: Any) -> None:
    """The queue holds 8."""
    app = create_app(server.service)
    responses = await asyncio.gather(*(ask(app) for _ in range(60)))
    assert {response["status_code"] for response in responses} == {200}


async def test_nobody_being_there_is_no_answer() -> None:
    app = FastAPI()

    @app.post("/v1/completions")
    async def away() -> JSONResponse:
        return JSONResponse({"error": {}}, status_code=503)

    async def has_failed() -> None:
        raise RuntimeError("the replica has failed")

    line = json.dumps({"method": "POST", "url": "/v1/completions", "body": {}})
    with pytest.raises(RuntimeError, match="the replica has failed"):
        await answer(app, line, has_failed)


async def test_an_error_of_ours_is_one_line_s_answer() -> None:
    app = FastAPI()

    @app.post("/v1/completions")
    async def broken() -> None:
        raise ValueError

    @app.exception_handler(Exception)
    async def on_error(_request: object, _error: Exception) -> JSONResponse:
        return JSONResponse({"error": {"message": "broken"}}, status_code=500)

    assert (await ask(app))["status_code"] == 500
