"""The loop: many requests at once over an executor that answers late, fails, and is repaired."""

from __future__ import annotations

import asyncio
import gc
import random
from dataclasses import replace

import pytest

from qwen_ray.core.errors import RANKS_FAILED, ContextLengthExceeded, RankFailed
from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.request import GenerateRequest, SamplingParams, TokenDelta
from qwen_ray.core.step import StepBatch, StepResult
from tests.unit.engine.fake_ranks import LETHAL, POISON
from tests.unit.engine.owner import Owner

CONFIG = EngineConfig(num_blocks=64, block_size=4, max_model_len=128, max_num_seqs=16, max_num_batched_tokens=48)


def request(name: str, prompt: range | list[int], *, seed: int = 1, max_tokens: int = 12) -> GenerateRequest:
    return GenerateRequest(
        request_id=name, prompt_token_ids=tuple(prompt), sampling=SamplingParams(max_tokens=max_tokens), seed=seed
    )


async def tokens_of(config: EngineConfig, wanted: GenerateRequest, *others: GenerateRequest) -> tuple[list[int], int]:
    """What `wanted` gives among `others`, and how many preemptions it took."""
    async with Owner(config).running() as owner:
        owner.add(*others, wanted)
        await owner.all_ended()
        owner.check_ended()
    return owner.tokens[wanted.request_id], owner.engine.stats().preemptions_total


@pytest.mark.parametrize(("depth", "dp_attention"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 3)])
async def test_64_streams_of_mixed_lengths_with_random_aborts(depth: int, dp_attention: int) -> None:
    chance = random.Random(depth)
    config = replace(CONFIG, depth=depth, dp_attention=dp_attention, num_blocks=64 // dp_attention)
    owner = Owner(config, latency=3)
    requests = [
        replace(
            request(
                f"r{i}",
                [*range(chance.choice([0, 0, 24])), *chance.choices(range(50), k=chance.randint(1, 60))],
                seed=chance.choice([i + 100, i + 100, i + 100, POISON]),
                max_tokens=chance.randint(1, 60),
            ),
            stop_token_ids=(0,),
        )
        for i in range(64)
    ]

    def abort_some(delta: TokenDelta) -> None:
        if chance.random() < 0.02:
            owner.engine.abort(chance.choice(requests).request_id)

    owner.on_token = abort_some
    async with owner.running():
        for one in requests:
            owner.add(one)
            for _ in range(chance.choice([0, 0, 5])):
                await asyncio.sleep(0)
        await owner.all_ended()
    owner.check_ended()
    assert {"abort", "length", "stop", "error"} == {end.finish_reason for end in owner.ends.values()}
    assert owner.engine.stats().preemptions_total > 0
    assert owner.executor.max_inflight == depth


async def test_the_same_seed_gives_the_same_tokens_whatever_happens_around_it() -> None:
    wanted = replace(request("wanted", range(40), seed=42, max_tokens=30), arrival=9.0)
    others = [replace(request(f"o{i}", [i], seed=i, max_tokens=40), arrival=1.0 + i) for i in range(31)]
    expected, _ = await tokens_of(CONFIG, wanted)
    assert len(expected) == 30

    batched, preemptions = await tokens_of(replace(CONFIG, num_blocks=640, max_num_seqs=32), wanted, *others)
    assert (batched, preemptions) == (expected, 0)

    preempted, preemptions = await tokens_of(replace(CONFIG, num_blocks=18), wanted, *others[:2])
    assert preempted == expected
    assert preemptions > 0

    async with Owner(CONFIG).running() as owner:
        owner.add(request("before", range(40)))
        await owner.all_ended()
        owner.add(wanted)
        await owner.all_ended()
        assert owner.engine.stats().prefix_hits_total == 36
        assert owner.tokens["wanted"] == expected


async def test_a_prefix_hit_saves_the_work() -> None:
    async with Owner(replace(CONFIG, num_blocks=640, max_model_len=2048)).running() as owner:
        owner.add(request("first", [i % 50 for i in range(1000)], max_tokens=1))
        await owner.all_ended()
        assert owner.executor.ranks.num_computed_tokens == 1000
        owner.add(request("second", [i % 50 for i in range(1000)], max_tokens=1))
        await owner.all_ended()
        assert owner.executor.ranks.num_computed_tokens == 1004
        assert owner.ends["second"].num_cached_tokens == 996


async def test_one_message_a_step() -> None:
    async with Owner(CONFIG).running() as owner:
        owner.add(*(request(f"r{i}", [i]) for i in range(8)))
        await owner.all_ended()
    assert len(owner.messages) == len(owner.steps) == 12
    assert all(step.num_sequences == step.num_output_tokens == step.num_tokens == 8 for step in owner.steps)


async def test_an_idle_engine_submits_nothing_and_wakes_up() -> None:
    async with Owner(CONFIG).running() as owner:
        for name in ("a", "b"):
            for _ in range(20):
                await asyncio.sleep(0)
            num_steps = owner.engine.stats().steps_total
            owner.add(request(name, [1], max_tokens=2))
            await owner.all_ended()
            assert owner.engine.stats().steps_total == num_steps + 2


async def test_a_request_that_never_ran_ends_too() -> None:
    owner = Owner(CONFIG)
    owner.add(request("aborted", [1]), request("ended before", [1], max_tokens=1).resumed((3,)))
    owner.engine.abort("aborted")
    with pytest.raises(ContextLengthExceeded):
        owner.engine.add(request("too long", range(128)))
    async with owner.running():
        await owner.all_ended()
    assert {name: end.finish_reason for name, end in owner.ends.items()} == {
        "aborted": "abort",
        "ended before": "length",
    }
    assert owner.executor.ranks.batches == []
    assert all(times.first_scheduled == times.first_token == 0.0 for times in owner.times)


async def test_whoever_hears_of_an_end_may_add_the_next_request() -> None:
    owner = Owner(CONFIG)
    owner.on_token = lambda delta: owner.add(request("b", [1])) if delta.request_id == "a" else None
    owner.add(request("a", [1]))
    owner.engine.abort("a")
    async with owner.running():
        await owner.all_ended()
    owner.check_ended()
    assert owner.ends["b"].finish_reason == "length"


async def test_an_executor_that_answers_at_once_leaves_others_their_turn() -> None:
    owner = Owner(CONFIG)

    def submit(batch: StepBatch) -> asyncio.Future[StepResult]:
        done: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        done.set_result(owner.executor.ranks.execute(batch))
        return done

    owner.executor.submit = submit  # pyright: ignore[reportAttributeAccessIssue]
    owner.add(request("a", [1], max_tokens=100))
    async with owner.running():
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        owner.engine.abort("a")
        await owner.all_ended()
    assert owner.ends["a"].finish_reason == "abort"
    assert len(owner.tokens["a"]) < 5


async def test_times_are_in_order() -> None:
    async with Owner(CONFIG).running() as owner:
        owner.add(request("a", range(5), max_tokens=3))
        await owner.all_ended()
    (times,) = owner.times
    assert 0 < times.arrival <= times.first_scheduled <= times.first_token <= times.finished
    assert (times.num_prompt_tokens, times.num_output_tokens, times.finish_reason) == (5, 3, "length")


@pytest.mark.parametrize("depth", [1, 3])
async def test_a_failed_rank_costs_no_request(depth: int, caplog: pytest.LogCaptureFixture) -> None:
    owner = Owner(replace(CONFIG, depth=depth, num_blocks=24), latency=2)
    owner.add(*(request(f"r{i}", [*range(10), i], seed=i) for i in range(6)))
    owner.executor.fail_at = {3, 7, 8}
    num_failures = 0
    while len(owner.ends) < 6:
        run = asyncio.ensure_future(owner.engine.run())
        ended = asyncio.ensure_future(owner.all_ended())
        await asyncio.wait({run, ended}, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if run.done():
            with pytest.raises(RankFailed, match="rank 1 failed: killed by the test"):
                await run
            num_failures += 1
            stats = owner.engine.stats()
            assert (stats.num_running, stats.num_used_blocks, stats.num_cached_blocks) == (0, 0, 0)
            assert stats.num_waiting == 6 - len(owner.ends)
            assert owner.engine.stalled_seconds > 0.0
            owner.executor.ranks.restart()
        else:
            owner.engine.stop()
            await run
    owner.check_ended()
    assert num_failures >= 2
    gc.collect()
    assert not caplog.records, "a failed step whose exception nobody asked for"


@pytest.mark.parametrize("depth", [1, 3])
async def test_whoever_kills_the_ranks_ends_before_run_raises_and_sixteen_others_do_not_notice(depth: int) -> None:
    owner = Owner(replace(CONFIG, depth=depth), latency=2)
    owner.add(*(request(f"r{i}", [*range(5), i], seed=i) for i in range(16)))
    owner.add(request("killer", [7, 8], seed=LETHAL), replace(request("known", [9], seed=LETHAL), is_suspect=True))
    num_failures = 0
    while owner.engine.stats().poisonous_total < 2:
        with pytest.raises(RankFailed):
            await owner.engine.run()
        owner.executor.ranks.restart()
        num_failures += 1
    codes = {name: end.code for name, end in owner.ends.items() if end.code}
    assert codes == {"killer": RANKS_FAILED, "known": RANKS_FAILED}
    assert num_failures == 4
    async with owner.running():
        await owner.all_ended()
    owner.check_ended()


async def test_a_failure_that_is_none_of_the_ranks_blames_nobody() -> None:
    owner = Owner(CONFIG, latency=1000)
    owner.add(request("a", [1]))
    submitted = asyncio.Event()
    owner.executor.on_submit = lambda _: submitted.set()
    for _ in range(3):
        submitted.clear()
        run = asyncio.ensure_future(owner.engine.run())
        await submitted.wait()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        owner.executor.ranks.restart()
    assert owner.engine.stats().num_set_aside == 0


async def test_stop_keeps_sequences_and_run_goes_on() -> None:
    owner = Owner(replace(CONFIG, depth=2), latency=2)
    owner.add(*(request(f"r{i}", [i]) for i in range(4)))

    def stop_at_once(batch: StepBatch) -> None:
        owner.engine.stop()

    owner.executor.on_submit = stop_at_once
    for num_runs in range(1, 100):
        await owner.engine.run()
        assert owner.executor.num_inflight == 0
        assert owner.engine.stats().steps_total == num_runs
        if len(owner.ends) == 4:
            break
    owner.check_ended()


async def test_cancelling_run_leaves_a_clean_engine() -> None:
    owner = Owner(CONFIG, latency=1000)
    owner.add(request("a", [1]))
    submitted = asyncio.Event()
    owner.executor.on_submit = lambda _: submitted.set()
    run = asyncio.ensure_future(owner.engine.run())
    await submitted.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    owner.executor.latency = 1
    owner.executor.ranks.restart()
    async with owner.running():
        await owner.all_ended()
    owner.check_ended()
