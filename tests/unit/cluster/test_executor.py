"""Steps in flight over a group that is none: results in any order, and failures."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest

from qwen_ray.cluster.executor import RayExecutor
from qwen_ray.cluster.group import RankGroup
from qwen_ray.cluster.rank_messages import RANK_CODEC
from qwen_ray.core.errors import RankFailed
from qwen_ray.core.step import StepBatch, StepResult


class Group:
    """The part of a RankGroup that an executor uses; keeps the frames."""

    def __init__(self) -> None:
        self.on_result: Callable[[StepResult], None] = print
        self.on_failure: Callable[[RankFailed], None] = print
        self.failure: RankFailed | None = None
        self.frames: list[bytes] = []

    def broadcast(self, frame: bytes) -> None:
        if self.failure is not None:
            raise self.failure
        self.frames.append(frame)


def step(number: int) -> StepBatch:
    return StepBatch(step_id=number, chunks=())


@pytest.fixture
def group() -> Group:
    return Group()


@pytest.fixture
def executor(group: Group) -> RayExecutor:
    return RayExecutor(cast(RankGroup, group))


async def test_results_find_their_steps_in_any_order(group: Group, executor: RayExecutor) -> None:
    first, second = executor.submit(step(1)), executor.submit(step(2))
    assert [RANK_CODEC.decode(frame[4:]) for frame in group.frames] == [step(1), step(2)]
    group.on_result(StepResult(step_id=2))
    group.on_result(StepResult(step_id=99))  # nobody's
    group.on_result(StepResult(step_id=1))
    assert ((await first).step_id, (await second).step_id) == (1, 2)


async def test_a_failure_ends_all_in_flight_and_all_later(group: Group, executor: RayExecutor) -> None:
    steps = [executor.submit(step(1)), executor.submit(step(2))]
    group.failure = RankFailed(3, "gone")
    group.on_failure(group.failure)
    group.on_result(StepResult(step_id=1))  # too late
    for failed in [*steps, executor.submit(step(3))]:
        with pytest.raises(RankFailed, match="rank 3 failed: gone"):
            await failed


async def test_a_result_nobody_waits_for_is_dropped(group: Group, executor: RayExecutor) -> None:
    given_up = executor.submit(step(1))
    given_up.cancel()
    group.on_result(StepResult(step_id=1))
    later = executor.submit(step(2))
    group.on_result(StepResult(step_id=2))
    assert (await later).step_id == 2
