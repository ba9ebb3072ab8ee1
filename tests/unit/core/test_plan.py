"""Who is whose peer, and who holds which experts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_ray.core.errors import PlanRefused
from qwen_ray.core.model_config import ModelConfig
from qwen_ray.core.plan import ExpertPlacement, ParallelPlan


def moe(num_experts: int = 7, *, sparse_step: int = 1) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "model_type": "qwen2_moe",
            "vocab_size": 100,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "num_experts": num_experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "shared_expert_intermediate_size": 160,
            "decoder_sparse_step": sparse_step,
        }
    )


@given(
    tp=st.integers(1, 4),
    dp_attention=st.integers(1, 4),
    pp=st.integers(1, 4),
    parts=st.integers(1, 16),
    num_experts=st.integers(1, 9),
)
def test_every_part_of_every_expert_lies_once_in_each_stage(
    tp: int, dp_attention: int, pp: int, parts: int, num_experts: int
) -> None:
    config = moe(num_experts)
    ep = next(d for d in range(min(parts, num_experts), 0, -1) if tp * dp_attention % d == 0)
    plan = ParallelPlan.of(config, tp=tp, pp=pp, ep=ep, dp_attention=dp_attention)
    shards = plan.shards(config)
    assert len(shards) == plan.world_size == tp * dp_attention * pp
    for shard in shards:
        assert shard.rank in shard.stage_peers
        assert [shards[peer].stage_rank for peer in shard.stage_peers] == list(range(plan.stage_size))
        assert [shards[peer].tp_rank for peer in shard.tp_peers] == list(range(tp))
        assert {shards[peer].dp_rank for peer in shard.tp_peers} == {shard.dp_rank}
        for neighbour, step in ((shard.previous_rank, -1), (shard.next_rank, 1)):
            if neighbour is not None:
                assert shards[neighbour].stage == shard.stage + step
                assert shards[neighbour].stage_rank == shard.stage_rank
        held = [
            (expert, row)
            for peer in shard.stage_peers
            for expert in shards[peer].own_experts(shard.layers.start)
            for row in shards[peer].expert_intermediate
        ]
        assert sorted(held) == [(expert, row) for expert in range(num_experts) for row in range(96)]
        shared = [row for peer in shard.tp_peers for row in shards[peer].shared_intermediate]
        assert shared == list(range(160))


def test_expert_ranks_beyond_tp_are_dp_ranks() -> None:
    config = moe()
    assert ParallelPlan.of(config, ep=4).dp_attention == 4
    assert ParallelPlan.of(config, tp=2, ep=2).dp_attention == 1
    assert ParallelPlan.of(config, tp=2, ep=4).dp_attention == 2
    plan = ParallelPlan.of(config, tp=2, ep=1)
    assert (plan.expert_tp, plan.world_size) == (2, 2)


def test_dense_layers_have_no_slots() -> None:
    plan = ParallelPlan.of(moe(sparse_step=2), ep=2)
    assert plan.experts is not None
    assert plan.experts.slots == ((), ((0, 1, 2, 3), (4, 5, 6))) * 2
    assert plan.experts.num_slots(1) == 3


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"ep": 8}, "ep=8 must be between 1 and the model's 7 experts"),
        ({"tp": 2, "ep": 3}, "ep=3 must divide the 2 ranks"),
        ({"ep": 2, "dp_attention": 1}, "ep=2 must divide the 1 ranks"),
    ],
)
def test_degrees_that_do_not_go_together(degrees: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanRefused, match=message):
        ParallelPlan.of(moe(), **degrees)


def test_a_dense_model_shares_no_experts() -> None:
    raw = {"model_type": "qwen2", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    dense = ModelConfig.from_dict(raw | {"num_attention_heads": 4, "max_position_embeddings": 64})
    with pytest.raises(PlanRefused, match="ep=2"):
        ParallelPlan.of(dense, ep=2)
    with pytest.raises(PlanRefused, match="dp_attention=2 shares experts"):
        ParallelPlan.of(dense, dp_attention=2)


@pytest.mark.parametrize(
    "layer",
    [
        ((0, 1, 2), (3, 4, 5)),  # 6 is nowhere
        ((0, 1, 2, 3), (4, 5, 6, 6)),  # twice on one rank
        ((0, 1, 2, 3, 4), (5, 6)),  # other numbers of slots than the next layer
        ((0, 1, 2), (3, 4), (5, 6)),  # three ranks
        (),  # dense
    ],
)
def test_a_placement_that_is_not_one(layer: tuple[tuple[int, ...], ...]) -> None:
    config = moe()
    even = ExpertPlacement.even(config, 2)
    even.check(config, 2)
    even.with_layer(1, ((6, 5, 4, 3), (2, 1, 0))).check(config, 2)
    with pytest.raises(PlanRefused, match="expert placement"):
        even.with_layer(1, layer).check(config, 2)


def test_experts_in_no_layer_are_no_experts() -> None:
    assert moe(sparse_step=5).moe is None
