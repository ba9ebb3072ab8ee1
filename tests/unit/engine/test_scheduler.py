"""What the scheduler does in each situation that has a name; any order of them: test_any_order.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen_ray.core.errors import ContextLengthExceeded, InvalidRequest, Overloaded
from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.request import GenerateRequest, TokenDelta
from qwen_ray.core.step import MAX_PROMPT_LOGITS, StepResult
from qwen_ray.engine.scheduler import Scheduler
from tests.unit.engine.fake_ranks import POISON, alone
from tests.unit.engine.harness import Harness, request

SMALL = EngineConfig(num_blocks=8, block_size=4, max_model_len=40, max_num_seqs=4, max_num_batched_tokens=16)


def run(config: EngineConfig, *requests: GenerateRequest) -> Harness:
    harness = Harness(config)
    harness.add(*requests)
    harness.drain()
    harness.check_ended()
    return harness


def test_long_prompts_are_computed_in_chunks_within_the_budget() -> None:
    harness = run(replace(SMALL, max_num_batched_tokens=5), request("a", range(12), max_tokens=2))
    assert [chunk.count for batch in harness.ranks.batches for chunk in batch.chunks] == [5, 5, 2, 1]


def test_decodes_come_before_prefill_chunks() -> None:
    harness = Harness(replace(SMALL, max_num_batched_tokens=5))
    harness.add(replace(request("later", range(3)), priority=1))
    harness.step()
    harness.add(request("first", range(20, 32)))
    harness.step()
    assert [chunk.count for chunk in harness.ranks.batches[-1].chunks] == [1, 4]
    harness.step()
    assert [chunk.count for chunk in harness.ranks.batches[-1].chunks] == [1, 4]


def test_a_prefix_is_shared_within_one_step() -> None:
    prompt = list(range(10))
    harness = Harness(SMALL)
    harness.add(*(request(f"r{i}", prompt, seed=i) for i in range(3)))
    harness.step()
    assert [(chunk.start, chunk.count) for chunk in harness.ranks.batches[0].chunks] == [(0, 10), (8, 2), (8, 2)]
    assert [harness.deltas[f"r{i}"][0].num_cached_tokens for i in range(3)] == [0, 8, 8]
    harness.drain()
    harness.check_ended()


def test_the_last_prompt_token_is_computed_even_if_all_of_it_is_known() -> None:
    harness = run(SMALL, request("a", range(8)))
    harness.add(request("b", range(8), seed=2))
    harness.drain()
    harness.check_ended()
    assert harness.deltas["b"][0].num_cached_tokens == 4


def test_prompt_logprobs_are_collected_over_chunks_and_turn_hits_off() -> None:
    harness = run(replace(SMALL, max_num_batched_tokens=5), request("a", range(12)))
    asking = request("b", range(12))
    harness.add(replace(asking, sampling=replace(asking.sampling, prompt_logprobs=0, logprobs=0)))
    harness.drain()
    harness.check_ended()
    first, *rest = harness.deltas["b"]
    assert [entry.token_id for entry in first.prompt_logprobs] == list(range(1, 12))
    assert first.num_cached_tokens == 0
    assert all(not delta.prompt_logprobs for delta in rest)
    assert all([lp.token_id for lp in delta.logprobs] == list(delta.token_ids) for delta in harness.deltas["b"])


def test_described_prompts_take_few_logits_a_step() -> None:
    config = EngineConfig(num_blocks=400, max_model_len=2000, max_num_batched_tokens=1000)
    harness = Harness(config)
    for i in range(3):
        plain = request(f"d{i}", range(500 * i, 500 * i + 400))
        harness.add(replace(plain, sampling=replace(plain.sampling, prompt_logprobs=0)))
    harness.add(request("plain", range(3000, 3100)))
    harness.drain()
    harness.check_ended()
    batches = harness.ranks.batches
    wanted = {new.sequence_id for batch in batches for new in batch.new if new.sampling.prompt_logprobs == 0}
    for batch in batches:
        assert sum(c.count for c in batch.chunks if c.sequence_id in wanted and c.count > 1) <= MAX_PROMPT_LOGITS
    assert all(len(harness.deltas[f"d{i}"][0].prompt_logprobs) == 399 for i in range(3))


def test_without_prefix_caching_nothing_is_hit() -> None:
    harness = run(replace(SMALL, enable_prefix_caching=False), request("a", range(8)), request("b", range(8)))
    assert harness.scheduler.stats().prefix_hits_total == 0
    assert harness.scheduler.stats().num_cached_blocks == 0


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_full_pool_preempts_the_last_in_turn_and_tokens_stay_the_same(depth: int) -> None:
    requests = [request(f"r{i}", range(10 * i, 10 * i + 6), max_tokens=18, seed=i) for i in range(4)]
    harness = run(replace(SMALL, depth=depth), *requests)
    assert harness.scheduler.stats().preemptions_total > 0
    ends = [delta.request_id for deltas in harness.deltas.values() for delta in deltas if delta.finish_reason]
    assert ends[0] == "r0"


def test_an_admission_leaves_a_block_for_each_running_sequence() -> None:
    harness = Harness(SMALL)
    harness.add(request("a", range(15), max_tokens=5), request("b", range(20, 36)))
    harness.step()
    harness.step()
    assert [seq.request.request_id for seq in harness.running] == ["a"]
    harness.drain()
    harness.check_ended()
    assert harness.scheduler.stats().preemptions_total == 0


def test_what_the_ranks_have_lost_is_not_dropped_again() -> None:
    harness = run(SMALL, request("a", [1]))  # its end has not been told to the ranks
    harness.restart(ranks_died=False)
    harness.add(request("b", [1]))
    harness.drain()
    assert harness.ranks.batches[-1].dropped == ()


def test_priority_decides_who_goes_first() -> None:
    harness = Harness(replace(SMALL, max_num_seqs=1))
    harness.add(request("a", [1]), replace(request("b", [2]), priority=1), replace(request("c", [3]), priority=-1))
    order: list[str] = []
    while not harness.scheduler.is_idle:
        harness.step()
        order += [seq.request.request_id for seq in harness.running]
    assert list(dict.fromkeys(order)) == ["c", "a", "b"]


def test_depth_splits_decodes_so_that_every_step_in_flight_has_work() -> None:
    harness = Harness(replace(SMALL, depth=2))
    harness.add(*(request(f"r{i}", [i]) for i in range(4)))
    harness.step()
    assert harness.submit()
    assert harness.submit()
    assert not harness.submit()
    assert [len(batch.chunks) for batch in harness.ranks.batches[1:]] == [2, 2]


def test_an_aborted_sequence_gives_its_blocks_back_while_its_step_is_in_flight() -> None:
    harness = Harness(SMALL)
    harness.add(request("a", range(20)), request("b", range(30, 40)))
    harness.submit()
    harness.abort("a")
    harness.abort("a")
    harness.abort("nobody")
    harness.add(request("c", range(50, 62)))
    harness.drain()
    harness.check_ended()
    (delta,) = harness.deltas["a"]
    assert delta == TokenDelta(request_id="a", finish_reason="abort", scheduled=delta.scheduled)


def test_an_error_ends_one_request_and_its_blocks_are_not_hit() -> None:
    harness = run(SMALL, request("bad", range(8), seed=POISON), request("good", range(20, 28)))
    assert harness.deltas["bad"][-1].error == "logits are not finite"
    harness.add(request("same", range(8)))
    harness.drain()
    assert harness.deltas["same"][0].num_cached_tokens == 0


def test_a_token_that_the_ranks_did_not_send_is_an_error() -> None:
    scheduler = Scheduler(SMALL, lambda _: None)
    scheduler.add(request("a", [1]))
    batch = scheduler.schedule()
    assert batch is not None
    (delta,) = scheduler.update(batch, StepResult(step_id=batch.step_id))
    assert delta.finish_reason == "error"


def test_the_last_delta_carries_the_token_that_ended_it_and_names_it() -> None:
    whole = request("whole", range(6))
    tokens, _ = alone(whole, SMALL)
    harness = run(SMALL, whole, replace(whole, request_id="stopped", stop_token_ids=(tokens[3],)))
    last = harness.deltas["stopped"][-1]
    assert (last.token_ids, last.finish_reason, last.stop_token_id) == ((tokens[3],), "stop", tokens[3])
    assert harness.deltas["whole"][-1].stop_token_id is None


def test_max_tokens_counts_what_another_replica_generated() -> None:
    whole = request("whole", range(6), max_tokens=8)
    tokens, _ = alone(whole, SMALL)
    resumed = replace(whole, request_id="resumed").resumed(tuple(tokens[:5]))
    harness = run(SMALL, whole, resumed)
    assert harness.output("resumed") == tokens[5:]
    assert harness.deltas["resumed"][0].num_cached_tokens == 0  # told with the first delta of all


def test_a_continued_request_that_had_ended_ends_at_once() -> None:
    harness = Harness(SMALL)
    harness.add(request("a", range(6), max_tokens=3).resumed((5, 6, 7)))
    assert not harness.submit()
    assert harness.deltas["a"] == [TokenDelta(request_id="a", finish_reason="length")]


@pytest.mark.parametrize(("max_tokens", "prompt"), [(None, 6), (1000, 6), (1000, 32)])
def test_an_answer_is_cut_where_context_or_memory_end(max_tokens: int | None, prompt: int) -> None:
    for config, longest in ((SMALL, 33), (replace(SMALL, max_model_len=33), 33), (replace(SMALL, num_blocks=99), 40)):
        harness = run(config, request("a", range(prompt), max_tokens=max_tokens))
        assert harness.deltas["a"][-1].finish_reason == "length"
        assert prompt + len(harness.output("a")) == longest


def test_what_can_never_run_is_refused_with_the_numbers() -> None:
    scheduler = Scheduler(SMALL, lambda _: None)
    with pytest.raises(ContextLengthExceeded, match=r"40 tokens; at most 39 .* context of 40"):
        scheduler.add(request("a", range(40)))
    with pytest.raises(ContextLengthExceeded, match=r"33 tokens; at most 32 .* 8 blocks of 4"):
        scheduler.add(request("a", range(33)))
    for prompt in ([], [-1], [2**31]):
        with pytest.raises(InvalidRequest):
            scheduler.add(request("a", prompt))
    scheduler.add(request("a", [1]))
    with pytest.raises(InvalidRequest, match="running already"):
        scheduler.add(request("a", [1]))
    assert scheduler.stats().num_waiting == 1


def test_a_full_queue_says_when_to_come_back() -> None:
    harness = Harness(replace(SMALL, max_num_waiting=2))
    harness.add(request("a", [1]), request("b", [2]))
    with pytest.raises(Overloaded) as refused:
        harness.scheduler.add(request("c", [3]))
    assert refused.value.retry_after >= 1.0
    harness.drain()
    harness.add(request("c", [3]), request("d", [4]))
    with pytest.raises(Overloaded) as refused:
        harness.scheduler.add(request("e", [5]))
    assert 1.0 <= refused.value.retry_after <= 60.0


def test_after_a_reset_everything_runs_again_from_its_tokens_so_far() -> None:
    harness = Harness(replace(SMALL, depth=2))
    harness.add(*(request(f"r{i}", range(10 * i, 10 * i + 5), seed=i) for i in range(4)))
    for _ in range(5):
        harness.step()
    harness.submit()
    harness.restart(ranks_died=False)
    harness.check_books()
    assert harness.scheduler.stats().num_running == 0
    harness.drain()
    harness.check_ended()
