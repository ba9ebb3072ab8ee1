"""One ingress speaks for all: other ingresses and replicas, and whoever does not answer is left out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qwen_ray.cluster.channel import Channel, Listener, listen
from qwen_ray.cluster.directory import Entry
from qwen_ray.core.stats import ScalingStats
from qwen_ray.metrics.recorder import IngressRecorder
from qwen_ray.serving import fleet
from qwen_ray.serving.fleet import Fleet
from qwen_ray.serving.messages import CODEC

SECRET = b"s" * 32


def entry(name: str, listener: Listener[Any]) -> Entry:
    return Entry(kind="ingress", id=name, app="test", address=listener.address, secret=SECRET, state="ready")


async def nobody() -> list[Entry]:
    return []


@pytest.fixture
async def other(pair: Any) -> AsyncIterator[Listener[Any]]:
    """Another ingress, which has seen requests of its own."""
    recorder = IngressRecorder("tiny", "two")
    recorder.hand_over()

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


def processes(text: str) -> set[tuple[str, str]]:
    """Whoever a sample is of."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(kind, s.labels[kind]) for s in samples for kind in ("ingress", "replica") if kind in s.labels}


async def test_targets_are_the_processes_and_each_gives_its_part(pair: Any, other: Listener[Any]) -> None:
    pair.other_ingresses = [entry("two", other)]
    groups = (await pair.client.get("/metrics/targets")).json()
    seen: set[tuple[str, str]] = set()
    lines: list[str] = []
    for group in groups:
        assert [f"http://{target}" for target in group["targets"]] == [pair.url]
        ((name, value),) = [item for item in group["labels"].items() if item[0].startswith("__param_")]
        kind = name.removeprefix("__param_")
        assert group["labels"]["instance"] == f"{kind}/{value}"
        text = (await pair.client.get(group["labels"]["__metrics_path__"], params={kind: value})).text
        assert processes(text) == {(kind, value)}
        seen.add((kind, value))
        lines += [line for line in text.splitlines() if not line.startswith("#")]
    whole = (await pair.client.get("/metrics")).text
    assert (
        seen
        == processes(whole)
        == {
            ("ingress", "one"),
            ("ingress", "two"),
            ("replica", "replica-0"),
            ("replica", "replica-1"),
        }
    )
    # Not counted in the same answers: requests for metrics.
    quiet = [line for line in whole.splitlines() if not line.startswith("#")]
    named = lambda found: sorted(s.split("}")[0] for s in found if "http_requests" not in s)  # noqa: E731
    assert named(lines) == named(quiet)


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ({"ingress": "nobody"}, 400, "unknown_process"),
        ({"replica": "nobody"}, 400, "unknown_process"),
        ({"ingress": "one", "replica": "replica-0"}, 400, None),
        ({"ingress": "x" * 300}, 400, None),
    ],
)
async def test_metrics_of_nobody(pair: Any, query: dict[str, str], status: int, code: str | None) -> None:
    response = await pair.client.get("/metrics", params=query)
    assert response.status_code == status
    assert code is None or response.json()["error"]["code"] == code


async def test_what_autoscaling_decides_is_shown(pair: Any) -> None:
    async def decided() -> ScalingStats:
        return ScalingStats(target=2, asked=3, min=1, max=4, decisions={("up", "backlog"): 1})

    speaker = Fleet("one", pair.dispatcher, IngressRecorder("tiny", "one", 2.5), nobody, pair._connect, decided)
    text = await speaker.metrics_of("one", None)
    assert 'qwen_ray_autoscaling_replicas{ingress="one",model_name="tiny",which="asked"} 3.0' in text
    line = 'qwen_ray_autoscaling_decisions_total{direction="up",ingress="one",model_name="tiny",reason="backlog"} 1.0'
    assert line in text
    assert 'qwen_ray_price_per_hour{ingress="one",model_name="tiny"} 2.5' in text


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
    for silent in ({"ingress": "two"}, {"replica": "replica-0"}):
        assert (await pair.client.get("/metrics", params=silent)).status_code == 503
    states = {r["replica"]: r["state"] for r in (await pair.client.get("/status")).json()["replicas"]}
    assert states == {"replica-0": "ready", "replica-1": "ready"}
    await listener.close()
