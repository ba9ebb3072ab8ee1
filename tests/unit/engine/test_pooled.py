"""Prompts that nothing follows: what the ranks make of their last token, once, however they were computed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen_ray.core.errors import ContextLengthExceeded
from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.pooling import Pooling
from qwen_ray.core.request import GenerateRequest
from tests.unit.engine.fake_ranks import context_of, pooled
from tests.unit.engine.harness import Harness, request
from tests.unit.engine.owner import Owner

CONFIG = EngineConfig(num_blocks=12, block_size=4, max_model_len=32, max_num_seqs=4, max_num_batched_tokens=8, depth=2)


def ask(name: str, prompt: range, pooling: Pooling = Pooling()) -> GenerateRequest:  # noqa: B008 (frozen)
    return replace(request(name, prompt), pooling=pooling)


def test_a_prompt_in_chunks_ends_with_one_delta_and_no_token() -> None:
    harness = Harness(CONFIG)
    harness.add(ask("a", range(20)), request("b", range(3)), ask("c", range(5), Pooling(token_ids=(7,))))
    harness.drain()
    harness.check_ended()
    (delta,) = harness.deltas["a"]
    assert (delta.token_ids, delta.finish_reason, delta.stop_token_id) == ((), "stop", None)
    assert delta.pooled == pooled(context_of(list(range(20))), Pooling())
    assert harness.scheduler.stats().output_tokens_total == 8  # those of b
    assert {times.num_output_tokens for times in harness.times} == {0, 8}


def test_of_a_prompt_that_is_cached_the_last_token_is_computed() -> None:
    harness = Harness(CONFIG)
    for name in ("a", "b"):
        harness.add(ask(name, range(16)))
        harness.drain()
    harness.check_ended()
    assert harness.ranks.num_computed_tokens == 16 + 4
    assert harness.deltas["b"][0].num_cached_tokens == 12
    assert harness.deltas["a"][0].pooled == harness.deltas["b"][0].pooled


def test_no_place_is_kept_for_an_answer() -> None:
    harness = Harness(CONFIG)
    harness.add(ask("a", range(32)))
    with pytest.raises(ContextLengthExceeded, match="at most 32"):
        harness.add(ask("b", range(33)))
    with pytest.raises(ContextLengthExceeded, match="at most 31"):
        harness.add(request("c", range(32)))
    harness.drain()
    harness.check_ended()


def test_after_a_death_it_is_computed_again() -> None:
    harness = Harness(CONFIG)
    harness.add(ask("a", range(20)))
    harness.step()
    harness.submit()
    harness.die()
    harness.drain()
    harness.check_ended()


async def test_what_is_pooled_is_no_token() -> None:
    async with Owner(CONFIG).running() as owner:
        owner.add(ask("a", range(3)), request("b", range(3)))
        await owner.all_ended()
    assert sum(step.num_output_tokens for step in owner.steps) == len(owner.tokens["b"])
