"""Engine: batches, cache and steps of each replica."""

from __future__ import annotations

from observability.panels.grafana import Dashboard, Panel
from observability.panels.queries import mean, most, per_second, quantile, total
from observability.panels.service import VARIABLES

REPLICA = "model_name, replica"
ALL_BLOCKS = total("qwen_ray_kv_blocks", "replica", 'state="total"')
BATCH = (
    Panel(
        title="Running and waiting",
        text="Sequences in the batch, and those that wait for room in it: for a place (--max-num-seqs) or for cache.",
        unit="short",
        queries={
            "running {{replica}}": total("vllm:num_requests_running", REPLICA),
            "waiting {{replica}}": total("vllm:num_requests_waiting", REPLICA),
        },
    ),
    Panel(
        title="Sequences of a step",
        text="Large batches mean throughput: a step of many sequences takes little longer than one of few.",
        unit="short",
        queries={
            "mean {{replica}}": mean("qwen_ray_step_sequences", REPLICA),
            "p95 {{replica}}": quantile(0.95, "qwen_ray_step_sequences", REPLICA),
        },
    ),
    Panel(
        title="Tokens of a step",
        text="One for each sequence that decodes, many for one in its prompt; --max-num-batched-tokens at most.",
        unit="short",
        queries={
            "mean {{replica}}": mean("vllm:iteration_tokens_total", REPLICA),
            "p95 {{replica}}": quantile(0.95, "vllm:iteration_tokens_total", REPLICA),
        },
    ),
    Panel(
        title="Prompt tokens to be computed",
        text="Of the sequences that wait: what stands before the first token of a new request.",
        unit="short",
        queries={"{{replica}}": total("qwen_ray_waiting_tokens", REPLICA)},
    ),
    Panel(
        title="Tokens computed a second",
        text="Prompt tokens (without those found in the prefix cache), and sampled ones.",
        unit="short",
        queries={
            "prompt {{replica}}": per_second("qwen_ray_computed_prompt_tokens_total", REPLICA),
            "sampled {{replica}}": per_second("qwen_ray_sampled_tokens_total", REPLICA),
        },
    ),
    Panel(
        title="Ended early, a second",
        text="refused: the queue was full (429). overdue: the request's own timeout. poisonous: ranks died under it.",
        unit="cps",
        queries={"{{why}} {{replica}}": per_second("qwen_ray_ended_early_total", "replica, why")},
    ),
)
CACHE = (
    Panel(
        title="KV cache",
        text="Part of it held by sequences. Near 100 % sequences are put back, and autoscaling asks for one more.",
        unit="percentunit",
        maximum=1,
        steps=((None, "green"), (0.9, "orange"), (0.95, "red")),
        queries={"{{replica}}": most("vllm:kv_cache_usage_perc", REPLICA)},
    ),
    Panel(
        title="KV blocks",
        text="used: held by sequences. cached: free, with a prefix that could still be hit. total: all there are.",
        unit="short",
        queries={"{{state}} {{replica}}": total("qwen_ray_kv_blocks", "replica, state")},
    ),
    Panel(
        title="Size of the cache",
        text="Blocks of each replica, and tokens of a block.",
        unit="short",
        kind="bargauge",
        queries={
            "{{num_gpu_blocks}} blocks of {{block_size}} tokens, {{replica}}": (
                f"{most('vllm:cache_config_info', 'replica, block_size, num_gpu_blocks')}"
                f" * on (replica) group_left () {ALL_BLOCKS}"
            )
        },
    ),
    Panel(
        title="Prefix cache hits",
        text="Part of the prompt tokens that need not be computed.",
        unit="percentunit",
        maximum=1,
        queries={
            "{{replica}}": (
                f"{per_second('vllm:prefix_cache_hits_total', REPLICA)}"
                f" / {per_second('vllm:prefix_cache_queries_total', REPLICA)}"
            )
        },
    ),
    Panel(
        title="Preemptions a second",
        text="Sequences put back to make room: they are computed again later. More than now and then is too much.",
        unit="cps",
        queries={"{{replica}}": per_second("vllm:num_preemptions_total", REPLICA)},
    ),
    Panel(
        title="Set aside",
        text="Sequences that run alone, because ranks died under them before.",
        unit="short",
        queries={"{{replica}}": total("qwen_ray_sequences_set_aside", REPLICA)},
    ),
)
STEPS = (
    Panel(
        title="Time of a step",
        text="From submit to result. Each decoding sequence gets one token in this time.",
        unit="s",
        queries={
            f"p{round(100 * q)} {{{{replica}}}}": quantile(q, "qwen_ray_step_seconds", REPLICA)
            for q in (0.5, 0.95, 0.99)
        },
    ),
    Panel(
        title="Steps a second",
        text="None while sequences wait means that the replica is stuck.",
        unit="cps",
        queries={"{{replica}}": per_second("qwen_ray_steps_total", REPLICA)},
    ),
    Panel(
        title="A step outside its ranks",
        text="Mean time of scheduling, and of carrying the step to the ranks and back. Small beside the step.",
        unit="s",
        queries={
            "scheduling {{replica}}": mean("qwen_ray_step_schedule_seconds", REPLICA),
            "transport {{replica}}": mean("qwen_ray_step_transport_seconds", REPLICA),
        },
    ),
)
TIMES = (
    Panel(
        title="Where a request's time goes",
        text="Mean of finished requests, one on the other. Ingress: template, tokenizer, checks.",
        unit="s",
        width=12,
        stacked=True,
        queries={
            "ingress {{model_name}}": mean("qwen_ray_ingress_seconds"),
            "queue {{model_name}}": mean("vllm:request_queue_time_seconds"),
            "prefill {{model_name}}": mean("vllm:request_prefill_time_seconds"),
            "decode {{model_name}}": mean("vllm:request_decode_time_seconds"),
        },
    ),
    Panel(
        title="The same, p95",
        text="Each part by itself: they do not add up to the p95 of the whole.",
        unit="s",
        width=12,
        queries={
            "ingress {{model_name}}": quantile(0.95, "qwen_ray_ingress_seconds"),
            "queue {{model_name}}": quantile(0.95, "vllm:request_queue_time_seconds"),
            "prefill {{model_name}}": quantile(0.95, "vllm:request_prefill_time_seconds"),
            "decode {{model_name}}": quantile(0.95, "vllm:request_decode_time_seconds"),
            "queue excepted, in the engine {{model_name}}": quantile(0.95, "vllm:request_inference_time_seconds"),
        },
    ),
)
ENGINE = Dashboard(
    name="engine",
    title="Engine",
    text="What each replica's engine does: its batch, its cache, its steps.",
    variables=VARIABLES,
    rows={"Time": TIMES, "Batch": BATCH, "Cache": CACHE, "Steps": STEPS},
)
