"""Replicas, a node, the controller, the GCS, the proxy and the ingress die, drain and roll under load.

Real Ray on two raylets, Serve in HAProxy mode, a tiny random model. What clients are told is compared with what they
were told in peace.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator

import httpx
import pytest
from chaos import injector
from faulty_worker import POISON
from place import NUM_CLIENTS, Place, wait_until

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One replica to begin with, all on the first node."""
    place = Place(tmp_path_factory.mktemp("survival"))
    try:
        place.start()
        yield place
    finally:
        place.close()


async def test_a_node_dies(place: Place) -> None:
    await place.do("add_node")
    await place.do("scale", 2)
    assert sorted(await place.do("replicas")) == ["head", "second"]

    async def blow() -> None:
        await place.do("kill_node")
        await asyncio.sleep(2.0)

    verdict = await place.under_load(blow)
    assert verdict.is_clean, str(verdict)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_one_of_two_replicas_dies(place: Place, number: signal.Signals) -> None:
    await place.do("scale", 2)

    async def blow() -> None:
        os.kill(place.replicas()[0]["pid"], number)
        await asyncio.sleep(2.0)

    verdict = await place.under_load(blow)
    assert verdict.is_clean, str(verdict)


async def test_the_only_replica_dies_and_requests_wait(place: Place) -> None:
    await place.do("scale", 1)

    async def blow() -> None:
        (replica,) = place.replicas()
        os.kill(replica["pid"], signal.SIGKILL)
        await wait_until(lambda: replica["pid"] not in [other["pid"] for other in place.replicas()])
        await wait_until(place.is_ready)

    verdict = await place.under_load(blow)
    assert verdict.is_clean, str(verdict)


@pytest.mark.parametrize("title", ["ray::RankActor", "ServeReplica:qwen-ray:Replica"])
async def test_the_network_fails_for_a_moment(place: Place, title: str) -> None:
    await place.do("scale", 1)

    async def blow() -> None:
        assert injector.cut(place.process(title)) > 0
        await asyncio.sleep(2.0)
        await wait_until(place.is_ready)

    verdict = await place.under_load(blow)
    assert verdict.is_clean, str(verdict)


async def test_health_tells_a_hang_from_much_work(place: Place) -> None:
    await place.do("scale", 1)
    seen: list[tuple[float, int]] = []

    async def look() -> None:
        async with httpx.AsyncClient(base_url=place.url, timeout=5) as client:
            while True:
                began = time.monotonic()
                seen.append((began, (await client.get("/health/ready")).status_code))
                assert (await client.get("/health/live")).status_code == 200
                await asyncio.sleep(0.1)

    async def blow() -> None:
        looking = asyncio.create_task(look())
        await asyncio.sleep(4.0)
        assert {status for _, status in seen} == {200}
        known = set(injector.named(place.owner.pid, "")) - set(injector.named(place.owner.pid, "ray::IDLE"))
        known -= set(injector.named(place.owner.pid, "ray::RankActor"))
        stopped, began = set[int](), time.monotonic()
        while seen[-1][1] == 200 and time.monotonic() < began + 20:
            for pid in set(injector.named(place.owner.pid, "")) - known - stopped:  # and whatever takes its place
                injector.stop(pid)
                stopped.add(pid)
            await asyncio.sleep(0.1)
        said = next(when for when, status in seen if status == 503)
        assert said - began < 10.5
        for pid in stopped:
            injector.go_on(pid)
        await wait_until(place.is_ready)
        looking.cancel()

    verdict = await place.under_load(blow)
    assert verdict.is_clean, str(verdict)


async def test_the_controller_dies_and_the_gcs_stands_still(place: Place) -> None:
    async def blow() -> None:
        gcs, controller = await place.do("gcs"), await place.do("controller")
        os.kill(controller, signal.SIGKILL)
        await asyncio.sleep(2.0)
        os.kill(gcs, signal.SIGSTOP)
        try:
            await asyncio.sleep(4.0)
        finally:
            os.kill(gcs, signal.SIGCONT)
        assert await place.do("controller") != controller

    verdict = await place.under_load(blow)
    assert verdict.is_clean, str(verdict)


async def test_three_replicas_become_one_and_a_new_version_comes(place: Place) -> None:
    await place.do("scale", 3)
    before = {replica["pid"] for replica in place.replicas()}

    async def blow() -> None:
        await place.do("scale", 1)
        await place.do("deploy", place.settings)
        await place.do("scale", 1)

    verdict = await place.under_load(blow)
    assert verdict.is_clean, str(verdict)
    (now,) = place.replicas()
    assert now["pid"] not in before
    assert verdict.num_requests > NUM_CLIENTS


async def test_the_ingress_dies_and_leaves_nothing_behind(place: Place) -> None:
    """The streams that it held end: their connections are gone. What had not begun goes to the next one."""
    ingress = place.process("ServeReplica:qwen-ray:Ingress")

    async def blow() -> None:
        os.kill(ingress, signal.SIGKILL)
        await wait_until(place.is_ready)

    verdict = await place.under_load(blow)
    assert not verdict.wrong
    assert not verdict.left_over
    assert place.process("ServeReplica:qwen-ray:Ingress") != ingress


async def test_the_proxy_dies_and_is_back_soon(place: Place) -> None:
    manager = place.process("ray::HAProxyManager")

    async def blow() -> None:
        os.kill(manager, signal.SIGKILL)
        await asyncio.sleep(0.5)
        await wait_until(place.is_ready)

    verdict = await place.under_load(blow)
    assert not verdict.wrong
    assert not verdict.left_over
    verdict = await place.under_load(lambda: asyncio.sleep(1.0))
    assert verdict.is_clean, str(verdict)


async def test_a_poisonous_request_is_ended_and_no_other_one(place: Place) -> None:
    """As the last one: the ranks of this version die of a prompt."""
    await place.do("deploy_with_poison", place.settings)
    answers: list[httpx.Response] = []

    async def blow() -> None:
        body = {"model": "tiny", "prompt": list(POISON), "max_tokens": 4}
        async with httpx.AsyncClient(base_url=place.url, timeout=120) as client:
            answers.append(await client.post("/v1/completions", json=body))
        await asyncio.sleep(1.0)

    verdict = await place.under_load(blow)
    assert verdict.is_clean, str(verdict)
    (answer,) = answers
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "ranks_failed"
    (replica,) = place.replicas()
    assert replica["num_repairs"] + replica["num_restarts"] <= 3
