"""One line for each request when it ends, and the id that it and the answer carry."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from qwen_ray.api_keys import ApiKey
from qwen_ray.config import HttpSettings
from qwen_ray.core.logs import REQUEST_ID, JsonFormatter
from qwen_ray.serving.request_log import sane_request_id

CHAT = "/v1/chat/completions"
HI = {"model": "tiny", "messages": [{"role": "user", "content": "Say hi, secretly"}]}
LOGGER = "qwen_ray.serving.request_log"


def fields(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.__dict__["fields"] for record in caplog.records if record.name == LOGGER]


async def test_who_what_and_where_the_time_went(start_server: Any, caplog: pytest.LogCaptureFixture) -> None:
    http = HttpSettings(api_keys=(ApiKey.of("right", "team-a"),))
    key = {"Authorization": "Bearer right"}
    server = await start_server(http=http)
    server.replicas[0].ranks.seconds = 0.01
    caplog.set_level(logging.INFO, LOGGER)
    whole = await server.client.post(CHAT, json={**HI, "max_tokens": 5}, headers=key)
    again = await server.client.post(CHAT, json={**HI, "max_tokens": 5, "stream": True}, headers=key)
    await server.client.post(CHAT, json={**HI, "model": "other\n"}, headers=key)
    await server.client.get("/v1/nonsense", headers=key)
    for path_not_told_of in ("/health/live", "/metrics"):
        await server.client.get(path_not_told_of, headers=key)
    await server.until(lambda: len(fields(caplog)) == 4)
    first, second, unknown, nonsense = fields(caplog)
    assert (first["method"], first["route"], first["status"], first["finish_reason"]) == ("POST", CHAT, 200, "length")
    assert (first["model"], first["key"], first["id"]) == ("tiny", "team-a", whole.json()["id"])
    assert first["replica"] == "replica-0"
    assert (first["prompt_tokens"], first["completion_tokens"]) == (whole.json()["usage"]["prompt_tokens"], 5)
    assert second["cached_tokens"] > 0
    assert again.status_code == 200
    parts = [first[f"{part}_seconds"] for part in ("ingress", "queue", "prefill", "decode", "respond")]
    assert sum(parts) == pytest.approx(first["total_seconds"], abs=1e-3)
    assert first["decode_seconds"] > 4 * 0.01 * 0.9
    assert first["prefill_seconds"] > 0.01 * 0.9
    assert first["ttft_seconds"] <= first["total_seconds"]
    assert (unknown["status"], unknown["finish_reason"]) == (404, "model_not_found")
    assert "id" not in unknown
    assert (nonsense["route"], nonsense["status"]) == ("other", 404)
    assert "secretly" not in caplog.text
    assert "\\n" in JsonFormatter("here").format(caplog.records[-2])


async def test_the_id_is_the_clients_or_ours(
    start_server: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await start_server()
    caplog.set_level(logging.INFO, LOGGER)
    seen: list[str] = []
    monkeypatch.setattr(logging.getLogger(LOGGER), "filters", [lambda _: seen.append(REQUEST_ID.get()) or True])
    theirs = await server.client.get("/v1/models", headers={"X-Request-Id": "trace/1:a_b-c"})
    forged = await server.client.get("/v1/models", headers={"X-Request-Id": 'x"} [err]'})
    none = await server.client.get("/v1/models")
    assert theirs.headers["x-request-id"] == "trace/1:a_b-c"
    assert forged.headers["x-request-id"].startswith("req-")
    assert none.headers["x-request-id"].startswith("req-")
    await server.until(lambda: len(seen) == 3)
    assert seen == [answer.headers["x-request-id"] for answer in (theirs, forged, none)]


async def test_a_hand_over_is_counted(pair: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    for replica in pair.replicas:
        replica.deltas_until_death = 3
    answer = await pair.client.post(CHAT, json=HI)
    assert answer.status_code == 200
    (line,) = fields(caplog)
    assert line["hand_overs"] >= 1


@pytest.mark.parametrize("given", ["", "a b", "a\n", "-a", "é", "x" * 129, '"', "a;b", "[a]"])
def test_what_is_no_name_is_replaced(given: str) -> None:
    ours = sane_request_id(given)
    assert ours.startswith("req-")
    assert sane_request_id(ours) == ours


def test_json_of_a_line_has_its_fields() -> None:
    record = logging.LogRecord(LOGGER, logging.INFO, "", 0, "x", (), None)
    record.__dict__["fields"] = {"status": 200}
    assert json.loads(JsonFormatter("p").format(record))["status"] == 200
