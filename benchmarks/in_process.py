"""One rank and its engine in this process, on the caller's thread: rounds of requests without Ray and HTTP.

Knows how to put requests in and when all have ended. What is measured in a round, its caller decides by `on_step`, and
may end the round there. Wants nothing but torch and what qwen_ray itself imports.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.profiler import record_function

from qwen_ray.core.plan import Rendezvous, ReplicaSpec
from qwen_ray.core.request import GenerateRequest, SamplingParams, TokenDelta
from qwen_ray.core.stats import StepStats
from qwen_ray.core.step import StepBatch, StepResult
from qwen_ray.engine.engine import Engine
from qwen_ray.worker.worker import Worker

PROMPT_TOKENS = 32
STEP = "sampling"  # under the profiler: all of a step that is not in the model


class OneRank:
    """An `engine.executor.Executor` on the caller's thread, where the profiler looks."""

    def __init__(self, spec: ReplicaSpec, on_loaded: Callable[[], None]) -> None:
        self.worker = Worker(spec, 0)
        self.worker.load()
        on_loaded()
        self.worker.join(Rendezvous(address="", name="benchmark"))
        self.worker.warm_up()

    async def submit(self, batch: StepBatch) -> StepResult:
        with marked_step():
            result = self.worker.execute(batch)
        assert result is not None, "the only rank samples"
        return result


class Bench:
    """One model and one engine for all rounds, which differ in `on_step` only.

    `on_loaded` is called when weights and KV cache are there, before the first step. `tokens`: what the requests of the
    round have been given so far, by their number; `errors`: why some of them ended early.
    """

    def __init__(self, spec: ReplicaSpec, on_loaded: Callable[[], None] = lambda: None) -> None:
        self.spec = spec
        self.rank = OneRank(spec, on_loaded)
        self.tokens: dict[int, list[int]] = {}
        self.errors: list[str] = []
        self._engine = Engine(spec.engine, self.rank, self._published, self._stepped)
        self._num_open = 0
        self._on_step: Callable[[StepStats], None] = lambda stats: None

    def run(
        self,
        num_sequences: int,
        num_output_tokens: int,
        on_step: Callable[[StepStats], None],
        num_prompt_tokens: int = PROMPT_TOKENS,
    ) -> float:
        """Seconds from the first prompt to the last token."""
        self._on_step = on_step
        self._num_open = num_sequences
        self.tokens, self.errors = {i: [] for i in range(num_sequences)}, []
        for i in range(num_sequences):
            self._engine.add(request(i, self.spec.config.vocab_size, num_output_tokens, num_prompt_tokens))
        begun = time.perf_counter()
        asyncio.run(self._engine.run())
        return time.perf_counter() - begun

    def end(self) -> None:
        """The round, now: for an `on_step` that has seen enough."""
        for number in self.tokens:
            self._engine.abort(str(number))

    def close(self) -> None:
        """Let go of the memory, and of the threads that would hold up the process's end."""
        self.rank.worker.close()

    def _published(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            self.tokens[int(delta.request_id)] += delta.token_ids
            if delta.error is not None:
                self.errors.append(delta.error)
        self._num_open -= sum(delta.finish_reason is not None for delta in deltas)
        if self._num_open == 0:
            self._engine.stop()

    def _stepped(self, stats: StepStats) -> None:
        self._on_step(stats)


@contextmanager
def marked_step() -> Iterator[None]:
    with record_function(STEP):
        yield


def request(number: int, vocab_size: int, num_output_tokens: int, num_prompt_tokens: int) -> GenerateRequest:
    draw = random.Random(number)
    return GenerateRequest(
        request_id=str(number),
        prompt_token_ids=tuple(draw.randrange(vocab_size) for _ in range(num_prompt_tokens)),
        sampling=SamplingParams(temperature=0.0, max_tokens=num_output_tokens, ignore_eos=True),
        seed=number,
    )


def is_decode(stats: StepStats) -> bool:
    return stats.num_tokens == stats.num_sequences


def step_seconds(stats: StepStats) -> float:
    return stats.schedule_seconds + stats.step_seconds
