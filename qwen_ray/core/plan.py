"""Decisions: how a model is divided, and what every rank of one replica is told.

`ParallelPlan` is the division, `Shard` one rank's part of it, `ReplicaSpec` everything a replica needs to start.
All are frozen arithmetic: no rank asks another, or a global, what is its own.

Ranks are numbered stage by stage: rank = stage * tp + tp_rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from qwen_ray.core.errors import PlanRefused
from qwen_ray.core.model_config import ModelConfig

# Intermediate sizes are cut in multiples of this where they allow it: quantized formats pack 32 values to a block.
INTERMEDIATE_UNIT = 32


# Of a process that computes on a CPU. Threads that meet at an OpenMP barrier spin; by default for so long that, where
# cores are shared, they keep those they wait for from running (a step of the demo model went from 110 to 1,098 ms).
# Sleeping at once (OMP_WAIT_POLICY=PASSIVE) costs a wake-up at each of some 300 barriers a step. Tokens/s of the demo
# model in float32, 2 threads on 2 cores, 1 / 8 sequences, and the same beside a process that keeps one core busy:
#                  default     20000       5000        1000        PASSIVE     1 thread
#     quiet        18.8 / 61   18.7 / 57   13.6 / 34   10.7 / 28   8.1 / 29    11.3 / 33
#     one busy                 5.4 / 37    9.0 / 27    10.7 / 32   11.6 / 32   11.2 / 33
THREAD_ENVIRONMENT = {"GOMP_SPINCOUNT": "20000"}


@dataclass(frozen=True, slots=True)
class Span:
    """The half-open range `[start, stop)`."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def scaled(self, factor: int) -> Span:
        """The span of elements when every item has `factor` of them."""
        return Span(self.start * factor, self.stop * factor)


@lru_cache(maxsize=4096)  # the planner asks for the same splits thousands of times
def split_evenly(total: int, parts: int) -> tuple[Span, ...]:
    """`parts` contiguous spans over `range(total)` whose lengths differ by at most one; the longer ones come first."""
    small, extra = divmod(total, parts)
    ends = list(accumulate([small + (i < extra) for i in range(parts)], initial=0))
    return tuple(Span(a, b) for a, b in pairwise(ends))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one rank holds. Spans are in the units of the whole model: layers, heads, rows of the vocabulary."""

    rank: int
    world_size: int
    stage: int
    num_stages: int
    tp_rank: int
    tp_size: int
    layers: Span
    heads: Span  # query heads
    kv_heads: Span  # every one of them serves len(heads) / len(kv_heads) query heads of this rank
    intermediate: Span
    vocab: Span

    @property
    def is_first(self) -> bool:
        """Embeds."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Holds the output head."""
        return self.stage == self.num_stages - 1

    @property
    def samples(self) -> bool:
        """The one rank that samples and answers the engine."""
        return self.is_last and self.tp_rank == 0

    @property
    def tp_peers(self) -> tuple[int, ...]:
        """Ranks of the same stage, this one among them."""
        first = self.stage * self.tp_size
        return tuple(range(first, first + self.tp_size))

    @property
    def previous_rank(self) -> int | None:
        """The rank that sends this one hidden states: same tp_rank, one stage before."""
        return None if self.is_first else self.rank - self.tp_size

    @property
    def next_rank(self) -> int | None:
        return None if self.is_last else self.rank + self.tp_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """Degrees of one replica, and how many replicas (`dp`). `stages` are the layers of each pipeline stage."""

    tp: int
    pp: int
    stages: tuple[Span, ...]
    dp: int = 1

    @classmethod
    def of(cls, config: ModelConfig, *, tp: int = 1, pp: int = 1, dp: int = 1) -> ParallelPlan:
        """Any degrees that leave every rank at least one head and one layer. Raises PlanRefused otherwise."""
        for name, degree, limit, what in (
            ("tp", tp, config.num_attention_heads, "query heads"),
            ("pp", pp, config.num_hidden_layers, "layers"),
        ):
            if not 1 <= degree <= limit:
                raise PlanRefused(
                    f"{name}={degree} must be between 1 and the model's {limit} {what}.",
                    inequality=f"1 <= {name} ({degree}) <= {limit} {what}",
                )
        return cls(tp=tp, pp=pp, dp=dp, stages=split_evenly(config.num_hidden_layers, pp))

    @property
    def world_size(self) -> int:
        """Ranks of one replica."""
        return self.tp * self.pp

    def shard(self, config: ModelConfig, rank: int) -> Shard:
        stage, tp_rank = divmod(rank, self.tp)
        heads, kv_heads = split_heads(config.num_attention_heads, config.num_key_value_heads, self.tp)[tp_rank]
        unit = INTERMEDIATE_UNIT if config.intermediate_size % INTERMEDIATE_UNIT == 0 else 1
        return Shard(
            rank=rank,
            world_size=self.world_size,
            stage=stage,
            num_stages=self.pp,
            tp_rank=tp_rank,
            tp_size=self.tp,
            layers=self.stages[stage],
            heads=heads,
            kv_heads=kv_heads,
            intermediate=split_evenly(config.intermediate_size // unit, self.tp)[tp_rank].scaled(unit),
            vocab=split_evenly(config.vocab_size, self.tp)[tp_rank],
        )

    def shards(self, config: ModelConfig) -> tuple[Shard, ...]:
        return tuple(self.shard(config, rank) for rank in range(self.world_size))


@lru_cache(maxsize=1024)
def split_heads(num_heads: int, num_kv_heads: int, tp: int) -> tuple[tuple[Span, Span], ...]:
    """(query heads, KV heads) of every tensor rank, for any `tp <= num_heads`.

    Up to `num_kv_heads` ranks, whole KV groups are dealt out. Beyond, a KV head is replicated on the ranks that share
    its query heads. Either way a rank's query heads divide evenly among its KV heads, so that kernels see plain GQA.
    """
    group = num_heads // num_kv_heads  # query heads of one KV head
    if tp <= num_kv_heads:
        return tuple((kv.scaled(group), kv) for kv in split_evenly(num_kv_heads, tp))
    parts: list[tuple[Span, Span]] = []
    for kv_head, owners in enumerate(split_evenly(tp, num_kv_heads)):
        for own in split_evenly(group, len(owners)):
            first = kv_head * group
            parts.append((Span(first + own.start, first + own.stop), Span(kv_head, kv_head + 1)))
    return tuple(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the ranks of one group meet. A repaired group meets anew, under another `name`.

    `address` is HOST:PORT of the TCP store, served by rank 0; `name` prefixes whatever the group names (keys, shared
    memory), so that two groups on one node never collide.
    """

    address: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Sizes of one replica's engine; decided by the planner from Settings and memory."""

    num_blocks: int
    block_size: int = 16
    max_model_len: int = 4096  # tokens, prompt and output
    max_num_seqs: int = 64  # sequences running at once
    max_num_batched_tokens: int = 2048  # of one step
    max_num_waiting: int = 1024  # sequences in the queue; one more is refused
    enable_prefix_caching: bool = True
    depth: int = 1  # steps in flight

    @property
    def num_kv_tokens(self) -> int:
        return self.num_blocks * self.block_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """All that the ranks and the engine of one replica are told, decided before anything is allocated.

    `path` is the checkpoint on the rank's own node: a directory or a GGUF file (a directory with config.json is
    enough for load_format "dummy"). `dtype` is the compute dtype. `device` is "cpu" or "cuda".
    """

    name: str
    path: str
    config: ModelConfig
    plan: ParallelPlan
    engine: EngineConfig
    dtype: str
    device: str = "cpu"
    load_format: str = "auto"  # auto | safetensors | gguf | dummy
    num_threads: int = 1  # of one rank
