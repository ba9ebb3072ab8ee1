"""Whoever owns an engine's requests, and holds it to its word."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from qwen_ray.core.errors import RANKS_FAILED
from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.request import GenerateRequest, TokenDelta
from qwen_ray.core.stats import RequestTimes, StepStats
from qwen_ray.engine.engine import Engine
from tests.unit.engine.fake_ranks import FakeExecutor, alone


class Owner:
    """Keeps the requests' journals, and the engine to its word about ends."""

    def __init__(self, config: EngineConfig, *, latency: int = 1) -> None:
        self.config = config
        self.executor = FakeExecutor(config, latency=latency)
        self.requests: dict[str, GenerateRequest] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, TokenDelta] = {}
        self.messages: list[list[TokenDelta]] = []
        self.steps: list[StepStats] = []
        self.times: list[RequestTimes] = []
        self.on_token: Callable[[TokenDelta], None] = lambda _: None
        self.has_crashed = False
        self._changed = asyncio.Event()
        self.engine = Engine(config, self.executor, self._take, self.steps.append, self.times.append)

    def add(self, *requests: GenerateRequest) -> None:
        for request in requests:
            self.engine.add(request)
            self.requests[request.request_id] = request
            self.tokens[request.request_id] = []

    def _take(self, deltas: list[TokenDelta]) -> None:
        self.messages.append(deltas)
        for delta in deltas:
            assert delta.request_id not in self.ends, "a delta after the end"
            self.tokens[delta.request_id] += delta.token_ids
            if delta.finish_reason:
                self.ends[delta.request_id] = delta
        for delta in deltas:
            self.on_token(delta)
        self._changed.set()

    async def _run(self) -> None:
        try:
            await self.engine.run()
        except BaseException:
            self.has_crashed = True
            self._changed.set()
            raise

    async def all_ended(self) -> None:
        async with asyncio.timeout(30):  # a hang is a failure, not a wait
            while len(self.ends) < len(self.requests):
                assert not self.has_crashed, "the engine's loop has ended"
                self._changed.clear()
                await self._changed.wait()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Owner]:
        task = asyncio.ensure_future(self._run())
        try:
            yield self
        finally:
            self.engine.stop()
            await task  # what crashed it says more than what the test missed

    def check_ended(self) -> None:
        for name, request in self.requests.items():
            tokens, reason = alone(request, self.config)
            tokens = tokens[len(request.output_token_ids) :]
            if self.ends[name].finish_reason == "abort" or self.ends[name].code == RANKS_FAILED:
                assert self.tokens[name] == tokens[: len(self.tokens[name])]
            else:
                assert (self.tokens[name], self.ends[name].finish_reason) == (tokens, reason)
        stats = self.engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
        assert stats.output_tokens_total >= sum(map(len, self.tokens.values()))
        assert len(self.times) == len(self.requests)
        assert self.engine.stalled_seconds == 0.0
