"""One rank in this very process, for one device and no Ray: what `LLM` runs on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from qwen_ray.core.errors import PlanRefused, RankFailed
from qwen_ray.core.plan import Rendezvous, ReplicaSpec
from qwen_ray.core.stats import RankStats
from qwen_ray.core.step import StepBatch, StepResult
from qwen_ray.worker.worker import Worker


class LocalExecutor:
    """An `engine.executor.Executor`. Steps run in a thread of their own, in order; the event loop stays free.

    Loads the model when made. Raises PlanRefused for a plan of several ranks, CheckpointError for a bad checkpoint.
    """

    def __init__(self, spec: ReplicaSpec, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        world_size = spec.plan.world_size
        if world_size != 1:
            degrees = f"tp ({spec.plan.tp}) × pp ({spec.plan.pp})"
            if spec.plan.dp_attention > 1:
                degrees += f" × dp_attention ({spec.plan.dp_attention})"
            raise PlanRefused(
                f"A plan of {world_size} ranks needs a cluster; in one process there is one rank.",
                inequality=f"{degrees} = {world_size} ranks > 1 rank in one process",
            )
        self._worker = Worker(spec, 0)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rank-0")
        try:
            self._thread.submit(self._start, on_progress).result()
        except BaseException:
            self.close()
            raise

    def submit(self, batch: StepBatch) -> Awaitable[StepResult]:
        return asyncio.wrap_future(self._thread.submit(self._execute, batch))

    def stats(self) -> RankStats:
        return self._worker.stats()

    def close(self) -> None:
        """Ends the step that runs, then frees the model."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._worker.close()

    def _start(self, on_progress: Callable[[int, int], None]) -> None:
        self._worker.load(on_progress)
        self._worker.join(Rendezvous(address="", name="local"))
        self._worker.warm_up()

    def _execute(self, batch: StepBatch) -> StepResult:
        try:
            result = self._worker.execute(batch)
        except Exception as error:
            raise RankFailed(0, f"{type(error).__name__}: {error}") from error
        assert result is not None, "the only rank samples"
        return result
