"""Ranks over their life, with groups that are none: what is repaired, what is started anew, and when it is hopeless."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from qwen_ray.cluster.rank_messages import Joined
from qwen_ray.core.errors import CheckpointError, RankFailed
from qwen_ray.core.stats import EngineStats, RepairTimes, StepStats
from qwen_ray.core.step import StepBatch, StepResult
from qwen_ray.serving import ranks as ranks_module
from qwen_ray.serving.patience import AT_LEAST
from qwen_ray.serving.ranks import COLD, MAX_FRUITLESS, MAX_FRUITLESS_REPAIRS, Ranks

SPEC: Any = SimpleNamespace(plan=SimpleNamespace(dp_attention=1), engine=SimpleNamespace(depth=1))
FAILURE = RankFailed(1, "test")
TIMES = RepairTimes(killed=0.1, started=2.0, loaded=1.0, joined=0.2)
STEP = StepBatch(step_id=1, chunks=())
DONE = StepStats(
    num_sequences=1, num_tokens=1, num_output_tokens=1, schedule_seconds=0.0, step_seconds=0.01, rank_seconds=0.01
)


class Group:
    """In place of a RankGroup. `start_errors`, `repair_errors`: what those raise, in this order."""

    log: ClassVar[list[str]] = []
    start_errors: ClassVar[list[Exception]] = []
    repair_errors: ClassVar[list[Exception]] = []
    progress: ClassVar[list[int]] = []  # bytes read of two, after 20 ms each

    def __init__(self) -> None:
        self.spec = SPEC
        self.experts = None
        self.warm_up = Joined(num_tokens=4, seconds=0.05)
        self.failure: RankFailed | None = None
        self.on_result: Callable[[StepResult], None] = print
        self.on_failure: Callable[[RankFailed], None] = print
        self.blamed: list[float] = []

    @classmethod
    async def start(cls, spec: Any, on_progress: Callable[[int, int], None], **_: Any) -> Group:
        cls.log.append("start")
        if cls.start_errors:
            raise cls.start_errors.pop(0)
        for done in cls.progress:
            await asyncio.sleep(0.02)
            on_progress(done, 2)
        return cls()

    async def repair(self, patience: float) -> RepairTimes:
        self.log.append("repair")
        if self.repair_errors:
            raise self.repair_errors.pop(0)
        self.failure = None
        return TIMES

    async def stop(self) -> None:
        self.log.append("stop")

    def send(self, frames: Any) -> None:
        if self.failure is not None:
            raise self.failure

    def blame(self, seconds: float) -> None:
        self.blamed.append(seconds)
        self.fail()

    def fail(self) -> None:
        self.failure = FAILURE
        self.on_failure(FAILURE)


@pytest.fixture(autouse=True)
def groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "RankGroup", Group)
    for name in ("log", "start_errors", "repair_errors", "progress"):
        monkeypatch.setattr(Group, name, [])


class Life:
    """Started ranks, and what their owner is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.ranks = Ranks(SPEC, None, lambda: self.told.append("failed"))

    @classmethod
    async def begin(cls) -> Life:
        life = cls()
        await life.ranks.start()
        return life

    @property
    def group(self) -> Any:
        return self.ranks._group

    async def fail(self) -> None:
        self.group.fail()
        await self.ranks.recover(FAILURE, lambda: self.told.append("restart"))

    async def step(self) -> None:
        step = self.ranks.submit(STEP)
        self.group.on_result(StepResult(step_id=1))
        await step
        self.ranks.step_done(DONE)


async def test_a_failure_is_repaired_and_its_phases_are_kept() -> None:
    life = await Life.begin()
    step = life.ranks.submit(STEP)
    await asyncio.sleep(0.02)
    await life.fail()
    with pytest.raises(RankFailed):
        await step
    assert life.told == []  # whoever waited for the step knows
    await life.step()
    times = life.ranks.repair_times
    assert times.noticed >= 0.02
    assert times.first_step > 0
    assert replace(times, noticed=0.0, first_step=0.0) == TIMES
    assert (life.ranks.num_repairs, life.ranks.num_restarts, life.ranks.stage) == (1, 0, "ready")
    assert str(TIMES).startswith("3.30 s: noticed 0.00 s, killed 0.10 s, started 2.00 s")


async def test_a_failure_between_two_steps_is_told() -> None:
    life = await Life.begin()
    await life.step()
    await life.fail()
    assert life.told == ["failed"]
    assert life.ranks.repair_times.noticed == 0


async def test_what_cannot_be_repaired_is_started_anew() -> None:
    life = await Life.begin()
    Group.repair_errors[:] = [RankFailed(0, "again"), ValueError("Ray's own")]
    for _ in range(2):
        await life.fail()
    assert Group.log == ["start", *["repair", "stop", "start"] * 2]
    assert life.told.count("restart") == 2
    assert (life.ranks.num_repairs, life.ranks.num_restarts) == (0, 2)


async def test_without_a_step_in_between_there_are_so_many_repairs_so_many_restarts_and_an_end() -> None:
    life = await Life.begin()
    for _ in range(MAX_FRUITLESS):
        await life.fail()
    assert Group.log.count("repair") == MAX_FRUITLESS_REPAIRS
    assert life.ranks.num_restarts == MAX_FRUITLESS - MAX_FRUITLESS_REPAIRS
    with pytest.raises(RankFailed):
        await life.fail()


async def test_a_step_gives_new_hope() -> None:
    life = await Life.begin()
    for _ in range(3 * MAX_FRUITLESS):
        await life.fail()
        await life.step()
    assert life.ranks.num_repairs == 3 * MAX_FRUITLESS


async def test_a_request_less_that_ranks_die_of_gives_new_hope_too() -> None:
    life = await Life.begin()
    for i in range(3 * MAX_FRUITLESS):
        await life.fail()
        life.ranks.look(0.25, replace(busy(1), poisonous_total=i // 3))
    assert life.ranks.num_repairs == 3 * MAX_FRUITLESS


async def test_ranks_that_die_while_they_start_are_started_again_a_bad_checkpoint_is_not() -> None:
    Group.start_errors[:] = [FAILURE, FAILURE]
    await Life.begin()
    assert Group.log == ["start"] * 3
    Group.start_errors[:] = [CheckpointError("bad")]
    with pytest.raises(CheckpointError):
        await Life.begin()


def busy(steps_total: int) -> EngineStats:
    return EngineStats(num_running=1, steps_total=steps_total)


async def test_ranks_with_work_and_no_progress_are_blamed() -> None:
    life = await Life.begin()
    for second in range(100):
        life.ranks.look(1.0, busy(second))  # a step a second
        life.ranks.look(1.0, EngineStats(steps_total=second))  # nothing to do
    assert life.group.blamed == []
    for _ in range(int(AT_LEAST) + 5):
        life.ranks.look(1.0, busy(99))
    assert life.group.blamed == [AT_LEAST + 1]  # once
    await life.ranks.recover(FAILURE, lambda: None)
    assert life.ranks.stalled_seconds == 0
    for _ in range(int(COLD * AT_LEAST)):
        life.ranks.look(1.0, busy(99))
    assert len(life.group.blamed) == 1  # new ranks may take longer for their first step


async def test_stopped_ranks_run_nothing() -> None:
    life = await Life.begin()
    await life.ranks.stop()
    await life.ranks.stop()
    assert Group.log == ["start", "stop"]
    with pytest.raises(RankFailed, match="no ranks are running"):
        life.ranks.submit(STEP)
    assert await life.ranks.stats() == ()


@pytest.mark.parametrize("progress", [[0, 1, 2], [2], []])
async def test_phases_of_a_start_are_all_of_it(progress: list[int]) -> None:
    Group.progress = progress
    ranks = Ranks(SPEC, None, lambda: None)
    await ranks.start()
    times = ranks.start_times
    assert times.placed + times.read + times.warmed_up == pytest.approx(ranks.load_seconds)
    if progress:
        assert times.placed > 0.01
    assert (times.read > 0.03) == (len(progress) == 3)
    await ranks.stop()
