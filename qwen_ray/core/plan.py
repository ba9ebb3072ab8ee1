"""Decisions: how a model is divided, and what every rank of one replica is told.

`ParallelPlan` is the division, `Shard` one rank's part of it, `ReplicaSpec` everything a replica needs to start.
All are frozen arithmetic: no rank asks another, or a global, what is its own.

Ranks are numbered stage by stage, within a stage by data-parallel rank: rank = (stage * dp_attention + dp_rank) * tp +
tp_rank. The `tp` ranks of one dp rank share the attention of the same sequences; all `dp_attention * tp` ranks of a
stage share one set of experts. Those are dealt to `ep` expert ranks, each of which is `expert_tp` neighbouring ranks
that hold a part of every one of its experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise

from qwen_ray.core.errors import PlanRefused
from qwen_ray.core.logs import LogConfig
from qwen_ray.core.model_config import ModelConfig, Quantization

# Intermediate sizes are cut in multiples of this where they allow it: quantized formats pack 32 values to a block.
INTERMEDIATE_UNIT = 32
MOST_GRAPH_ROWS = 256  # sequences of a step that is run as one CUDA graph

# Of a process that computes on a CPU. Threads that meet at an OpenMP barrier spin; by default for so long that, where
# cores are shared, they keep those they wait for from running (a step of the demo model went from 110 to 1,098 ms).
# Sleeping at once (OMP_WAIT_POLICY=PASSIVE) costs a wake-up at each of some 300 barriers a step. Tokens/s of the demo
# model in float32, 2 threads on 2 cores, 1 / 8 sequences, and the same beside a process that keeps one core busy:
#                  default     20000       5000        1000        PASSIVE     1 thread
#     quiet        18.8 / 61   18.7 / 57   13.6 / 34   10.7 / 28   8.1 / 29    11.3 / 33
#     one busy                 5.4 / 37    9.0 / 27    10.7 / 32   11.6 / 32   11.2 / 33
# (Since then our kernels for few rows meet at barriers of their own, which soon let others run, see kernels/cpu/team.h:
# what is said here goes for torch's operations, and for the start and the end of each of our calls.)
# And torch takes memory in pages of 2 MiB where the system lets it: a step of Qwen2.5-0.5B (bfloat16, one sequence)
# took 3 to 8 % less, medians of five alternated runs.
CPU_ENVIRONMENT = {"GOMP_SPINCOUNT": "20000", "THP_MEM_ALLOC_ENABLE": "1"}


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
class ExpertPlacement:
    """Which experts lie where: `slots[layer][ep_rank]` are the ids in that expert rank's slots; () for a dense layer.

    An expert may have several copies, on different ranks. All layers give an expert rank the same number of slots, so
    that experts can change places while serving.
    """

    slots: tuple[tuple[tuple[int, ...], ...], ...]

    @classmethod
    def even(cls, config: ModelConfig, ep: int) -> ExpertPlacement:
        """One copy of each, in order, as even as it goes."""
        assert config.moe is not None, "a dense model has no experts"
        layer = tuple(tuple(span) for span in split_evenly(config.moe.num_experts, ep))
        return cls(slots=tuple(layer if config.is_sparse(i) else () for i in range(config.num_hidden_layers)))

    def num_slots(self, ep_rank: int) -> int:
        """Of one layer."""
        return next(len(layer[ep_rank]) for layer in self.slots if layer)

    def with_layer(self, layer: int, slots: tuple[tuple[int, ...], ...]) -> ExpertPlacement:
        """The same with other slots in one layer."""
        return ExpertPlacement(slots=(*self.slots[:layer], slots, *self.slots[layer + 1 :]))

    def check(self, config: ModelConfig, ep: int) -> None:
        """Raises PlanRefused for a placement that is not one of this model's on `ep` expert ranks."""
        assert config.moe is not None, "a dense model has no experts"
        experts = set(range(config.moe.num_experts))
        sizes: set[tuple[int, ...]] = set()
        for i, layer in enumerate(self.slots):
            if bool(layer) != config.is_sparse(i):
                raise PlanRefused(f"expert placement: layer {i} is {'dense' if layer else 'sparse'}.")
            if layer and (set().union(*layer) != experts or any(len(set(own)) != len(own) for own in layer)):
                raise PlanRefused(f"expert placement: layer {i} must hold each of {len(experts)} experts, once a rank.")
            sizes |= {tuple(map(len, layer))} if layer else set()
        if len(self.slots) != config.num_hidden_layers or {len(size) for size in sizes} != {ep} or len(sizes) != 1:
            raise PlanRefused(
                f"expert placement: {config.num_hidden_layers} layers on {ep} expert ranks with as many slots in every "
                f"layer are needed, got {len(self.slots)} layers with slots {sorted(sizes)}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one rank holds. Spans are in the units of the whole model: layers, heads, rows of the vocabulary."""

    rank: int
    world_size: int
    stage: int
    num_stages: int
    tp_rank: int
    tp_size: int
    dp_rank: int = 0
    dp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    expert_tp_rank: int = 0
    expert_tp_size: int = 1
    layers: Span
    heads: Span  # query heads
    kv_heads: Span  # every one of them serves len(heads) / len(kv_heads) query heads of this rank
    intermediate: Span  # of a dense MLP
    vocab: Span
    shared_intermediate: Span = Span(0, 0)  # of the shared expert
    expert_intermediate: Span = Span(0, 0)  # of every expert that it holds
    experts: ExpertPlacement | None = None  # of the whole model; None: it is dense

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
        """The one rank of its dp rank that samples and answers the engine."""
        return self.is_last and self.tp_rank == 0

    @property
    def stage_size(self) -> int:
        return self.dp_size * self.tp_size

    @property
    def stage_rank(self) -> int:
        """Among the ranks of its stage."""
        return self.dp_rank * self.tp_size + self.tp_rank

    @property
    def stage_peers(self) -> tuple[int, ...]:
        """Ranks of the same stage, this one among them: they share the experts."""
        first = self.stage * self.stage_size
        return tuple(range(first, first + self.stage_size))

    @property
    def tp_peers(self) -> tuple[int, ...]:
        """Ranks of the same stage and dp rank, this one among them: they share attention and dense layers."""
        first = self.rank - self.tp_rank
        return tuple(range(first, first + self.tp_size))

    @property
    def previous_rank(self) -> int | None:
        """The rank that sends this one hidden states: same place, one stage before."""
        return None if self.is_first else self.rank - self.stage_size

    @property
    def next_rank(self) -> int | None:
        return None if self.is_last else self.rank + self.stage_size

    def own_experts(self, layer: int) -> tuple[int, ...]:
        """Ids of the experts in this rank's slots; () in a dense layer."""
        slots = self.experts.slots[layer] if self.experts else ()
        return slots[self.ep_rank] if slots else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """Degrees of one replica, and how many replicas (`dp`). `stages` are the layers of each pipeline stage.

    `dp_attention` copies of the attention in one replica, each for sequences of its own, share one set of experts.
    """

    tp: int
    pp: int
    stages: tuple[Span, ...]
    dp: int = 1
    ep: int = 1
    dp_attention: int = 1
    experts: ExpertPlacement | None = None  # None: the model is dense

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        *,
        tp: int = 1,
        pp: int = 1,
        dp: int = 1,
        ep: int = 1,
        dp_attention: int | None = None,
        experts: ExpertPlacement | None = None,
    ) -> ParallelPlan:
        """Any degrees that leave every rank at least one head, one layer and one expert. Raises PlanRefused otherwise.

        `dp_attention` None: as much as `ep` expert ranks need beyond `tp`. `experts` None: dealt out evenly.
        """
        num_experts = config.moe.num_experts if config.moe else 0
        for name, degree, limit, what in (
            ("tp", tp, config.num_attention_heads, "query heads"),
            ("pp", pp, config.num_hidden_layers, "layers"),
            ("ep", ep, max(num_experts, 1), "experts"),
        ):
            if not 1 <= degree <= limit:
                raise PlanRefused(
                    f"{name}={degree} must be between 1 and the model's {limit} {what}.",
                    inequality=f"1 <= {name} ({degree}) <= {limit} {what}",
                )
        dp_attention = dp_attention or max(1, ep // tp)
        if dp_attention > 1 and not num_experts:
            raise PlanRefused(
                f"dp_attention={dp_attention} shares experts, and the model has none: use as many replicas instead.",
                inequality=f"dp_attention ({dp_attention}) > 1 without experts",
            )
        stage_size = tp * dp_attention
        if stage_size % ep:
            raise PlanRefused(
                f"ep={ep} must divide the {stage_size} ranks of a stage (tp={tp} × dp_attention={dp_attention}).",
                inequality=f"{stage_size} mod ep ({ep}) != 0",
            )
        if num_experts:
            experts = experts or ExpertPlacement.even(config, ep)
            experts.check(config, ep)
        elif experts is not None:
            raise PlanRefused("An expert placement is for a model with experts; this one is dense.")
        return cls(
            tp=tp,
            pp=pp,
            dp=dp,
            ep=ep,
            dp_attention=dp_attention,
            stages=split_evenly(config.num_hidden_layers, pp),
            experts=experts,
        )

    @property
    def stage_size(self) -> int:
        """Ranks of one stage."""
        return self.dp_attention * self.tp

    @property
    def expert_tp(self) -> int:
        """Ranks that one expert is cut over."""
        return self.stage_size // self.ep

    @property
    def world_size(self) -> int:
        """Ranks of one replica."""
        return self.stage_size * self.pp

    def shard(self, config: ModelConfig, rank: int) -> Shard:
        stage, stage_rank = divmod(rank, self.stage_size)
        dp_rank, tp_rank = divmod(stage_rank, self.tp)
        ep_rank, expert_tp_rank = divmod(stage_rank, self.expert_tp)
        heads, kv_heads = split_heads(config.num_attention_heads, config.num_key_value_heads, self.tp)[tp_rank]
        moe = config.moe
        return Shard(
            rank=rank,
            world_size=self.world_size,
            stage=stage,
            num_stages=self.pp,
            tp_rank=tp_rank,
            tp_size=self.tp,
            dp_rank=dp_rank,
            dp_size=self.dp_attention,
            ep_rank=ep_rank,
            ep_size=self.ep,
            expert_tp_rank=expert_tp_rank,
            expert_tp_size=self.expert_tp,
            layers=self.stages[stage],
            heads=heads,
            kv_heads=kv_heads,
            intermediate=split_intermediate(config.intermediate_size, self.tp)[tp_rank],
            vocab=split_evenly(config.vocab_size, self.tp)[tp_rank],
            shared_intermediate=split_intermediate(moe.shared_expert_intermediate_size, self.tp)[tp_rank]
            if moe
            else Span(0, 0),
            expert_intermediate=split_intermediate(moe.moe_intermediate_size, self.expert_tp)[expert_tp_rank]
            if moe
            else Span(0, 0),
            experts=self.experts,
        )

    def shards(self, config: ModelConfig) -> tuple[Shard, ...]:
        return tuple(self.shard(config, rank) for rank in range(self.world_size))


@lru_cache(maxsize=1024)
def split_intermediate(size: int, parts: int) -> tuple[Span, ...]:
    """An MLP's inner size, in multiples of INTERMEDIATE_UNIT where it is one."""
    unit = INTERMEDIATE_UNIT if size % INTERMEDIATE_UNIT == 0 else 1
    return tuple(span.scaled(unit) for span in split_evenly(size // unit, parts))


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
    """Sizes of one replica's engine; decided by the planner from Settings and memory.

    With data-parallel attention, blocks, sequences and batched tokens are those of each of the `dp_attention` dp ranks.
    """

    num_blocks: int
    block_size: int = 16
    max_model_len: int = 4096  # tokens, prompt and output
    max_num_seqs: int = 64  # sequences running at once
    max_num_batched_tokens: int = 2048  # of one step
    max_num_waiting: int = 1024  # sequences in the queue; one more is refused
    light_tenant_slowdown: float = 1.5  # of steps with a light tenant, by others: see `engine/company.py`
    enable_prefix_caching: bool = True
    depth: int = 1  # steps in flight
    dp_attention: int = 1

    @property
    def num_kv_tokens(self) -> int:
        """That one sequence can reach."""
        return self.num_blocks * self.block_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """All that the ranks and the engine of one replica are told, decided before anything is allocated.

    `path` is the checkpoint on the rank's own node: a directory or a GGUF file (a directory with config.json is
    enough for load_format "dummy"). `dtype` is the compute dtype, `quantization` what matrices are rounded to
    as they are read. `device` is "cpu" or "cuda".
    """

    name: str
    path: str
    config: ModelConfig
    plan: ParallelPlan
    engine: EngineConfig
    dtype: str
    quantization: Quantization = "none"
    deterministic: bool = False  # a token's bits depend on no other request
    device: str = "cpu"
    load_format: str = "auto"  # auto | safetensors | gguf | dummy
    num_threads: int = 1  # of one rank
    eplb_interval: float | None = None  # seconds between two re-balancings of experts; None: never
    standby_ranks: bool = False  # a process for each stage that waits to take a rank's place
    logs: LogConfig = field(default_factory=LogConfig)

    @property
    def fingerprint(self) -> str:
        """Of what decides the tokens of an answer: equal ones may carry on each other's requests.

        The plan is no part of it: cut in another way, the model says the same (but for rounding).
        """
        decides = (self.path, self.load_format, self.dtype, self.quantization, self.config, self.engine.max_model_len)
        return hashlib.sha256(repr(decides).encode()).hexdigest()[:16]
