"""What a collector gets of a request: one trace whose spans nest, and whose times are the request's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from otlp_receiver import Receiver, receiving, values

from qwen_ray.tracing import Tracer

CHAT = "/v1/chat/completions"
ROOT = f"POST {CHAT}"
HI = {"model": "tiny", "messages": [{"role": "user", "content": "Say hi, secretly"}]}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACED = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
UNTRACED = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
MILLISECOND = 10**6  # in a span's nanoseconds

Start = Callable[..., Awaitable[Any]]


@pytest.fixture
async def collector() -> AsyncIterator[Receiver]:
    with receiving() as receiver:
        yield receiver


class WatchedTracer(Tracer):
    def __init__(self, endpoint: str, sample_rate: float) -> None:
        super().__init__(endpoint, sample_rate, "one")
        self.ended: list[str] = []  # ids of traces

    def record(self, *args: Any, **kwargs: Any) -> str:
        self.ended.append(super().record(*args, **kwargs))
        return self.ended[-1]


@pytest.fixture
def start(start_server: Start, collector: Receiver) -> Start:
    async def start(sample_rate: float = 1.0, **options: Any) -> Any:
        return await start_server(tracer=WatchedTracer(collector.url, sample_rate), **options)

    return start


async def spans(server: Any, collector: Receiver, count: int, *, num_requests: int = 1) -> None:
    """Until all requests have ended, which is after their answers, and the tracer has no more to send."""
    await server.until(lambda: len(server.tracer.ended) == num_requests)
    await asyncio.to_thread(server.tracer.close)
    assert len(collector.spans) == count


async def test_spans_nest_and_times_add_up(start: Start, collector: Receiver) -> None:
    server = await start()
    server.replicas[0].ranks.seconds = 0.01
    answer = await server.client.post(CHAT, json={**HI, "max_tokens": 6}, headers=TRACED)
    await spans(server, collector, 6)
    root, children = collector.trace(ROOT)
    assert root.trace_id.hex() == TRACE == server.tracer.ended[0]
    assert root.parent_span_id.hex() == PARENT
    assert root.trace_state == "vendor=1"
    assert list(children) == ["ingress", "queue", "prefill", "decode", "respond"]
    whole = root.end_time_unix_nano - root.start_time_unix_nano
    parts = [child.end_time_unix_nano - child.start_time_unix_nano for child in children.values()]
    assert all(part >= 0 for part in parts)
    assert abs(sum(parts) - whole) < 2 * MILLISECOND
    assert all(root.start_time_unix_nano <= child.start_time_unix_nano for child in children.values())
    assert all(child.end_time_unix_nano <= root.end_time_unix_nano for child in children.values())
    assert all(child.trace_id == root.trace_id for child in children.values())
    assert parts[2] > 9 * MILLISECOND  # one step
    assert parts[3] > 5 * 9 * MILLISECOND
    usage = answer.json()["usage"]
    said = values(root.attributes)
    assert said["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert said["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 6
    assert (said["gen_ai.operation.name"], said["gen_ai.request.model"]) == ("chat", "tiny")
    assert (said["gen_ai.response.finish_reasons"], said["gen_ai.response.id"]) == (["length"], answer.json()["id"])
    assert (said["http.route"], said["http.response.status_code"]) == (CHAT, 200)
    assert said["qwen_ray.request_id"] == answer.headers["x-request-id"]
    assert said["qwen_ray.replicas"] == ["replica-0"]
    assert collector.resources[0]["service.name"] == "qwen-ray"
    assert "secretly" not in str(collector.spans)


async def test_streams_and_what_is_refused(start: Start, collector: Receiver) -> None:
    server = await start()
    await server.client.post(CHAT, json={**HI, "stream": True})
    await server.client.post("/v1/completions", json={"model": "other", "prompt": "x"})
    await server.client.get("/health/live")
    await spans(server, collector, 8, num_requests=2)
    streamed, children = collector.trace(ROOT)
    assert len(children) == 5
    assert streamed.parent_span_id == b""
    refused, children = collector.trace("POST /v1/completions")
    assert list(children) == ["ingress"]
    assert values(refused.attributes)["error.type"] == "model_not_found"


@pytest.mark.parametrize(("sample_rate", "headers", "count"), [(0.0, {}, 0), (0.0, TRACED, 6), (1.0, UNTRACED, 0)])
async def test_the_client_decides_before_the_rate(
    start: Start, collector: Receiver, sample_rate: float, headers: dict[str, str], count: int
) -> None:
    server = await start(sample_rate)
    await server.client.post(CHAT, json=HI, headers=headers)
    await spans(server, collector, count)


@pytest.mark.parametrize("given", ["nonsense", f"00-{'0' * 32}-{PARENT}-01", "00-" + "é" * 50, "x" * 5000])
async def test_a_context_that_is_none_begins_a_trace(start: Start, collector: Receiver, given: str) -> None:
    server = await start()
    answer = await server.client.post(CHAT, json=HI, headers={"traceparent": given.encode("latin-1")})
    assert answer.status_code == 200
    await spans(server, collector, 6)
    assert collector.trace(ROOT)[0].parent_span_id == b""


async def test_a_hand_over_is_an_event(start: Start, collector: Receiver) -> None:
    server = await start(num_replicas=2)
    for replica in server.replicas:
        replica.deltas_until_death = 3
    assert (await server.client.post(CHAT, json=HI)).status_code == 200
    await spans(server, collector, 6)
    root, _ = collector.trace(ROOT)
    assert [event.name for event in root.events][:1] == ["hand-over"]
    assert root.start_time_unix_nano < root.events[0].time_unix_nano < root.end_time_unix_nano
    said = values(root.attributes)
    assert said["qwen_ray.hand_overs"] == len(root.events)


async def test_a_collector_that_is_gone_disturbs_nobody(start_server: Start, caplog: pytest.LogCaptureFixture) -> None:
    tracer = Tracer("http://127.0.0.1:9", 1.0, "one")
    server = await start_server(tracer=tracer)
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        assert (await server.client.post(CHAT, json={**HI, "max_tokens": 2})).status_code == 200
    await asyncio.to_thread(tracer.close)
    assert any(record.name.startswith("opentelemetry") for record in caplog.records)
