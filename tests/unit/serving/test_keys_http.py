"""API keys over HTTP: which doors they open, what a key may take, and that nothing tells a wrong key from none."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from qwen_ray.api_keys import ApiKey
from qwen_ray.config import HttpSettings
from qwen_ray.core.errors import SettingsError, Unauthorized
from qwen_ray.serving import keys as keys_module
from qwen_ray.serving.keys import KeyRing
from qwen_ray.serving.routes import create_app

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "Hi"}]}
HEALTH = ("/health", "/health/live", "/health/ready", "/health/startup")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def settings(*keys: ApiKey, **options: Any) -> HttpSettings:
    return HttpSettings(api_keys=keys, max_body_bytes=200_000, **options)


async def test_every_route_of_the_document_but_health_wants_a_key(start_server: Any) -> None:
    server = await start_server(http=settings(ApiKey.of("right")))
    document = create_app(server.service).openapi()
    assert CHAT in document["paths"]
    unlisted = {
        "/openapi.json": ["get"],
        "/nowhere": ["get"],
        "/docs": ["get"],
        "/health/": ["get"],
        "//health": ["get"],
    }
    routes = {**{path: list(methods) for path, methods in document["paths"].items()}, **unlisted}
    for path, methods in routes.items():
        url = path.replace("{name}", "tiny")
        for method in (*methods, "head", "options", "delete"):
            for headers in (
                {},
                bearer("wrong"),
                {"Authorization": "Bearer"},
                {"Authorization": "right"},
                {"Authorization": "Basic right"},
            ):
                response = await server.client.request(method, url, headers=headers)
                operation = document["paths"].get(path, {}).get(method, {})
                assert ("security" in operation) == (bool(operation) and path not in HEALTH)
                if path in HEALTH:
                    assert response.status_code != 401, (method, path)
                    continue
                assert response.status_code == 401, (method, path, response.text)
                assert response.headers["www-authenticate"] == "Bearer"
                if method != "head":
                    assert response.json()["error"]["code"] == "invalid_api_key"
                    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    for path in HEALTH:
        assert (await server.client.get(path)).status_code == 200
    for path in ("/metrics", "/metrics/targets", "/status", "/v1/models", "/openapi.json", "/version"):
        assert (await server.client.get(path, headers=bearer("right"))).status_code == 200
    assert (await server.client.post(CHAT, json=HI, headers=bearer("right"))).status_code == 200
    assert (await server.client.post(CHAT, json=HI, headers={"Authorization": "bearer  right"})).status_code == 200


async def test_a_wrong_key_and_none_get_the_same_answer(start_server: Any) -> None:
    server = await start_server(http=settings(ApiKey.of("right")))
    answers = [await server.client.post(CHAT, json=HI, headers=sent) for sent in ({}, bearer("wrong"), bearer("righu"))]
    assert len({answer.content for answer in answers}) == 1
    assert "right" not in answers[0].text
    large = await server.client.post(CHAT, content=b"x" * 10_000_000)
    assert large.status_code == 401


def test_every_look_up_compares_with_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = KeyRing(settings(*(ApiKey.of(f"key-{i}") for i in range(5))))
    compared: list[tuple[bytes, bytes]] = []
    in_constant_time = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return in_constant_time(a, b)

    monkeypatch.setattr(keys_module.hmac, "compare_digest", compare)
    known = [hashlib.sha256(f"key-{i}".encode()).digest() for i in range(5)]
    for sent in (b"Bearer key-0", b"Bearer key-4", b"Bearer no", b"Bearer ", b"", b"Basic key-0", b"\xff\x00"):
        compared.clear()
        try:
            found = ring.caller(sent).id
        except Unauthorized:
            found = None
        assert [b for _, b in compared] == known, sent
        assert {len(a) for a, _ in compared} == {32}
        assert (found is not None) == (sent in (b"Bearer key-0", b"Bearer key-4"))


async def test_the_file_of_keys_is_read_again(
    start_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "LOOK_SECONDS", 0.0)
    file = tmp_path / "keys"
    first, second = (hashlib.sha256(key.encode()).hexdigest() for key in ("first", "second"))
    file.write_text(f"{first} one\n")
    server = await start_server(http=settings(ApiKey.of("fixed"), api_keys_file=file))

    async def opened() -> list[str]:
        answers = {
            key: await server.client.get("/version", headers=bearer(key)) for key in ("fixed", "first", "second")
        }
        return [key for key, answer in answers.items() if answer.status_code == 200]

    assert await opened() == ["fixed", "first"]
    replacement = tmp_path / "new"
    replacement.write_text(yaml.safe_dump([{"id": "two", "sha256": second}]))
    replacement.replace(file)
    assert await opened() == ["fixed", "second"]
    file.write_text("a slip of the pen\n")
    assert await opened() == ["fixed", "second"]
    file.write_text("# nobody\n")
    assert await opened() == ["fixed"]
    file.write_text(f"{first}\n")
    assert await opened() == ["fixed", "first"]
    file.unlink()
    assert await opened() == ["fixed"]


async def test_an_empty_file_of_keys_lets_nobody_in(start_server: Any, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("")
    server = await start_server(http=settings(api_keys_file=tmp_path / "keys"))
    assert (await server.client.get("/version")).status_code == 401
    with pytest.raises(SettingsError, match="nowhere"):
        KeyRing(settings(api_keys_file=tmp_path / "nowhere"))


async def test_requests_per_minute(start_server: Any) -> None:
    limited = ApiKey.of("limited").model_copy(update={"requests_per_minute": 3})
    server = await start_server(http=settings(limited, ApiKey.of("free")))
    answers = [await server.client.post(CHAT, json=HI, headers=bearer("limited")) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["2", "1", "0", "0"]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "3"
    assert float(answers[3].headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
    assert 1 <= int(answers[3].headers["retry-after"]) <= 20
    assert answers[3].json()["error"]["code"] == "rate_limit_exceeded"
    assert limited.id in answers[3].json()["error"]["message"]
    free = await server.client.post(CHAT, json=HI, headers=bearer("free"))
    assert free.status_code == 200
    assert not [name for name in free.headers if name.startswith("x-ratelimit")]
    assert (await server.client.get("/v1/models", headers=bearer("limited"))).status_code == 200


async def test_tokens_per_minute_count_prompts_and_answers(start_server: Any) -> None:
    limited = ApiKey.of("limited").model_copy(update={"tokens_per_minute": 50})
    server = await start_server(http=settings(limited))

    async def ask(**body: Any) -> httpx.Response:
        return await server.client.post("/v1/completions", json=body, headers=bearer("limited"))

    first = await ask(prompt="x" * 20, max_tokens=10)
    assert first.status_code == 200
    refused = await ask(prompt="x" * 45, max_tokens=1)
    assert refused.status_code == 429
    assert 20 <= int(refused.headers["x-ratelimit-remaining-tokens"]) <= 25
    assert int(refused.headers["retry-after"]) >= 15
    assert (await ask(prompt="x" * 5, max_tokens=30)).status_code == 200  # goes on into debt
    assert (await ask(prompt="x", max_tokens=1)).status_code == 429


async def test_a_key_is_its_requests_tenant(start_server: Any) -> None:
    heavy = ApiKey.of("heavy", "team-a").model_copy(update={"weight": 3.0, "priority": -1})
    server = await start_server(http=settings(heavy))
    answer = await server.client.post(CHAT, json={**HI, "priority": -1}, headers=bearer("heavy"))
    assert answer.status_code == 200
    request = server.replicas[0].requests[-1]
    assert (request.tenant, request.weight, request.priority, request.deadline) == ("team-a", 3.0, -1, None)
    refused = await server.client.post(CHAT, json={**HI, "priority": -2}, headers=bearer("heavy"))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")


async def test_without_keys_nobody_is_asked(server: Any) -> None:
    assert (await server.client.get("/version", headers=bearer("anything"))).status_code == 200
    assert (await server.client.post(CHAT, json={**HI, "priority": -5})).status_code == 200
    assert server.replicas[0].requests[-1].tenant == ""
