"""A scheduler driven by hand against ranks that notice every wrong block."""

from __future__ import annotations

from collections import deque

from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.request import GenerateRequest, SamplingParams, TokenDelta
from qwen_ray.core.stats import RequestTimes
from qwen_ray.core.step import StepBatch, StepResult
from qwen_ray.engine.scheduler import Scheduler
from qwen_ray.engine.sequence import Sequence
from tests.unit.engine.fake_ranks import FakeRanks, alone


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

    @property
    def alive(self) -> list[str]:
        return [name for name, deltas in self.deltas.items() if not deltas or deltas[-1].finish_reason is None]

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
        self.check_books()
        assert self.scheduler.stats().num_used_blocks == 0
        assert len(self.times) == len(self.requests)

    def check_books(self) -> None:
        """Blocks of every dp rank against the tables of those that run on it."""
        for dp_rank in self.scheduler.dp_ranks:
            dp_rank.pool.check([seq.block_table for seq in dp_rank.running])
            assert all(seq.dp_rank == dp_rank.number for seq in dp_rank.running)
            assert len(dp_rank.running) <= self.config.max_num_seqs

    @property
    def running(self) -> list[Sequence]:
        return [seq for dp_rank in self.scheduler.dp_ranks for seq in dp_rank.running]

    def _take(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            self.deltas[delta.request_id].append(delta)
