"""Which dp rank a sequence goes to, and what dp ranks have apart; any order of events: test_any_order.py."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest

from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.step import MAX_PROMPT_LOGITS, StepBatch
from tests.unit.engine.fake_ranks import POISON
from tests.unit.engine.harness import Harness, request

CONFIG = EngineConfig(
    num_blocks=32, block_size=4, max_model_len=100, max_num_seqs=4, max_num_batched_tokens=64, dp_attention=2
)


def places(harness: Harness) -> dict[str, int]:
    return {seq.request.request_id: seq.dp_rank for seq in harness.running}


def tokens_of(batch: StepBatch) -> dict[int, int]:
    """How many tokens of a step each dp rank has."""
    counts: dict[int, int] = defaultdict(int)
    for chunk in batch.chunks:
        counts[chunk.dp_rank] += chunk.count
    return dict(counts)


def test_strangers_spread_evenly() -> None:
    harness = Harness(CONFIG)
    harness.add(*(request(f"r{i}", range(10 * i, 10 * i + 6)) for i in range(6)))
    harness.step()
    assert places(harness) == {f"r{i}": i % 2 for i in range(6)}
    harness.drain()
    harness.check_ended()


def test_it_goes_to_where_least_is_in_use() -> None:
    harness = Harness(CONFIG)
    harness.add(request("long", range(40)), *(request(f"r{i}", [50 + i]) for i in range(4)))
    harness.step()
    assert places(harness) == {"long": 0, "r0": 1, "r1": 1, "r2": 1, "r3": 1}


def test_a_conversation_goes_on_where_it_was() -> None:
    """Its blocks are kept there, though nobody holds them."""
    harness = Harness(CONFIG)
    harness.add(request("other", [99], max_tokens=40), request("first", range(20), max_tokens=2))
    harness.step()
    assert places(harness) == {"other": 0, "first": 1}
    harness.step()
    harness.add(request("third", range(50, 62), max_tokens=40))
    harness.step()
    assert places(harness) == {"other": 0, "third": 1}
    harness.add(request("again", range(22)))
    harness.step()
    assert places(harness)["again"] == 1
    assert harness.deltas["again"][0].num_cached_tokens == 20


def test_words_that_all_begin_with_do_not_draw_all_to_one_place() -> None:
    harness = Harness(replace(CONFIG, num_blocks=100, max_num_seqs=8))
    for i in range(8):
        harness.add(request(f"r{i}", [*range(20), 30 + i], max_tokens=40))
        harness.step()
    assert sorted(places(harness).values()) == [0] * 4 + [1] * 4
    assert harness.scheduler.stats().prefix_hits_total == 6 * 20  # the first on each computes them


def test_each_has_a_budget_and_places_of_its_own() -> None:
    config = replace(CONFIG, max_num_seqs=2, max_num_batched_tokens=10)
    harness = Harness(config)
    harness.add(*(request(f"r{i}", range(10 * i, 10 * i + 8)) for i in range(5)))
    harness.step()
    assert [tokens_of(batch) for batch in harness.ranks.batches] == [{0: 10, 1: 10}]
    harness.step()
    assert len(places(harness)) == 4
    harness.drain()
    harness.check_ended()


def test_described_prompts_are_capped_on_each() -> None:
    config = EngineConfig(num_blocks=400, max_model_len=2000, max_num_batched_tokens=1000, dp_attention=2)
    harness = Harness(config)
    for i in range(4):
        plain = request(f"d{i}", range(500 * i, 500 * i + 400), max_tokens=1)
        harness.add(replace(plain, sampling=replace(plain.sampling, prompt_logprobs=0)))
    harness.drain()
    harness.check_ended()
    assert [tokens_of(batch) for batch in harness.ranks.batches[:2]] == [
        {0: MAX_PROMPT_LOGITS, 1: MAX_PROMPT_LOGITS}
    ] * 2


@pytest.mark.parametrize("depth", [1, 2])
def test_only_neighbours_are_preempted_and_may_come_back_elsewhere(depth: int) -> None:
    harness = Harness(replace(CONFIG, num_blocks=16, depth=depth))
    lengths = [(20, 30), (28, 2), (20, 30), (28, 2), (4, 4)]  # of prompt and answer; the long answers outgrow dp rank 0
    for i, (prompt, answer) in enumerate(lengths):
        harness.add(request(f"r{i}", range(100 * i, 100 * i + prompt), max_tokens=answer))
    seen: dict[str, list[int]] = defaultdict(list)
    while not harness.scheduler.is_idle:
        harness.step()
        for name, place in places(harness).items():
            if seen[name][-1:] != [place]:
                seen[name].append(place)
    harness.drain()
    harness.check_ended()
    assert harness.scheduler.stats().preemptions_total > 0
    assert seen["r0"] == [0]
    assert seen["r2"] == [0, 1]


def test_stats_are_of_all() -> None:
    harness = Harness(CONFIG)
    harness.add(*(request(f"r{i}", range(10 * i, 10 * i + 6)) for i in range(3)))
    harness.step()
    stats = harness.scheduler.stats()
    assert (stats.num_blocks, stats.num_used_blocks, stats.num_running) == (64, 6, 3)
    harness.drain()
    stats = harness.scheduler.stats()
    assert (stats.num_used_blocks, stats.num_cached_blocks) == (0, 9)


def test_after_a_reset_sequences_find_new_places() -> None:
    harness = Harness(CONFIG)
    harness.add(request("a", range(20)), request("b", range(50, 60)), request("c", range(70, 80), max_tokens=20))
    harness.step()
    assert places(harness) == {"a": 0, "b": 1, "c": 1}
    harness.abort("a")
    harness.restart(ranks_died=False)
    harness.step()
    assert places(harness) == {"b": 0, "c": 1}
    harness.drain()
    harness.check_ended()


def test_an_error_spoils_blocks_where_they_are_and_no_others() -> None:
    harness = Harness(CONFIG)
    harness.add(request("good", range(8)), request("bad", range(20, 28), seed=POISON))
    harness.drain()
    harness.check_ended()
    assert harness.deltas["bad"][-1].error
    harness.add(request("again", range(8)), request("same", range(20, 28)))
    harness.drain()
    harness.check_ended()
    assert harness.deltas["same"][0].num_cached_tokens == 0
    assert harness.deltas["again"][0].num_cached_tokens == 4
