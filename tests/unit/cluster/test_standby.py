"""Processes that stand by: one for each stage, taken once, and of no harm when they are broken."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from ray.exceptions import RayActorError

from qwen_ray.cluster import standby
from qwen_ray.cluster.standby import Standbys


class Method:
    def __init__(self, answer: Callable[[], Awaitable[str]]) -> None:
        self._answer = answer

    def remote(self) -> Awaitable[str]:
        return self._answer()


class Actor:
    """What a Ray actor's handle is to Standbys."""

    def __init__(self, stage: int, state: str) -> None:
        self.stage = stage
        self._state = state
        self.free_address = Method(self._free_address)

    async def _free_address(self) -> str:
        if self._state == "dead":
            raise RayActorError
        if self._state == "stopped":
            await asyncio.Event().wait()
        return "127.0.0.1:1"


@pytest.fixture(autouse=True)
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Actor]:
    """Those that were killed."""
    actors: list[Actor] = []
    monkeypatch.setattr(standby.ray, "kill", actors.append)
    monkeypatch.setattr(standby, "CALM_SECONDS", 0.0)
    monkeypatch.setattr(standby, "ANSWER_SECONDS", 0.05)
    return actors


def standbys(state: str = "well", idle_seconds: Callable[[], float] = lambda: 0.0) -> tuple[Standbys, list[Actor]]:
    """Of two stages, and the actors they have made."""
    made: list[Actor] = []

    async def create(stage: int) -> Actor:
        made.append(Actor(stage, state))
        return made[-1]

    return Standbys(2, create, idle_seconds), made


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_each_is_taken_once_and_replaced_after_the_repair(killed: list[Actor]) -> None:
    waiting, made = standbys()
    assert await waiting.take(1) is None  # before there is one
    waiting.prepare(waits_for_idle=False)
    await settled()
    assert [actor.stage for actor in made] == [0, 1]
    assert await waiting.take(1) is made[1]
    assert await waiting.take(1) is None
    waiting.prepare(waits_for_idle=False)
    await settled()
    assert [actor.stage for actor in made] == [0, 1, 1]
    await waiting.stop()
    assert killed == [made[0], made[2]]


@pytest.mark.parametrize("state", ["dead", "stopped"])
async def test_one_that_does_not_answer_is_ended_and_not_given_out(killed: list[Actor], state: str) -> None:
    waiting, made = standbys(state)
    waiting.prepare(waits_for_idle=False)
    await settled()
    assert await waiting.take(0) is None
    assert killed == [made[0]]
    await waiting.stop()


async def test_a_repair_is_not_disturbed_by_one_that_is_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby, "CALM_SECONDS", 0.01)
    waiting, made = standbys()
    waiting.prepare(waits_for_idle=False)
    assert await waiting.take(0) is None
    await asyncio.sleep(0.03)
    assert made == []
    await waiting.stop()


async def test_after_a_start_who_computes_is_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby, "IDLE_SECONDS", 0.01)
    idle = 0.0
    waiting, made = standbys(idle_seconds=lambda: idle)
    waiting.prepare(waits_for_idle=True)
    await asyncio.sleep(0.03)
    assert made == []
    idle = standby.IDLE_SECONDS
    await asyncio.sleep(0.03)
    assert [actor.stage for actor in made] == [0, 1]
    await waiting.stop()


async def test_who_never_rests_gets_one_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby, "IDLE_SECONDS", 0.01)
    monkeypatch.setattr(standby, "PATIENCE_SECONDS", 0.03)
    waiting, made = standbys()
    waiting.prepare(waits_for_idle=True)
    await asyncio.sleep(0.01)
    assert made == []
    await asyncio.sleep(0.1)
    assert [actor.stage for actor in made] == [0, 1]
    await waiting.stop()


async def test_a_node_without_room_is_told_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    async def create(stage: int) -> Actor:
        raise RayActorError

    waiting = Standbys(1, create, lambda: 0.0)
    waiting.prepare(waits_for_idle=False)
    await settled()
    assert "no process waits" in caplog.text
    assert await waiting.take(0) is None
    await waiting.stop()
