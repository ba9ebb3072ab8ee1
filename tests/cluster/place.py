"""A cluster of this machine with a tiny random model on it, and what clients see of it. Not a test."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
from chaos import injector
from chaos.judge import Verdict, judge, left_over
from chaos.load import Ask, Seen, every_kind, in_peace, until
from tiny_model import write_tiny_model

from qwen_ray.commands.haproxy import own_ports
from qwen_ray.commands.ports import free_ports
from qwen_ray.serving.environment import ENVIRONMENT

NUM_CLIENTS = 6
HERE = Path(__file__).parent


class Place:
    """The cluster, by way of the process that owns it, and what clients see of it."""

    def __init__(self, folder: Path, **environment: str) -> None:
        """`environment`: more of it, for Ray's processes."""
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
            "engine": {"kv_cache_memory": "4MiB", "standby_ranks": False},  # every RankActor is a rank
        }
        wanted = folder / "replicas"
        wanted.write_text("1")
        changes = {
            **ENVIRONMENT,
            **own_ports(),
            "RAY_SERVE_HAPROXY_NBTHREAD": "2",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",  # no connection idles here
            "QWEN_RAY_TEST_REPLICAS": str(wanted),
            "OMP_NUM_THREADS": "1",
            **environment,
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        }
        self._log = (folder / "log").open("wb")
        self.owner = subprocess.Popen(
            [sys.executable, str(HERE / "two_nodes.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **changes},
            text=True,
        )
        kinds = [ask for ask in every_kind("tiny", max_tokens=96) if ask.kind != "long"]
        random.Random(3).shuffle(kinds)
        self.asks: list[Ask] = kinds[::2]
        self.expected: dict[str, Seen] = {}

    def start(self) -> None:
        """One replica, and what it says in peace."""
        self.tell("deploy", self.settings)
        self.expected = asyncio.run(in_peace(self.url, self.asks, num_clients=NUM_CLIENTS))

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

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

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


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110 (what is waited for is told to nobody)
            await asyncio.sleep(0.2)
