"""What is asked of the planner, and what it answers: a request, candidates, a report.

Knows how a candidate becomes what an engine and its ranks are told. Searching is `search`, wording is `explain`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_ray.core.errors import PlanRefused
from qwen_ray.core.hardware import Hardware
from qwen_ray.core.model_config import ModelConfig, Quantization
from qwen_ray.core.plan import EngineConfig, ParallelPlan, ReplicaSpec
from qwen_ray.planner.cost import Estimate
from qwen_ray.planner.memory import RankMemory, compute_dtype
from qwen_ray.planner.placement import Replica


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Aims in seconds: time to first token, time per output token."""

    ttft: float | None = None
    tpot: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """None means: find it.

    `concurrency` is the number of requests at once over all replicas, of `prompt_len` and `output_len` tokens; they
    only serve the estimates. `memory_utilization` is the part of a device's (on CPU: a node's) memory that may be used.
    `kv_memory_bytes` is the KV cache of the rank that holds most of it. `device` is cuda or cpu; None: GPUs where there
    are any. `dtype` may be fp8, of which weights are made and nothing else is. `expert_load` is tokens by layer and
    expert; `num_redundant_experts` are copies in each layer with experts.
    """

    config: ModelConfig
    hardware: Hardware
    model: str = ""
    dtype: str | None = None  # None: the checkpoint's own
    quantization: Quantization = "none"
    tp: int | None = None
    pp: int | None = None
    dp: int | None = None
    ep: int | None = None
    dp_attention: int | None = None
    num_redundant_experts: int = 0
    expert_load: tuple[tuple[float, ...], ...] | None = None
    eplb_interval: float | None = None  # seconds; None: experts stay where they are
    max_model_len: int | None = None
    concurrency: int = 64
    prompt_len: int = 1024
    output_len: int = 256
    slo: Slo = field(default_factory=Slo)
    memory_utilization: float = 0.9
    kv_memory_bytes: int | None = None
    num_blocks: int | None = None
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_num_waiting: int = 1024
    light_tenant_slowdown: float = 1.5
    enable_prefix_caching: bool = True
    standby_ranks: bool = False
    deterministic: bool = False
    device: str | None = None

    @property
    def weight_dtype(self) -> str:
        """As `memory.compute_dtype` says them."""
        dtype = self.dtype or self.config.dtype
        return dtype if self.quantization == "none" else f"{self.quantization}+{dtype}"

    @property
    def compute_dtype(self) -> str:
        """Of activations and KV cache."""
        return compute_dtype(self.weight_dtype)

    @property
    def kind(self) -> str:
        """Of the devices that are planned for."""
        kinds = {node.device.kind for node in self.hardware.nodes}
        return self.device or ("cuda" if "cuda" in kinds else "cpu")

    @property
    def context_limit(self) -> int:
        """Positions that the model was made for, or stretched to."""
        rope = self.config.rope
        # llama3 checkpoints state the stretched length, the others what the model was trained on.
        if rope.kind not in ("yarn", "linear") or rope.original_max_position_embeddings is None:
            return self.config.max_position_embeddings
        return max(self.config.max_position_embeddings, int(rope.original_max_position_embeddings * rope.factor))


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to divide the model. `reason` says why it cannot hold, `miss` which aim it misses; None for neither.

    `ranks` are those of one replica; `placement` gives, for each replica, the node of each stage. A rejected candidate
    has no blocks and no estimate.
    """

    request: PlanRequest
    plan: ParallelPlan
    ranks: tuple[RankMemory, ...] = ()
    placement: tuple[Replica, ...] = ()
    engine: EngineConfig
    usable_bytes: int = 0  # of the fullest device, or CPU node
    needed_bytes: int = 0  # there, with the KV cache that is asked for at least
    num_threads: int = 1  # of one rank
    estimate: Estimate | None = None
    reason: str | None = None
    miss: str | None = None

    @property
    def fits(self) -> bool:
        return self.reason is None

    @property
    def degrees(self) -> str:
        """Of one replica: `tp=4 pp=2`, and of a model with experts those of them too."""
        plan = self.plan
        text = f"tp={plan.tp} pp={plan.pp}"
        return f"{text} ep={plan.ep} dp_attention={plan.dp_attention}" if self.request.config.moe else text

    @property
    def kv_bytes_per_token(self) -> int:
        """Of all ranks that hold a part of one sequence: those of one dp rank."""
        return sum(rank.kv_per_block for rank in self.ranks) // self.engine.block_size // self.plan.dp_attention

    @property
    def num_kv_tokens(self) -> int:
        """That one replica can hold, all dp ranks together."""
        return self.engine.num_kv_tokens * self.plan.dp_attention

    @property
    def max_sequences(self) -> int:
        """That one replica can hold at full length."""
        return self.engine.num_kv_tokens // self.engine.max_model_len * self.plan.dp_attention

    @property
    def is_full_context(self) -> bool:
        return self.engine.max_model_len >= (self.request.max_model_len or self.request.context_limit)

    def rank_bytes(self, rank: int) -> int:
        """All that the planner says this rank will hold."""
        return self.ranks[rank].total(self.engine.num_blocks)

    def engine_config(self) -> EngineConfig:
        """Raises PlanRefused for a candidate that does not fit."""
        if self.reason is not None:
            raise PlanRefused(f"{self.degrees} does not fit.", inequality=self.reason)
        return self.engine

    def replica_spec(self, *, name: str, path: str, load_format: str = "auto") -> ReplicaSpec:
        """What each replica is started with. Raises PlanRefused for a candidate that does not fit."""
        return ReplicaSpec(
            name=name,
            path=path,
            config=self.request.config,
            plan=self.plan,
            engine=self.engine_config(),
            dtype=self.request.compute_dtype,
            quantization=self.request.quantization,
            deterministic=self.request.deterministic,
            device=self.request.kind,
            load_format=load_format,
            num_threads=self.num_threads,
            eplb_interval=self.request.eplb_interval,
            # On a GPU it would have to be given the device of the rank that it follows.
            standby_ranks=self.request.standby_ranks and self.request.kind == "cpu",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """All candidates, best first, and the best one if any fits. `advice` says what would fit where nothing does."""

    request: PlanRequest
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    advice: tuple[str, ...] = ()

    def require(self) -> Candidate:
        """The chosen candidate. Raises PlanRefused with the inequality of the one that came closest."""
        if self.chosen is not None:
            return self.chosen
        closest = self.candidates[0]
        what = self.request.model or f"the {self.request.config.architecture} model"
        message = (
            f"{what} ({self.request.weight_dtype}) does not fit {self.request.hardware.description}; closest was "
            f"{closest.degrees}: {closest.reason}."
        )
        raise PlanRefused(" ".join((message, *self.advice)), inequality=closest.reason)
