"""Far more requests than can be served, and many of them for a long time. `make chaos` runs the long form."""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import sys
import time
from asyncio.subprocess import PIPE
from collections import Counter
from pathlib import Path

import httpx
import pytest
from chaos import memory
from chaos.flood import post
from chaos.judge import judge, left_over
from chaos.load import Ask, Seen, every_kind, in_peace, many, run
from chaos.memory import MIB, Memory
from rich.console import Console
from served import serving

from qwen_ray.api_keys import ApiKey, new_key

TESTS = Path(__file__).parents[1]
IS_LONG = bool(os.environ.get("QWEN_RAY_CHAOS_LONG"))
NUM_AT_ONCE = 10_000 if IS_LONG else 500
SOAK_SECONDS = 1800 if IS_LONG else 30
MAX_GROWTH = 512 * MIB  # of any process, in a burst
MAX_CREEP = 0.02  # of any process, over the last two thirds of a long time
NOTHING = 4 * MIB  # is what allocators take at a time: of Ray's small processes that is more than 2 %

pytestmark = pytest.mark.chaos


async def test_far_too_many_requests_at_once() -> None:
    with serving("demo") as url:
        steady = [ask for ask in every_kind("demo", max_tokens=16) if ask.kind in ("greedy", "chat")] * 8
        await many(url, steady[:16], num_clients=8)
        rate = await _rate(url, steady)
        body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
        async with Memory(period=0.5) as seen:
            await seen.calm()  # the KV cache is given its memory in the background
            began = time.monotonic()
            answers = await asyncio.gather(*(post(url, body) for _ in range(NUM_AT_ONCE)))
            ended = time.monotonic()
            await asyncio.sleep(1.5)
        rates = [rate, await _rate(url, steady)]
        statuses = Counter(status for status, _, _ in answers)
        growth = {
            f"{p.title} ({p.pid})": (p.around(began, width=2.0) or 0.0, float(p.peak)) for p in seen.processes.values()
        }
        told = f"{dict(statuses)} in {ended - began:.1f} s; requests/s before {rates[0]:.2f}, after {rates[1]:.2f}"
        memory.show(f"{NUM_AT_ONCE} requests at once: {told}; memory before, and at most", growth)
        assert set(statuses) <= {200, 429}
        assert len({json.loads(text)["choices"][0]["text"] for status, _, text in answers if status == 200}) == 1
        assert all("retry-after" in head.lower() for status, head, _ in answers if status == 429)
        assert all(peak - first < MAX_GROWTH for first, peak in growth.values())
        assert left_over(url) == []


async def test_a_light_tenant_beside_one_that_floods(tmp_path: Path) -> None:
    """Who asks now and then is answered nearly as soon as on an idle server: queues are fair to keys."""
    keys = {"light": new_key(), "heavy": new_key()}
    listed = [ApiKey.of(key, name).model_dump(mode="json") for name, key in keys.items()]
    (tmp_path / "keys.json").write_text(json.dumps(listed), encoding="utf-8")
    body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    with serving("demo", "--api-keys-file", str(tmp_path / "keys.json")) as url:

        async def light() -> float:
            began = time.monotonic()
            status, _, _ = await post(url, body, keys["light"])
            assert status == 200, status
            return time.monotonic() - began

        await light()
        idle = [await light() for _ in range(20)]
        # Of another process: whoever sends ten thousand requests notices late that something has come.
        arguments = "-m", "chaos.flood", url, keys["heavy"], str(NUM_AT_ONCE), json.dumps(body)
        flood = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=PIPE, cwd=TESTS)
        beside: list[float] = []
        told_statuses = asyncio.create_task(flood.communicate())
        while not told_statuses.done():
            beside.append(await light())
            await asyncio.sleep(0.5)
        statuses = {int(status): count for status, count in json.loads((await told_statuses)[0]).items()}
        medians = [statistics.median(seconds) for seconds in (idle, beside)]
        told = f"{medians[0]:.2f} s on an idle server, {medians[1]:.2f} s beside {dict(statuses)}"
        Console(width=120).print(
            f"8 tokens for a light tenant: {told}; ratio {medians[1] / medians[0]:.2f}; {len(beside)} requests, "
            f"nine in ten within {statistics.quantiles(beside, n=10)[-1]:.2f} s, the longest {max(beside):.2f} s"
        )
        assert set(statuses) <= {200, 429}


async def test_mixed_traffic_for_a_long_time_with_clients_that_go_away() -> None:
    chance = random.Random(4)
    with serving("demo", "--dtype", "float32") as url:
        asks = [ask for ask in every_kind("demo", max_tokens=8) if ask.kind != "long"]
        expected = await in_peace(url, asks)
        counts, wrong = Counter[str](), list[str]()
        began = time.monotonic()

        async def work(client: httpx.AsyncClient) -> None:
            while time.monotonic() - began < SOAK_SECONDS:
                ask = chance.choice(asks)
                if chance.random() < 0.1:
                    counts["gone away"] += await _go_away(client, ask, chance)
                    continue
                seen: Seen = await run(client, ask)
                verdict = judge("", [seen], expected)
                wrong.extend(verdict.failed + verdict.wrong)
                counts[ask.kind] += 1

        async with (
            Memory(period=2.0 if IS_LONG else 0.5) as seen,
            httpx.AsyncClient(base_url=url, timeout=120) as client,
        ):
            await asyncio.gather(*(work(client) for _ in range(16)))
            left = await asyncio.to_thread(left_over, url)
        ended = began + SOAK_SECONDS
        growth = seen.growth(began + SOAK_SECONDS / 3, ended, width=SOAK_SECONDS / 15)
        told = f"{counts.total()} requests in {SOAK_SECONDS} s: {dict(counts)}"
        memory.show(f"{told}; memory at {SOAK_SECONDS / 3:.0f} s, and at the end", growth)
        assert not wrong, wrong[:5]
        assert left == []
        if IS_LONG:
            limits = {name: first + max(first * MAX_CREEP, NOTHING) for name, (first, _) in growth.items()}
            assert {name: sizes for name, sizes in growth.items() if sizes[1] > limits[name]} == {}


async def _rate(url: str, asks: list[Ask]) -> float:
    """Requests per second with 32 clients."""
    began = time.monotonic()
    seen = await many(url, asks, num_clients=32)
    assert not [one.error for one in seen if one.error]
    return len(asks) / (time.monotonic() - began)


async def _go_away(client: httpx.AsyncClient, ask: Ask, chance: random.Random) -> int:
    """Ask, and hang up after a few lines. Returns 1."""
    async with client.stream("POST", ask.path, json=ask.body) as answer:
        lines = answer.aiter_lines()
        for _ in range(chance.randrange(6)):
            await anext(lines, None)
    return 1
