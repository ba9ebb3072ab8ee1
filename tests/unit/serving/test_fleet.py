"""One ingress speaks for all: other ingresses and replicas, and whoever does not answer is left out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qwen_ray.cluster.channel import Channel, Listener, listen
from qwen_ray.cluster.directory import Entry
from qwen_ray.metrics.recorder import IngressRecorder
from qwen_ray.serving import fleet
from qwen_ray.serving.fleet import Fleet
from qwen_ray.serving.messages import CODEC

SECRET = b"s" * 32


def entry(name: str, listener: Listener[Any]) -> Entry:
    return Entry(kind="ingress", id=name, app="test", address=listener.address, secret=SECRET, state="ready")


@pytest.fixture
async def other(pair: Any) -> AsyncIterator[Listener[Any]]:
    """Another ingress, which has seen requests of its own."""
    recorder = IngressRecorder("tiny", "two")
    recorder.hand_over()

    async def nobody() -> list[Entry]:
        return []

    speaker = Fleet("two", pair.dispatcher, recorder, nobody, pair._connect)
    listener = await listen("127.0.0.1", SECRET, speaker.handle, CODEC)
    yield listener
    await listener.close()


async def test_metrics_of_every_ingress_and_replica(pair: Any, other: Listener[Any]) -> None:
    pair.other_ingresses = [entry("two", other)]
    text = (await pair.client.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    hand_overs = {s.labels["ingress"]: s.value for s in samples if s.name == "qwen_ray_hand_overs_total"}
    assert hand_overs == {"one": 0, "two": 1}
    replicas = {s.labels["replica"] for s in samples if s.name == "vllm:num_requests_running"}
    assert replicas == {"replica-0", "replica-1"}
    heads = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(heads) == len(set(heads))


async def test_who_does_not_answer_is_left_out(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(_: Channel[Any]) -> None:
        await asyncio.Event().wait()

    listener = await listen("127.0.0.1", SECRET, never, CODEC)
    monkeypatch.setattr(fleet, "ASK_SECONDS", 0.2)
    pair.other_ingresses = [entry("two", listener)]
    pair.replicas[0].sessions._answer = never
    response = await pair.client.get("/metrics")
    assert response.status_code == 200
    assert 'replica="replica-1"' in response.text
    assert 'replica="replica-0"' not in response.text
    states = {r["replica"]: r["state"] for r in (await pair.client.get("/status")).json()["replicas"]}
    assert states == {"replica-0": "ready", "replica-1": "ready"}
    await listener.close()
