"""Groups of rank actors around tiny random models, and what those must say. Not a test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.placement_group import placement_group_table
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from qwen_ray.cluster.group import RankGroup
from qwen_ray.core.model_config import ModelConfig
from qwen_ray.core.plan import EngineConfig, ParallelPlan, ReplicaSpec

PROMPTS = [(5, 9, 200, 17), tuple(range(2, 40)), (7,) * 9]


def dense_model() -> Qwen2ForCausalLM:
    """3 layers, 6 heads and 2 KV heads."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=320,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
    ).eval()


def moe_model() -> Qwen3MoeForCausalLM:
    """2 layers of 5 experts."""
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=320,
            hidden_size=48,
            moe_intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=5,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            max_position_embeddings=256,
            initializer_range=0.2,
        )
    ).eval()


def continuations(model: PreTrainedModel, num_tokens: int) -> list[list[int]]:
    """transformers' greedy continuation of each prompt."""
    ends: list[list[int]] = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(  # pyright: ignore[reportCallIssue]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        ends.append(out[0, len(prompt) :].tolist())
    return ends


def make_spec(path: Path, *, tp: int = 1, pp: int = 1, ep: int = 1) -> ReplicaSpec:
    config = ModelConfig.from_dict(json.loads((path / "config.json").read_text()))
    plan = ParallelPlan.of(config, tp=tp, pp=pp, ep=ep)
    return ReplicaSpec(
        name="tiny",
        path=str(path),
        config=config,
        plan=plan,
        engine=EngineConfig(
            num_blocks=32,
            max_model_len=128,
            max_num_seqs=4,
            max_num_batched_tokens=32,
            depth=pp,
            dp_attention=plan.dp_attention,
        ),
        dtype="float32",
    )


@asynccontextmanager
async def running(spec: ReplicaSpec, **options: Any) -> AsyncIterator[RankGroup]:
    group = await RankGroup.start(spec, **options)
    try:
        yield group
    finally:
        await group.stop()


def is_alive(pid: int) -> bool:
    """Of a process that is there and no zombie waiting to be reaped by its raylet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it was gone before the file was opened, or read
        return False


async def until(holds: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether `holds()` comes true in time."""
    for _ in range(int(seconds / 0.05)):
        if holds():
            return True
        await asyncio.sleep(0.05)
    return holds()


def everything_is_free() -> bool:
    states = {table["state"] for table in placement_group_table().values()}
    return states <= {"REMOVED"} and ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]
