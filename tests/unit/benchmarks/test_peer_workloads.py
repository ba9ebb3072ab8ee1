"""The workloads: what is sent, and what is told of it, with a server whose every token takes no time or a known one."""

from __future__ import annotations

import asyncio
import statistics
import time

import pytest

from benchmarks.peers.client import Answer
from benchmarks.peers.figures import Measured, percentile
from benchmarks.peers.workloads import SHORT_WORKLOADS, WORKLOADS, ManyAtOnce, OpenLoop, Prompt


class Sent:
    """Answers at once, on a clock of its own: the first token after 2 s, each other after 1 s more."""

    def __init__(self) -> None:
        self.requests: list[tuple[Prompt, int]] = []
        self.num_open = 0
        self.most_open = 0

    async def __call__(self, prompt: Prompt, num_tokens: int) -> Answer:
        self.requests.append((prompt, num_tokens))
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        await asyncio.sleep(0)
        self.num_open -= 1
        now = time.perf_counter()
        return Answer(started=now, arrivals=tuple((now + 2 + i, 1) for i in range(num_tokens)))


@pytest.mark.parametrize(
    ("name", "prompt_lengths", "output_lengths", "most_open"),
    [
        ("W1", [128] * 2, {128}, 1),
        ("W2", [128] * 32, {64}, 32),
        ("W3", [2048] * 3, {1}, 1),
        ("W4", [1056] * 32, {16}, 16),
    ],
)
async def test_requests_are_those_of_the_definition(
    name: str, prompt_lengths: list[int], output_lengths: set[int], most_open: int
) -> None:
    sent = Sent()
    figures = await WORKLOADS[name].run(sent, "seed", None)
    assert [len(prompt) for prompt, _ in sent.requests] == prompt_lengths
    assert {num_tokens for _, num_tokens in sent.requests} == output_lengths
    assert sent.most_open == most_open
    assert {figure.name for figure in WORKLOADS[name].figures} <= figures.keys()


async def test_figures_of_one_stream() -> None:
    figures = await WORKLOADS["W1"].run(Sent(), "seed", None)
    assert figures == pytest.approx({"decode_tokens_per_s": 1.0, "ttft_ms": 2000.0, "itl_ms": 1000.0})
    assert await WORKLOADS["W3"].run(Sent(), "seed", None) == pytest.approx({"prompt_tokens_per_s": 1024.0})


async def test_prompts_share_what_they_are_meant_to_and_nothing_else() -> None:
    sent = Sent()
    await WORKLOADS["W4"].run(sent, "one", None)
    assert len({tuple(prompt[:1024]) for prompt, _ in sent.requests}) == 1
    assert len({tuple(prompt[1024:]) for prompt, _ in sent.requests}) == 32
    await WORKLOADS["W4"].run(sent, "two", None)
    assert len({tuple(prompt[:16]) for prompt, _ in sent.requests}) == 2
    for name in ("W1", "W2", "W3"):
        sent = Sent()
        await WORKLOADS[name].run(sent, "one", None)
        assert len({tuple(prompt[:16]) for prompt, _ in sent.requests}) == len(sent.requests)


async def test_arrivals_are_the_same_for_every_server() -> None:
    first, second = Sent(), Sent()
    for sent in (first, second):
        figures = await SHORT_WORKLOADS["W5"].run(sent, "seed", 1000.0)
        assert {figure.name for figure in WORKLOADS["W5"].figures} <= figures.keys()
        assert figures["requests_per_s"] == 1000.0
    assert first.requests == second.requests
    assert len(first.requests) == 4


def test_mixed_lengths_have_the_means_that_the_rate_is_made_for() -> None:
    saturating, arriving = WORKLOADS["W2"], WORKLOADS["W5"]
    assert isinstance(saturating, ManyAtOnce)
    assert isinstance(arriving, OpenLoop)
    assert statistics.mean(arriving.prompt_lengths) == saturating.num_prompt
    assert statistics.mean(arriving.output_lengths) == saturating.num_output


def test_short_workloads_are_the_same_ones() -> None:
    assert [(w.name, type(w), w.figures) for w in SHORT_WORKLOADS.values()] == [
        (w.name, type(w), w.figures) for w in WORKLOADS.values()
    ]


def test_statistics() -> None:
    assert percentile([3, 1, 2, 4], 50) == 2
    assert percentile([3, 1, 2, 4], 99) == 4
    assert Measured.of([8.0, 10.0, 14.0]) == Measured(median=10.0, spread=0.3, num_rounds=3)
    assert Measured.of([5.0]).spread == 0.0
