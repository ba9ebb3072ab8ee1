"""A scheduler driven by hand against ranks that notice every wrong block, on a clock that stands still."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from qwen_ray.core.errors import DEADLINE_EXCEEDED, RANKS_FAILED, RankFailed
from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.request import GenerateRequest, SamplingParams, TokenDelta
from qwen_ray.core.stats import RequestTimes
from qwen_ray.core.step import StepBatch, StepResult
from qwen_ray.engine.company import party
from qwen_ray.engine.scheduler import Scheduler
from qwen_ray.engine.sequence import Sequence
from tests.unit.engine.fake_ranks import FakeRanks, alone, context_of, pooled


def request(name: str, prompt: list[int] | range, *, max_tokens: int | None = 8, seed: int = 1) -> GenerateRequest:
    return GenerateRequest(
        request_id=name, prompt_token_ids=tuple(prompt), sampling=SamplingParams(max_tokens=max_tokens), seed=seed
    )


@dataclass
class Step:
    """A step in flight; the ranks die of one without a result."""

    batch: StepBatch
    names: tuple[str, ...]
    result: StepResult | None


@dataclass
class Blame:
    """What is held against a request: deaths of ranks under it, and how many tokens it had at the last one."""

    num_deaths: int = 0
    num_tokens: int = 0


class Harness:
    """A scheduler, its ranks, and what came out for every request."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.now = 1000.0
        self.times: list[RequestTimes] = []
        self.scheduler = Scheduler(config, self.times.append, lambda: self.now)
        self.ranks = FakeRanks(config)
        self.inflight: deque[Step] = deque()
        self.steps: list[tuple[str, ...]] = []  # whose tokens each computed
        self.requests: dict[str, GenerateRequest] = {}
        self.deltas: dict[str, list[TokenDelta]] = {}
        self.blame: dict[str, Blame] = {}
        self.aborted: set[str] = set()
        self.num_deaths = 0
        self.condemned: set[str] = set()  # who must end because ranks died under them alone

    def add(self, *requests: GenerateRequest) -> None:
        for one in requests:
            self.scheduler.add(one)
            self.requests[one.request_id] = one
            self.deltas[one.request_id] = []
            self.blame[one.request_id] = Blame(num_deaths=2 if one.is_suspect else 0)
            self._take(self.scheduler.take_deltas())

    def abort(self, name: str) -> None:
        self.scheduler.abort(name)
        if name in self.alive:
            self.aborted.add(name)
        self._take(self.scheduler.take_deltas())

    def submit(self) -> bool:
        batch = self.scheduler.schedule()
        if batch is not None:
            names_of = {seq.sequence_id: seq.request.request_id for seq in self.running}
            names = tuple(names_of[chunk.sequence_id] for chunk in batch.chunks)
            try:
                result = self.ranks.execute(batch)
            except RankFailed:
                result = None
            self.inflight.append(Step(batch=batch, names=names, result=result))
            self.steps.append(names)
        self._take(self.scheduler.take_deltas())
        assert all((self.requests[name].deadline or self.now + 1) > self.now for name in self.alive), "overdue"
        return batch is not None

    def finish(self) -> None:
        step = self.inflight[0]
        if step.result is None:
            self.die()
        else:
            self.inflight.popleft()
            self._take(self.scheduler.update(step.batch, step.result))

    def die(self) -> None:
        """The ranks die, of whatever; all that is in flight is blamed, and nobody takes a third death with company."""
        self.num_deaths += 1
        names = dict.fromkeys(name for step in self.inflight for name in step.names)
        for name in names:
            blame = self.blame[name]
            if len(self.output(name)) >= blame.num_tokens + 2:
                blame.num_deaths = 0
            blame.num_deaths += 1
            blame.num_tokens = len(self.output(name))
            if blame.num_deaths > 2 and name in self.alive:
                assert len(names) == len(self.inflight) == 1, f"{name} takes others with it once more"
                self.condemned.add(name)
        alive = self.alive
        self.restart(ranks_died=True)
        assert [name for name in alive if name not in self.condemned] == self.alive

    def restart(self, *, ranks_died: bool) -> None:
        self.inflight.clear()
        self.ranks.restart()
        self.scheduler.reset(ranks_died=ranks_died)
        self._take(self.scheduler.take_deltas())

    def step(self) -> None:
        while len(self.inflight) < self.config.depth and self.submit():
            pass
        assert self.inflight or self.scheduler.is_idle, "work, but nothing planned"
        assert len(self.steps) < 10_000, "it never ends"
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
        for name in self.requests:
            ends = [delta for delta in self.deltas[name] if delta.finish_reason]
            assert len(ends) == 1, f"{name} ended {ends}"
            assert self.deltas[name][-1] is ends[0]
            self._check_end(name, ends[0])
        self.check_books()
        stats = self.scheduler.stats()
        assert (stats.num_used_blocks, stats.num_running, stats.num_waiting) == (0, 0, 0)
        assert (stats.num_waiting_tokens, stats.num_set_aside) == (0, 0)
        assert len(self.times) == len(self.requests)
        assert not self.scheduler._queue._by_priority, "accounts of nobody"

    def _check_end(self, name: str, end: TokenDelta) -> None:
        one, got = self.requests[name], self.output(name)
        tokens, reason = alone(one, self.config)
        tokens = tokens[len(one.output_token_ids) :]
        assert (end.code == RANKS_FAILED) == (name in self.condemned)
        if end.code == DEADLINE_EXCEEDED:
            assert (one.deadline or 0.0) <= self.now
            assert end.finish_reason == ("length" if got or one.output_token_ids else "error")
            assert got == tokens[: len(got)]
        elif name in self.aborted or name in self.condemned:
            assert end.finish_reason == ("abort" if name in self.aborted else "error")
            assert got == tokens[: len(got)]
        else:
            assert (got, end.finish_reason) == (tokens, reason)
            if one.pooling is not None and reason == "stop":
                assert end.pooled == pooled(context_of(list(one.prompt_token_ids)), one.pooling)

    def check_books(self) -> None:
        """Blocks of every dp rank against the tables of those that run on it."""
        for dp_rank in self.scheduler.dp_ranks:
            dp_rank.pool.check([seq.block_table for seq in dp_rank.running])
            assert all(seq.dp_rank == dp_rank.number for seq in dp_rank.running)
            assert len(dp_rank.running) <= self.config.max_num_seqs
        assert self.scheduler._shares._counts == Counter(map(party, self.running))
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting) == (len(self.running), len(self.alive) - len(self.running))

    @property
    def running(self) -> list[Sequence]:
        return [seq for dp_rank in self.scheduler.dp_ranks for seq in dp_rank.running]

    def _take(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            self.deltas[delta.request_id].append(delta)
