"""Groups of rank actors on a real local Ray: the same tokens as transformers, and every way to end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from chaos import injector
from safetensors.torch import load_file, save_file
from tiny_ranks import (
    PROMPTS,
    continuations,
    dense_model,
    everything_is_free,
    is_alive,
    make_spec,
    moe_model,
    running,
    until,
)

from qwen_ray.cluster import standby
from qwen_ray.cluster.executor import RayExecutor
from qwen_ray.cluster.group import RankGroup
from qwen_ray.core.errors import CheckpointError, PlanRefused, RankFailed
from qwen_ray.core.plan import ReplicaSpec
from qwen_ray.core.request import GenerateRequest, SamplingParams, TokenDelta
from qwen_ray.core.stats import StepStats
from qwen_ray.core.step import Chunk, MoveExperts, NewSequence, StepBatch
from qwen_ray.engine.engine import Engine

pytestmark = pytest.mark.usefixtures("cluster")

NUM_TOKENS = 12
ONE_TOKEN = NewSequence(
    sequence_id=1, token_ids=(5,), num_prompt_tokens=1, sampling=SamplingParams(), seed=0, stop_token_ids=()
)
STEP = StepBatch(step_id=1, new=(ONE_TOKEN,), chunks=(Chunk(sequence_id=1, start=0, count=1, new_blocks=(0,)),))
STEP_OF_A_STRANGER = StepBatch(step_id=1, chunks=(Chunk(sequence_id=99, start=0, count=1),))

# Ray's workers cannot import a test module: they get its classes by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-qwen2")
    dense_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return continuations(dense_model(), NUM_TOKENS)


async def generate(group: RankGroup, moves: Sequence[MoveExperts] = ()) -> list[list[int]]:
    """All PROMPTS at once through the engine, greedily; one of `moves` after each of the first steps."""
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(PROMPTS))}
    left = set(tokens)

    def publish(deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            assert delta.error is None, delta.error
            tokens[delta.request_id].extend(delta.token_ids)
            if delta.finish_reason is not None:
                left.discard(delta.request_id)
        if not left:
            engine.stop()

    executor = RayExecutor(group)
    left_to_move = iter(moves)

    def on_step(step: StepStats) -> None:
        if (move := next(left_to_move, None)) is not None:
            executor.move_experts(move)

    engine = Engine(group.spec.engine, executor, publish, on_step)
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    for i, prompt in enumerate(PROMPTS):
        engine.add(GenerateRequest(request_id=str(i), prompt_token_ids=prompt, sampling=sampling, seed=0))
    await asyncio.wait_for(engine.run(), 120)
    return list(tokens.values())


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (3, 2)])
async def test_same_tokens_as_transformers_and_nothing_left(
    checkpoint: Path, expected: list[list[int]], tp: int, pp: int
) -> None:
    progress: list[tuple[int, int]] = []
    async with running(
        make_spec(checkpoint, tp=tp, pp=pp), on_progress=lambda done, total: progress.append((done, total))
    ) as group:
        assert await generate(group) == expected
        stats = await group.stats()
        assert [(s.rank, s.stage, s.tp_rank) for s in stats] == [(r, *divmod(r, tp)) for r in range(tp * pp)]
        assert len({s.pid for s in stats}) == tp * pp
        assert all(s.num_steps > 0 for s in stats)
        # Every rank says when it is done: the last word is about all bytes of all shards.
        assert progress[-1] == (sum(s.weights_bytes for s in stats),) * 2
    assert await until(lambda: not any(is_alive(s.pid) for s in stats))
    assert await until(everything_is_free)


async def test_dp_ranks_share_experts_that_move_and_a_death_among_them_ends_all(tmp_path: Path) -> None:
    model = moe_model()
    model.save_pretrained(tmp_path)
    moves = [
        MoveExperts(layer=i % 2, slots=((i, (i + 1) % 5, (i + 2) % 5), ((i + 3) % 5, (i + 4) % 5))) for i in range(5)
    ]
    async with running(make_spec(tmp_path, ep=2)) as group:
        assert await generate(group, moves) == continuations(model, NUM_TOKENS)
        stats = await group.stats()
        assert [(s.rank, s.stage, s.dp_rank, s.tp_rank, s.ep_rank) for s in stats] == [(0, 0, 0, 0, 0), (1, 0, 1, 0, 1)]
        assert stats[0].num_steps == stats[1].num_steps
        assert all(s.num_moved_experts > 0 for s in stats)
        num_tokens = sum(s.num_tokens for s in stats)
        assert all(s.num_tokens > 0 for s in stats)
        counts = [sum(sum(s.expert_tokens[layer]) for s in stats) for layer in range(2)]
        # The last layer computes those alone that another token was sampled behind.
        assert counts == [2 * num_tokens, 2 * NUM_TOKENS * len(PROMPTS)]
        # Rank 1 has none of this step's tokens; rank 0 waits for it all the same.
        os.kill(stats[1].pid, signal.SIGSTOP)
        executor = RayExecutor(group)
        step = executor.submit(replace(STEP, step_id=1000))
        os.kill(stats[1].pid, signal.SIGKILL)
        with pytest.raises(RankFailed, match="rank 1 failed: its process ended"):
            await asyncio.wait_for(step, 20)
    assert await until(everything_is_free)


async def test_killed_rank_fails_what_is_in_flight_and_what_comes_later(checkpoint: Path) -> None:
    async with running(make_spec(checkpoint, tp=2)) as group:
        executor = RayExecutor(group)
        stats = await group.stats()
        os.kill(stats[0].pid, signal.SIGSTOP)  # the rank that answers: the step stays in flight
        step = executor.submit(STEP)
        assert [s.rank for s in await group.stats()] == [1]  # which waits for rank 0 in the middle of its step
        os.kill(stats[0].pid, signal.SIGKILL)
        with pytest.raises(RankFailed, match="rank 0 failed: its process ended"):
            await asyncio.wait_for(step, 20)
        with pytest.raises(RankFailed, match="rank 0"):
            await executor.submit(replace(STEP, step_id=2))
        assert group.failure is not None
        assert [s.rank for s in await group.stats()] == [1]
    assert await until(lambda: not is_alive(stats[1].pid))


async def test_step_that_raises_fails_the_group_and_leaves_the_rank_to_be_asked(checkpoint: Path) -> None:
    async with running(make_spec(checkpoint)) as group:
        with pytest.raises(RankFailed, match="rank 0 failed: KeyError: 99"):
            await asyncio.wait_for(RayExecutor(group).submit(STEP_OF_A_STRANGER), 20)
        (stats,) = await group.stats()
        assert is_alive(stats.pid)
    assert await until(lambda: not is_alive(stats.pid))


async def test_missing_tensor_is_a_checkpoint_error_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        await RankGroup.start(make_spec(tmp_path, pp=2))
    assert await until(everything_is_free)


async def test_no_place_is_refused_with_what_is_missing(checkpoint: Path) -> None:
    spec = replace(make_spec(checkpoint, tp=2), device="cuda")
    with pytest.raises(PlanRefused, match=r"Needed: 1 time 0\.1 CPU, 2 GPU, each on one node; free: .* 0 GPU"):
        await RankGroup.start(spec, placement_seconds=0.2)
    assert await until(everything_is_free)


async def test_ranks_end_with_the_process_that_owns_them(checkpoint: Path) -> None:
    # Detached, as Serve's replicas are: a placement group ends with a detached creator, but with another's whole job.
    owner_class = ray.remote(Owner).options(num_cpus=0.1, name="owner", lifetime="detached")
    owner = owner_class.remote(replace(make_spec(checkpoint, tp=2), standby_ranks=True))
    owner_pid, *rank_pids = await owner.pids.remote()
    assert await until(lambda: set(injector.named(os.getpid(), "ray::RankActor")) > set(rank_pids))  # and one stands by
    os.kill(owner_pid, signal.SIGKILL)
    assert await until(lambda: not injector.named(os.getpid(), "ray::RankActor"))
    assert await until(everything_is_free)


class Owner:
    """A process that has a group and will be killed."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self._spec = spec

    async def pids(self) -> list[int]:
        standby.CALM_SECONDS = 0.0
        self._group = await RankGroup.start(self._spec)
        return [os.getpid(), *(s.pid for s in await self._group.stats())]
