"""How long a step takes: a roofline per rank, plus what ranks say to each other.

A rank's time is the longer of reading (weights, KV cache) and computing, at the part of the data sheet's rates that
engines reach; the slowest rank of a stage rules, because each layer ends in an exchange. Tokens choose experts by
chance here, so that one of several expert ranks always has more to do than the others; what is known of the experts'
load comes on top. Knows nothing of memory limits. These are estimates for choosing between plans, not promises: a test
holds them to within a third of published figures (Qwen2.5 0.5B to 72B, one stream on A100; Qwen3-8B loaded on H100).
Published H20 figures are half of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from qwen_ray.core.hardware import Node
from qwen_ray.core.model_config import DTYPE_BYTES, ModelConfig
from qwen_ray.core.plan import ParallelPlan, Shard
from qwen_ray.planner.memory import (
    compute_dtype,
    expert_weights,
    layer_weights,
    num_kv_elements,
    num_slots,
    num_sparse_layers,
    vocab_row_size,
)


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


NUM_EXCHANGES = 3  # of a layer with experts: how many rows come, the rows, and the answers
CHOICE_BYTES = 8  # a slot and a weight that travel with a row


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a stage runs: its node, and how many ranks share one of the node's devices (CPU only; 1 on GPUs)."""

    node: Node
    index: int
    ranks_per_device: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """One step as the roofline sees it: of the dp rank that has most to do.

    `num_shared_tokens` are those of all dp ranks, whose experts are shared. `imbalance` is the fullest expert rank's
    part of their choices over the mean one, beyond chance.
    """

    num_tokens: int
    num_sequences: int
    context: float  # tokens that each sequence's queries look back on, on average
    num_kv_tokens: float  # tokens of KV cache read, over all sequences
    num_shared_tokens: int
    imbalance: float = 1.0


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
    imbalance: float = 1.0,
) -> Estimate:
    """`sites`: one per stage of one replica. `num_running`: sequences that run on that replica at once.

    `max_num_batched_tokens` is a dp rank's. `imbalance`: see StepLoad.
    """
    num_chunks = math.ceil(prompt_len / max_num_batched_tokens)
    num_tokens = math.ceil(prompt_len / num_chunks)
    chunk = StepLoad(
        num_tokens=num_tokens,
        num_sequences=1,
        context=prompt_len / 2,
        num_kv_tokens=prompt_len / 2,
        num_shared_tokens=num_tokens,
        imbalance=imbalance,
    )
    prefill = stage_seconds(config, plan, dtype, sites, chunk)
    ttft = sum(prefill) + (num_chunks - 1) * max(prefill)

    # A pipeline is filled with as many parts of the batch as it has stages, where there are so many sequences.
    own = math.ceil(num_running / plan.dp_attention)
    num_parts = min(plan.pp, own)
    part = math.ceil(own / num_parts)
    context = prompt_len + output_len / 2
    decode = stage_seconds(
        config,
        plan,
        dtype,
        sites,
        StepLoad(
            num_tokens=part,
            num_sequences=part,
            context=context,
            num_kv_tokens=part * context,
            num_shared_tokens=min(part * plan.dp_attention, num_running),
            imbalance=imbalance,
        ),
    )
    tpot = max(sum(decode), num_parts * max(decode))
    busy = _prompt_seconds(config, plan, dtype, sites, own, prompt_len, max_num_batched_tokens, imbalance)
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
    imbalance: float,
) -> float:
    """Time of the slowest stage for many prompts of each dp rank: they share steps, and stages overlap."""
    num_steps = num_prompts * prompt_len / max_num_batched_tokens
    num_tokens = math.ceil(num_prompts * prompt_len / max(1.0, num_steps))
    load = StepLoad(
        num_tokens=num_tokens,
        num_sequences=math.ceil(num_tokens / prompt_len),
        context=prompt_len / 2,
        num_kv_tokens=max(prompt_len, num_tokens) / 2,
        num_shared_tokens=num_tokens * plan.dp_attention,
        imbalance=imbalance,
    )
    return max(1.0, num_steps) * max(stage_seconds(config, plan, dtype, sites, load))


def stage_seconds(
    config: ModelConfig, plan: ParallelPlan, dtype: str, sites: tuple[Site, ...], load: StepLoad
) -> list[float]:
    """Seconds of each stage for one step: its slowest rank, its collectives, and handing on what it computed."""
    seconds: list[float] = []
    hidden_bytes = load.num_tokens * config.hidden_size * DTYPE_BYTES[compute_dtype(dtype)]
    for stage, site in enumerate(sites):
        device = site.node.device
        reached = EFFICIENCY[device.kind]
        shards = [plan.shard(config, stage * plan.stage_size + i) for i in range(plan.stage_size)]
        unlike = {_sizes(shard): shard for shard in shards}.values()
        time = reached.step_overhead + max(rank_seconds(config, shard, dtype, site, load) for shard in unlike)
        if plan.tp > 1:
            num_reduces = 2 * len(plan.stages[stage]) + int(stage == 0)
            ring = load.num_tokens * reduce_bytes_per_token(config, plan, dtype) / device.link_bandwidth
            time += num_reduces * (reached.collective_latency + ring)
            if stage == plan.pp - 1:
                time += reached.collective_latency + load.num_sequences * config.vocab_size * 4 / device.link_bandwidth
        time += num_sparse_layers(config, shards[0]) * _exchange_seconds(config, plan, dtype, site, load)
        if stage + 1 < plan.pp:
            time += _send_seconds(site, sites[stage + 1], hidden_bytes)
        seconds.append(time)
    return seconds


def _sizes(shard: Shard) -> tuple[int, ...]:
    """Ranks of a stage that have the same are equally fast."""
    spans = (shard.heads, shard.kv_heads, shard.intermediate, shard.shared_intermediate, shard.expert_intermediate)
    return (*map(len, spans), len(shard.vocab), num_slots(shard))


def rank_seconds(config: ModelConfig, shard: Shard, dtype: str, site: Site, load: StepLoad) -> float:
    """The roofline of one rank: max(bytes / bandwidth, operations / rate)."""
    device, computed = site.node.device, compute_dtype(dtype)
    reached = EFFICIENCY[device.kind]
    num_rows = len(shard.vocab) if shard.is_last else 0
    always = replace(layer_weights(config, shard), experts=0)
    read: float = replace(layer_weights(config, shard, dtype), experts=0).total
    read += num_rows * vocab_row_size(config.hidden_size, dtype)
    read += _experts_read(config, shard, load) * expert_weights(config, shard, dtype)
    read += load.num_kv_tokens * num_kv_elements(config, shard) * DTYPE_BYTES[computed]
    scores = len(shard.layers) * len(shard.heads) * config.head_dim * load.context
    operations = (
        2 * load.num_tokens * always.total
        + 2 * load.num_sequences * num_rows * config.hidden_size
        + 4 * load.num_tokens * scores
    )
    operations += 2 * _choices_computed(config, shard, load) * expert_weights(config, shard)
    rate = device.flops * reached.flops * (reached.flops_float32 if computed == "float32" else 1.0)
    bandwidth = device.memory_bandwidth * reached.bandwidth
    return max(read / bandwidth, operations / rate) * site.ranks_per_device


def _experts_read(config: ModelConfig, shard: Shard, load: StepLoad) -> float:
    """Copies of experts that a step touches on the fullest expert rank, in all of its layers.

    Of S slots, each gets one of T tokens with a chance of p; so 1 - (1 - p)^T of them are touched and must be read.
    """
    moe = config.moe
    if moe is None:
        return 0.0
    slots = num_slots(shard)
    chance = min(1.0, moe.num_experts_per_tok / (slots * shard.ep_size))
    hit = 1 - (1 - chance) ** load.num_shared_tokens
    most = _fullest(slots * hit, slots * hit * (1 - hit), shard.ep_size)
    return num_sparse_layers(config, shard) * min(slots, most)


def _choices_computed(config: ModelConfig, shard: Shard, load: StepLoad) -> float:
    """Pairs of a token and one of its experts that the fullest expert rank computes, in all of its layers."""
    if config.moe is None:
        return 0.0
    choices = load.num_shared_tokens * config.moe.num_experts_per_tok
    mean = choices / shard.ep_size
    most = _fullest(mean * load.imbalance, mean * (1 - 1 / shard.ep_size), shard.ep_size)
    return num_sparse_layers(config, shard) * min(choices, most)


def _fullest(mean: float, variance: float, num_ranks: int) -> float:
    """About the largest of so many normal numbers."""
    return mean + math.sqrt(2 * math.log(num_ranks) * variance)


def reduce_bytes_per_token(config: ModelConfig, plan: ParallelPlan, dtype: str) -> float:
    """That a rank sends for a token in one all-reduce of hidden states over the `tp` ranks, as a ring does it."""
    return 2 * (plan.tp - 1) / plan.tp * config.hidden_size * DTYPE_BYTES[compute_dtype(dtype)]


def exchange_bytes_per_token(config: ModelConfig, plan: ParallelPlan, dtype: str) -> float:
    """That a token's hidden states travel in one layer with experts, there and back, when experts are chosen by chance.

    With data-parallel attention, to every rank that has one of its experts: of `ep` expert ranks, k choices reach
    ep (1 - (1 - 1/ep)^k), each of them `expert_tp` ranks; one of all ranks is its own. Otherwise nowhere: the ranks of
    a stage all have it, and what they add up is counted with the other all-reduces.
    """
    if config.moe is None or plan.dp_attention == 1:
        return 0.0
    k = config.moe.num_experts_per_tok
    num_ranks = plan.ep * (1 - (1 - 1 / plan.ep) ** k) * plan.expert_tp * (1 - 1 / plan.stage_size)
    return num_ranks * (2 * config.hidden_size * DTYPE_BYTES[compute_dtype(dtype)] + k * CHOICE_BYTES)


def _exchange_seconds(config: ModelConfig, plan: ParallelPlan, dtype: str, site: Site, load: StepLoad) -> float:
    """Of one layer: counts, then hidden states, then what the experts made of them; the fullest rank rules."""
    if plan.dp_attention == 1:
        return 0.0
    through = load.num_shared_tokens * exchange_bytes_per_token(config, plan, dtype) / plan.stage_size * load.imbalance
    sent = load.num_tokens / plan.tp * exchange_bytes_per_token(config, plan, dtype)
    latency = NUM_EXCHANGES * EFFICIENCY[site.node.device.kind].collective_latency
    return latency + max(through, sent) / site.node.device.link_bandwidth


def _send_seconds(site: Site, to: Site, num_bytes: int) -> float:
    if site.index == to.index:
        return EFFICIENCY[site.node.device.kind].collective_latency + num_bytes / site.node.device.link_bandwidth
    bandwidth = min(site.node.network_bandwidth, to.node.network_bandwidth)
    return max(site.node.network_latency, to.node.network_latency) + num_bytes / bandwidth
