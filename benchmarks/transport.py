"""What carrying a step to the ranks and back costs, with a step that computes nothing.

    .venv/bin/python benchmarks/transport.py [--steps 2000] [--sequences 32]

Three mechanisms in the same run, through real Ray actors on this machine: our channels (`RayExecutor`), plain actor
calls, and a Ray compiled graph. Each is timed from the engine's side, submit to result, one step after the other. Over
channels only the rank that samples answers; Ray's two have every actor answer.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.dag import InputNode, MultiOutputNode
from ray.exceptions import RayChannelTimeoutError
from rich.console import Console
from rich.table import Table

from qwen_ray.cluster import rank_messages
from qwen_ray.cluster.executor import RayExecutor
from qwen_ray.cluster.group import RankGroup
from qwen_ray.core.model_config import ModelConfig, RopeConfig
from qwen_ray.core.plan import EngineConfig, ParallelPlan, Rendezvous, ReplicaSpec
from qwen_ray.core.stats import RankStats
from qwen_ray.core.step import Chunk, Sample, StepBatch, StepResult

WORLD_SIZES = (1, 2, 4)
WARM_UP = 100
LENGTH_BYTES = 4  # of a frame, before what `decode` takes
CONFIG = ModelConfig(
    architecture="qwen2",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope=RopeConfig(),
    max_position_embeddings=64,
    tie_word_embeddings=True,
    qkv_bias=True,
    qk_norm=False,
)


class EmptyWorker:
    """A worker that computes nothing: what is measured is the way there and back."""

    def __init__(self, spec: ReplicaSpec, rank: int, rendezvous: Rendezvous) -> None:
        self._shard = spec.plan.shard(spec.config, rank)

    def join(self) -> None: ...

    def load(self, on_progress: Callable[[int, int], None]) -> None: ...

    def allocate(self) -> None: ...

    def execute(self, batch: StepBatch) -> StepResult | None:
        return answer(batch) if self._shard.samples else None

    def stats(self) -> RankStats:
        shard = self._shard
        return RankStats(
            rank=shard.rank, stage=shard.stage, tp_rank=shard.tp_rank, pid=os.getpid(), node="here", device="cpu"
        )

    def close(self) -> None: ...


# Ray pickles a class of __main__ with all it names, and a codec cannot be pickled: it is named through its module.
class Plain:
    """The same step behind an ordinary actor method; bytes of our codec, which are cheaper than pickled dataclasses."""

    def execute(self, frame: bytes) -> bytes:
        batch = rank_messages.RANK_CODEC.decode(frame[LENGTH_BYTES:])
        assert isinstance(batch, StepBatch)
        return rank_messages.RANK_CODEC.encode(answer(batch))


def answer(batch: StepBatch) -> StepResult:
    samples = tuple(Sample(sequence_id=chunk.sequence_id, token_id=7) for chunk in batch.chunks)
    return StepResult(step_id=batch.step_id, samples=samples)


def decode_step(num_sequences: int) -> StepBatch:
    chunks = [Chunk(sequence_id=i, start=1000 + i, count=1, new_tokens=(i + 70_000,)) for i in range(num_sequences)]
    return StepBatch(step_id=0, chunks=tuple(chunks))


def make_spec(world_size: int) -> ReplicaSpec:
    plan = ParallelPlan.of(CONFIG, tp=world_size)
    return ReplicaSpec(
        name="transport", path="", config=CONFIG, plan=plan, engine=EngineConfig(num_blocks=1), dtype="float32"
    )


async def through_channels(world_size: int, batch: StepBatch, num_steps: int) -> list[float]:
    group = await RankGroup.start(make_spec(world_size), worker=f"{Path(__file__).stem}:EmptyWorker")
    executor = RayExecutor(group)
    times: list[float] = []
    for step in range(num_steps):
        begun = time.perf_counter()
        await executor.submit(replace(batch, step_id=step))
        times.append(time.perf_counter() - begun)
    await group.stop()
    return times


def through_actor_calls(actors: list[Any], batch: StepBatch, num_steps: int) -> list[float]:
    times: list[float] = []
    for step in range(num_steps):
        begun = time.perf_counter()
        frame = rank_messages.RANK_CODEC.encode(replace(batch, step_id=step))
        results = ray.get([actor.execute.remote(frame) for actor in actors])
        rank_messages.RANK_CODEC.decode(results[0][LENGTH_BYTES:])
        times.append(time.perf_counter() - begun)
    return times


def through_compiled_graph(actors: list[Any], batch: StepBatch, num_steps: int) -> list[float]:
    with InputNode() as step_input:
        graph = MultiOutputNode([actor.execute.bind(step_input) for actor in actors]).experimental_compile()
    times: list[float] = []
    for step in range(num_steps):
        begun = time.perf_counter()
        try:
            results = ray.get(graph.execute(rank_messages.RANK_CODEC.encode(replace(batch, step_id=step))))
        except RayChannelTimeoutError:  # seen in most runs on a loaded machine, at 1 and at 4 ranks
            break
        rank_messages.RANK_CODEC.decode(results[0][LENGTH_BYTES:])
        times.append(time.perf_counter() - begun)
    graph.teardown()
    return times


def row(name: str, world_size: int, times: list[float]) -> list[str]:
    kept = sorted(times[WARM_UP:])
    if not kept:
        return [name, str(world_size), f"hung after {len(times)}", "", "", ""]
    figures = (kept[0], statistics.median(kept), kept[int(0.99 * len(kept))])
    return [name, str(world_size), str(len(kept)), *(f"{seconds * 1e3:.3f}" for seconds in figures)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--sequences", type=int, default=32, help="decoding sequences in the step")
    args = parser.parse_args()
    batch = decode_step(args.sequences)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    table = Table(
        "mechanism", "ranks", "steps", "best ms", "p50 ms", "p99 ms", title=f"{args.sequences} sequences a step"
    )
    try:
        for size in WORLD_SIZES:
            times = asyncio.run(through_channels(size, batch, args.steps + WARM_UP))
            table.add_row(*row("channel", size, times))
            actors = [ray.remote(Plain).options(num_cpus=0.05).remote() for _ in range(size)]
            times = through_actor_calls(actors, batch, args.steps // 10 + WARM_UP)
            table.add_row(*row("actor call", size, times))
            times = through_compiled_graph(actors, batch, args.steps + WARM_UP)
            table.add_row(*row("compiled graph", size, times), end_section=True)
            for actor in actors:
                ray.kill(actor)
    finally:
        ray.shutdown()
    Console().print(table)


if __name__ == "__main__":
    main()
