"""Bytes that one rank will hold, before anything is allocated.

Knows what each part of a shard weighs, exactly, and what the largest step needs beside it. Knows nothing of devices,
speeds or which plan is best. The layers cut their weights by the same `Shard`; where both disagree, this page is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_ray.core.model_config import DTYPE_BYTES, ModelConfig
from qwen_ray.core.plan import INTERMEDIATE_UNIT, EngineConfig, Shard, split_evenly
from qwen_ray.core.step import MAX_PROMPT_LOGITS

MIB = 2**20

# What a process takes on a GPU before its first tensor: CUDA context, cuBLAS and cuDNN workspaces; with peers, NCCL's
# buffers. Figures of vLLM's and SGLang's start-up logs on A100 and H100, rounded up. Fragmentation is what the part
# of the memory above `memory_utilization` is for.
CUDA_CONTEXT_BYTES = 700 * MIB
NCCL_BYTES = 500 * MIB
# Of the sampler, per row and token of the vocabulary: logits, scaled ones, their exponentials, copies for logprobs.
SAMPLER_BYTES = 28
# A CPU rank's interpreter with torch and Ray. Stated, not counted: it is there whatever the model.
CPU_PROCESS_BYTES = 450 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes of one rank.

    `kv_per_block`: K and V of one block in all of the rank's layers; `gather_per_block`: of one layer, where decoding
    copies them together.
    """

    rank: int
    weights: int
    tables: int  # cosines and sines of every position
    kv_per_block: int
    gather_per_block: int
    activations: int
    reserve: int

    @property
    def fixed(self) -> int:
        """All but the KV cache."""
        return self.weights + self.tables + self.activations + self.reserve

    @property
    def per_block(self) -> int:
        """What one more block of KV cache costs."""
        return self.kv_per_block + self.gather_per_block

    def total(self, num_blocks: int) -> int:
        """What must be free for it: the most that it will ever hold."""
        return self.fixed + self.per_block * num_blocks

    def held(self, num_blocks: int) -> int:
        """What stays between steps: weights, tables and KV cache."""
        return self.weights + self.tables + self.kv_per_block * num_blocks


def rank_memory(config: ModelConfig, shard: Shard, dtype: str, engine: EngineConfig, kind: str) -> RankMemory:
    """`engine.num_blocks` is not looked at; `kind` is the device's: cuda or cpu."""
    width = DTYPE_BYTES[dtype]
    kv_per_block = num_kv_elements(config, shard) * engine.block_size * width
    return RankMemory(
        rank=shard.rank,
        weights=num_weights(config, shard) * width,
        tables=engine.max_model_len * config.head_dim * width,
        kv_per_block=kv_per_block,
        gather_per_block=kv_per_block // len(shard.layers) if kind == "cpu" else 0,
        activations=activation_bytes(config, shard, dtype, engine, kind),
        reserve=reserve_bytes(shard, kind),
    )


def num_weights(config: ModelConfig, shard: Shard) -> int:
    """Parameters that a rank holds."""
    copies = int(shard.is_first) + int(shard.is_last)
    if config.tie_word_embeddings and shard.num_stages == 1:
        copies = 1  # one stage embeds and heads with the same matrix; apart, each end holds its own copy
    ends = copies * len(shard.vocab) * config.hidden_size
    return num_layer_weights(config, shard) + ends + (config.hidden_size if shard.is_last else 0)


def num_layer_weights(config: ModelConfig, shard: Shard, *, experts_read: float | None = None) -> int:
    """Parameters of a rank's layers; `experts_read`: of each sparse layer count only so many of its experts."""
    hidden, head_dim = config.hidden_size, config.head_dim
    q, kv = len(shard.heads) * head_dim, len(shard.kv_heads) * head_dim
    attention = 2 * hidden * (q + kv) + (q + 2 * kv if config.qkv_bias else 0) + (2 * head_dim if config.qk_norm else 0)
    num_sparse = sum(map(config.is_sparse, shard.layers)) if config.moe else 0
    dense = 3 * hidden * len(shard.intermediate)
    total = len(shard.layers) * (attention + 2 * hidden) + (len(shard.layers) - num_sparse) * dense
    if config.moe and num_sparse:
        moe = config.moe
        num_experts = moe.num_experts if experts_read is None else experts_read
        sparse = hidden * moe.num_experts + num_experts * 3 * hidden * _cut(moe.moe_intermediate_size, shard)
        if moe.shared_expert_intermediate_size:
            sparse += 3 * hidden * _cut(moe.shared_expert_intermediate_size, shard) + hidden
        total += round(num_sparse * sparse)
    return total


def num_kv_elements(config: ModelConfig, shard: Shard) -> int:
    """Elements of K and V that a rank holds for one token."""
    return 2 * len(shard.layers) * len(shard.kv_heads) * config.head_dim


def activation_bytes(config: ModelConfig, shard: Shard, dtype: str, engine: EngineConfig, kind: str) -> int:
    """The most that the largest step holds at one time.

    The residual and one normed copy live through a layer; beside them either attention's tensors or the MLP's. They
    are gone when the rank that samples sorts its logits.
    """
    width, hidden = DTYPE_BYTES[dtype], config.hidden_size
    tokens, context = engine.max_num_batched_tokens, engine.max_model_len
    q, kv = len(shard.heads) * config.head_dim, len(shard.kv_heads) * config.head_dim
    attention = tokens * (3 * q + 2 * kv) * width  # qkv, rotated q, output
    if kind == "cpu":
        # One chunk at a time: its sequence's keys and values, once more for every query head, and its mask, which is
        # booleans first and numbers in the fused kernel.
        attention += 2 * context * (kv + q) * width + min(tokens, context) * context * (1 + width)
    mlp = tokens * 3 * max(len(shard.intermediate), _cut_expert(config, shard)) * width  # gate and up, their product
    layer = 2 * tokens * hidden * width + max(attention, mlp)
    rows = min(engine.max_num_seqs, tokens)
    prompt_rows = min(MAX_PROMPT_LOGITS, tokens)
    ends = rows * len(shard.vocab) * 4
    if shard.samples:
        ends = config.vocab_size * (rows * SAMPLER_BYTES + prompt_rows * (4 + width))
    return max(layer, ends if shard.is_last else 0)


def reserve_bytes(shard: Shard, kind: str) -> int:
    if kind == "cpu":
        return 0
    return CUDA_CONTEXT_BYTES + (NCCL_BYTES if shard.world_size > 1 else 0)


def in_words(num_bytes: float) -> str:
    """`1.23 GB`, or `4.5 MB` where that would be nothing."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e7 or not num_bytes else f"{num_bytes / 1e6:.1f} MB"


def _cut(size: int, shard: Shard) -> int:
    """A rank's part of an expert's intermediate size, cut as `ParallelPlan.shard` cuts the dense one."""
    unit = INTERMEDIATE_UNIT if size % INTERMEDIATE_UNIT == 0 else 1
    return unit * len(split_evenly(size // unit, shard.tp_size)[shard.tp_rank])


def _cut_expert(config: ModelConfig, shard: Shard) -> int:
    moe = config.moe
    if moe is None:
        return 0
    routed = moe.num_experts_per_tok * _cut(moe.moe_intermediate_size, shard)
    return routed + _cut(moe.shared_expert_intermediate_size, shard)
