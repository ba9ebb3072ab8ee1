"""Experts of a replica under a skewed load, with ranks that only count."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from qwen_ray.core.errors import RankFailed
from qwen_ray.core.model_config import ModelConfig
from qwen_ray.core.plan import ExpertPlacement, ParallelPlan
from qwen_ray.core.stats import RankStats
from qwen_ray.core.step import MoveExperts
from qwen_ray.serving import expert_balancer
from qwen_ray.serving.expert_balancer import ExpertBalancer

CONFIG = ModelConfig.from_dict(
    {
        "model_type": "qwen3_moe",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [1],
    }
)
PLAN = ParallelPlan.of(CONFIG, ep=2)
SKEWED = (900, 900, 100, 100)  # of a token's experts, per step


class CountingRanks:
    """Two expert ranks that count what a skewed router sends to the experts they hold."""

    def __init__(self) -> None:
        assert PLAN.experts is not None
        self.placement: ExpertPlacement = PLAN.experts
        self.counts = [[[0] * 4 if CONFIG.is_sparse(i) else [] for i in range(3)] for _ in range(2)]
        self.is_broken = False
        self.asked = asyncio.Event()  # to move the last layer, or any when broken

    def step(self, tokens: Sequence[int] = SKEWED) -> None:
        for layer, slots in enumerate(self.placement.slots):
            for rank, own in enumerate(slots):
                for expert in own:
                    self.counts[rank][layer][expert] += tokens[expert]

    def move(self, move: MoveExperts) -> None:
        if self.is_broken or move.layer == 2:
            self.asked.set()
        if self.is_broken:
            raise RankFailed(1, "gone")
        self.placement = self.placement.with_layer(move.layer, move.slots)
        self.placement.check(CONFIG, 2)

    async def stats(self) -> list[RankStats]:
        return [
            RankStats(
                rank=rank,
                stage=0,
                tp_rank=0,
                pid=1,
                node="n",
                device="cpu",
                ep_rank=rank,
                expert_tokens=tuple(map(tuple, self.counts[rank])),
            )
            for rank in range(2)
        ]


async def test_a_skewed_load_is_evened_out() -> None:
    ranks, balancer = CountingRanks(), ExpertBalancer(PLAN, interval=1.0)
    ranks.step()
    changes = balancer.look(await ranks.stats())
    assert balancer.imbalance == pytest.approx(1.8)
    assert [change.layer for change in changes] == [0, 2]
    for change in changes:
        ranks.move(change)
        balancer.placement = balancer.placement.with_layer(change.layer, change.slots)
    ranks.step()
    assert balancer.look(await ranks.stats()) == []
    assert balancer.imbalance == pytest.approx(1.0)


async def test_few_tokens_say_nothing() -> None:
    ranks, balancer = CountingRanks(), ExpertBalancer(PLAN, interval=1.0)
    ranks.step((10, 0, 0, 0))
    assert balancer.look(await ranks.stats()) == []
    assert balancer.imbalance == 1.0
    ranks.step((200, 0, 0, 0))  # the interval has gone on: together they are enough
    balancer.look(await ranks.stats())
    assert balancer.imbalance == 2.0


async def test_without_an_interval_it_only_looks() -> None:
    ranks, balancer = CountingRanks(), ExpertBalancer(PLAN, interval=None)
    ranks.step()
    assert balancer.look(await ranks.stats()) == []
    assert balancer.imbalance == pytest.approx(1.8)


async def test_runs_beside_steps_and_tells_where_experts_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_balancer, "PAUSE_SECONDS", 0.001)
    ranks, balancer = CountingRanks(), ExpertBalancer(PLAN, interval=0.01)
    ranks.step()
    task = asyncio.create_task(balancer.run(ranks.stats, ranks.move))
    await asyncio.wait_for(ranks.asked.wait(), 5)
    await asyncio.sleep(0.05)
    assert balancer.num_rebalances == 1
    assert balancer.placement == ranks.placement != PLAN.experts
    task.cancel()


async def test_ranks_that_fail_leave_the_placement_as_it_was() -> None:
    ranks, balancer = CountingRanks(), ExpertBalancer(PLAN, interval=0.01)
    ranks.is_broken = True
    ranks.step()
    task = asyncio.create_task(balancer.run(ranks.stats, ranks.move))
    await asyncio.wait_for(ranks.asked.wait(), 5)
    await asyncio.sleep(0.05)
    assert balancer.num_rebalances == 0
    assert balancer.placement == PLAN.experts
    assert not task.done()
    task.cancel()
