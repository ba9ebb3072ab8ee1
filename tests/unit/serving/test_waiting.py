"""What a dispatcher does while no replica is ready, or where some are going away: waits, refuses, hands over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from qwen_ray.core.errors import DeadlineExceeded, NotReady, Overloaded, RequestFailed
from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.request import GenerateRequest, SamplingParams
from qwen_ray.serving import links
from qwen_ray.serving.dispatch import Dispatcher
from tests.unit.serving.mortal_replicas import Population

CONFIG = EngineConfig(num_blocks=64, block_size=4, max_model_len=200, max_num_waiting=6, max_num_seqs=4)


def request(name: str, max_tokens: int = 8, **fields: Any) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return GenerateRequest(request_id=name, prompt_token_ids=(1, 2, 3), sampling=sampling, seed=1, **fields)


class Town(Population):
    """Replicas that come when they are added, and a dispatcher."""

    def __init__(self) -> None:
        super().__init__(0, [], CONFIG, 100, range(50))
        self.dispatcher = Dispatcher(self.find, self.connect)

    async def open_dispatcher(self, **options: Any) -> Dispatcher:
        await self.dispatcher.close()
        self.dispatcher = Dispatcher(self.find, self.connect, **options)
        await self.dispatcher.start()
        await self.until(lambda: len(self.dispatcher.statuses) == len(self.replicas))
        return self.dispatcher

    async def read(self, one: GenerateRequest) -> tuple[list[int], str | None, str | None]:
        """Tokens, finish reason and code."""
        tokens: list[int] = []
        with self.dispatcher.open([one]) as stream:
            while True:
                for _, delta in await stream.take():
                    tokens += delta.token_ids
                    if delta.finish_reason is not None:
                        return tokens, delta.finish_reason, delta.code

    def start(self, *requests: GenerateRequest) -> list[asyncio.Task[Any]]:
        return [asyncio.create_task(self.read(one)) for one in requests]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 (what is waited for is told to nobody)
                await asyncio.sleep(0.002)

    async def pause(self) -> None:
        """Some rounds of everything."""
        await asyncio.sleep(0.05)

    def expect_nobody(self) -> None:
        """As when the last replica has been gone for long."""
        self.dispatcher._links._expected_until = 0.0


@pytest.fixture
async def town(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Town]:
    monkeypatch.setattr(links, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(links, "TICK_SECONDS", 0.005)
    town = Town()
    yield town
    await town.dispatcher.close()
    await town.stop()


async def slow(town: Town, *, state: Any = "ready") -> Any:
    """A replica whose steps take a while."""
    replica = town.add(state=state)
    submit = replica._ranks.submit

    async def later(batch: Any) -> Any:
        await asyncio.sleep(0.01)
        return await submit(batch)

    replica._ranks.submit = later  # pyright: ignore[reportAttributeAccessIssue]
    return replica


@pytest.mark.parametrize("state", ["loading", None])
async def test_requests_wait_for_a_replica_on_its_way(town: Town, state: Any) -> None:
    replica = town.add(state=state) if state else None
    await town.open_dispatcher()
    tasks = town.start(request("a"), request("b"))
    await town.pause()
    assert not any(task.done() for task in tasks)
    with pytest.raises(NotReady):
        town.dispatcher.check_ready()
    replica = replica or town.add()
    replica.state = "ready"
    assert [len(tokens) for tokens, _, _ in await asyncio.gather(*tasks)] == [8, 8]


async def test_a_repair_is_waited_for_where_it_is(town: Town) -> None:
    replica = await slow(town)
    await town.open_dispatcher()
    tasks = town.start(request("a", 20))
    await town.until(lambda: len(replica.requests) == 1)
    replica.state = "repairing"
    await town.pause()
    tasks += town.start(request("b"))
    await asyncio.gather(*tasks)
    assert [one.request_id for one in replica.requests] == ["a#1", "b#1"]


async def test_no_more_than_so_many_wait(town: Town) -> None:
    town.add(state="loading")
    await town.open_dispatcher(max_waiting=2)
    tasks = town.start(request("a"), request("b"))
    await town.pause()
    with pytest.raises(Overloaded) as refusal:
        town.dispatcher.open([request("c")])
    assert refusal.value.retry_after >= 1
    tasks[0].cancel()
    await asyncio.gather(tasks[0], return_exceptions=True)
    town.dispatcher.open([request("c")]).__exit__()
    tasks[1].cancel()
    await asyncio.gather(tasks[1], return_exceptions=True)
    assert town.dispatcher.num_sequences == 0


@pytest.mark.parametrize("state", ["failed", None])
async def test_without_anybody_to_wait_for_it_is_refused_at_once(town: Town, state: Any) -> None:
    if state:
        town.add(state=state)
    await town.open_dispatcher()
    town.expect_nobody()
    with pytest.raises(NotReady):
        town.dispatcher.open([request("a")])


async def test_who_has_waited_long_enough_is_told(town: Town) -> None:
    town.add(state="loading")
    await town.open_dispatcher(queue_seconds=0.03)
    with pytest.raises(NotReady, match="in time"):
        await town.read(request("a"))
    with pytest.raises(DeadlineExceeded):
        await town.read(request("b", deadline=time.time()))
    assert town.dispatcher.num_sequences == 0


async def test_a_deadline_ends_an_answer_that_waits_for_the_rest(town: Town) -> None:
    replica = await slow(town)
    await town.open_dispatcher(queue_seconds=0.2)  # half an answer is waited for longer than that
    deadline = time.time() + 0.5
    (task,) = town.start(request("a", 100, deadline=deadline))
    await town.until(lambda: replica.engine.stats().output_tokens_total > 3)
    replica.die()
    tokens, reason, code = await task
    assert (reason, code) == ("length", "deadline_exceeded")
    assert 3 <= len(tokens) < 100


async def test_a_full_queue_cannot_refuse_who_had_a_place(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_ray.serving.link.FULL_SECONDS", 0.05)
    first, second = await slow(town), await slow(town)
    await town.open_dispatcher()
    tasks = town.start(*(request(f"r{i}", 20) for i in range(8)))
    await town.until(lambda: first.engine.stats().num_running == second.engine.stats().num_running == 4)
    tasks += town.start(*(request(f"s{i}", 20) for i in range(8)))
    await town.until(lambda: len(first.requests) + len(second.requests) == 16)
    first.die()
    assert [len(tokens) for tokens, _, _ in await asyncio.gather(*tasks)] == [20] * 16
    assert len(second.requests) > 16  # some were refused, and came again


async def test_a_draining_replica_is_relieved_and_let_go(town: Town) -> None:
    first = await slow(town)
    await town.open_dispatcher()
    tasks = town.start(request("a", 40), request("b", 40))
    await town.until(lambda: first.engine.stats().output_tokens_total > 4)
    first.state = "draining"
    await town.pause()
    tasks += town.start(request("c", 40))  # nobody is ready, and nobody is expected for long: see the next test
    await first.sessions.until_released(0.01)
    assert first.sessions._channels
    second = town.add()
    await first.sessions.until_released(10.0)
    assert not first.sessions._channels
    assert [len(tokens) for tokens, _, _ in await asyncio.gather(*tasks)] == [40] * 3
    assert all(one.output_token_ids for one in second.requests[:2])
    assert first.engine.stats().num_used_blocks == 0
    await town.pause()
    assert not first.sessions._channels  # nobody came back


async def test_what_drains_takes_requests_where_there_will_be_nobody_else(town: Town) -> None:
    """As an old ingress whose model is replaced by another one."""
    town.add(state="draining")
    await town.open_dispatcher()
    other = town.add(fingerprint="another model")
    await town.until(lambda: len(town.dispatcher.statuses) == 2)
    town.expect_nobody()
    tokens, reason, _ = await town.read(request("a"))
    assert (len(tokens), reason) == (8, "length")
    assert other.requests == []


async def test_in_place_what_drains_is_let_go_of_as_soon_as_another_one_starts(town: Town) -> None:
    first = await slow(town)
    await town.open_dispatcher(in_place=True)
    tasks = town.start(request("a", 40))
    await town.until(lambda: first.engine.stats().output_tokens_total > 4)
    town.expect_nobody()
    first.state = "draining"
    await town.pause()
    assert first.sessions._channels
    with pytest.raises(NotReady):
        town.dispatcher.open([request("b")])
    second = town.add(state="loading")
    await town.until(lambda: not first.sessions._channels)
    assert not tasks[0].done()
    second.state = "ready"
    tokens, _, _ = await tasks[0]
    assert len(tokens) == 40


async def test_another_model_is_no_replica_for_it(town: Town) -> None:
    other = town.add(fingerprint="another model")
    await town.open_dispatcher(fingerprint="ours")
    tasks = town.start(request("a"))
    waiting = asyncio.create_task(town.dispatcher.until_ready())
    await town.pause()
    assert other.requests == []
    assert not waiting.done()
    town.add(fingerprint="ours")
    await asyncio.gather(*tasks, waiting)
    other.state = "draining"
    await town.until(lambda: not other.sessions._channels)


async def test_a_replica_that_hangs_is_relieved(town: Town) -> None:
    first = await slow(town)
    await town.open_dispatcher()
    tasks = town.start(request("a", 40))
    await town.until(lambda: first.engine.stats().output_tokens_total > 4)
    first._ranks.hang = asyncio.Event()
    second = town.add()
    await asyncio.gather(*tasks)
    assert len(second.requests) == 1
    assert first.sessions._owners == {}  # it was told to forget it


async def test_a_silent_replica_is_given_up(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_ray.serving.link.SILENT_SECONDS", 0.05)
    first = await slow(town)
    await town.open_dispatcher()
    tasks = town.start(request("a", 100))
    await town.until(lambda: first.engine.stats().output_tokens_total > 4)
    first.is_mute = True
    first._ranks.submit = asyncio.Event().wait  # as a process that is stopped
    second = town.add()
    ((tokens, _, _),) = await asyncio.gather(*tasks)
    assert len(tokens) == 100
    assert len(second.requests) == 1


async def test_a_directory_that_hangs_or_fails_harms_nobody(town: Town) -> None:
    replica = await slow(town)
    await town.open_dispatcher()
    find, looks = town.find, []

    async def away() -> Any:
        looks.append(1)
        if len(looks) % 2:
            raise ConnectionError("the GCS is away")
        await asyncio.sleep(3600)

    town.dispatcher._links._find = away
    tasks = town.start(request("a", 20))
    await town.until(lambda: len(looks) == 2)
    assert len((await tasks[0])[0]) == 20
    assert find is not away
    assert len(replica.requests) == 1


async def test_suspects_come_one_by_one_and_the_killer_is_found(town: Town) -> None:
    """`bad` kills every replica in its first decode; what shares replicas with it gets its answer all the same."""
    ran: list[list[str]] = []

    def add_mortal() -> None:
        replica = town.add()
        submit = replica._ranks.submit
        names: dict[int, str] = {}
        ran.append([])

        async def deadly(batch: Any) -> Any:
            for new in batch.new:
                names[new.sequence_id] = "bad" if new.token_ids[0] == 66 else "good"
            running = [names[chunk.sequence_id] for chunk in batch.chunks]
            ran[-1] += running
            if any(names[c.sequence_id] == "bad" and c.count == 1 for c in batch.chunks):
                replica.die()
                await asyncio.Event().wait()
            return await submit(batch)

        replica._ranks.submit = deadly  # pyright: ignore[reportAttributeAccessIssue]

    add_mortal()
    await town.open_dispatcher()

    async def replace_the_dead() -> None:
        while True:
            await asyncio.sleep(0.005)
            if town.replicas[-1].is_dead:
                add_mortal()

    serve = asyncio.create_task(replace_the_dead())
    bad = replace(request("bad"), prompt_token_ids=(66, 2, 3))
    good = town.start(*(request(f"good{i}", 30) for i in range(3)))
    (killer,) = town.start(bad)
    with pytest.raises(RequestFailed, match="3 times"):
        await killer
    assert [len(tokens) for tokens, _, _ in await asyncio.gather(*good)] == [30] * 3
    serve.cancel()
    await asyncio.gather(serve, return_exceptions=True)
    assert len([replica for replica in town.replicas if replica.is_dead]) == 3
    assert set(ran[2][-1:]) == {"bad"}
