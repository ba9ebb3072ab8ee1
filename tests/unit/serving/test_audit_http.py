"""The audit log: a line for every request, what it tells and what it does not, and how it rotates."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.api_keys import ApiKey
from qwen_ray.config import HttpSettings
from qwen_ray.core.errors import SettingsError
from qwen_ray.serving.audit import NUM_KEPT, AuditLog

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "Hi, secretly"}]}
KEY = {"Authorization": "Bearer right"}
SHOWN = {
    "time",
    "request_id",
    "key",
    "method",
    "route",
    "model",
    "status",
    "outcome",
    "prompt_tokens",
    "completion_tokens",
    "seconds",
}


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_who_when_what_and_how_it_ended(start_server: Any, tmp_path: Path) -> None:
    path = tmp_path / "logs" / "audit.jsonl"
    http = HttpSettings(api_keys=(ApiKey.of("right", "team-a"),))
    server = await start_server(http=http, audit=AuditLog(path, 10**6))
    forged = {"X-Request-Id": 'a"}{"b', **KEY}
    whole = await server.client.post(CHAT, json={**HI, "max_tokens": 5}, headers=forged)
    await server.client.post(CHAT, json={**HI, "stream": True}, headers=KEY)
    await server.client.post(CHAT, json={**HI, "model": "other\n{}"}, headers=KEY)
    await server.client.post(CHAT, json={**HI, "top_p": 7}, headers=KEY)
    await server.client.post(CHAT, json=HI, headers={"Authorization": "Bearer wrong"})
    await server.client.get("/v1/models", headers=KEY)
    for path_not_told_of in ("/health/live", "/metrics", "/metrics/targets"):
        await server.client.get(path_not_told_of, headers=KEY)
    usage = whole.json()["usage"]
    first, streamed, unknown, wrong, stranger, models = records(path)
    assert set(first) == SHOWN
    assert (first["key"], first["model"]) == ("team-a", "tiny")
    assert first["request_id"] == whole.headers["x-request-id"] != 'a"}{"b'
    assert (first["method"], first["route"], first["status"], first["outcome"]) == ("POST", CHAT, 200, "length")
    assert (first["prompt_tokens"], first["completion_tokens"]) == (usage["prompt_tokens"], 5)
    assert (streamed["status"], streamed["outcome"]) == (200, "stop")
    assert streamed["completion_tokens"] > 5
    assert (unknown["status"], unknown["outcome"], unknown["model"]) == (404, "model_not_found", "other\n{}")
    assert (wrong["status"], wrong["outcome"], wrong["key"]) == (400, "invalid_request_error", "team-a")
    assert (stranger["status"], stranger["outcome"], stranger["key"]) == (401, "invalid_api_key", None)
    assert (models["status"], models["outcome"], models["route"]) == (200, "ok", "/v1/models")
    assert "secretly" not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


async def test_contents_only_where_switched_on(start_server: Any, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    server = await start_server(audit=AuditLog(path, 10**6, keeps_contents=True))
    answer = await server.client.post(CHAT, json={**HI, "n": 2, "max_tokens": 8})
    await server.client.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 8})
    chat, texts = records(path)
    assert chat["request"] == HI["messages"]
    assert chat["answers"] == [choice["message"]["content"] for choice in answer.json()["choices"]]
    assert texts["request"] == ["a", "b"]
    assert len(texts["answers"]) == 2


async def test_a_client_that_left(start_server: Any, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    server = await start_server(audit=AuditLog(path, 10**6))
    server.replicas[0].ranks.seconds = 0.01
    async with server.client.stream("POST", CHAT, json={**HI, "stream": True}) as response:
        await anext(response.aiter_lines())
    await server.until(lambda: path.stat().st_size > 0)
    assert records(path)[0]["outcome"] == "abort"


def test_rotation_loses_nothing_and_keeps_a_bounded_number(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    logs = [AuditLog(path, 200), AuditLog(path, 200)]
    for number in range(40):
        logs[number % 2].write({"number": number, "text": "x" * 30})
    files = [path, *(path.with_name(f"audit.jsonl.{i}") for i in range(1, NUM_KEPT + 1))]
    kept = [file for file in files if file.exists()]
    assert all(file.stat().st_size <= 200 for file in kept)
    numbers = [record["number"] for file in reversed(kept) for record in records(file)]
    assert numbers == list(range(numbers[0], 40))
    for log in logs:
        for number in range(100):
            log.write({"number": number, "text": "x" * 300})
    assert len(list(tmp_path.iterdir())) == NUM_KEPT + 2  # the file and its lock
    path.unlink()
    logs[0].write({"number": 0})
    assert records(path) == [{"number": 0}]
    for log in logs:
        log.close()


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="file/audit"):
        AuditLog(tmp_path / "file" / "audit", 100)


async def test_streams_at_once(start_server: Any, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    server = await start_server(audit=AuditLog(path, 10**6))
    await asyncio.gather(*(server.client.post(CHAT, json={**HI, "stream": True}) for _ in range(6)))
    await server.until(lambda: len(records(path)) == 6)
    assert {record["outcome"] for record in records(path)} == {"stop"}
