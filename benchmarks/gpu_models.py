"""Which models are measured on a device, at which sizes, and what of that fits into its memory.

Knows shapes, and the planner's page on memory. Weights are random, made on the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qwen_ray.core.model_config import ModelConfig, MoeConfig, Quantization
from qwen_ray.core.plan import EngineConfig, ParallelPlan, ReplicaSpec
from qwen_ray.machine import num_cores
from qwen_ray.planner.family import FAMILY
from qwen_ray.planner.memory import RankMemory, rank_memory

MEMORY_UTILIZATION = 0.92  # of what the device has: torch's fragments and the libraries' workspaces are outside


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    config: ModelConfig
    quantization: Quantization = "none"
    dtype: str = "bfloat16"
    deterministic: bool = False

    @property
    def weight_dtype(self) -> str:
        """As the planner names it."""
        return self.dtype if self.quantization == "none" else f"{self.quantization}+{self.dtype}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of the workloads: tokens, sequences, steps."""

    batches: tuple[int, ...]  # of decodes, the smallest first
    context: int  # before the first of them
    num_outputs: int  # of each sequence, at the most
    num_timed: int  # steps
    num_profiled: int
    num_prompts: int  # of a prefill
    prompt_length: int
    max_num_batched_tokens: int


CUDA_SIZES = Sizes(
    batches=(1, 64, 256),
    context=1024,
    num_outputs=128,
    num_timed=64,
    num_profiled=6,
    num_prompts=8,
    prompt_length=2048,
    max_num_batched_tokens=8192,
)
CPU_SIZES = Sizes(
    batches=(1, 4),
    context=32,
    num_outputs=16,
    num_timed=6,
    num_profiled=0,
    num_prompts=2,
    prompt_length=64,
    max_num_batched_tokens=128,
)

_TINY = replace(
    FAMILY["qwen2.5-0.5b"],
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)
_TINY_MOE = replace(
    _TINY,
    architecture="qwen3_moe",
    qkv_bias=False,
    qk_norm=True,
    moe=MoeConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True),
)
CUDA_MODELS: dict[str, Model] = {
    "qwen2.5-0.5b": Model(config=FAMILY["qwen2.5-0.5b"]),
    "qwen2.5-7b": Model(config=FAMILY["qwen2.5-7b"]),
    "qwen2.5-7b-deterministic": Model(config=FAMILY["qwen2.5-7b"], deterministic=True),
    "qwen3-8b": Model(config=FAMILY["qwen3-8b"]),
    "qwen3-30b-a3b": Model(config=FAMILY["qwen3-30b-a3b"]),
    "qwen2.5-72b-int4": Model(config=FAMILY["qwen2.5-72b"], quantization="int4"),
}
TINY_MODELS: dict[str, Model] = {
    "tiny": Model(config=_TINY),
    "tiny-moe": Model(config=_TINY_MOE),
    "tiny-int4": Model(config=_TINY, quantization="int4"),
}
MODELS = {**CUDA_MODELS, **TINY_MODELS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A model with as many of the batches as there is memory for, and what the planner says that they take."""

    spec: ReplicaSpec
    batches: tuple[int, ...]
    memory: RankMemory

    @property
    def planned_bytes(self) -> int:
        """With what the device's driver and libraries take."""
        return self.memory.total(self.spec.engine.num_blocks)


def fit(name: str, sizes: Sizes, kind: str, total_bytes: int) -> Fitted | None:
    """None if not even the smallest batch fits."""
    for count in range(len(sizes.batches), 0, -1):
        fitted = _with_batches(name, sizes, sizes.batches[:count], kind)
        if fitted.planned_bytes <= MEMORY_UTILIZATION * total_bytes:
            return fitted
    return None


def _with_batches(name: str, sizes: Sizes, batches: tuple[int, ...], kind: str) -> Fitted:
    model = MODELS[name]
    block_size = EngineConfig(num_blocks=1).block_size
    decoded, prompt = (
        -(-length // block_size) for length in (sizes.context + sizes.num_outputs, sizes.prompt_length + 1)
    )
    engine = EngineConfig(
        num_blocks=max(batches[-1] * decoded, sizes.num_prompts * prompt),
        block_size=block_size,
        max_model_len=max(decoded, prompt) * block_size,
        max_num_seqs=max(batches[-1], sizes.num_prompts),
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        enable_prefix_caching=False,  # every round computes its prompts
    )
    plan = ParallelPlan.of(model.config)
    spec = ReplicaSpec(
        name=name,
        path=name,
        config=model.config,
        plan=plan,
        engine=engine,
        dtype=model.dtype,
        quantization=model.quantization,
        deterministic=model.deterministic,
        device=kind,
        load_format="dummy",
        num_threads=num_cores() if kind == "cpu" else 1,
    )
    memory = rank_memory(model.config, plan.shard(model.config, 0), model.weight_dtype, engine, kind)
    return Fitted(spec=spec, batches=batches, memory=memory)
