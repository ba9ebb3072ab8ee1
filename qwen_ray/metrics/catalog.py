"""Every metric in one table. Knows names, labels and buckets; nothing of who observes or exports them.

`vllm:` names mean what vLLM means by them, so that dashboards, KEDA triggers and gateways made for vLLM work as they
are; what has no counterpart there is called `qwen_ray_`. Every series carries `model_name` and the process it comes
from: `ingress`, or `replica` (and `rank`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Owner = Literal["ingress", "replica", "rank"]

# Seconds, from a step of a tiny model to a long generation.
STEP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)
NEXT_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
REQUEST = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 600.0)
OVERHEAD = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000)
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

PROCESS_LABELS: dict[Owner, tuple[str, ...]] = {
    "ingress": ("model_name", "ingress"),
    "replica": ("model_name", "replica"),
    "rank": ("model_name", "replica", "rank", "stage", "dp_rank", "tp_rank", "ep_rank"),
}


@dataclass(frozen=True, slots=True)
class Metric:
    """One row. `labels` are those beside the process's own."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


INGRESS: tuple[Metric, ...] = (
    Metric("vllm:time_to_first_token_seconds", "histogram", "From arrival to the first token.", (), FIRST_TOKEN),
    Metric("vllm:inter_token_latency_seconds", "histogram", "Between two tokens of a sequence.", (), NEXT_TOKEN),
    Metric(
        "vllm:request_time_per_output_token_seconds",
        "histogram",
        "Mean time of a sequence's tokens after the first.",
        (),
        NEXT_TOKEN,
    ),
    Metric("vllm:e2e_request_latency_seconds", "histogram", "From arrival to the last token.", (), REQUEST),
    Metric("vllm:request_prompt_tokens", "histogram", "Prompt tokens of a finished sequence.", (), TOKENS),
    Metric("vllm:request_generation_tokens", "histogram", "Generated tokens of a finished sequence.", (), TOKENS),
    Metric("vllm:request_success_total", "counter", "Sequences by how they ended.", ("finished_reason",)),
    Metric("vllm:prompt_tokens_total", "counter", "Prompt tokens of sequences that got their first token."),
    Metric("vllm:generation_tokens_total", "counter", "Generated tokens."),
    Metric("qwen_ray_http_requests_total", "counter", "Answered HTTP requests.", ("route", "status")),
    Metric(
        "qwen_ray_ingress_seconds",
        "histogram",
        "From arrival to hand-over to a replica: template, tokenizer, checks.",
        (),
        OVERHEAD,
    ),
    Metric(
        "qwen_ray_replica_seconds",
        "histogram",
        "From hand-over to a replica to the last token: engine and transport.",
        (),
        REQUEST,
    ),
    Metric("qwen_ray_hand_overs_total", "counter", "Sequences carried on by another replica."),
    Metric("qwen_ray_open_sequences", "gauge", "Sequences whose answer is not complete."),
    Metric("qwen_ray_unplaced_sequences", "gauge", "Of them, those that wait for a replica to be ready."),
    Metric("qwen_ray_replicas", "gauge", "Replicas that this ingress is connected to.", ("state",)),
    Metric("qwen_ray_price_per_hour", "gauge", "What a replica costs by the hour, as the settings have it; only then."),
    Metric(
        "qwen_ray_autoscaling_replicas",
        "gauge",
        "Replicas: target, what the policy asks for (before delays and bounds), min and max.",
        ("which",),
    ),
    Metric(
        "qwen_ray_autoscaling_decisions_total", "counter", "Changes of the target, and why.", ("direction", "reason")
    ),
)

REPLICA: tuple[Metric, ...] = (
    Metric("vllm:num_requests_running", "gauge", "Sequences in the running batch."),
    Metric("vllm:num_requests_waiting", "gauge", "Sequences waiting for room in the batch."),
    Metric("vllm:kv_cache_usage_perc", "gauge", "Part of the KV cache held by sequences, 0 to 1."),
    Metric("vllm:prefix_cache_queries_total", "counter", "Prompt tokens looked up in the prefix cache."),
    Metric("vllm:prefix_cache_hits_total", "counter", "Prompt tokens found in the prefix cache."),
    Metric("vllm:num_preemptions_total", "counter", "Sequences put back to make room."),
    Metric("vllm:request_queue_time_seconds", "histogram", "From arrival to the first step.", (), REQUEST),
    Metric("vllm:request_prefill_time_seconds", "histogram", "From the first step to the first token.", (), REQUEST),
    Metric("vllm:request_decode_time_seconds", "histogram", "From the first token to the last.", (), REQUEST),
    Metric("vllm:request_inference_time_seconds", "histogram", "From the first step to the last token.", (), REQUEST),
    Metric("vllm:iteration_tokens_total", "histogram", "Tokens of one step.", (), BATCH),
    Metric("vllm:cache_config_info", "gauge", "Sizes of the KV cache.", ("block_size", "num_gpu_blocks")),
    Metric("qwen_ray_sequences_set_aside", "gauge", "Sequences that run alone: ranks died under them."),
    Metric("qwen_ray_ended_early_total", "counter", "Requests refused, overdue or found poisonous.", ("why",)),
    Metric("qwen_ray_waiting_tokens", "gauge", "Prompt tokens still to be computed."),
    Metric("qwen_ray_kv_blocks", "gauge", "KV blocks: all, held by sequences, cached and evictable.", ("state",)),
    Metric("qwen_ray_computed_prompt_tokens_total", "counter", "Prompt tokens computed, prefix hits not counted."),
    Metric("qwen_ray_sampled_tokens_total", "counter", "Tokens sampled by the engine."),
    Metric("qwen_ray_steps_total", "counter", "Engine steps."),
    Metric("qwen_ray_step_seconds", "histogram", "One step, from submit to result.", (), STEP),
    Metric("qwen_ray_step_sequences", "histogram", "Sequences of one step.", (), BATCH),
    Metric("qwen_ray_step_schedule_seconds", "histogram", "Scheduling of one step.", (), OVERHEAD),
    Metric("qwen_ray_step_transport_seconds", "histogram", "A step's time outside its sampling rank.", (), OVERHEAD),
    Metric("qwen_ray_load_seconds", "gauge", "From start to ready, of the ranks that run now."),
    Metric("qwen_ray_start_seconds", "gauge", "Of it, phases: placed, read, warmed_up.", ("phase",)),
    Metric(
        "qwen_ray_autoscaling_pressure",
        "gauge",
        "How much too small the replica is: more than 1 asks for another one.",
        ("reason",),
    ),
    Metric("qwen_ray_expert_tokens_total", "counter", "Tokens that an expert has computed.", ("layer", "expert")),
    Metric(
        "qwen_ray_expert_imbalance", "gauge", "Tokens of the fullest expert rank over those of the mean one, lately."
    ),
    Metric("qwen_ray_expert_rebalances_total", "counter", "Times that experts changed places while serving."),
    Metric("qwen_ray_rank_repairs_total", "counter", "Times that broken ranks were replaced while the others stayed."),
    Metric("qwen_ray_repair_seconds", "gauge", "Seconds of each phase of the last repair.", ("phase",)),
    Metric("qwen_ray_replica_restarts_total", "counter", "Times that the ranks were started anew after a failure."),
)

RANK: tuple[Metric, ...] = (
    Metric("qwen_ray_rank_steps_total", "counter", "Steps that the rank has run."),
    Metric("qwen_ray_rank_tokens_total", "counter", "Tokens that the rank has computed."),
    Metric("qwen_ray_rank_step_seconds_total", "counter", "Time that the rank has spent in steps."),
    Metric("qwen_ray_rank_memory_bytes", "gauge", "Memory that the rank holds."),
    Metric("qwen_ray_rank_weights_bytes", "gauge", "Of it, weights."),
    Metric("qwen_ray_rank_kv_bytes", "gauge", "Of it, KV cache."),
    Metric("qwen_ray_rank_read_bytes", "gauge", "Bytes read from the checkpoint."),
    Metric("qwen_ray_rank_load_seconds", "gauge", "Time to load the shard."),
    Metric("qwen_ray_rank_expert_tokens_total", "counter", "Tokens that the rank's experts have computed."),
    Metric("qwen_ray_rank_moved_experts_total", "counter", "Experts that the rank received from others while serving."),
    Metric("qwen_ray_rank_loads_total", "counter", "Times that the shard was loaded."),
)

BY_OWNER: dict[Owner, tuple[Metric, ...]] = {"ingress": INGRESS, "replica": REPLICA, "rank": RANK}
