"""One actor of a batch's pool: an engine with its ranks, and before it what answers requests in an ingress.

The replica is the one that Serve has: it replaces ranks that die. Knows neither files nor Ray Data.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from qwen_ray.cluster.directory import Directory
from qwen_ray.config import Settings
from qwen_ray.core.plan import ReplicaSpec
from qwen_ray.serving.batch_line import answer
from qwen_ray.serving.frontend import Frontend
from qwen_ray.serving.generation import Model
from qwen_ray.serving.replica import Replica
from qwen_ray.serving.routes import create_app


class BatchReplica(Replica):
    """Started by `start`, without Serve. It ends with its process."""

    def __init__(self) -> None:
        pass


class BatchEngine:
    """Loads in the background; calls wait for it, and raise what it raised. Calls may come from several threads."""

    def __init__(self, settings: Settings, model: Model, spec: ReplicaSpec) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="engine", daemon=True).start()
        self._started = asyncio.run_coroutine_threadsafe(self._start(settings, model, spec), self._loop)

    def __call__(self, batch: dict[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        """`number` of requests and their `line`, to the same numbers and the lines of their answers."""
        self._started.result()
        lines = asyncio.run_coroutine_threadsafe(self._answer_all(batch["line"]), self._loop).result()
        return {"number": batch["number"], "line": lines}

    async def _answer_all(self, texts: Iterable[Any]) -> list[str]:
        return await asyncio.gather(*(answer(self._app, str(text), self._replica.check_health) for text in texts))

    async def _start(self, settings: Settings, model: Model, spec: ReplicaSpec) -> None:
        name = f"batch-{uuid.uuid4().hex[:8]}"
        directory = Directory(name)
        self._replica = BatchReplica()
        await self._replica.start(name, spec, name, 0.0)
        frontend = await Frontend.make(name, settings, model, spec, directory)
        await frontend.start()
        await frontend.dispatcher.until_ready()
        self._app = create_app(frontend.service)
