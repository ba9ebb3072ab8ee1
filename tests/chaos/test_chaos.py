"""Blows to a running server under requests of every kind. `make chaos` runs the long form of all of it."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest
from chaos import injector
from chaos.judge import Verdict, judge, left_over, show
from chaos.load import Ask, Seen, every_kind, in_peace, until
from served import serving

NUM_CLIENTS = 16
IS_LONG = bool(os.environ.get("QWEN_RAY_CHAOS_LONG"))
EXACT = "--dtype", "float32"  # in which a step says the same whatever else is in it

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def verdicts() -> Iterator[list[Verdict]]:
    found: list[Verdict] = []
    yield found
    show(found)


def asks() -> list[Ask]:
    kinds = every_kind("demo", max_tokens=48 if IS_LONG else 24)
    random.Random(1).shuffle(kinds)
    return kinds if IS_LONG else kinds[::4]


async def under_load(
    url: str, expected: dict[str, Seen], blows: Callable[[list[float]], Awaitable[None]], name: str
) -> Verdict:
    """`blows` does what it does, and notes when, while clients ask; then they finish and it is judged."""
    done, times = asyncio.Event(), list[float]()
    load = asyncio.create_task(until(done, url, asks(), num_clients=NUM_CLIENTS))
    try:
        await blows(times)
    finally:
        done.set()
    verdict = judge(name, await load, expected, times)
    verdict.left_over = await asyncio.to_thread(left_over, url)
    return verdict


@pytest.mark.parametrize("plan", ["--tp 2", "--pp 2", "--ep 2"] if IS_LONG else ["--tp 2"])
async def test_a_rank_is_killed_again_and_again(
    plan: str, verdicts: list[Verdict], request: pytest.FixtureRequest
) -> None:
    chance = random.Random(2)
    num_kills, pause = (15, 20.0) if IS_LONG else (2, 12.0)
    model = str(request.getfixturevalue("upcycled_demo")) if "--ep" in plan else "demo"
    with serving(model, *plan.split(), *EXACT, "--served-model-name", "demo") as url:
        expected = await in_peace(url, asks())
        killed: set[int] = set()

        async def blows(times: list[float]) -> None:
            others: set[int] = set()  # that were there at the last blow
            await asyncio.sleep(4.0)
            for _ in range(num_kills):
                living = await _living(url)
                assert others <= {rank.pid for rank in living}
                victim = chance.choice(living).pid
                others = {rank.pid for rank in living} - {victim}
                times.append(time.monotonic())
                killed.add(victim)
                injector.kill(victim)
                await asyncio.sleep(pause)
            assert others <= {rank.pid for rank in await _living(url)}

        verdict = await under_load(url, expected, blows, f"SIGKILL of a rank, {plan}")
        verdicts.append(verdict)
        assert verdict.is_clean, str(verdict)
        assert len(verdict.recoveries) == len(killed) == num_kills
        assert [rank.num_loads for rank in injector.ranks(url)] == [1, 1]


async def test_a_rank_stands_still(verdicts: list[Verdict]) -> None:
    with serving("demo", "--tp", "2", *EXACT) as url:
        expected = await in_peace(url, asks())

        async def blows(times: list[float]) -> None:
            await asyncio.sleep(3.0)
            times.append(time.monotonic())
            injector.stop(injector.ranks(url)[1].pid)
            await asyncio.sleep(20.0)

        verdict = await under_load(url, expected, blows, "SIGSTOP of a rank")
        verdicts.append(verdict)
        assert verdict.is_clean, str(verdict)
        assert len(verdict.recoveries) == 1


async def test_both_ranks_at_once_and_others_while_one_is_replaced(verdicts: list[Verdict]) -> None:
    with serving("demo", "--tp", "2", *EXACT) as url:
        expected = await in_peace(url, asks())

        def kill(rank: int) -> set[int]:
            """Returns the processes of all ranks until then; who stands by to be one is not among them."""
            ranks = injector.ranks(url)
            injector.kill(ranks[rank].pid)
            return {other.pid for other in ranks}

        async def blows(times: list[float]) -> None:
            await asyncio.sleep(4.0)
            times.append(time.monotonic())
            for rank in injector.ranks(url):
                injector.kill(rank.pid)
            await _repaired(url)

            # The one that takes the place of the first, as soon as it is there, and whoever stands by.
            times.append(time.monotonic())
            known = await asyncio.to_thread(kill, 0)
            async with asyncio.timeout(30):
                while not (new := set(injector.named(os.getpid(), "RankActor")) - known):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            for pid in new:
                injector.kill(pid)
            await _repaired(url)

            # The other one, while the first is replaced.
            times.append(time.monotonic())
            other = injector.ranks(url)[1].pid
            await asyncio.to_thread(kill, 0)
            await asyncio.sleep(1.5)
            injector.kill(other)
            await _repaired(url)

        verdict = await under_load(url, expected, blows, "SIGKILL of two ranks, and during repair")
        verdicts.append(verdict)
        assert verdict.is_clean, str(verdict)


async def _repaired(url: str) -> None:
    """Returns when all ranks work again, and have for a while."""
    await asyncio.sleep(1.0)
    await _living(url)
    await asyncio.sleep(5.0)


async def _living(url: str) -> list[injector.Rank]:
    """Both ranks, as soon as they can be asked."""
    async with asyncio.timeout(120):
        while len(ranks := await asyncio.to_thread(injector.ranks, url)) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    return ranks
