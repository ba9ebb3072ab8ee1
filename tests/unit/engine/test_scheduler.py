"""The scheduler against ranks that notice every wrong block, under any order of events."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qwen_ray.core.errors import ContextLengthExceeded, InvalidRequest, Overloaded
from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.request import GenerateRequest, SamplingParams, TokenDelta
from qwen_ray.core.stats import RequestTimes
from qwen_ray.core.step import StepBatch, StepResult
from qwen_ray.engine.scheduler import Scheduler
from tests.unit.engine.fake_ranks import POISON, FakeRanks, alone

SMALL = EngineConfig(num_blocks=8, block_size=4, max_model_len=40, max_num_seqs=4, max_num_batched_tokens=16)


def request(name: str, prompt: list[int] | range, *, max_tokens: int | None = 8, seed: int = 1) -> GenerateRequest:
    return GenerateRequest(
        request_id=name, prompt_token_ids=tuple(prompt), sampling=SamplingParams(max_tokens=max_tokens), seed=seed
    )


class Harness:
    """A scheduler, its ranks, and what came out for every request."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.times: list[RequestTimes] = []
        self.scheduler = Scheduler(config, self.times.append)
        self.ranks = FakeRanks(config)
        self.inflight: deque[tuple[StepBatch, StepResult]] = deque()
        self.requests: dict[str, GenerateRequest] = {}
        self.deltas: dict[str, list[TokenDelta]] = {}
        self.aborted: set[str] = set()

    def add(self, *requests: GenerateRequest) -> None:
        for one in requests:
            self.scheduler.add(one)
            self.requests[one.request_id] = one
            self.deltas[one.request_id] = []

    def submit(self) -> bool:
        batch = self.scheduler.schedule()
        if batch is not None:
            self.inflight.append((batch, self.ranks.execute(batch)))
        self._take(self.scheduler.take_deltas())
        return batch is not None

    def finish(self) -> None:
        self._take(self.scheduler.update(*self.inflight.popleft()))

    def step(self) -> None:
        while len(self.inflight) < self.config.depth and self.submit():
            pass
        assert self.inflight or self.scheduler.is_idle, "work, but nothing planned"
        if self.inflight:
            self.finish()

    def drain(self) -> None:
        while not self.scheduler.is_idle:
            self.step()
        while self.inflight:
            self.finish()
        self._take(self.scheduler.take_deltas())

    def output(self, name: str) -> list[int]:
        return [token for delta in self.deltas[name] for token in delta.token_ids]

    def check_ended(self) -> None:
        """Everything ended exactly once, with the tokens it would have had alone, and all blocks are back."""
        for name, one in self.requests.items():
            reasons = [delta.finish_reason for delta in self.deltas[name] if delta.finish_reason]
            tokens, reason = alone(one, self.config)
            tokens = tokens[len(one.output_token_ids) :]
            assert len(reasons) == 1, f"{name} ended {reasons}"
            assert self.deltas[name][-1].finish_reason
            if name in self.aborted:
                assert self.output(name) == tokens[: len(self.output(name))]
            else:
                assert (self.output(name), reasons) == (tokens, [reason])
        self.scheduler.pool.check([])
        assert self.scheduler.pool.num_free == self.config.num_blocks
        assert len(self.times) == len(self.requests)

    def _take(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            self.deltas[delta.request_id].append(delta)


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
    harness = run(SMALL, request("a", range(12)))
    asking = request("b", range(12))
    harness.config = replace(SMALL, max_num_batched_tokens=5)
    harness.add(replace(asking, sampling=replace(asking.sampling, prompt_logprobs=0, logprobs=0)))
    harness.drain()
    harness.check_ended()
    first, *rest = harness.deltas["b"]
    assert [entry.token_id for entry in first.prompt_logprobs] == list(range(1, 12))
    assert first.num_cached_tokens == 0
    assert all(not delta.prompt_logprobs for delta in rest)
    assert all([lp.token_id for lp in delta.logprobs] == list(delta.token_ids) for delta in harness.deltas["b"])


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
    assert [seq.request.request_id for seq in harness.scheduler.running] == ["a"]
    harness.drain()
    harness.check_ended()
    assert harness.scheduler.stats().preemptions_total == 0


def test_what_the_ranks_have_lost_is_not_dropped_again() -> None:
    harness = run(SMALL, request("a", [1]))  # its end has not been told to the ranks
    harness.ranks.restart()
    harness.scheduler.reset()
    harness.add(request("b", [1]))
    harness.drain()
    assert harness.ranks.batches[-1].dropped == ()


def test_priority_decides_who_goes_first() -> None:
    harness = Harness(replace(SMALL, max_num_seqs=1))
    harness.add(request("a", [1]), replace(request("b", [2]), priority=1), replace(request("c", [3]), priority=-1))
    order: list[str] = []
    while not harness.scheduler.is_idle:
        harness.step()
        order += [seq.request.request_id for seq in harness.scheduler.running]
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
    harness.scheduler.abort("a")
    harness.aborted.add("a")
    harness.scheduler.abort("a")
    harness.scheduler.abort("nobody")
    harness.add(request("c", range(50, 62)))
    harness.drain()
    harness.check_ended()
    assert harness.deltas["a"] == [TokenDelta(request_id="a", finish_reason="abort")]


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
    harness.inflight.clear()
    harness.ranks.restart()
    harness.scheduler.reset()
    harness.scheduler.pool.check([])
    assert harness.scheduler.stats().num_running == 0
    harness.drain()
    harness.check_ended()


class AnyOrder(RuleBasedStateMachine):
    """Arrivals, aborts, steps and failures in any order, over few blocks and prompts that share their beginnings."""

    @initialize(
        depth=st.integers(1, 3),
        num_blocks=st.integers(3, 12),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 12),
        caching=st.booleans(),
    )
    def begin(
        self, depth: int, num_blocks: int, block_size: int, max_num_seqs: int, budget: int, caching: bool
    ) -> None:
        self.harness = Harness(
            EngineConfig(
                num_blocks=num_blocks,
                block_size=block_size,
                max_model_len=24,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=budget,
                max_num_waiting=6,
                enable_prefix_caching=caching,
                depth=depth,
            )
        )

    @rule(
        shared=st.integers(0, 8),
        own=st.lists(st.integers(0, 3), min_size=1, max_size=6),
        earlier=st.sampled_from([0, 0, 0, 2]),
        max_tokens=st.one_of(st.none(), st.integers(3, 20)),
        min_tokens=st.integers(0, 3),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        seed=st.sampled_from([1, 2, 3, 4, 5, POISON]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
    )
    def arrive(
        self,
        shared: int,
        own: list[int],
        earlier: int,
        max_tokens: int | None,
        min_tokens: int,
        priority: int,
        seed: int,
        prompt_logprobs: int | None,
    ) -> None:
        new = GenerateRequest(
            request_id=f"r{len(self.harness.requests)}",
            prompt_token_ids=(*range(shared), *own),
            sampling=SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, prompt_logprobs=prompt_logprobs),
            seed=seed,
            stop_token_ids=(0, 1, 2),
            priority=priority,
        )
        tokens, _ = alone(new, self.harness.config)
        if len(tokens) > earlier:
            new = new.resumed(tuple(tokens[:earlier]))
        try:
            self.harness.add(new)
        except (ContextLengthExceeded, Overloaded):
            assert new.request_id not in self.harness.requests

    @precondition(lambda self: len(self.harness.inflight) < self.harness.config.depth)
    @rule()
    def submit(self) -> None:
        self.harness.submit()

    @precondition(lambda self: self.harness.inflight)
    @rule()
    def finish(self) -> None:
        self.harness.finish()

    @rule(steps=st.integers(1, 6))
    def run_steps(self, steps: int) -> None:
        for _ in range(steps):
            self.harness.step()

    @precondition(lambda self: not self.harness.scheduler.is_idle)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        alive = [s.request.request_id for s in (*self.harness.scheduler.waiting, *self.harness.scheduler.running)]
        name = data.draw(st.sampled_from(sorted(alive)))
        self.harness.aborted.add(name)
        self.harness.scheduler.abort(name)

    @rule(happens=st.sampled_from([False, False, False, True]))
    def lose_ranks(self, happens: bool) -> None:
        if happens:
            self.harness.inflight.clear()
            self.harness.ranks.restart()
            self.harness.scheduler.reset()

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "harness"):
            scheduler = self.harness.scheduler
            scheduler.pool.check([seq.block_table for seq in scheduler.running])
            assert all(not seq.block_table for seq in scheduler.waiting)
            assert len(scheduler.running) <= self.harness.config.max_num_seqs

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.drain()
            self.harness.check_ended()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
