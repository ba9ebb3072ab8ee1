"""Bytes that one rank will hold, before anything is allocated.

Knows what each part of a shard weighs, exactly, and what the largest step needs beside it. Knows nothing of devices,
speeds or which plan is best. The layers cut their weights by the same `Shard`; where both disagree, this page is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from qwen_ray.core.model_config import DTYPE_BYTES, ModelConfig
from qwen_ray.core.plan import MOST_GRAPH_ROWS, EngineConfig, ParallelPlan, Shard, Span
from qwen_ray.core.step import MAX_PROMPT_LOGITS

MIB = 2**20

# What a process takes on a GPU before its first tensor: CUDA context, cuBLAS and cuDNN workspaces; with peers, NCCL's
# buffers. Figures of vLLM's and SGLang's start-up logs on A100 and H100, rounded up. Fragmentation is what the part
# of the memory above `memory_utilization` is for.
CUDA_CONTEXT_BYTES = 700 * MIB
NCCL_BYTES = 500 * MIB
# Of the sampler, per row and token of the vocabulary: logits, scaled ones, their exponentials, copies for logprobs.
SAMPLER_BYTES = 28
# Of the experts' kernels: rows of hidden states, one per token and choice, that are computed at once.
PARTS_AT_ONCE = 16384
CHOICE_BYTES = 16  # a token's expert: its id or slot in 8 bytes, its weight in 4, and room for order
# A CPU rank's interpreter with torch and Ray, and the vocabulary that grammars are compiled over (50 MB of Qwen's).
# Stated, not counted: it is there whatever the model.
CPU_PROCESS_BYTES = 500 * MIB
STANDBY_BYTES = 300 * MIB  # of a process with the same libraries that has yet to become a rank


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


# How matrices lie in 8 and 4 bits: a multiple of so many rows, each of a multiple of so many weights, each row with a
# scale, or each group with a scale and its least weight.
PACKED_LANES = 16
INT8_STEP, INT8_SCALE_BYTES = 64, 4
INT4_STEP, INT4_GROUP, INT4_SCALE_BYTES = 128, 32, 4
# Of a GPU's attention, for a sequence's one new token: the context in parts of so many tokens, so many at most.
SPLIT_TOKENS, MOST_SPLITS = 256, 64
# On a GPU: rows of a matrix that are widened at once, for steps of many tokens; what lies beside the weights while they
# are rounded, and beside a step of few tokens, whose sums are parts at first.
WIDENED_ROWS = 4096
ROUNDING_BYTES = 80 * MIB
PARTIAL_SUMS_BYTES = 4 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What a rank holds, or reads, of the model, by what it is part of: parameters, or bytes of some dtype."""

    attention: int = 0
    mlp: int = 0  # dense ones
    experts: int = 0
    shared_experts: int = 0
    ends: int = 0  # embedding and head
    rest: int = 0  # norms, routers, gates of shared experts

    @property
    def total(self) -> int:
        return self.attention + self.mlp + self.experts + self.shared_experts + self.ends + self.rest

    @property
    def by_part(self) -> dict[str, int]:
        return {
            "attention": self.attention,
            "MLPs": self.mlp,
            "experts": self.experts,
            "shared experts": self.shared_experts,
            "embedding and head": self.ends,
            "norms and routers": self.rest,
        }

    def __add__(self, other: Weights) -> Weights:
        return Weights(
            attention=self.attention + other.attention,
            mlp=self.mlp + other.mlp,
            experts=self.experts + other.experts,
            shared_experts=self.shared_experts + other.shared_experts,
            ends=self.ends + other.ends,
            rest=self.rest + other.rest,
        )

    def __sub__(self, other: Weights) -> Weights:
        return Weights(
            attention=self.attention - other.attention,
            mlp=self.mlp - other.mlp,
            experts=self.experts - other.experts,
            shared_experts=self.shared_experts - other.shared_experts,
            ends=self.ends - other.ends,
            rest=self.rest - other.rest,
        )


def compute_dtype(dtype: str) -> str:
    """Of activations and KV cache, beside weights of `dtype`: a name as in DTYPE_BYTES, fp8, or `int8+bfloat16`.

    The latter are matrices of layers in int8 (or int4), and all else in bfloat16 (or another), but for embedding and
    head, which are in int8.
    """
    return "bfloat16" if dtype == "fp8" else dtype.rpartition("+")[2]


def row_size(size: int, dtype: str | None) -> int:
    """Bytes of `size` weights that are a row of a layer's matrix; None: weights.

    fp8: 1 byte, as in Qwen's FP8 checkpoints. Their scales, 4 bytes for each 128 x 128 weights, are left out.
    """
    if dtype is None or dtype == "fp8":
        return size
    quantization = dtype.partition("+")[0]
    if quantization == "int8":
        return size + -size % INT8_STEP + INT8_SCALE_BYTES
    if quantization == "int4":
        held = size + -size % INT4_STEP
        return held // 2 + held // INT4_GROUP * INT4_SCALE_BYTES
    return size * DTYPE_BYTES[dtype]


def matrix_size(num_rows: int, size: int, dtype: str | None) -> int:
    """Bytes of a layer's matrix [num_rows, size]; as `row_size`."""
    return _num_held(num_rows, dtype) * row_size(size, dtype)


def vocab_matrix_size(num_rows: int, size: int, dtype: str | None) -> int:
    """The same of embedding and head."""
    return _num_held(num_rows, dtype) * vocab_row_size(size, dtype)


def _num_held(num_rows: int, dtype: str | None) -> int:
    return num_rows + -num_rows % PACKED_LANES if is_packed(dtype) else num_rows


def is_packed(dtype: str | None) -> bool:
    """Whether matrices are in 8 or 4 bits."""
    return dtype is not None and dtype.startswith("int")


def vocab_row_size(size: int, dtype: str | None) -> int:
    """As `row_size`, of embedding and head."""
    if dtype is None or dtype == "fp8":
        return size * unit_size(dtype)
    return row_size(size, dtype.replace("int4", "int8"))


def unit_size(dtype: str | None) -> int:
    """Bytes of a weight that is in no such matrix: a bias, a norm, a router's."""
    return 1 if dtype is None else DTYPE_BYTES[compute_dtype(dtype)]


def rank_memory(
    config: ModelConfig, shard: Shard, dtype: str, engine: EngineConfig, kind: str, *, moves_experts: bool = False
) -> RankMemory:
    """`engine.num_blocks` is not looked at; `dtype` is that of the weights; `kind` is the device's: cuda or cpu.

    `moves_experts`: between two steps, new experts for all slots of a layer may lie beside those that give way.
    """
    arrivals = num_slots(shard) * expert_weights(config, shard, dtype) if moves_experts else 0
    width = DTYPE_BYTES[compute_dtype(dtype)]
    activations = activation_bytes(config, shard, compute_dtype(dtype), engine, kind)
    if kind == "cuda" and is_packed(dtype):
        widened = widened_bytes(config, shard, compute_dtype(dtype), engine)
        activations = max(activations + widened, ROUNDING_BYTES)
    kv_per_block = num_kv_elements(config, shard) * engine.block_size * width
    return RankMemory(
        rank=shard.rank,
        weights=rank_weights(config, shard, dtype).total,
        tables=engine.max_model_len * config.head_dim * width,
        kv_per_block=kv_per_block,
        gather_per_block=kv_per_block // len(shard.layers) if kind == "cpu" else 0,
        activations=max(activations, arrivals) + graph_bytes(config, shard, compute_dtype(dtype), engine, kind),
        reserve=reserve_bytes(shard, kind),
    )


def rank_weights(config: ModelConfig, shard: Shard, dtype: str | None = None) -> Weights:
    """All that a rank holds, in bytes of `dtype`; None: in parameters, here and below."""
    copies = int(shard.is_first) + int(shard.is_last)
    if config.tie_word_embeddings and shard.num_stages == 1:
        copies = 1  # one stage embeds and heads with the same matrix; apart, each end holds its own copy
    ends = copies * vocab_matrix_size(len(shard.vocab), config.hidden_size, dtype)
    last_norm = config.hidden_size * unit_size(dtype) if shard.is_last else 0
    return layer_weights(config, shard, dtype) + Weights(ends=ends, rest=last_norm)


def layer_weights(config: ModelConfig, shard: Shard, dtype: str | None = None) -> Weights:
    """Of a rank's layers."""
    hidden, head_dim, num_layers = config.hidden_size, config.head_dim, len(shard.layers)
    unit = unit_size(dtype)
    q, kv = len(shard.heads) * head_dim, len(shard.kv_heads) * head_dim
    biases = q + 2 * kv if config.qkv_bias else 0
    norms = 2 * hidden + (2 * head_dim if config.qk_norm else 0)
    num_sparse = num_sparse_layers(config, shard)
    moe = config.moe
    router = hidden * (moe.num_experts + int(moe.shared_expert_intermediate_size > 0)) if moe else 0
    return Weights(
        attention=num_layers * (matrix_size(q + 2 * kv, hidden, dtype) + matrix_size(hidden, q, dtype) + biases * unit),
        mlp=(num_layers - num_sparse) * mlp_weights(config, len(shard.intermediate), dtype),
        experts=num_sparse * num_slots(shard) * expert_weights(config, shard, dtype),
        shared_experts=num_sparse * mlp_weights(config, len(shard.shared_intermediate), dtype),
        rest=(num_layers * norms + num_sparse * router) * unit,
    )


def mlp_weights(config: ModelConfig, inner: int, dtype: str | None = None) -> int:
    """Of gate, up and down with `inner` in between."""
    return matrix_size(2 * inner, config.hidden_size, dtype) + matrix_size(config.hidden_size, inner, dtype)


def expert_weights(config: ModelConfig, shard: Shard, dtype: str | None = None) -> int:
    """Of one expert, what a rank holds of those in its slots."""
    return mlp_weights(config, len(shard.expert_intermediate), dtype)


def num_slots(shard: Shard) -> int:
    """For experts, in each of a rank's layers that has any."""
    return shard.experts.num_slots(shard.ep_rank) if shard.experts else 0


def num_sparse_layers(config: ModelConfig, shard: Shard) -> int:
    """Layers of a rank's stage that have experts."""
    return _num_sparse(config, shard.layers) if config.moe else 0


@lru_cache(maxsize=4096)
def _num_sparse(config: ModelConfig, layers: Span) -> int:
    return sum(map(config.is_sparse, layers))


def copied_weights(config: ModelConfig, plan: ParallelPlan, dtype: str | None = None) -> Weights:
    """What the ranks of one replica hold beyond one copy of the model."""
    ranks = sum((rank_weights(config, shard, dtype) for shard in plan.shards(config)), Weights())
    return ranks - model_weights(config, dtype)


def model_weights(config: ModelConfig, dtype: str | None = None) -> Weights:
    """Of the checkpoint: what a rank alone would hold."""
    return rank_weights(config, ParallelPlan.of(config).shard(config, 0), dtype)


def num_kv_elements(config: ModelConfig, shard: Shard) -> int:
    """Elements of K and V that a rank holds for one token."""
    return 2 * len(shard.layers) * len(shard.kv_heads) * config.head_dim


def activation_bytes(config: ModelConfig, shard: Shard, dtype: str, engine: EngineConfig, kind: str) -> int:
    """The most that the largest step holds at one time.

    The residual and one normed copy live through a layer; beside them either attention's tensors or the MLP's. They
    are gone when the rank that samples sorts its logits.
    """
    layer = layer_activation_bytes(config, shard, dtype, engine, kind)
    rows = min(engine.max_num_seqs, engine.max_num_batched_tokens)
    prompt_rows = min(MAX_PROMPT_LOGITS, engine.max_num_batched_tokens)
    ends = rows * len(shard.vocab) * 4
    if shard.samples:
        ends = config.vocab_size * (rows * SAMPLER_BYTES + prompt_rows * (4 + DTYPE_BYTES[dtype]))
    return max(layer, ends if shard.is_last else 0)


def layer_activation_bytes(config: ModelConfig, shard: Shard, dtype: str, engine: EngineConfig, kind: str) -> int:
    """The same, of layers alone."""
    width, hidden = DTYPE_BYTES[dtype], config.hidden_size
    tokens, context = engine.max_num_batched_tokens, engine.max_model_len
    q, kv = len(shard.heads) * config.head_dim, len(shard.kv_heads) * config.head_dim
    attention = tokens * (3 * q + 2 * kv) * width  # qkv, rotated q, output
    if kind == "cpu":
        # One chunk at a time: its sequence's keys and values, once more for every query head, and its mask, which is
        # booleans first and numbers in the fused kernel.
        attention += 2 * context * (kv + q) * width + min(tokens, context) * context * (1 + width)
    else:  # of each part: weighted values of all heads, a largest score and a sum, in float32
        num_splits = min(MOST_SPLITS, -(-context // SPLIT_TOKENS))
        attention += min(engine.max_num_seqs, tokens) * len(shard.heads) * num_splits * (config.head_dim + 2) * 4
    num_sparse = num_sparse_layers(config, shard)
    # gate and up, their product
    mlp = tokens * 3 * len(shard.intermediate) * width if num_sparse < len(shard.layers) else 0
    experts = expert_activation_bytes(config, shard, dtype, engine, kind) if num_sparse else 0
    return 2 * tokens * hidden * width + max(attention, mlp, experts)


def expert_activation_bytes(config: ModelConfig, shard: Shard, dtype: str, engine: EngineConfig, kind: str) -> int:
    """Of a layer with experts, when every token of every dp rank comes to this rank."""
    assert config.moe is not None, "a dense model has no experts"
    width, hidden, inner = DTYPE_BYTES[dtype], config.hidden_size, len(shard.expert_intermediate)
    num_choices, own = config.moe.num_experts_per_tok, engine.max_num_batched_tokens
    # The router's logits, once more in float32, and their softmax; the shared expert; what the routed ones add.
    router = own * (config.moe.num_experts * (width + 8) + num_choices * CHOICE_BYTES)
    beside = router + own * (3 * len(shard.shared_intermediate) + hidden) * width
    rows, packed = own * shard.dp_size, 0
    if shard.dp_size > 1:
        # Rows as they are sent, one for each expert rank at most, and as they come, with slots and weights.
        sent = -(-own // shard.tp_size) * min(num_choices, shard.ep_size)
        packed = (sent + rows) * (hidden * width + num_choices * CHOICE_BYTES)
    answers = 2 * rows * hidden * width  # of the pieces, and put together
    parts = min(PARTS_AT_ONCE, rows * num_choices)
    if kind == "cpu":
        # What every choice gives, and either gate and up for every choice, or of one expert at a time its rows, gate
        # and up, their product and its answer.
        piece = parts * hidden + max(parts * 2 * inner, parts // num_choices * (2 * hidden + 3 * inner))
    else:  # rows in order of experts, gate and up, their product, what experts give, in their order and the tokens'
        piece = parts * (3 * hidden + 3 * inner)
    return beside + packed + answers + piece * width + parts // num_choices * hidden * 4  # added up in float32


def graph_bytes(config: ModelConfig, shard: Shard, dtype: str, engine: EngineConfig, kind: str) -> int:
    """What CUDA graphs keep for themselves: all share the room of the largest. A rank with peers makes none."""
    if kind != "cuda" or shard.world_size > 1:
        return 0
    rows = min(MOST_GRAPH_ROWS, engine.max_num_seqs)
    return layer_activation_bytes(config, shard, dtype, replace(engine, max_num_batched_tokens=rows), kind)


def widened_bytes(config: ModelConfig, shard: Shard, dtype: str, engine: EngineConfig) -> int:
    """The most that a product with a packed matrix has beside it on a GPU: some of its rows as `dtype`, and their part
    of the result where that is not all of it."""
    hidden, q, kv = config.hidden_size, len(shard.heads) * config.head_dim, len(shard.kv_heads) * config.head_dim
    shapes = [(q + 2 * kv, hidden), (hidden, q)]
    inner = [len(shard.intermediate), len(shard.shared_intermediate)]
    if shard.experts is not None:
        inner.append(len(shard.expert_intermediate))
    shapes += [shape for size in inner for shape in ((2 * size, hidden), (hidden, size))]
    if shard.is_last:
        shapes.append((len(shard.vocab), hidden))
    most = 0
    for num_rows, size in shapes:
        at_once = min(num_rows, WIDENED_ROWS)
        result = engine.max_num_batched_tokens * at_once if num_rows > at_once else 0
        most = max(most, at_once * size + result)
    return most * DTYPE_BYTES[dtype] + PARTIAL_SUMS_BYTES


def reserve_bytes(shard: Shard, kind: str) -> int:
    if kind == "cpu":
        return 0
    return CUDA_CONTEXT_BYTES + (NCCL_BYTES if shard.world_size > 1 else 0)


def in_words(num_bytes: float) -> str:
    """`1.23 GB`, or `4.5 MB` where that would be nothing."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e7 or not num_bytes else f"{num_bytes / 1e6:.1f} MB"
