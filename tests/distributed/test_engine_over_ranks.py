"""An engine over the ranks of a model with experts: the tokens of one process, however the ranks share the work."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

import pytest
import torch
from rank_processes import Ranks
from rank_steps import ProcessGroup
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from qwen_ray.cluster.executor import RayExecutor
from qwen_ray.cluster.group import RankGroup
from qwen_ray.core.model_config import ModelConfig
from qwen_ray.core.plan import EngineConfig, ExpertPlacement, ParallelPlan, ReplicaSpec
from qwen_ray.core.request import GenerateRequest, SamplingParams, TokenDelta
from qwen_ray.core.stats import RankStats, StepStats
from qwen_ray.core.step import MoveExperts
from qwen_ray.engine.engine import Engine
from qwen_ray.engine.executor import Executor
from qwen_ray.worker.local import LocalExecutor

NUM_EXPERTS, TOP_K = 7, 2
CONFIG = Qwen3MoeConfig(
    vocab_size=131,
    hidden_size=48,
    intermediate_size=64,
    moe_intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=NUM_EXPERTS,
    num_experts_per_tok=TOP_K,
    norm_topk_prob=True,
    mlp_only_layers=[1],
    max_position_embeddings=64,
    initializer_range=0.2,
)
# So few blocks that sequences are preempted, on one dp rank and on two.
ENGINE = EngineConfig(num_blocks=16, block_size=4, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=24)


def requests() -> list[GenerateRequest]:
    """16 of mixed lengths; some begin with the same words."""
    chance = random.Random(7)
    found: list[GenerateRequest] = []
    for i in range(16):
        prompt = [*range(chance.choice([0, 0, 9, 17])), *chance.choices(range(131), k=chance.randint(1, 24))]
        sampling = SamplingParams(temperature=0.0, max_tokens=chance.randint(1, 20), ignore_eos=True)
        found.append(GenerateRequest(request_id=f"r{i}", prompt_token_ids=tuple(prompt), sampling=sampling, seed=i))
    return found


async def generate(
    engine_config: EngineConfig, executor: Executor, on_step: Callable[[StepStats], None] = lambda _: None
) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests()}
    left = set(tokens)

    def publish(deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            assert delta.error is None, delta.error
            tokens[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                left.remove(delta.request_id)
        if not left:
            engine.stop()

    engine = Engine(engine_config, executor, publish, on_step)
    for request in requests():
        engine.add(request)
    await asyncio.wait_for(engine.run(), 60)
    assert engine.stats().preemptions_total > 0
    return tokens


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks(4)
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ReplicaSpec:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint")
    Qwen3MoeForCausalLM(CONFIG).save_pretrained(path)
    config = ModelConfig.from_dict(CONFIG.to_dict())
    plan = ParallelPlan.of(config)
    return ReplicaSpec(name="tiny", path=str(path), config=config, plan=plan, engine=ENGINE, dtype="float32")


@pytest.fixture(scope="module")
def alone(spec: ReplicaSpec) -> dict[str, list[int]]:
    """One rank, in this process."""
    executor = LocalExecutor(spec)
    try:
        return asyncio.run(generate(ENGINE, executor))
    finally:
        executor.close()


def spread(
    spec: ReplicaSpec, *, tp: int = 1, pp: int = 1, ep: int, dp_attention: int, copies: bool = False
) -> ReplicaSpec:
    """`copies`: each expert rank has room for one more than its share."""
    placement = ExpertPlacement(
        slots=tuple(
            shuffled(random.Random(0), ep, copies) if spec.config.is_sparse(layer) else ()
            for layer in range(spec.config.num_hidden_layers)
        )
    )
    plan = ParallelPlan.of(spec.config, tp=tp, pp=pp, ep=ep, dp_attention=dp_attention, experts=placement)
    return replace(spec, plan=plan, engine=replace(ENGINE, depth=pp, dp_attention=dp_attention))


def shuffled(chance: random.Random, ep: int, copies: bool) -> tuple[tuple[int, ...], ...]:
    """Every expert somewhere; with `copies`, one of another rank's on each."""
    experts = chance.sample(range(NUM_EXPERTS), NUM_EXPERTS)
    parts = [experts[rank::ep] for rank in range(ep)]
    return tuple(
        (*part, chance.choice([expert for expert in experts if expert not in part])) if copies else tuple(part)
        for part in parts
    )


async def generate_over(
    ranks: Ranks, spec: ReplicaSpec, *, moves: bool = False, copies: bool = False
) -> tuple[dict[str, list[int]], list[RankStats]]:
    """The tokens, and what the ranks say at the end; `moves`: experts change places after every other step."""
    async with ProcessGroup.running(ranks, spec) as group:
        executor = RayExecutor(cast(RankGroup, group))
        chance = random.Random(1)

        def on_step(step: StepStats) -> None:
            if moves and chance.random() < 0.5:
                layer = chance.choice([0, 2])
                executor.move_experts(MoveExperts(layer=layer, slots=shuffled(chance, spec.plan.ep, copies)))

        tokens = await generate(spec.engine, executor, on_step)
    return tokens, group.stats


@pytest.mark.parametrize(
    ("tp", "pp", "ep", "dp_attention"),
    [(1, 1, 2, 2), (2, 1, 2, 1), (1, 2, 2, 2), (2, 1, 2, 2), (1, 1, 4, 4)],
)
async def test_same_tokens_as_one_process_while_experts_move(
    ranks: Ranks, spec: ReplicaSpec, alone: dict[str, list[int]], tp: int, pp: int, ep: int, dp_attention: int
) -> None:
    many = spread(spec, tp=tp, pp=pp, ep=ep, dp_attention=dp_attention)
    tokens, stats = await generate_over(ranks, many, moves=True)
    assert tokens == alone
    check_stats(many, stats, tokens)
    # Two ranks have seven experts in two layers: of any shuffle, about half of them move.
    assert sum(rank.num_moved_experts for rank in stats) > 20


@pytest.mark.parametrize("ep", [1, 2])
async def test_same_tokens_where_experts_stay(
    ranks: Ranks, spec: ReplicaSpec, alone: dict[str, list[int]], ep: int
) -> None:
    """With `ep` 1 every expert is cut over the two dp ranks."""
    many = spread(spec, ep=ep, dp_attention=2)
    tokens, stats = await generate_over(ranks, many)
    assert tokens == alone
    check_stats(many, stats, tokens)
    assert [rank.num_moved_experts for rank in stats] == [0, 0]


async def test_copies_of_experts_change_nothing(ranks: Ranks, spec: ReplicaSpec, alone: dict[str, list[int]]) -> None:
    many = spread(spec, ep=2, dp_attention=2, copies=True)
    tokens, stats = await generate_over(ranks, many, moves=True, copies=True)
    assert tokens == alone
    check_stats(many, stats, tokens)


@pytest.mark.parametrize("tp", [1, 2])
async def test_all_sequences_on_one_dp_rank(
    ranks: Ranks, spec: ReplicaSpec, alone: dict[str, list[int]], tp: int
) -> None:
    """The other one has no tokens, ever: the engine believes that there is one alone."""
    many = spread(spec, tp=tp, ep=2, dp_attention=2)
    tokens, stats = await generate_over(ranks, replace(many, engine=ENGINE), moves=True)
    assert tokens == alone
    assert [rank.num_tokens > 0 for rank in stats] == [rank.dp_rank == 0 for rank in stats]
    assert all(rank.num_steps == stats[0].num_steps for rank in stats)
    assert sum(sum(map(sum, rank.expert_tokens)) for rank in stats if rank.dp_rank == 1) > 0


def check_stats(spec: ReplicaSpec, stats: list[RankStats], tokens: dict[str, list[int]]) -> None:
    """Ranks know their places, and TOP_K experts of every sparse layer computed every token: in the last layer, those
    alone that another one was sampled behind."""
    for rank in stats:
        shard = spec.plan.shard(spec.config, rank.rank)
        assert (rank.stage, rank.dp_rank, rank.tp_rank) == (shard.stage, shard.dp_rank, shard.tp_rank)
        assert (rank.ep_rank, rank.expert_tp_rank) == (shard.ep_rank, shard.expert_tp_rank)
        assert (rank.first_layer, len(rank.expert_tokens)) == (shard.layers.start, len(shard.layers))
    num_tokens = sum(rank.num_tokens for rank in stats if rank.stage == 0 and rank.tp_rank == 0)
    for layer in range(spec.config.num_hidden_layers):
        counts = [
            sum(rank.expert_tokens[layer - rank.first_layer])
            for rank in stats
            if layer in spec.plan.stages[rank.stage] and rank.expert_tp_rank == 0
        ]
        is_last = layer == spec.config.num_hidden_layers - 1
        least = most = sum(map(len, tokens.values())) if is_last else num_tokens
        if is_last and spec.plan.pp > 1:
            most = num_tokens - 1  # a sequence may be preempted while a step of it is under way: that is in vain
        top_k = TOP_K if spec.config.is_sparse(layer) else 0
        assert least * top_k <= sum(counts) <= most * top_k
