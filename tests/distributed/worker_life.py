"""One rank's life, in a module that the rank's process can import. Not a test itself."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_ray.core.plan import Rendezvous, ReplicaSpec
from qwen_ray.core.stats import RankStats
from qwen_ray.core.step import StepBatch, StepResult
from qwen_ray.worker.worker import Worker


@dataclass(frozen=True)
class Life:
    """What one rank went through."""

    results: list[StepResult | None]
    again: list[StepResult | None]  # the same steps, after all have met anew
    stats: RankStats
    progress: tuple[int, int]


def live(rank: int, spec: ReplicaSpec, address: str, batches: list[StepBatch]) -> Life:
    worker = Worker(spec, rank)
    seen = [(0, 0)]
    try:
        worker.load(lambda done, total: seen.append((done, total)))
        worker.join(Rendezvous(address=address, name="test-worker"))
        worker.warm_up()
        results = [worker.execute(batch) for batch in batches]
        stats = worker.stats()
        worker.join(Rendezvous(address=address, name="test-worker-again"))
        again = [worker.execute(batch) for batch in batches]
        assert worker.stats().num_loads == 1
        return Life(results, again, stats, seen[-1])
    finally:
        worker.close()
