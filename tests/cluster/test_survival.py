"""Replicas, a node, the controller, the GCS, the proxy and the ingress die, drain and roll under load.

Real Ray on two raylets, Serve in HAProxy mode, a tiny random model. What clients are told is compared with what they
were told in peace.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from chaos import injector
from chaos.judge import Verdict, judge, left_over
from chaos.load import Ask, Seen, every_kind, in_peace, until
from faulty_worker import POISON
from tiny_model import write_tiny_model

from qwen_ray.commands.haproxy import own_ports
from qwen_ray.commands.ports import free_ports
from qwen_ray.serving.environment import ENVIRONMENT

pytestmark = pytest.mark.chaos

NUM_CLIENTS = 6
HERE = Path(__file__).parent


class Place:
    """The cluster, by way of the process that owns it, and what clients see of it."""

    def __init__(self, folder: Path) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self.settings: dict[str, Any] = {
            "models": [
                {
                    "source": str(write_tiny_model(folder / "tiny")),
                    "dtype": "float32",
                    "max_model_len": 512,
                    "replicas": {"min": 1, "max": 3},
                }
            ],
            "http": {"port": port},
            "engine": {"kv_cache_memory": "4MiB"},
        }
        wanted = folder / "replicas"
        wanted.write_text("1")
        environment = {
            **os.environ,
            **ENVIRONMENT,
            **own_ports(),
            "RAY_SERVE_HAPROXY_NBTHREAD": "2",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",  # no connection idles here
            "QWEN_RAY_TEST_REPLICAS": str(wanted),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        }
        self._log = (folder / "log").open("wb")
        self.owner = subprocess.Popen(
            [sys.executable, str(HERE / "two_nodes.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
        )
        kinds = [ask for ask in every_kind("tiny", max_tokens=96) if ask.kind != "long"]
        random.Random(3).shuffle(kinds)
        self.asks: list[Ask] = kinds[::2]
        self.expected: dict[str, Seen] = {}

    def tell(self, command: str, argument: Any = None) -> Any:
        assert self.owner.stdin is not None
        assert self.owner.stdout is not None
        self.owner.stdin.write(json.dumps([command, argument]) + "\n")
        self.owner.stdin.flush()
        answer = json.loads(self.owner.stdout.readline())
        assert "error" not in answer, f"{command}: {answer['error']}"
        return answer["answer"]

    async def do(self, command: str, argument: Any = None) -> Any:
        return await asyncio.to_thread(self.tell, command, argument)

    def replicas(self) -> list[dict[str, Any]]:
        return injector.status(self.url)["replicas"]

    def process(self, title: str) -> int:
        (pid,) = injector.named(self.owner.pid, title)
        return pid

    async def under_load(self, blow: Callable[[], Awaitable[None]]) -> Verdict:
        """What clients say of `blow`, from a second before it until it returns."""
        done = asyncio.Event()
        load = asyncio.create_task(until(done, self.url, self.asks, num_clients=NUM_CLIENTS))
        try:
            await asyncio.sleep(1.0)
            await blow()
        finally:
            done.set()
            seen = await load
        verdict = judge("", seen, self.expected)
        verdict.left_over = await asyncio.to_thread(left_over, self.url)
        return verdict

    def close(self) -> None:
        with self.owner:  # closes the pipes, and waits
            assert self.owner.stdin is not None
            self.owner.stdin.close()
        self._log.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One replica to begin with, all on the first node."""
    place = Place(tmp_path_factory.mktemp("survival"))
    try:
        place.tell("deploy", place.settings)
        place.expected = asyncio.run(in_peace(place.url, place.asks, num_clients=NUM_CLIENTS))
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
        await _until(lambda: replica["pid"] not in [other["pid"] for other in place.replicas()])
        await _until(lambda: _is_ready(place))

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
        await _until(lambda: _is_ready(place))

    verdict = await place.under_load(blow)
    assert not verdict.wrong
    assert not verdict.left_over
    assert place.process("ServeReplica:qwen-ray:Ingress") != ingress


async def test_the_proxy_dies_and_is_back_soon(place: Place) -> None:
    manager = place.process("ray::HAProxyManager")

    async def blow() -> None:
        os.kill(manager, signal.SIGKILL)
        await asyncio.sleep(0.5)
        await _until(lambda: _is_ready(place))

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


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110 (what is waited for is told to nobody)
            await asyncio.sleep(0.2)


def _is_ready(place: Place) -> bool:
    try:
        return httpx.get(f"{place.url}/health/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
