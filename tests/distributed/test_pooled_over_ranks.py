"""Vectors and logits of prompts, among others that are continued, over ranks of every kind against transformers'."""

from __future__ import annotations

import asyncio
import random
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from rank_processes import Ranks
from rank_steps import ProcessGroup
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from qwen_ray.cluster.executor import RayExecutor
from qwen_ray.cluster.group import RankGroup
from qwen_ray.core.model_config import ModelConfig
from qwen_ray.core.plan import EngineConfig, ParallelPlan, ReplicaSpec
from qwen_ray.core.pooling import Pooling
from qwen_ray.core.request import GenerateRequest, SamplingParams, TokenDelta
from qwen_ray.engine.engine import Engine

TOLERANCE = 1e-4
VOCAB = 131
IDS = (7, 120, 7)
CONFIG = Qwen3MoeConfig(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=64,
    moe_intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=6,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    max_position_embeddings=64,
    initializer_range=0.2,
)
# Prompts come in chunks, and sequences are preempted.
ENGINE = EngineConfig(num_blocks=18, block_size=4, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=24)
KINDS = (Pooling(), Pooling(token_ids=IDS), None)


def requests() -> list[GenerateRequest]:
    """Of every kind in turn; some begin with the same words."""
    chance = random.Random(3)
    found: list[GenerateRequest] = []
    for i in range(15):
        prompt = [*range(chance.choice([0, 9, 17])), *chance.choices(range(VOCAB), k=chance.randint(1, 40))]
        found.append(
            GenerateRequest(
                request_id=f"r{i}",
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(temperature=0.0, max_tokens=6),
                seed=i,
                pooling=KINDS[i % len(KINDS)],
            )
        )
    return found


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks(4)
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Qwen3MoeForCausalLM]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint")
    model = Qwen3MoeForCausalLM(CONFIG).eval()
    model.save_pretrained(path)
    return path, model


async def run(ranks: Ranks, spec: ReplicaSpec) -> dict[str, TokenDelta]:
    """The last delta of each."""
    left = {request.request_id for request in requests()}
    ends: dict[str, TokenDelta] = {}

    def publish(deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            if delta.finish_reason is not None:
                left.remove(delta.request_id)
                ends[delta.request_id] = delta
        if not left:
            engine.stop()

    async with ProcessGroup.running(ranks, spec) as group:
        engine = Engine(spec.engine, RayExecutor(cast(RankGroup, group)), publish)
        for request in requests():
            engine.add(request)
        await asyncio.wait_for(engine.run(), 60)
    return ends


@pytest.mark.parametrize(("tp", "pp", "dp_attention"), [(2, 2, 1), (1, 1, 2), (2, 1, 2)])
async def test_vectors_and_logits_are_those_of_transformers(
    ranks: Ranks, checkpoint: tuple[Path, Qwen3MoeForCausalLM], tp: int, pp: int, dp_attention: int
) -> None:
    path, model = checkpoint
    config = ModelConfig.from_dict(CONFIG.to_dict())
    plan = ParallelPlan.of(config, tp=tp, pp=pp, ep=tp * dp_attention, dp_attention=dp_attention)
    engine = replace(ENGINE, depth=pp, dp_attention=dp_attention)
    spec = ReplicaSpec(name="tiny", path=str(path), config=config, plan=plan, engine=engine, dtype="float32")
    ends = await run(ranks, spec)
    for request in requests():
        end = ends[request.request_id]
        assert end.error is None
        if request.pooling is None:
            assert end.finish_reason == "length"
            continue
        with torch.inference_mode():
            said = model(torch.tensor([request.prompt_token_ids]), output_hidden_states=True)
        wanted = said.logits[0, -1, list(IDS)] if request.pooling.token_ids else said.hidden_states[-1][0, -1]
        got = torch.tensor(array("f", end.pooled))
        assert end.finish_reason == "stop"
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max().item() <= TOLERANCE
