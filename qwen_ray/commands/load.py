"""Load on an OpenAI endpoint, anybody's: sends requests, takes the time of every streamed chunk.

Knows HTTP and clocks; nothing of what serves, and nothing of how results are shown. Prompts are token ids of
`/v1/completions`, so that their length is exact on every server and no two requests share a prefix by accident.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from qwen_ray.core.errors import SourceError

WITH_KEY = "give it with --api-key or QWEN_RAY_API_KEY"

# Below this lie the special and single-byte tokens of common vocabularies, above it every one has ids to spare.
FIRST_TOKEN_ID = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSpec:
    """What to send. Either `request_rate` (requests/s, Poisson arrivals) or `concurrency` (requests always open)."""

    url: str
    model: str
    num_requests: int = 64
    concurrency: int = 8
    request_rate: float | None = None
    input_len: int = 128
    output_len: int = 64
    shared_prefix_len: int = 0  # of input_len, the same for all
    ignore_eos: bool = True
    vocab_size: int = 30_000
    seed: int = 0
    timeout: float = 600.0
    api_key: str | None = None

    def prompt(self, index: int) -> list[int]:
        """Token ids of request `index`; the same for the same seed."""
        shared = random.Random(self.seed)
        own = random.Random(f"{self.seed}-{index}")
        prefix = min(self.shared_prefix_len, self.input_len)
        return [
            (shared if i < prefix else own).randrange(FIRST_TOKEN_ID, self.vocab_size) for i in range(self.input_len)
        ]

    def body(self, index: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": self.prompt(index),
            "max_tokens": self.output_len,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            # Not in OpenAI's own API: servers of open models know it, others refuse it.
            **({"ignore_eos": True} if self.ignore_eos else {}),
        }


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request as its client saw it; times in seconds of one clock. `error` is None when it was answered whole."""

    started: float
    arrivals: list[float] = field(default_factory=list[float])  # of every chunk that carried tokens
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.started

    @property
    def e2e(self) -> float:
        return self.arrivals[-1] - self.started

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None with fewer than two."""
        if self.num_output_tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.num_output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: between neighbouring chunks."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


def bearer(api_key: str | None) -> dict[str, str]:
    """Headers for an OpenAI endpoint."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def served_model(url: str, api_key: str | None = None) -> str:
    """The first model that the endpoint lists. Raises SourceError when nothing answers there."""
    try:
        answer = httpx.get(f"{url}/v1/models", headers=bearer(api_key), timeout=10.0)
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise SourceError(f"{url} wants another API key: {WITH_KEY}.")
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, LookupError, TypeError, ValueError) as error:
        raise SourceError(
            f"No OpenAI endpoint answers at {url}: {error}. Is the server up (`qwen-ray serve`)?"
        ) from error


async def run_load(spec: LoadSpec, on_done: Callable[[RequestRecord], None]) -> tuple[list[RequestRecord], float]:
    """Send all of `spec`; the records in order of their start, and the seconds it took."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=spec.concurrency)
    async with httpx.AsyncClient(timeout=spec.timeout, limits=limits, headers=bearer(spec.api_key)) as client:
        started = time.perf_counter()
        gate = asyncio.Semaphore(spec.num_requests if spec.request_rate else spec.concurrency)
        tasks: list[asyncio.Task[RequestRecord]] = []
        async for index in _arrivals(spec):
            await gate.acquire()
            task = asyncio.create_task(_send(client, spec, index))
            task.add_done_callback(lambda done: (gate.release(), on_done(done.result())))
            tasks.append(task)
        records = await asyncio.gather(*tasks)
        return records, time.perf_counter() - started


async def _arrivals(spec: LoadSpec) -> AsyncIterator[int]:
    clock = random.Random(f"{spec.seed}-arrivals")
    due = time.perf_counter()
    for index in range(spec.num_requests):
        yield index
        if spec.request_rate:
            due += clock.expovariate(spec.request_rate)
            await asyncio.sleep(due - time.perf_counter())


async def _send(client: httpx.AsyncClient, spec: LoadSpec, index: int) -> RequestRecord:
    body = spec.body(index)
    record = RequestRecord(started=time.perf_counter())
    try:
        async with client.stream("POST", f"{spec.url}/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                text = (await answer.aread()).decode(errors="replace")
                record.error = f"HTTP {answer.status_code}: {text[:200]}"
                return record
            await _read_events(answer.aiter_lines(), record)
    except httpx.HTTPError as error:
        record.error = f"{type(error).__name__}: {error}"
    if record.error is None and not record.arrivals:
        record.error = "the stream ended without a token"
    return record


async def _read_events(lines: AsyncIterator[str], record: RequestRecord) -> None:
    async for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        now = time.perf_counter()
        event: dict[str, Any] = json.loads(data)
        if event.get("error"):
            record.error = str(event["error"].get("message", event["error"]))
        if event.get("choices"):
            record.arrivals.append(now)
        if usage := event.get("usage"):
            record.num_input_tokens = usage["prompt_tokens"]
            record.num_output_tokens = usage["completion_tokens"]
    record.error = record.error or "the stream broke off before [DONE]"
