"""Steps in flight over a group that is none: results in any order, parts for dp ranks, and failures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import cast

import pytest

from qwen_ray.cluster.executor import RayExecutor
from qwen_ray.cluster.group import RankGroup
from qwen_ray.cluster.rank_messages import RANK_CODEC, RankMessage
from qwen_ray.core.errors import RankFailed
from qwen_ray.core.request import SamplingParams
from qwen_ray.core.step import Chunk, MoveExperts, NewSequence, Sample, StepBatch, StepResult


class Group:
    """The part of a RankGroup that an executor uses; keeps what each dp rank is sent."""

    def __init__(self, dp_attention: int) -> None:
        self.spec = SimpleNamespace(plan=SimpleNamespace(dp_attention=dp_attention))
        self.on_result: Callable[[StepResult], None] = print
        self.on_failure: Callable[[RankFailed], None] = print
        self.failure: RankFailed | None = None
        self.sent: list[list[RankMessage]] = []

    def send(self, frames: Sequence[bytes]) -> None:
        if self.failure is not None:
            raise self.failure
        self.sent.append([RANK_CODEC.decode(frame[4:]) for frame in frames])


def start(dp_attention: int = 1) -> tuple[Group, RayExecutor]:
    group = Group(dp_attention)
    return group, RayExecutor(cast(RankGroup, group))


def step(number: int) -> StepBatch:
    return StepBatch(step_id=number, chunks=())


def result(step_id: int, *sequence_ids: int, seconds: float = 0.0) -> StepResult:
    samples = tuple(Sample(sequence_id=i, token_id=10 * i) for i in sequence_ids)
    return StepResult(step_id=step_id, samples=samples, seconds=seconds)


async def test_results_find_their_steps_in_any_order() -> None:
    group, executor = start()
    first, second = executor.submit(step(1)), executor.submit(step(2))
    assert group.sent == [[step(1)], [step(2)]]
    group.on_result(result(2))
    group.on_result(result(99))  # nobody's
    group.on_result(result(1))
    assert ((await first).step_id, (await second).step_id) == (1, 2)


async def test_each_dp_rank_is_sent_its_part_and_all_answer() -> None:
    group, executor = start(3)
    new = NewSequence(
        sequence_id=7,
        token_ids=(1,),
        num_prompt_tokens=1,
        sampling=SamplingParams(),
        seed=0,
        stop_token_ids=(),
        dp_rank=2,
    )
    chunks = tuple(Chunk(sequence_id=5 + rank, start=0, count=1, dp_rank=rank) for rank in (0, 2))
    batch = StepBatch(step_id=1, new=(new,), chunks=chunks, dropped=(3,))
    first, second = executor.submit(batch), executor.submit(step(2))
    assert group.sent == [
        [
            StepBatch(step_id=1, chunks=chunks[:1], dropped=(3,)),
            StepBatch(step_id=1, chunks=(), dropped=(3,)),
            StepBatch(step_id=1, chunks=chunks[1:], new=(new,), dropped=(3,)),
        ],
        [step(2)] * 3,
    ]
    for part in (result(1, 7, seconds=2.0), result(2), result(2), result(1, seconds=0.1)):
        group.on_result(part)
    assert not first.done()
    assert not second.done()
    group.on_result(result(1, 5, seconds=0.5))
    assert await first == StepResult(step_id=1, samples=result(1, 7, 5).samples, seconds=2.0)
    group.on_result(result(2))
    assert await second == result(2)


async def test_moves_keep_their_place_among_the_steps_and_reach_all() -> None:
    group, executor = start(2)
    move = MoveExperts(layer=3, slots=((1, 0), (2, 3)))
    executor.submit(step(1))
    executor.move_experts(move)
    executor.submit(step(2))
    assert group.sent == [[step(1)] * 2, [move] * 2, [step(2)] * 2]
    group.failure = RankFailed(1, "gone")
    with pytest.raises(RankFailed, match="gone"):
        executor.move_experts(move)


@pytest.mark.parametrize("dp_attention", [1, 2])
async def test_a_failure_ends_all_in_flight_and_all_later(dp_attention: int) -> None:
    group, executor = start(dp_attention)
    steps = [executor.submit(step(1)), executor.submit(step(2))]
    if dp_attention == 2:
        group.on_result(result(1))
    group.failure = RankFailed(3, "gone")
    group.on_failure(group.failure)
    group.on_result(result(1))  # too late
    for failed in [*steps, executor.submit(step(3))]:
        with pytest.raises(RankFailed, match="rank 3 failed: gone"):
            await failed


async def test_a_result_nobody_waits_for_is_dropped() -> None:
    group, executor = start()
    given_up = executor.submit(step(1))
    given_up.cancel()
    group.on_result(result(1))
    later = executor.submit(step(2))
    group.on_result(result(2))
    assert (await later).step_id == 2
