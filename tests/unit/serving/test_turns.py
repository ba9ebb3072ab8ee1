"""Tenants take turns, and nobody is forgotten."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive, Scope, Send

from qwen_ray.serving.call import SCOPE_KEY, Call
from qwen_ray.serving.middleware import InTurn
from qwen_ray.serving.turns import Turns


async def in_order(turns: Turns, tenants: str, cancelled: frozenset[int] = frozenset()) -> str:
    """Who was let through, one letter for each."""
    order: list[str] = []

    async def work(tenant: str) -> None:
        await turns.next(tenant)
        order.append(tenant)

    tasks = [asyncio.create_task(work(tenant)) for tenant in tenants]
    await asyncio.sleep(0)
    for number in cancelled:
        tasks[number].cancel()
    async with asyncio.timeout(5):
        await asyncio.gather(*tasks, return_exceptions=True)
    return "".join(order)


async def test_tenants_take_turns() -> None:
    turns = Turns()
    assert await in_order(turns, "aaaaaab") == "aabaaaa"
    assert await in_order(turns, "aaaabbc") == "aabcaba"
    assert await in_order(turns, "x") == "x"


async def test_who_comes_later_waits_for_one_or_two_others() -> None:
    turns = Turns()
    order: list[str] = []

    async def work(tenant: str) -> None:
        await turns.next(tenant)
        order.append(tenant)

    heavy = [asyncio.create_task(work("heavy")) for _ in range(100)]
    for _ in range(20):
        await asyncio.sleep(0)
    before = len(order)
    assert 0 < before < 30
    await work("light")
    assert len(order) - before <= 3
    await asyncio.gather(*heavy)
    assert len(order) == 101


async def test_who_gives_up_holds_nobody_up() -> None:
    turns = Turns()
    assert await in_order(turns, "abcabc", cancelled=frozenset({1, 2, 4})) == "aac"
    assert await in_order(turns, "ab") == "ab"


async def test_whoever_looks_after_the_server_waits_for_nobody() -> None:
    order: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        order.append(scope["method"])

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        raise AssertionError(message)

    in_turn = InTurn(app)

    async def ask(method: str) -> None:
        scope = {"type": "http", "method": method, SCOPE_KEY: Call(method=method, path="/")}
        await in_turn(scope, receive, send)

    await asyncio.gather(*(ask("POST") for _ in range(50)), ask("GET"))
    assert order.index("GET") <= 1
    assert len(order) == 51
