"""How long a step takes: a roofline per rank, plus what ranks say to each other.

A rank's time is the longer of reading (weights, KV cache) and computing, at the part of the data sheet's rates that
engines reach; the slowest rank of a stage rules, because each layer ends in an all-reduce. Knows nothing of memory
limits. These are estimates for choosing between plans, not promises: a test holds them to within a third of published
figures (Qwen2.5 0.5B to 72B, one stream on A100; Qwen3-8B loaded on H100). Published H20 figures are half of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwen_ray.core.hardware import Node
from qwen_ray.core.model_config import DTYPE_BYTES, ModelConfig
from qwen_ray.core.plan import ParallelPlan, Shard
from qwen_ray.planner.memory import num_kv_elements, num_layer_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """What is reached of a data sheet's figures, and what a step costs that no data sheet shows (seconds)."""

    bandwidth: float
    flops: float
    flops_float32: float  # of the bf16 rate, when computing in float32
    step_overhead: float
    collective_latency: float


EFFICIENCY: dict[str, Efficiency] = {
    # Qwen's own vLLM table, A100, one stream (0.5B: 3.2 ms a token, 7B: 11.9, 14B: 21.6, 32B: 45.2): a line of 2 ms
    # a step and 70 % of the bandwidth, which at 7B is 60 % in all. Half of the matrix rate: vLLM 0.30, Qwen3-8B on an
    # H100, 24 requests/s of 1,024 + 128 tokens are 45 %, decoding included. float32: 67 of 989 TFLOP/s, data sheet.
    "cuda": Efficiency(bandwidth=0.7, flops=0.5, flops_float32=0.07, step_overhead=2e-3, collective_latency=10e-6),
    # Two Xeon cores: 12 of 20 GB/s at one row; 0.3 to 1.1 of 1.2 TFLOP/s in large steps; float32 has no AMX.
    "cpu": Efficiency(bandwidth=0.6, flops=0.5, flops_float32=0.15, step_overhead=1e-3, collective_latency=20e-6),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a stage runs: its node, and how many ranks share one of the node's devices (CPU only; 1 on GPUs)."""

    node: Node
    index: int
    ranks_per_device: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """One step as the roofline sees it."""

    num_tokens: int
    num_sequences: int
    context: float  # tokens that each sequence's queries look back on, on average
    num_kv_tokens: float  # tokens of KV cache read, over all sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds: `ttft` of one prompt on an idle replica, `tpot` per token and stream when `num_running` streams share
    each replica. `tokens_per_s`: output tokens of all replicas, the prompts' work included.
    """

    ttft: float
    tpot: float
    tokens_per_s: float
    num_running: int


def estimate(
    config: ModelConfig,
    plan: ParallelPlan,
    dtype: str,
    sites: tuple[Site, ...],
    *,
    num_running: int,
    prompt_len: int,
    output_len: int,
    max_num_batched_tokens: int,
) -> Estimate:
    """`sites`: one per stage of one replica. `num_running`: sequences that run on that replica at once."""
    num_chunks = math.ceil(prompt_len / max_num_batched_tokens)
    chunk = StepLoad(
        num_tokens=math.ceil(prompt_len / num_chunks),
        num_sequences=1,
        context=prompt_len / 2,
        num_kv_tokens=prompt_len / 2,
    )
    prefill = stage_seconds(config, plan, dtype, sites, chunk)
    ttft = sum(prefill) + (num_chunks - 1) * max(prefill)

    # A pipeline is filled with as many parts of the batch as it has stages, where there are so many sequences.
    num_parts = min(plan.pp, num_running)
    part = math.ceil(num_running / num_parts)
    context = prompt_len + output_len / 2
    decode = stage_seconds(
        config,
        plan,
        dtype,
        sites,
        StepLoad(num_tokens=part, num_sequences=part, context=context, num_kv_tokens=part * context),
    )
    tpot = max(sum(decode), num_parts * max(decode))
    busy = _prompt_seconds(config, plan, dtype, sites, num_running, prompt_len, max_num_batched_tokens)
    busy += output_len * tpot
    return Estimate(
        ttft=ttft, tpot=tpot, tokens_per_s=plan.dp * num_running * output_len / busy, num_running=num_running
    )


def _prompt_seconds(
    config: ModelConfig,
    plan: ParallelPlan,
    dtype: str,
    sites: tuple[Site, ...],
    num_prompts: int,
    prompt_len: int,
    max_num_batched_tokens: int,
) -> float:
    """Time of the slowest stage for many prompts: they share steps, and stages overlap."""
    num_steps = num_prompts * prompt_len / max_num_batched_tokens
    num_tokens = math.ceil(num_prompts * prompt_len / max(1.0, num_steps))
    load = StepLoad(
        num_tokens=num_tokens,
        num_sequences=math.ceil(num_tokens / prompt_len),
        context=prompt_len / 2,
        num_kv_tokens=max(prompt_len, num_tokens) / 2,
    )
    return max(1.0, num_steps) * max(stage_seconds(config, plan, dtype, sites, load))


def stage_seconds(
    config: ModelConfig, plan: ParallelPlan, dtype: str, sites: tuple[Site, ...], load: StepLoad
) -> list[float]:
    """Seconds of each stage for one step: its slowest rank, its collectives, and handing on what it computed."""
    seconds: list[float] = []
    hidden_bytes = load.num_tokens * config.hidden_size * DTYPE_BYTES[dtype]
    for stage, site in enumerate(sites):
        device = site.node.device
        reached = EFFICIENCY[device.kind]
        shards = [plan.shard(config, stage * plan.tp + tp_rank) for tp_rank in range(plan.tp)]
        time = reached.step_overhead + max(rank_seconds(config, shard, dtype, site, load) for shard in shards)
        if plan.tp > 1:
            num_reduces = 2 * len(plan.stages[stage]) + int(stage == 0)
            ring = 2 * (plan.tp - 1) / plan.tp * hidden_bytes / device.link_bandwidth
            time += num_reduces * (reached.collective_latency + ring)
            if stage == plan.pp - 1:
                time += reached.collective_latency + load.num_sequences * config.vocab_size * 4 / device.link_bandwidth
        if stage + 1 < plan.pp:
            time += _send_seconds(site, sites[stage + 1], hidden_bytes)
        seconds.append(time)
    return seconds


def rank_seconds(config: ModelConfig, shard: Shard, dtype: str, site: Site, load: StepLoad) -> float:
    """The roofline of one rank: max(bytes / bandwidth, operations / rate)."""
    device, width = site.node.device, DTYPE_BYTES[dtype]
    reached = EFFICIENCY[device.kind]
    head = len(shard.vocab) * config.hidden_size if shard.is_last else 0
    active = touched = None
    if config.moe:
        # Of E experts, k for each of T tokens chosen evenly, E (1 - (1 - k/E)^T) are touched and must be read.
        num_experts, active = config.moe.num_experts, float(config.moe.num_experts_per_tok)
        touched = num_experts * (1 - (1 - active / num_experts) ** load.num_tokens)
    read = num_layer_weights(config, shard, experts_read=touched) + head
    read += load.num_kv_tokens * num_kv_elements(config, shard)
    passed = num_layer_weights(config, shard, experts_read=active)
    scores = len(shard.layers) * len(shard.heads) * config.head_dim * load.context
    operations = 2 * load.num_tokens * passed + 2 * load.num_sequences * head + 4 * load.num_tokens * scores
    rate = device.flops * reached.flops * (reached.flops_float32 if dtype == "float32" else 1.0)
    bandwidth = device.memory_bandwidth * reached.bandwidth
    return max(read * width / bandwidth, operations / rate) * site.ranks_per_device


def _send_seconds(site: Site, to: Site, num_bytes: int) -> float:
    if site.index == to.index:
        return EFFICIENCY[site.node.device.kind].collective_latency + num_bytes / site.node.device.link_bandwidth
    bandwidth = min(site.node.network_bandwidth, to.node.network_bandwidth)
    return max(site.node.network_latency, to.node.network_latency) + num_bytes / bandwidth
