"""One rank and its engine in this process, on the caller's thread: rounds of requests without Ray and HTTP.

Knows how to put requests in and when all have ended. What is measured in a round, its caller decides by `on_step`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

from step_profile import marked_step

from qwen_ray.core.plan import Rendezvous, ReplicaSpec
from qwen_ray.core.request import GenerateRequest, SamplingParams, TokenDelta
from qwen_ray.core.stats import StepStats
from qwen_ray.core.step import StepBatch, StepResult
from qwen_ray.engine.engine import Engine
from qwen_ray.worker.worker import Worker

PROMPT_TOKENS = 32


class OneRank:
    """An `engine.executor.Executor` on the caller's thread, where the profiler looks."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self.worker = Worker(spec, 0)
        self.worker.load()
        self.worker.join(Rendezvous(address="", name="benchmark"))
        self.worker.warm_up()

    async def submit(self, batch: StepBatch) -> StepResult:
        with marked_step():
            result = self.worker.execute(batch)
        assert result is not None, "the only rank samples"
        return result


class Bench:
    """One model and one engine for all rounds, which differ in `on_step` only."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self.spec = spec
        self.rank = OneRank(spec)
        self._engine = Engine(spec.engine, self.rank, self._published, self._stepped)
        self._num_open = 0
        self._on_step: Callable[[StepStats], None] = lambda stats: None

    def run(self, num_sequences: int, num_output_tokens: int, on_step: Callable[[StepStats], None]) -> float:
        """Seconds from the first prompt to the last token."""
        self._on_step = on_step
        self._num_open = num_sequences
        for i in range(num_sequences):
            self._engine.add(request(i, self.spec.config.vocab_size, num_output_tokens))
        begun = time.perf_counter()
        asyncio.run(self._engine.run())
        return time.perf_counter() - begun

    def _published(self, deltas: list[TokenDelta]) -> None:
        self._num_open -= sum(delta.finish_reason is not None for delta in deltas)
        if self._num_open == 0:
            self._engine.stop()

    def _stepped(self, stats: StepStats) -> None:
        self._on_step(stats)


def request(number: int, vocab_size: int, num_output_tokens: int) -> GenerateRequest:
    draw = random.Random(number)
    return GenerateRequest(
        request_id=str(number),
        prompt_token_ids=tuple(draw.randrange(vocab_size) for _ in range(PROMPT_TOKENS)),
        sampling=SamplingParams(temperature=0.0, max_tokens=num_output_tokens, ignore_eos=True),
        seed=number,
    )


def is_decode(stats: StepStats) -> bool:
    return stats.num_tokens == stats.num_sequences


def step_seconds(stats: StepStats) -> float:
    return stats.schedule_seconds + stats.step_seconds
