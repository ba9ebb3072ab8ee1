"""What a step has to do at the least: the bytes it reads and the operations it computes, from the model's sizes alone.

Knows arithmetic. Bytes are those of weights and of the KV cache; the tokens' own, and the rows of the embedding, are
nothing beside them. Of a sparse layer, a step reads the experts that its tokens go to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qwen_ray.core.model_config import DTYPE_BYTES, ModelConfig
from qwen_ray.core.plan import ParallelPlan, Shard
from qwen_ray.planner.memory import (
    compute_dtype,
    expert_weights,
    layer_weights,
    num_kv_elements,
    num_sparse_layers,
    vocab_matrix_size,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """Of one step, or of several together."""

    num_bytes: float
    operations: float

    def bandwidth_fraction(self, seconds: float, bandwidth: float) -> float:
        """Of `bandwidth` in bytes/s, reached by a step that took so long."""
        return self.num_bytes / seconds / bandwidth

    def rate_fraction(self, seconds: float, rate: float) -> float:
        """The same of operations/s."""
        return self.operations / seconds / rate


def decode_work(config: ModelConfig, dtype: str, num_sequences: int, num_kv_tokens: float) -> StepWork:
    """One token for each sequence; `num_kv_tokens` are those that all of them look back on, together.

    `dtype` is that of the weights, as the planner names it (`int4+bfloat16`, say).
    """
    shard = _whole(config)
    always = replace(layer_weights(config, shard, dtype), experts=0).total
    experts = num_sparse_layers(config, shard) * experts_touched(config, num_sequences)
    head = vocab_matrix_size(config.vocab_size, config.hidden_size, dtype)
    kv = num_kv_elements(config, shard) * DTYPE_BYTES[compute_dtype(dtype)] * num_kv_tokens
    scores = config.num_hidden_layers * config.q_size * num_kv_tokens
    return StepWork(
        num_bytes=always + experts * expert_weights(config, shard, dtype) + head + kv,
        operations=2 * num_sequences * (_layer_parameters(config) + config.vocab_size * config.hidden_size)
        + 4 * scores,
    )


def prefill_operations(config: ModelConfig, num_prompts: int, length: int) -> float:
    """All prompts of `length` tokens; of each, logits for the last position, and attention to no later one."""
    scores = config.num_hidden_layers * config.q_size * length * (length + 1) / 2
    head = config.vocab_size * config.hidden_size
    return num_prompts * (2.0 * length * _layer_parameters(config) + 2 * head + 4 * scores)


def experts_touched(config: ModelConfig, num_tokens: int) -> float:
    """Of a sparse layer's, in the mean, if tokens choose by chance. One token goes to as many as it chooses."""
    moe = config.moe
    if moe is None:
        return 0.0
    missed = (1 - moe.num_experts_per_tok / moe.num_experts) ** num_tokens
    return moe.num_experts * (1 - missed)


def _layer_parameters(config: ModelConfig) -> int:
    """Of all layers, that a token passes through."""
    shard = _whole(config)
    always = replace(layer_weights(config, shard), experts=0).total
    chosen = config.moe.num_experts_per_tok if config.moe else 0
    return always + num_sparse_layers(config, shard) * chosen * expert_weights(config, shard)


def _whole(config: ModelConfig) -> Shard:
    return ParallelPlan.of(config).shard(config, 0)
