"""The order of a repair, with ranks that are puppets; and one rank's handle, with a channel that is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest

from qwen_ray.cluster import rank_handle
from qwen_ray.cluster.channel import Channel
from qwen_ray.cluster.rank_handle import RankHandle
from qwen_ray.cluster.rank_messages import (
    Beat,
    Failed,
    Hello,
    Join,
    Joined,
    Pause,
    Paused,
    Progress,
    RankMessage,
    Released,
)
from qwen_ray.cluster.repair import MAX_LIVES, Repair
from qwen_ray.core.errors import CheckpointError, RankFailed
from qwen_ray.core.plan import ExpertPlacement
from qwen_ray.core.step import StepResult

EXPERTS = ExpertPlacement(slots=(((0, 1), (2, 3)), (), ((0, 1), (2, 3))))
MOVED = ((0, 2), (1, 3))


class Puppet(RankHandle):
    """Writes down what is done with it. `fails`: which of `pause`, `connect`, `load` break it."""

    def __init__(self, crew: Crew, number: int, life: int) -> None:
        super().__init__(number, 0, life, None, lambda rank: crew.repair.changed())
        self._crew = crew
        self.name = f"{number}.{life}"

    async def _do(self, what: str) -> None:
        self._crew.log.append(f"{what} {self.name}")
        await asyncio.sleep(0)
        if (hook := self._crew.hooks.pop(f"{what} {self.name}", None)) is not None:
            hook()
        if self.is_broken and what != "kill":
            raise RankFailed(self.number, self.reason)

    async def pause(self, seconds: float) -> Paused:
        await self._do("pause")
        return Paused(experts=self._crew.tables.get(self.number, {}))

    async def connect(self) -> None:
        await self._do("connect")

    async def load(self, experts: ExpertPlacement | None) -> None:
        await self._do("load")
        self._crew.told[self.name] = experts

    async def kill(self) -> None:
        await self._do("kill")


class Crew:
    """Three ranks. `hooks` are called amid what they are named after."""

    def __init__(self, experts: ExpertPlacement | None = None) -> None:
        self.log: list[str] = []
        self.hooks: dict[str, Callable[[], None]] = {}
        self.tables: dict[int, dict[int, tuple[tuple[int, ...], ...]]] = {}
        self.told: dict[str, ExpertPlacement | None] = {}
        self.ranks: dict[int, RankHandle] = {}
        self.repair = Repair(self.ranks, experts, self.create, lambda rank: cast(Puppet, rank).connect())
        for number in range(3):
            self.ranks[number] = Puppet(self, number, 1)

    async def create(self, number: int) -> RankHandle:
        life = self.ranks[number].life + 1
        self.log.append(f"create {number}.{life}")
        self.ranks[number] = Puppet(self, number, life)
        return self.ranks[number]

    def breaks(self, *numbers: int) -> Callable[[], None]:
        def hook() -> None:
            for number in numbers:
                self.ranks[number].break_("test")

        return hook

    def of(self, number: int) -> list[str]:
        """What was done with one rank, in order."""
        return [line.replace(f" {number}.", " ") for line in self.log if f" {number}." in line]

    async def mend(self) -> None:
        await asyncio.wait_for(self.repair.run(1.0), 10)
        assert not any(rank.is_broken for rank in self.ranks.values())


NEW = ["kill 1", "create 2", "connect 2", "load 2"]


async def test_the_broken_are_replaced_and_the_others_paused() -> None:
    crew = Crew()
    crew.breaks(1)()
    await crew.mend()
    assert [crew.of(number) for number in range(3)] == [["pause 1"], NEW, ["pause 1"]]
    assert crew.repair.replaced == {1: 1}


async def test_without_a_broken_rank_all_are_paused() -> None:
    crew = Crew()
    await crew.mend()
    await crew.mend()  # they could not meet: once more
    assert sorted(crew.log) == sorted(f"pause {number}.1" for number in (0, 0, 1, 1, 2, 2))


@pytest.mark.parametrize("moment", ["connect 1.2", "load 1.2", "kill 1.1"])
async def test_another_death_at_any_moment_is_one_more_to_replace(moment: str) -> None:
    crew = Crew()
    crew.breaks(1)()
    crew.hooks[moment] = crew.breaks(2)
    await crew.mend()
    assert crew.of(2)[-4:] == NEW
    assert crew.of(1) == NEW
    assert crew.of(0) == ["pause 1"]


@pytest.mark.parametrize("moment", ["connect 1.2", "load 1.2"])
async def test_a_new_rank_that_dies_is_replaced_too(moment: str) -> None:
    crew = Crew()
    crew.breaks(1)()
    crew.hooks[moment] = crew.breaks(1)
    await crew.mend()
    assert crew.of(1)[-4:] == ["kill 2", "create 3", "connect 3", "load 3"]


async def test_a_rank_that_does_not_leave_its_step_is_replaced() -> None:
    crew = Crew()
    crew.breaks(1)()
    crew.hooks["pause 0.1"] = crew.breaks(0)
    await crew.mend()
    assert crew.of(0) == ["pause 1", *NEW]


async def test_too_many_deaths_in_one_place_are_the_end() -> None:
    crew = Crew()
    crew.breaks(1)()
    for life in range(2, 20):
        crew.hooks[f"load 1.{life}"] = crew.breaks(1)
    with pytest.raises(RankFailed, match=f"{MAX_LIVES} new ones failed in its place; the last one: test"):
        await crew.mend()
    assert crew.of(1).count("load 2") == 1
    assert len([line for line in crew.of(1) if line.startswith("create")]) == MAX_LIVES


async def test_what_loading_raises_comes_out_as_it_is() -> None:
    crew = Crew()
    crew.breaks(1, 2)()

    def gone() -> None:
        raise CheckpointError("gone")

    crew.hooks["load 1.2"] = gone
    with pytest.raises(CheckpointError, match="gone"):
        await crew.mend()


async def test_new_ranks_load_the_experts_that_the_others_know_of() -> None:
    crew = Crew(EXPERTS)
    crew.breaks(0)()
    crew.tables = {1: {0: EXPERTS.slots[0], 2: MOVED}, 2: {0: EXPERTS.slots[0], 2: MOVED}}
    await crew.mend()
    assert crew.told == {"0.2": EXPERTS.with_layer(2, MOVED)}
    assert crew.repair.experts == EXPERTS.with_layer(2, MOVED)


async def test_a_rank_that_had_moved_its_experts_alone_is_replaced() -> None:
    crew = Crew(EXPERTS)
    crew.breaks(2)()
    crew.tables = {0: {0: EXPERTS.slots[0]}, 1: {0: MOVED}}
    await crew.mend()
    assert crew.told == {"1.2": EXPERTS, "2.2": EXPERTS}
    assert crew.of(0) == ["pause 1"]


async def test_ranks_that_disagree_without_a_death_are_found() -> None:
    crew = Crew(EXPERTS)
    crew.tables = {0: {0: EXPERTS.slots[0]}, 1: {0: EXPERTS.slots[0]}, 2: {0: MOVED}}
    await crew.mend()
    assert crew.told == {"2.2": EXPERTS}


async def test_where_all_ranks_are_new_the_experts_lie_as_they_were_told_to() -> None:
    crew = Crew(EXPERTS)
    crew.breaks(0, 1, 2)()
    await crew.mend()
    assert crew.told == dict.fromkeys(("0.2", "1.2", "2.2"), EXPERTS)


class Wire:
    """In place of a Channel: what is sent, and what comes."""

    reason = "closed by the other end"

    def __init__(self) -> None:
        self.sent: asyncio.Queue[RankMessage] = asyncio.Queue()
        self.comes: asyncio.Queue[RankMessage | None] = asyncio.Queue()

    def send(self, message: RankMessage) -> None:
        self.sent.put_nowait(message)

    async def __aiter__(self) -> AsyncIterator[RankMessage]:
        while (message := await self.comes.get()) is not None:
            self.comes.task_done()
            yield message
        self.comes.task_done()


class Actor:
    def __init__(self) -> None:
        self.abort = self
        self.num_aborts = 0

    def remote(self) -> Any:
        self.num_aborts += 1
        return asyncio.sleep(0)


class Life:
    """A handle that follows a wire; `news` is what it leaves to its group."""

    def __init__(self) -> None:
        self.news: list[RankMessage] = []
        self.broken: list[str] = []
        self.wire = Wire()
        self.actor = Actor()
        self.rank = RankHandle(3, 0, 1, self.actor, lambda rank: self.broken.append(rank.reason))
        channel = cast(Channel[RankMessage], self.wire)
        self.following = asyncio.ensure_future(
            self.rank.follow(channel, Hello(rank=3, life=1, pid=0, node_id=""), self.news.append)
        )

    async def hears(self, *messages: RankMessage | None) -> None:
        for message in messages:
            self.wire.comes.put_nowait(message)
        await self.wire.comes.join()
        await asyncio.sleep(0)


JOIN = Join(address="a:1", name="n", warm_up=False)


async def test_a_handle_keeps_what_a_rank_says_of_itself_and_hands_on_the_rest() -> None:
    life = Life()
    result, progress, failed = StepResult(step_id=1), Progress(done=1, total=2), Failed(reason="x")
    await life.hears(Beat(num_steps=4), result, progress, failed, Released())
    assert life.news == [result, progress, failed]
    assert life.rank.beat == Beat(num_steps=4)
    assert life.rank.progress == progress
    assert life.rank.released.is_set()
    await life.hears(None)
    assert life.rank.ended.is_set()
    assert life.broken == ["its process ended: closed by the other end"]


async def test_a_rank_whose_device_is_lost_is_broken_at_once() -> None:
    life = Life()
    await life.hears(Failed(reason="CUDA error", is_lost=True))
    assert life.broken == ["CUDA error"]
    life.following.cancel()


async def test_what_was_said_before_the_question_is_no_answer() -> None:
    life = Life()
    pausing = asyncio.ensure_future(life.rank.pause(5.0))
    assert await life.wire.sent.get() == Pause()
    await life.hears(Failed(reason="aborted"), Joined(), Paused(experts={}))
    assert await pausing == Paused(experts={})
    assert life.actor.num_aborts == 1
    joining = asyncio.ensure_future(life.rank.join(JOIN))
    assert await life.wire.sent.get() == JOIN
    await life.hears(Joined(num_tokens=3))
    assert await joining == Joined(num_tokens=3)
    joining = asyncio.ensure_future(life.rank.join(JOIN))
    await life.wire.sent.get()
    await life.hears(Failed(reason="nobody came"))
    with pytest.raises(RankFailed, match="rank 3 failed: meeting the other ranks: nobody came"):
        await joining
    life.following.cancel()


async def test_a_rank_that_stays_in_its_step_is_given_up() -> None:
    life = Life()
    with pytest.raises(RankFailed):
        await life.rank.pause(0.05)
    assert life.broken == ["it did not leave its step within 0 s"]
    life.following.cancel()


async def test_a_death_ends_a_question() -> None:
    life = Life()
    joining = asyncio.ensure_future(life.rank.join(JOIN))
    await life.hears(None)
    with pytest.raises(RankFailed, match="its process ended"):
        await joining


async def test_silence_breaks_a_rank_and_any_sign_of_life_ends_silence() -> None:
    life = Life()
    await life.hears(Beat(num_steps=0))
    life.rank._is_loaded = True
    for _ in range(3):
        life.rank.listen(rank_handle.SILENT_SECONDS)
        await life.hears(StepResult(step_id=1))
    assert life.broken == []
    life.rank.listen(rank_handle.SILENT_SECONDS)
    life.rank.listen(1.0)
    assert life.broken == ["it has given no sign of life for 6 s"]
    life.following.cancel()


async def test_a_rank_that_loads_may_be_silent_for_longer() -> None:
    life = Life()
    await life.hears(Beat(num_steps=0))
    life.rank.listen(rank_handle.SILENT_LOADING_SECONDS)
    assert life.broken == []
    life.rank.listen(1.0)
    assert len(life.broken) == 1
    life.following.cancel()
