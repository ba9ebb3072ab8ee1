"""Hand-over, aborts and choice of replica: what a client sees has no gap and no repetition."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

TEXT = "Grüße, 世界! 👩‍👩‍👧 The end of the line. STOP and more."


def ask(server: Any, **body: Any) -> Any:
    return server.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 200, **body})


@pytest.mark.parametrize("deaths", [0, 1, 30, len(TEXT.encode())])
async def test_a_replica_dies_and_another_goes_on(pair: Any, deaths: int) -> None:
    pair.replicas[0].deltas_until_death = deaths
    responses = await asyncio.gather(*(ask(pair) for _ in range(4)))
    for response in responses:
        assert response.json()["choices"][0]["text"] == TEXT
        assert response.json()["usage"]["completion_tokens"] == len(TEXT.encode()) + 1
    resumed = [r for replica in pair.replicas for r in replica.requests if r.output_token_ids]
    reference = pair.tokenizer.encode(TEXT)
    assert all(list(r.output_token_ids) == reference[: len(r.output_token_ids)] for r in resumed)
    assert len(pair.replicas[0].requests) + len(pair.replicas[1].requests) > 4
    await pair.until(pair.is_idle)


async def test_a_stream_waits_for_its_only_replica_to_come_back(server: Any) -> None:
    replica = server.replicas[0]
    replica.deltas_until_death = 10
    replica.ranks.seconds = 0.001

    async def go_away_for_a_while() -> None:
        await server.until(lambda: replica.deltas_until_death is None)
        replica.state = "loading"
        await asyncio.sleep(0.5)
        replica.state = "ready"

    response, _ = await asyncio.gather(ask(server), go_away_for_a_while())
    assert response.json()["choices"][0]["text"] == TEXT
    metrics = (await server.client.get("/metrics")).text
    assert 'qwen_ray_hand_overs_total{ingress="one",model_name="tiny"} 1.0' in metrics
    await server.until(server.is_idle)


async def test_a_request_that_kills_every_replica_is_given_up(server: Any) -> None:
    replica = server.replicas[0]

    def always_die(_: object) -> None:
        for channel in replica.channels:
            channel.close()

    replica.sessions.publish = always_die
    replica.engine._publish = always_die
    response = await ask(server)
    assert response.status_code == 500
    assert "3 times" in response.json()["error"]["message"]
    await server.until(server.is_idle)


async def test_the_least_loaded_replica_gets_the_next_request(pair: Any) -> None:
    for replica in pair.replicas:
        replica.ranks.seconds = 0.005
    await asyncio.gather(*(ask(pair, max_tokens=30) for _ in range(8)))
    assert [len(replica.requests) for replica in pair.replicas] == [4, 4]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_blocks(server: Any, stream: bool) -> None:
    server.replicas[0].ranks.seconds = 0.01
    async with httpx.AsyncClient(base_url=server.url) as client:
        body = {"prompt": "x" * 50, "max_tokens": 200, "stream": stream, "n": 3}
        call = asyncio.create_task(_read_a_little(client, body))
        await server.until(lambda: server.dispatcher.num_sequences == 3)
        await server.until(lambda: server.replicas[0].engine.stats().num_used_blocks > 0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await server.until(server.is_idle)
    assert server.replicas[0].ranks.num_steps < 50
    metrics = (await server.client.get("/metrics")).text
    assert 'vllm:request_success_total{finished_reason="abort",ingress="one",model_name="tiny"} 3.0' in metrics


async def _read_a_little(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line:
                json.loads(line.removeprefix("data: "))


async def test_a_stalled_replica_is_not_ready(server: Any) -> None:
    replica = server.replicas[0]
    replica.ranks.seconds = 1000.0
    call = asyncio.create_task(ask(server))
    await server.until(lambda: replica.engine.stats().num_running == 1)
    replica.engine._last_progress -= 2000.0
    response = await server.until_status("/health", 503)
    assert "without progress" in response.json()["error"]["message"]
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)


async def test_status_shows_replicas_and_their_engines(pair: Any) -> None:
    await ask(pair)
    status = (await pair.client.get("/status")).json()
    assert [replica["replica"] for replica in status["replicas"]] == ["replica-0", "replica-1"]
    assert sum(replica["engine"]["steps_total"] for replica in status["replicas"]) > 10
    assert status["replicas"][0]["engine"]["kv_usage"] == 0.0
    assert status["model"]["id"] == "tiny"
