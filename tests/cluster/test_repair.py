"""Ranks of a real local Ray that die, stop, hang or lose their device: they are replaced while the others keep their
weights, and the sequences go on as if nothing had happened."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import faulty_worker
import pytest
from chaos import injector
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
from qwen_ray.core.errors import RankFailed
from qwen_ray.core.request import GenerateRequest, SamplingParams, TokenDelta
from qwen_ray.core.stats import RepairTimes
from qwen_ray.core.step import MoveExperts, StepBatch, StepResult
from qwen_ray.engine.engine import Engine

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.chaos]

NUM_TOKENS = 30
FAULT_STEP = 8
PATIENCE = 10.0


class Disturbed(RayExecutor):
    """Calls `fault` once, with a step in flight; and `moves` experts before some steps."""

    def __init__(self, group: RankGroup, fault: Callable[[], None], moves: dict[int, MoveExperts]) -> None:
        super().__init__(group)
        self._fault = fault
        self._moves = moves
        self._num_steps = 0

    def submit(self, batch: StepBatch) -> asyncio.Future[StepResult]:
        self._num_steps += 1
        if (move := self._moves.get(self._num_steps)) is not None:
            self.move_experts(move)
        result = super().submit(batch)
        if self._num_steps == FAULT_STEP:
            self._fault()
        return result


class Service:
    """What a replica does with its group, as far as it matters here."""

    def __init__(self, group: RankGroup, expected: list[list[int]]) -> None:
        self.group = group
        self.repairs: list[RepairTimes] = []
        self.failures: list[str] = []
        self._expected = expected

    async def survives(
        self,
        fault: Callable[[], None],
        *,
        replaced: set[int],
        meanwhile: Callable[[], Awaitable[None]] | None = None,
        moves: dict[int, MoveExperts] | None = None,
    ) -> None:
        """The expected tokens in spite of `fault` amid them. Those ranks are new afterwards, the others what they
        were. `meanwhile` runs beside the first repair."""
        before = await self.group.stats()
        assert await self._generate(fault, meanwhile, moves or {}) == self._expected
        after = await self.group.stats()
        assert {s.rank for s, old in zip(after, before, strict=True) if s.pid != old.pid} == replaced
        assert [s.num_loads for s in after] == [1] * len(after)
        assert not any(is_alive(old.pid) for old in before if old.rank in replaced)

    async def _generate(
        self,
        fault: Callable[[], None],
        meanwhile: Callable[[], Awaitable[None]] | None,
        moves: dict[int, MoveExperts],
    ) -> list[list[int]]:
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

        engine = Engine(self.group.spec.engine, Disturbed(self.group, fault, moves), publish)
        sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        for i, prompt in enumerate(PROMPTS):
            engine.add(GenerateRequest(request_id=str(i), prompt_token_ids=prompt, sampling=sampling, seed=0))
        async with asyncio.timeout(120):
            while left:
                try:
                    await engine.run()
                except RankFailed as failure:
                    self.failures.append(failure.reason)
                    beside = asyncio.ensure_future(meanwhile()) if meanwhile else None
                    self.repairs.append(await self.group.repair(PATIENCE))
                    if beside is not None:
                        await beside
        return list(tokens.values())


async def pids(group: RankGroup) -> list[int]:
    return [s.pid for s in await group.stats()]


async def send(group: RankGroup, signal_number: int, *ranks: int) -> Callable[[], None]:
    """A fault: these ranks get that signal."""
    victims = [(await pids(group))[rank] for rank in ranks]

    def fault() -> None:
        for pid in victims:
            os.kill(pid, signal_number)

    return fault


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-qwen2")
    dense_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return continuations(dense_model(), NUM_TOKENS)


async def test_tensor_ranks_that_are_killed(checkpoint: Path, expected: list[list[int]]) -> None:
    async with running(make_spec(checkpoint, tp=2)) as group:
        service = Service(group, expected)
        await service.survives(await send(group, signal.SIGKILL, 1), replaced={1})
        (times,) = service.repairs
        assert min(times.started, times.loaded, times.joined) > 0

        # Rank 0 serves the store at which they meet.
        await service.survives(await send(group, signal.SIGKILL, 0), replaced={0})
        await service.survives(await send(group, signal.SIGKILL, 0, 1), replaced={0, 1})

        # The one that had stayed dies while the new one starts.
        async def kill_the_other() -> None:
            assert await until(lambda: group._ranks[1].life != life)
            (await send_soon)()

        life = group._ranks[1].life
        send_soon = asyncio.ensure_future(send(group, signal.SIGKILL, 0))
        await service.survives(await send(group, signal.SIGKILL, 1), replaced={0, 1}, meanwhile=kill_the_other)
        assert len(service.repairs) == 4
        last = await pids(group)
    assert await until(lambda: not any(map(is_alive, last)))
    assert await until(everything_is_free)


async def test_tensor_ranks_that_stop_hang_raise_or_lose_their_device(
    checkpoint: Path, expected: list[list[int]]
) -> None:
    async with running(make_spec(checkpoint, tp=2), worker=faulty_worker.NAME) as group:
        service = Service(group, expected)
        await service.survives(await send(group, signal.SIGSTOP, 0), replaced={0})
        assert service.failures[-1].startswith("it has given no sign of life for")

        await service.survives((checkpoint / "0.lose").touch, replaced={0})
        assert service.failures[-1] == "RuntimeError: CUDA error: unspecified launch failure"

        await service.survives((checkpoint / "1.raise").touch, replaced=set())
        assert service.failures[-1] == "RuntimeError: something else"

        async def blame() -> None:
            assert await until(lambda: all(rank.beat and rank.beat.step_seconds > 1 for rank in group._ranks.values()))
            group.blame(1.0)

        blaming = asyncio.ensure_future(blame())
        await service.survives((checkpoint / "1.hang").touch, replaced={1})
        await blaming
        assert service.failures[-1] == "no progress for 1 s"


async def test_a_stage_of_a_pipeline(checkpoint: Path, expected: list[list[int]]) -> None:
    async with running(make_spec(checkpoint, pp=2)) as group:
        service = Service(group, expected)
        await service.survives(await send(group, signal.SIGKILL, 0), replaced={0})
        await service.survives(await send(group, signal.SIGKILL, 1), replaced={1})


async def test_who_stands_by_takes_the_place(
    checkpoint: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standby, "CALM_SECONDS", 0.0)
    monkeypatch.setattr(standby, "ANSWER_SECONDS", 1.0)

    async def waiting(num: int) -> set[int]:
        """As many processes as there should be that are no ranks."""
        ranks = set(await pids(group))
        assert await until(lambda: len(set(injector.named(os.getpid(), "ray::RankActor")) - ranks) == num)
        return set(injector.named(os.getpid(), "ray::RankActor")) - ranks

    spec = replace(make_spec(checkpoint, pp=2), standby_ranks=True)
    async with running(spec) as group:
        service = Service(group, expected)
        before = await waiting(2)  # one for each stage
        await service.survives(await send(group, signal.SIGKILL, 1), replaced={1})
        assert (await pids(group))[1] in before
        before = await waiting(2)
        await service.survives(await send(group, signal.SIGKILL, 0, 1), replaced={0, 1})
        assert set(await pids(group)) == before

        for pid in await waiting(2):
            os.kill(pid, signal.SIGSTOP)
        await service.survives(await send(group, signal.SIGKILL, 0), replaced={0})
        last = await waiting(2)
    assert await until(lambda: not any(map(is_alive, last)))
    assert await until(everything_is_free)


async def test_a_rank_that_shares_experts_which_have_moved(tmp_path: Path) -> None:
    model = moe_model()
    model.save_pretrained(tmp_path)
    moves = {
        step: MoveExperts(layer=step % 2, slots=((i, (i + 1) % 5, (i + 2) % 5), ((i + 3) % 5, (i + 4) % 5)))
        for i, step in enumerate((2, 3, 5, FAULT_STEP, FAULT_STEP + 1))
    }
    async with running(make_spec(tmp_path, ep=2)) as group:
        service = Service(group, continuations(model, NUM_TOKENS))
        await service.survives(await send(group, signal.SIGKILL, 1), replaced={1}, moves=moves)
        assert group.experts is not None
        assert group.experts != group.spec.plan.experts
        # Both ranks know of the same places: another one can be replaced, and move experts again.
        await service.survives(await send(group, signal.SIGKILL, 0), replaced={0}, moves=moves)


async def test_a_rank_that_cannot_be_replaced_fails_the_repair(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    path.symlink_to(checkpoint)
    async with running(make_spec(path, tp=2)) as group:
        (await send(group, signal.SIGKILL, 1))()
        path.unlink()
        assert await until(lambda: group.failure is not None)
        with pytest.raises(Exception, match="checkpoint"):
            await group.repair(PATIENCE)
    assert await until(everything_is_free)
