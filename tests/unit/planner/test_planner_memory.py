"""Bytes of ranks: by hand, against the whole model, and against what the layers really allocate."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.core.model_config import DTYPE_BYTES, ModelConfig, MoeConfig, RopeConfig
from qwen_ray.core.plan import EngineConfig, ParallelPlan
from qwen_ray.models.registry import build
from qwen_ray.planner.family import lookup
from qwen_ray.planner.memory import num_kv_elements, rank_memory, rank_weights

ENGINE = EngineConfig(num_blocks=0, max_model_len=256, max_num_seqs=4, max_num_batched_tokens=64)


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
def configs(draw: st.DrawFn, *, dense: bool = False) -> ModelConfig:
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(1, 4))
    head_dim = draw(st.sampled_from([4, 8]))
    num_layers = draw(st.integers(1, 6))
    moe = None
    if not dense and draw(st.booleans()):
        moe = MoeConfig(
            num_experts=draw(st.integers(2, 6)),
            num_experts_per_tok=2,
            moe_intermediate_size=draw(st.integers(16, 96)),
            norm_topk_prob=True,
            shared_expert_intermediate_size=draw(st.sampled_from([0, 48])),
            decoder_sparse_step=draw(st.integers(1, min(2, num_layers))),
        )
    return ModelConfig(
        architecture="qwen2_moe" if moe else "qwen2",
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
        qk_norm=False if dense else draw(st.booleans()),
        moe=moe,
    )


@given(config=configs(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_shards_add_up_to_the_model(config: ModelConfig, data: st.DataObject) -> None:
    """Every parameter once, and beyond that only what is held on purpose: norms, routers, a tied matrix's other end."""
    tp = data.draw(st.integers(1, config.num_key_value_heads), label="tp")
    pp = data.draw(st.integers(1, config.num_hidden_layers), label="pp")
    shards = ParallelPlan.of(config, tp=tp, pp=pp).shards(config)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    copied = layers * 2 * hidden + hidden + (layers * 2 * config.head_dim if config.qk_norm else 0)
    if config.moe:
        shared_gate = hidden if config.moe.shared_expert_intermediate_size else 0
        copied += sum(map(config.is_sparse, range(layers))) * (hidden * config.moe.num_experts + shared_gate)
    ends = config.vocab_size * hidden if config.tie_word_embeddings and pp > 1 else 0
    assert sum(rank_weights(config, s).total for s in shards) == config.num_parameters + (tp - 1) * copied + ends
    assert sum(num_kv_elements(config, s) for s in shards) == 2 * layers * config.kv_size


@given(config=configs(dense=True), data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_layers_hold_what_is_said(config: ModelConfig, data: st.DataObject) -> None:
    tp = data.draw(st.integers(1, config.num_attention_heads), label="tp")
    pp = data.draw(st.integers(1, config.num_hidden_layers), label="pp")
    dtype = data.draw(st.sampled_from(["float32", "bfloat16"]), label="dtype")
    groups: Any = SimpleNamespace(tensor=SimpleNamespace(size=tp, all_reduce=None, gather=None))
    for shard in ParallelPlan.of(config, tp=tp, pp=pp).shards(config):
        stage = build(config, shard, groups, torch.device("cpu"), getattr(torch, dtype), max_len=256)
        memory = rank_memory(config, shard, dtype, ENGINE, "cpu")
        assert memory.weights + memory.tables == stage.num_bytes
        per_token = sum(2 * a.num_kv_heads * a.head_dim for a in stage.attentions) * DTYPE_BYTES[dtype]
        assert memory.kv_per_block == per_token * ENGINE.block_size


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
