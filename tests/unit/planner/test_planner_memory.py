"""Bytes of ranks: by hand, against the whole model, and against what the layers really allocate."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.core.model_config import DTYPE_BYTES, ModelConfig, MoeConfig, Quantization, RopeConfig
from qwen_ray.core.plan import EngineConfig, ParallelPlan
from qwen_ray.kernels import quantized
from qwen_ray.models.registry import build
from qwen_ray.planner import memory as memory_page
from qwen_ray.planner.experts import balance, even_slots
from qwen_ray.planner.family import FAMILY, lookup
from qwen_ray.planner.memory import copied_weights, model_weights, num_kv_elements, rank_memory, rank_weights

ENGINE = EngineConfig(num_blocks=0, max_model_len=256, max_num_seqs=4, max_num_batched_tokens=64)

QUANTIZATIONS: list[Quantization] = ["none", "int8", "int4"]


def known(name: str) -> ModelConfig:
    config = lookup(name)
    assert config is not None
    return config


def test_a_rank_of_qwen2_5_0_5b_at_tp_2() -> None:
    config = known("Qwen/Qwen2.5-0.5B-Instruct")
    plan = ParallelPlan.of(config, tp=2)
    # 7 of 14 heads, 1 of 2 KV heads, 64 wide; hidden 896; 2,432 of 4,864 intermediate; 75,968 rows of the vocabulary.
    # q and o 2 * 448 * 896 = 802,816; k and v 2 * 64 * 896 = 114,688; biases 448 + 2 * 64 = 576;
    # MLP 3 * 896 * 2,432 = 6,537,216; norms 2 * 896 = 1,792: a layer 7,457,088; 24 of them 178,970,112.
    # One matrix for embedding and head 75,968 * 896 = 68,067,328; final norm 896.
    assert rank_weights(config, plan.shard(config, 0)).total == 247_038_336
    memory = rank_memory(config, plan.shard(config, 1), "bfloat16", ENGINE, "cuda")
    assert memory.weights == 2 * 247_038_336
    assert memory.kv_per_block == 16 * 24 * 2 * 64 * 2  # tokens, layers, K and V, one head, bytes
    assert memory.tables == 256 * 64 * 2


def test_a_rank_of_qwen2_5_72b_at_tp_8() -> None:
    config = known("Qwen/Qwen2.5-72B-Instruct")
    plan = ParallelPlan.of(config, tp=8)
    # 8 of 64 heads, 1 of 8 KV heads, 128 wide; hidden 8,192. The intermediate size is 924 units of 32, so the first
    # four ranks have 116 of them, 3,712. q and o 2 * 1,024 * 8,192 = 16,777,216; k and v 2 * 128 * 8,192 = 2,097,152;
    # biases 1,024 + 256 = 1,280; MLP 3 * 8,192 * 3,712 = 91,226,112; norms 16,384: a layer 110,118,144; 80 of them
    # 8,809,451,520. Embedding and head 2 * 19,008 * 8,192 = 311,427,072; final norm 8,192.
    assert rank_weights(config, plan.shard(config, 0)).total == 9_120_886_784
    assert num_kv_elements(config, plan.shard(config, 0)) == 80 * 2 * 128
    total = sum(rank_memory(config, s, "bfloat16", ENGINE, "cuda").weights for s in plan.shards(config))
    assert total == pytest.approx(145.4e9, rel=0.02)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(1, 4))
    head_dim = draw(st.sampled_from([4, 8]))
    num_layers = draw(st.integers(1, 6))
    is_qwen3 = draw(st.booleans())
    moe = None
    if draw(st.booleans()):
        moe = MoeConfig(
            num_experts=draw(st.integers(2, 7)),
            num_experts_per_tok=2,
            moe_intermediate_size=draw(st.integers(16, 96)),
            norm_topk_prob=True,
            shared_expert_intermediate_size=0 if is_qwen3 else draw(st.sampled_from([0, 48])),
            decoder_sparse_step=draw(st.integers(1, min(2, num_layers))),
        )
    return ModelConfig(
        architecture=("qwen3_moe" if moe else "qwen3") if is_qwen3 else ("qwen2_moe" if moe else "qwen2"),
        vocab_size=draw(st.integers(32, 99)),
        hidden_size=heads * head_dim,
        intermediate_size=draw(st.integers(16, 200)),
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        rope=RopeConfig(),
        max_position_embeddings=256,
        tie_word_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        qk_norm=is_qwen3,
        moe=moe,
    )


def draw_plan(data: st.DataObject, config: ModelConfig, *, max_tp: int) -> ParallelPlan:
    tp = data.draw(st.integers(1, max_tp), label="tp")
    pp = data.draw(st.integers(1, config.num_hidden_layers), label="pp")
    if config.moe is None:
        return ParallelPlan.of(config, tp=tp, pp=pp)
    dp_attention = data.draw(st.integers(1, 3), label="dp_attention")
    num_experts, size = config.moe.num_experts, tp * dp_attention
    divisors = [ep for ep in range(1, min(size, num_experts) + 1) if size % ep == 0]
    ep = data.draw(st.sampled_from(divisors), label="ep")
    redundant = data.draw(st.integers(0, min(3, num_experts * (ep - 1))), label="redundant")
    load = [[1.0] * num_experts if config.is_sparse(i) else [] for i in range(config.num_hidden_layers)]
    experts = balance(load, ep=ep, num_slots=even_slots(num_experts, ep, redundant))
    return ParallelPlan.of(config, tp=tp, pp=pp, ep=ep, dp_attention=dp_attention, experts=experts)


def copied_by_hand(config: ModelConfig, plan: ParallelPlan) -> int:
    """Parameters that ranks hold on purpose beyond one copy of the model; KV heads are not cut finer than they are."""
    hidden, layers, size = config.hidden_size, config.num_hidden_layers, plan.stage_size
    norms = layers * (2 * hidden + (2 * config.head_dim if config.qk_norm else 0)) + hidden
    attention = layers * hidden * (2 * config.q_size + 2 * config.kv_size)
    attention += layers * (config.q_size + 2 * config.kv_size) * int(config.qkv_bias)
    ends = config.vocab_size * hidden * (1 if config.tie_word_embeddings and plan.pp == 1 else 2)
    num_sparse = sum(map(config.is_sparse, range(layers))) if config.moe else 0
    mlps = (layers - num_sparse) * 3 * hidden * config.intermediate_size
    routers = shared = redundant = 0
    if config.moe and plan.experts:
        has_shared = config.moe.shared_expert_intermediate_size > 0
        routers = num_sparse * hidden * (config.moe.num_experts + has_shared)
        shared = num_sparse * 3 * hidden * config.moe.shared_expert_intermediate_size
        num_slots = sum(plan.experts.num_slots(rank) for rank in range(plan.ep))
        one = 3 * hidden * config.moe.moe_intermediate_size
        redundant = num_sparse * (num_slots - config.moe.num_experts) * one
    kv_copies = max(
        0, plan.tp - config.num_key_value_heads
    )  # of one dp rank: tensor ranks without a KV head of their own
    kv = layers * kv_copies * 2 * config.head_dim * (hidden + int(config.qkv_bias))
    tied = config.vocab_size * hidden if config.tie_word_embeddings and plan.pp > 1 else 0
    by_dp_rank = (plan.dp_attention - 1) * (attention + mlps + shared + ends)
    return by_dp_rank + (size - 1) * (norms + routers) + plan.dp_attention * kv + redundant + tied


@given(config=configs(), data=st.data())
@settings(max_examples=100, deadline=None)
def test_shards_add_up_to_the_model(config: ModelConfig, data: st.DataObject) -> None:
    """Every parameter once, and beyond that only what is held on purpose."""
    plan = draw_plan(data, config, max_tp=config.num_attention_heads)
    shards = plan.shards(config)
    total = sum(rank_weights(config, s).total for s in shards)
    assert total == config.num_parameters + copied_by_hand(config, plan)
    assert copied_weights(config, plan).total == copied_by_hand(config, plan)
    assert model_weights(config).total == config.num_parameters
    kv = 2 * config.num_hidden_layers * config.head_dim * max(config.num_key_value_heads, plan.tp) * plan.dp_attention
    assert sum(num_kv_elements(config, s) for s in shards) == kv


@pytest.mark.parametrize("name", [name for name, config in FAMILY.items() if config.moe])
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_ranks_add_up_to_the_checkpoint_of_every_mixture(name: str, dtype: str) -> None:
    """Bytes of all ranks, less the copies counted by hand, are the checkpoint's within 1 %: what `plan` prints."""
    config = known(name)
    # In fp8, all but embedding, head, norms and routers is one byte.
    checkpoint = 2 * config.num_parameters
    if dtype == "fp8":
        wide = config.num_embedding_parameters + config.num_hidden_layers * config.hidden_size * known_experts(config)
        checkpoint = config.num_parameters + wide
    for tp, copies, ep, pp in ((1, 1, 1, 1), (4, 1, 4, 2), (2, 1, 1, 3), (1, 4, 4, 1), (2, 4, 8, 1), (8, 1, 2, 1)):
        plan = ParallelPlan.of(config, tp=tp, pp=pp, ep=ep, dp_attention=copies)
        held = sum(rank_memory(config, s, dtype, ENGINE, "cuda").weights for s in plan.shards(config))
        copied = copied_weights(config, plan)
        assert copied.total == copied_by_hand(config, plan)
        assert held - copied_weights(config, plan, dtype).total == pytest.approx(checkpoint, rel=0.01)


def known_experts(config: ModelConfig) -> int:
    assert config.moe is not None
    return config.moe.num_experts


@given(config=configs(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_layers_hold_what_is_said(config: ModelConfig, data: st.DataObject) -> None:
    plan = draw_plan(data, config, max_tp=min(4, config.num_attention_heads))
    dtype = data.draw(st.sampled_from(["float32", "bfloat16"]), label="dtype")
    quantization = "none" if config.moe else data.draw(st.sampled_from(QUANTIZATIONS), label="quantization")
    weight_dtype = dtype if quantization == "none" else f"{quantization}+{dtype}"
    tensor, stage_group = (SimpleNamespace(size=n, all_reduce=None, gather=None) for n in (plan.tp, plan.stage_size))
    groups: Any = SimpleNamespace(tensor=tensor, stage=stage_group)
    for shard in plan.shards(config):
        compute: torch.dtype = getattr(torch, dtype)
        stage = build(config, shard, groups, torch.device("cpu"), compute, max_len=256, quantization=quantization)
        memory = rank_memory(config, shard, weight_dtype, ENGINE, "cpu")
        assert memory.weights + memory.tables == stage.num_bytes
        per_token = sum(2 * a.num_kv_heads * a.head_dim for a in stage.attentions) * DTYPE_BYTES[dtype]
        assert memory.kv_per_block == per_token * ENGINE.block_size


def test_weights_of_qwen2_5_0_5b_in_8_and_4_bits() -> None:
    config = known("Qwen/Qwen2.5-0.5B-Instruct")
    shard = ParallelPlan.of(config).shard(config, 0)
    # A layer has 1,152 rows of q, k and v and 2 * 4,864 of gate and up, 896 long; 896 rows of o, 896 long, and of down,
    # 4,864 long. Each row has a scale of 4 bytes, or 4 bytes for each 32 weights. All are multiples of 128.
    # Biases 1,152 and norms 1,792 of a layer, and a norm of 896, are bfloat16; 151,936 rows of the embedding are int8.
    rest = 24 * 2 * (1_152 + 1_792) + 2 * 896 + 151_936 * (896 + 4)
    rows, long_rows = 1_152 + 2 * 4_864 + 896, 896
    in_int8 = 24 * (rows * (896 + 4) + long_rows * (4_864 + 4)) + rest
    assert rank_memory(config, shard, "int8+bfloat16", ENGINE, "cpu").weights == in_int8
    in_int4 = 24 * (rows * (448 + 112) + long_rows * (2_432 + 608)) + rest
    assert rank_memory(config, shard, "int4+bfloat16", ENGINE, "cpu").weights == in_int4
    assert rank_memory(config, shard, "int4+bfloat16", ENGINE, "cpu").kv_per_block == 16 * 24 * 2 * 128 * 2


def test_what_packed_weights_need_beside_them_on_a_gpu() -> None:
    """The most is all of down's 3,584 rows of 18,944, or where it is cut 4,096 of gate's and up's rows and results."""
    config = known("Qwen/Qwen2.5-7B-Instruct")
    shard = ParallelPlan.of(config).shard(config, 0)
    engine = replace(ENGINE, max_num_batched_tokens=2_048)
    wide = rank_memory(config, shard, "bfloat16", engine, "cuda").activations
    for dtype in ("int8+bfloat16", "int4+bfloat16"):
        on_gpu, on_cpu = (rank_memory(config, shard, dtype, engine, kind) for kind in ("cuda", "cpu"))
        assert on_gpu.activations == wide + 2 * 3_584 * 18_944 + 4 * 2**20
        assert on_gpu.weights == on_cpu.weights
    half = ParallelPlan.of(config, tp=8).shard(config, 7)
    cut = rank_memory(config, half, "int4+bfloat16", engine, "cuda").activations
    cut -= rank_memory(config, half, "bfloat16", engine, "cuda").activations
    assert cut == 2 * 4_096 * (3_584 + 2_048) + 4 * 2**20
    demo = known("demo")
    tiny = replace(ENGINE, max_num_batched_tokens=1, max_num_seqs=1)
    stage = ParallelPlan.of(demo, pp=2).shard(demo, 0)
    assert rank_memory(demo, stage, "int4+bfloat16", tiny, "cuda").activations == 80 * 2**20


def test_what_the_planner_knows_of_the_kernels_is_so() -> None:
    assert memory_page.WIDENED_ROWS == quantized.ROWS_AT_ONCE
    assert memory_page.ROUNDING_BYTES == 20 * quantized.WEIGHTS_AT_ONCE
    assert (memory_page.PACKED_LANES, memory_page.INT4_GROUP) == (quantized.LANES, quantized.GROUP)
    assert (quantized.STEPS[8], quantized.STEPS[4]) == (memory_page.INT8_STEP, memory_page.INT4_STEP)


def test_decodes_on_a_gpu_have_parts_of_attention_and_graphs() -> None:
    """256 contexts of 64 parts, of 28 heads of 128 numbers and 2: more than a step of 256 tokens has otherwise."""
    config = known("Qwen/Qwen2.5-7B-Instruct")
    engine = replace(ENGINE, max_num_batched_tokens=256, max_num_seqs=256)
    step = 2 * 256 * 3_584 * 2 + 256 * (3 * 3_584 + 2 * 512) * 2
    for context, num_parts in ((256, 1), (257, 2), (32_768, 64)):
        alone, one_of_two = (
            layer_room(ParallelPlan.of(config, tp=tp), replace(engine, max_model_len=context)) for tp in (1, 2)
        )
        parts = 256 * 28 * num_parts * 130 * 4
        assert alone == 2 * max(step + parts, 2 * 256 * 3_584 * 2 + 3 * 256 * 18_944 * 2)
        assert one_of_two < alone / 2


def layer_room(plan: ParallelPlan, engine: EngineConfig) -> int:
    """Of rank 0, that samples one row: of layers, then."""
    config = known("Qwen/Qwen2.5-7B-Instruct")
    shard = plan.shard(config, 0)
    layers = memory_page.layer_activation_bytes(config, shard, "bfloat16", engine, "cuda")
    return layers + memory_page.graph_bytes(config, shard, "bfloat16", engine, "cuda")


def test_what_is_held_between_steps_and_at_most() -> None:
    config = known("demo")
    memory = rank_memory(config, ParallelPlan.of(config).shard(config, 0), "float32", ENGINE, "cpu")
    assert memory.held(10) == memory.weights + memory.tables + 10 * memory.kv_per_block
    assert memory.gather_per_block * 30 == memory.kv_per_block
    assert memory.total(10) == memory.held(10) + memory.activations + 10 * memory.gather_per_block
    assert memory.reserve == 0


def test_activations_grow_with_the_step_and_only_the_sampling_rank_sorts() -> None:
    config = known("Qwen/Qwen2.5-7B-Instruct")
    plan = ParallelPlan.of(config, tp=2, pp=2)
    small, large = (
        EngineConfig(num_blocks=0, max_num_seqs=seqs, max_num_batched_tokens=tokens)
        for seqs, tokens in ((8, 512), (256, 8192))
    )
    sizes = [
        [rank_memory(config, s, "bfloat16", e, "cuda").activations for s in plan.shards(config)] for e in (small, large)
    ]
    assert all(a < b for a, b in zip(*sizes, strict=True))
    assert sizes[1][2] > sizes[1][3] == sizes[1][1]


def test_activations_of_experts_grow_with_the_ranks_that_send_tokens() -> None:
    """A worst case of 4 x 2,048 tokens on one rank: 3 rows of 2,048 bf16 numbers for each hold 100 MB by themselves."""
    config = known("qwen3-30b-a3b")
    engine = EngineConfig(num_blocks=0, max_num_batched_tokens=2048, max_num_seqs=8)
    one, four = (
        rank_memory(config, plan.shard(config, 0), "bfloat16", engine, "cuda").activations
        for plan in (ParallelPlan.of(config, tp=4, ep=4), ParallelPlan.of(config, ep=4))
    )
    assert four - one > 3 * 4 * 2048 * 2048 * 2 - 2 * 2048 * 2048 * 2


def test_experts_that_move_need_room_for_a_layer_of_them() -> None:
    """16 of 3 x 4,096 x 1,536 in bfloat16 are more than a step of 16 tokens takes."""
    config = known("qwen3-235b-a22b")
    shard = ParallelPlan.of(config, ep=8).shard(config, 1)
    engine = EngineConfig(num_blocks=0, max_num_batched_tokens=16, max_num_seqs=1)
    assert rank_memory(config, shard, "bfloat16", engine, "cuda").activations < 10**8
    moving = rank_memory(config, shard, "bfloat16", engine, "cuda", moves_experts=True)
    assert moving.activations == 16 * 3 * 4096 * 1536 * 2
