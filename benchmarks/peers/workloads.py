"""The workloads, W1 to W5: which requests, when, and what is told of their answers.

Knows prompts as random token ids: no two workloads, rounds or requests share a prefix unless they are meant to. Nothing
of servers and HTTP: `send` is given.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.peers.client import Answer
from benchmarks.peers.figures import Figure, percentile

# Below lie single bytes, above it the ids are whole words of any vocabulary of this size.
TOKEN_IDS = range(1000, 30_000)

Prompt = list[int]
Send = Callable[[Prompt, int], Awaitable[Answer]]
MILLISECONDS = 1000

TTFT = Figure(name="ttft_ms", unit="ms", more_is_better=False)
TTFT_P99 = Figure(name="ttft_p99_ms", unit="ms", more_is_better=False)
ITL = Figure(name="itl_ms", unit="ms", more_is_better=False)
ITL_P99 = Figure(name="itl_p99_ms", unit="ms", more_is_better=False)
CHUNK_GAP_P99 = Figure(name="chunk_gap_p99_ms", unit="ms", more_is_better=False)
DECODE_RATE = Figure(name="decode_tokens_per_s", unit="tokens/s")
OUTPUT_RATE = Figure(name="output_tokens_per_s", unit="tokens/s")
PROMPT_RATE = Figure(name="prompt_tokens_per_s", unit="tokens/s")
COLD = Figure(name="cold_s", unit="s", more_is_better=False)
WARM = Figure(name="warm_s", unit="s", more_is_better=False)


class Workload(Protocol):
    """`rate` is requests/s, for those that arrive by themselves."""

    @property
    def name(self) -> str: ...
    @property
    def figures(self) -> tuple[Figure, ...]: ...
    async def run(self, send: Send, seed: str, rate: float | None) -> dict[str, float]: ...


def tokens(seed: str, count: int) -> Prompt:
    draw = random.Random(seed)
    return [draw.choice(TOKEN_IDS) for _ in range(count)]


async def at_once(send: Send, prompts: Sequence[Prompt], num_output: int) -> tuple[list[Answer], float]:
    """All answers, and the seconds from the first request to the last token."""
    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(_sent(send, prompt, num_output)) for prompt in prompts]
    answers = [task.result() for task in running]
    return answers, max(answer.ended for answer in answers) - begun


def _p50_ms(seconds: Sequence[float]) -> float:
    return statistics.median(seconds) * MILLISECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class OneStream:
    """One request after the other, alone."""

    name: str
    num_prompt: int
    num_output: int
    repeats: int
    figures: tuple[Figure, ...] = (DECODE_RATE, TTFT, ITL)

    async def run(self, send: Send, seed: str, rate: float | None) -> dict[str, float]:
        answers = [await send(tokens(f"{seed}-{i}", self.num_prompt), self.num_output) for i in range(self.repeats)]
        return {
            DECODE_RATE.name: statistics.median(answer.tokens_per_second for answer in answers),
            TTFT.name: _p50_ms([answer.ttft for answer in answers]),
            ITL.name: _p50_ms([gap for answer in answers for gap in answer.token_gaps]),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ManyAtOnce:
    name: str
    num_requests: int
    num_prompt: int
    num_output: int
    figures: tuple[Figure, ...] = (OUTPUT_RATE, TTFT, ITL)

    async def run(self, send: Send, seed: str, rate: float | None) -> dict[str, float]:
        prompts = [tokens(f"{seed}-{i}", self.num_prompt) for i in range(self.num_requests)]
        answers, seconds = await at_once(send, prompts, self.num_output)
        return {
            OUTPUT_RATE.name: self.num_requests * self.num_output / seconds,
            TTFT.name: _p50_ms([answer.ttft for answer in answers]),
            ITL.name: _p50_ms([gap for answer in answers for gap in answer.token_gaps]),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LongPrompt:
    name: str
    num_prompt: int
    repeats: int
    figures: tuple[Figure, ...] = (PROMPT_RATE,)

    async def run(self, send: Send, seed: str, rate: float | None) -> dict[str, float]:
        answers = [await send(tokens(f"{seed}-{i}", self.num_prompt), 1) for i in range(self.repeats)]
        return {PROMPT_RATE.name: self.num_prompt / statistics.median(answer.ttft for answer in answers)}


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefix:
    """All at once, twice: the prefix unseen, then seen (own tokens are new both times)."""

    name: str
    num_requests: int
    num_prefix: int
    num_own: int
    num_output: int
    figures: tuple[Figure, ...] = (COLD, WARM)

    async def run(self, send: Send, seed: str, rate: float | None) -> dict[str, float]:
        prefix = tokens(f"{seed}-prefix", self.num_prefix)
        seconds: dict[str, float] = {}
        for figure in (COLD, WARM):
            own = (tokens(f"{seed}-{figure.name}-{i}", self.num_own) for i in range(self.num_requests))
            _, seconds[figure.name] = await at_once(send, [prefix + one for one in own], self.num_output)
        return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLoop:
    """Requests of mixed lengths that arrive as they like (Poisson), whether or not the server keeps up."""

    name: str
    num_requests: int
    prompt_lengths: tuple[int, ...]
    output_lengths: tuple[int, ...]
    figures: tuple[Figure, ...] = (ITL_P99, ITL, TTFT, TTFT_P99, CHUNK_GAP_P99)

    async def run(self, send: Send, seed: str, rate: float | None) -> dict[str, float]:
        assert rate is not None, "arrivals need a rate"
        draw = random.Random(seed)
        running: list[asyncio.Task[Answer]] = []
        async with asyncio.TaskGroup() as group:
            due = time.perf_counter()
            for i in range(self.num_requests):
                prompt = tokens(f"{seed}-{i}", draw.choice(self.prompt_lengths))
                running.append(group.create_task(_sent(send, prompt, draw.choice(self.output_lengths))))
                due += draw.expovariate(rate)
                await asyncio.sleep(due - time.perf_counter())
        answers = [task.result() for task in running]
        ttfts = [answer.ttft for answer in answers]
        gaps = [gap for answer in answers for gap in answer.token_gaps]
        return {
            ITL_P99.name: percentile(gaps, 99) * MILLISECONDS,
            ITL.name: _p50_ms(gaps),
            TTFT.name: _p50_ms(ttfts),
            TTFT_P99.name: percentile(ttfts, 99) * MILLISECONDS,
            CHUNK_GAP_P99.name: percentile([g for answer in answers for g in answer.chunk_gaps], 99) * MILLISECONDS,
            "requests_per_s": rate,
        }


async def _sent(send: Send, prompt: Prompt, num_output: int) -> Answer:
    return await send(prompt, num_output)


# Of W2's rate, W5's arrivals are this part. Its lengths have W2's means, 128 and 64.
LOAD = 0.7
WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        OneStream(name="W1", num_prompt=128, num_output=128, repeats=2),
        ManyAtOnce(name="W2", num_requests=32, num_prompt=128, num_output=64),
        LongPrompt(name="W3", num_prompt=2048, repeats=3),
        SharedPrefix(name="W4", num_requests=16, num_prefix=1024, num_own=32, num_output=16),
        OpenLoop(name="W5", num_requests=64, prompt_lengths=(32, 64, 128, 288), output_lengths=(16, 32, 64, 144)),
    )
}
# The same in seconds, to see that a server can be measured. Its figures say nothing.
SHORT_WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        OneStream(name="W1", num_prompt=16, num_output=8, repeats=1),
        ManyAtOnce(name="W2", num_requests=4, num_prompt=16, num_output=8),
        LongPrompt(name="W3", num_prompt=64, repeats=1),
        SharedPrefix(name="W4", num_requests=3, num_prefix=48, num_own=8, num_output=4),
        OpenLoop(name="W5", num_requests=4, prompt_lengths=(8, 16), output_lengths=(4, 8)),
    )
}


async def warm_up(send: Send, seed: str) -> None:
    """What a server does once: nobody counts it against its first request."""
    await at_once(send, [tokens(f"{seed}-warm-up-{i}", 64) for i in range(4)], 8)
