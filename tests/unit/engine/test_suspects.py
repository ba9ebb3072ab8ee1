"""Sequences that kill their ranks, and those that only stood by; any order of events: test_any_order.py."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from qwen_ray.core.errors import RANKS_FAILED
from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.request import GenerateRequest
from qwen_ray.engine.suspects import MAX_BLAMED_TOGETHER
from tests.unit.engine.fake_ranks import LETHAL, LETHAL_DECODE, LETHAL_LATER
from tests.unit.engine.harness import Harness, request

CONFIG = EngineConfig(num_blocks=200, block_size=4, max_model_len=120, max_num_seqs=20, max_num_batched_tokens=64)


def streams(count: int, *, max_tokens: int = 30) -> list[GenerateRequest]:
    return [request(f"r{i}", range(10 * i, 10 * i + 5), seed=i, max_tokens=max_tokens) for i in range(count)]


def suspect(name: str, prompt: range, *, max_tokens: int = 8, seed: int = 1) -> GenerateRequest:
    return replace(request(name, prompt, max_tokens=max_tokens, seed=seed), is_suspect=True)


def steps_until(harness: Harness, *names: str) -> list[tuple[str, ...]]:
    """Those that it takes for `names` to end."""
    before = len(harness.steps)
    while set(names) & set(harness.alive):
        harness.step()
    return harness.steps[before:]


@pytest.mark.parametrize(("depth", "dp_attention"), [(1, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("seed", [LETHAL, LETHAL_LATER, LETHAL_DECODE])
def test_whoever_kills_ends_after_three_deaths_and_nobody_else_is_harmed(
    seed: int, depth: int, dp_attention: int
) -> None:
    harness = Harness(replace(CONFIG, depth=depth, dp_attention=dp_attention))
    harness.add(*streams(8), request("killer", range(90, 99), seed=seed))
    harness.add(*(replace(one, request_id=f"late {one.request_id}") for one in streams(8)))
    steps_until(harness, "killer")
    end = harness.deltas["killer"][-1]
    assert (end.finish_reason, end.code) == ("error", RANKS_FAILED)
    assert end.error is not None
    assert "made its ranks fail 3 times" in end.error
    assert harness.num_deaths == 3
    harness.drain()
    harness.check_ended()
    assert harness.num_deaths == 3
    assert harness.scheduler.stats().poisonous_total == 1


def test_two_killers_at_once_take_two_deaths_together_and_one_each() -> None:
    harness = Harness(replace(CONFIG, depth=2))
    harness.add(*streams(4), *(request(f"k{i}", [90 + i], seed=LETHAL) for i in range(2)))
    harness.drain()
    harness.check_ended()
    assert harness.condemned == {"k0", "k1"}
    assert harness.num_deaths == 4


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_two_deaths_in_a_row_do_not_harm_sixteen_who_stood_by(depth: int) -> None:
    harness = Harness(replace(CONFIG, depth=depth, max_num_batched_tokens=80))
    harness.add(*streams(16))
    for _ in range(2):
        for _ in range(depth):
            harness.submit()
        harness.die()
    assert harness.scheduler.stats().num_set_aside == MAX_BLAMED_TOGETHER
    harness.drain()
    harness.check_ended()
    assert harness.condemned == set()


def test_the_blamed_come_back_a_few_at_a_time_beside_newcomers() -> None:
    harness = Harness(CONFIG)
    harness.add(*streams(10))
    harness.submit()
    harness.die()
    harness.add(*(replace(one, request_id=f"late {one.request_id}") for one in streams(2)))
    steps = steps_until(harness, *(one.request_id for one in streams(10)))
    old = [{name for name in step if not name.startswith("late")} for step in steps]
    assert [len(step) for step in old[:7]] == [4, 4, 8, 8, 10, 10, 10]  # cleared by the second of two tokens
    assert harness.condemned == set()


def test_a_death_spares_whoever_was_not_in_flight() -> None:
    harness = Harness(replace(CONFIG, max_num_batched_tokens=5))
    harness.add(*streams(2))
    for _ in range(2):
        harness.submit()  # one prompt fills a step
        harness.die()
    assert harness.scheduler.stats().num_set_aside == 1
    harness.drain()
    harness.check_ended()


def test_progress_between_two_deaths_clears() -> None:
    harness = Harness(CONFIG)
    harness.add(*streams(4))
    for _ in range(5):
        harness.step()
        harness.step()
        harness.submit()
        harness.die()
        assert harness.scheduler.stats().num_set_aside == 0
    harness.drain()
    harness.check_ended()


def test_the_token_that_comes_back_from_a_prefill_is_not_progress() -> None:
    harness = Harness(CONFIG)
    harness.add(*streams(1))
    for _ in range(2):
        harness.step()
        harness.submit()
        harness.die()
    assert harness.scheduler.stats().num_set_aside == 1


def test_others_have_every_second_step_while_a_long_prompt_is_computed_alone() -> None:
    harness = Harness(replace(CONFIG, max_num_batched_tokens=8))
    harness.add(*streams(3), suspect("s", range(50, 130 - 24)))
    steps = steps_until(harness, "s")
    alone = [i for i, names in enumerate(steps) if names == ("s",)]
    assert len(alone) >= 7
    assert all(second - first == 2 for first, second in pairwise(alone))
    harness.drain()
    harness.check_ended()


def test_with_several_in_flight_others_keep_the_pipeline_full_between_two_steps_alone() -> None:
    harness = Harness(replace(CONFIG, depth=3, max_num_batched_tokens=8))
    harness.add(*streams(9))
    for _ in range(9):
        harness.step()
    harness.add(suspect("s", range(100, 116)))
    num_inflight: list[int] = []
    while harness.scheduler.stats().num_set_aside:
        harness.step()
        num_inflight.append(len(harness.inflight))
        assert num_inflight[-1] <= 1 or all("s" not in step.names for step in harness.inflight)
    assert max(num_inflight) == 2  # beside the one that has just ended
    harness.drain()
    harness.check_ended()


def test_cleared_it_goes_back_to_the_others() -> None:
    harness = Harness(CONFIG)
    harness.add(*streams(2), suspect("s", range(50, 55)))
    steps = steps_until(harness, "s")
    assert [names for names in steps if names == ("s",)] == [("s",)] * 2
    assert ("r0", "r1", "s") in steps
    assert harness.scheduler.stats().num_set_aside == 0


def test_suspects_run_one_after_the_other_by_turns_with_newcomers() -> None:
    harness = Harness(CONFIG)
    harness.add(*(suspect(f"s{i}", range(50 + i, 55 + i)) for i in range(3)))
    harness.step()
    harness.add(*streams(1))
    steps = [("s0",), *steps_until(harness, "s0", "s1", "s2", "r0")]
    first = {name: min(i for i, names in enumerate(steps) if name in names) for name in ("s0", "s1", "s2", "r0")}
    assert first["s0"] < first["r0"] < first["s1"] < first["s2"]
    alone = [names for names in steps if names in [("s0",), ("s1",), ("s2",)]]
    assert alone[:6] == [("s0",), ("s0",), ("s1",), ("s1",), ("s2",), ("s2",)]
    harness.check_ended()


def test_newcomers_wait_until_a_suspect_has_room() -> None:
    harness = Harness(replace(CONFIG, num_blocks=14))
    harness.add(request("r", range(20)))
    harness.step()
    harness.add(suspect("s", range(100, 140)), *(request(f"new{i}", [i]) for i in range(6)))
    steps = steps_until(harness, "r")
    assert steps == [("r",)] * 7  # there was room for the small ones, but not for the suspect
    harness.step()
    assert harness.steps[-1] == ("s",)
    harness.step()
    assert len(harness.steps[-1]) > 1
    harness.drain()
    harness.check_ended()


def test_a_suspect_whose_blocks_are_taken_comes_back_alone() -> None:
    harness = Harness(replace(CONFIG, num_blocks=14, max_num_batched_tokens=4))
    harness.add(*streams(2, max_tokens=30))
    for _ in range(4):
        harness.step()
    harness.add(suspect("s", range(100, 132), max_tokens=2))
    steps = steps_until(harness, "s")
    assert harness.scheduler.stats().preemptions_total > 0
    assert all(names == ("s",) for names in steps if "s" in names)
    harness.drain()
    harness.check_ended()


def test_one_aborted_while_it_runs_alone_leaves_nobody_to_blame() -> None:
    harness = Harness(replace(CONFIG, depth=2))
    harness.add(*streams(2), suspect("s", range(50, 55), seed=LETHAL))
    while ("s",) not in harness.steps:
        if not harness.submit():
            harness.finish()
    harness.abort("s")
    assert not harness.submit()  # its step is still in flight, and may yet kill
    harness.finish()
    assert harness.num_deaths == 1
    harness.drain()
    harness.check_ended()
    assert harness.blame["r0"].num_deaths == 0


def test_a_suspect_among_nobody_runs_like_any_other() -> None:
    harness = Harness(replace(CONFIG, depth=2))
    harness.add(suspect("s", range(50, 55)))
    assert harness.scheduler.stats().num_waiting_tokens == 5
    harness.submit()
    assert harness.scheduler.stats().num_waiting_tokens == 0
    harness.drain()
    harness.check_ended()
    assert harness.steps == [("s",)] * 8
