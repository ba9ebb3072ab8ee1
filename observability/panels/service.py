"""Service: what users notice."""

from __future__ import annotations

from observability.panels.grafana import Dashboard, Panel
from observability.panels.queries import grown, most, per_second, quantile, recorded, total

VARIABLES = {
    "model_name": "qwen_ray_replicas",
    "ingress": "qwen_ray_open_sequences",
    "replica": "vllm:num_requests_running",
}
ROUTES = 'route!~"/health.*|/metrics.*|/status|/version|/expert_load|/openapi.json"'


STATES = {"ready": "green", "repairing": "orange", "loading": "blue", "draining": "purple", "failed": "red"}
ENDS = {"stop": "green", "length": "blue", "abort": "orange", "error": "red"}


def percentiles(name: str, legend: str = "{{model_name}}") -> dict[str, str]:
    return {f"p{round(100 * q)} {legend}": quantile(q, name) for q in (0.5, 0.95, 0.99)}


OBJECTIVE = (
    Panel(
        title="Availability, 1 h",
        text="Part of requests that did not fail because of the server in the last hour. The objective is 99.9 %.",
        unit="percentunit",
        kind="stat",
        width=4,
        height=5,
        maximum=1,
        decimals=2,
        steps=((None, "red"), (0.99, "orange"), (0.999, "green")),
        queries={"{{model_name}}": f"1 - {recorded('error_ratio:rate1h')}"},
    ),
    Panel(
        title="Error budget burn, 1 h",
        text="How many times faster than allowed errors come. 1 uses up the month's budget in a month, 14 in two days.",
        unit="none",
        kind="stat",
        width=4,
        height=5,
        decimals=1,
        steps=((None, "green"), (1, "orange"), (6, "red")),
        queries={"{{model_name}}": f"{recorded('error_ratio:rate1h')} / on () group_left () qwen_ray:error_budget"},
    ),
    Panel(
        title="Replicas ready",
        text="Replicas that take requests now. At 0 requests wait, then get 503.",
        unit="none",
        kind="stat",
        width=4,
        height=5,
        steps=((None, "red"), (1, "green")),
        queries={"{{model_name}}": most("qwen_ray_replicas", where='state="ready"')},
    ),
    Panel(
        title="Requests open",
        text="Sequences whose answer is not complete: running, in a queue, or waiting for a replica.",
        unit="none",
        kind="stat",
        width=4,
        height=5,
        queries={"{{model_name}}": total("qwen_ray_open_sequences")},
    ),
    Panel(
        title="Generated tokens a second",
        text="Tokens a second that reach clients.",
        unit="short",
        kind="stat",
        width=4,
        height=5,
        decimals=1,
        queries={"{{model_name}}": per_second("vllm:generation_tokens_total")},
    ),
    Panel(
        title="First token, p95",
        text="95 % of requests get their first token sooner. Above 10 s an alert comes.",
        unit="s",
        kind="stat",
        width=4,
        height=5,
        decimals=2,
        steps=((None, "green"), (5, "orange"), (10, "red")),
        queries={"{{model_name}}": quantile(0.95, "vllm:time_to_first_token_seconds")},
    ),
)
LATENCY = (
    Panel(
        title="Time to first token",
        text="From arrival to the first token: ingress, queue and prefill.",
        unit="s",
        queries=percentiles("vllm:time_to_first_token_seconds"),
    ),
    Panel(
        title="Between tokens",
        text="Time between two tokens of one answer, as the client would see it.",
        unit="s",
        queries=percentiles("vllm:inter_token_latency_seconds"),
    ),
    Panel(
        title="Whole request",
        text="From arrival to the last token. Long answers take long: see how many tokens there are, below.",
        unit="s",
        queries=percentiles("vllm:e2e_request_latency_seconds"),
    ),
    Panel(
        title="Time per output token, p95, by ingress",
        text="Mean over each answer, without its first token. One ingress apart from the others has too little CPU.",
        unit="s",
        queries={"{{ingress}}": quantile(0.95, "vllm:request_time_per_output_token_seconds", "model_name, ingress")},
    ),
    Panel(
        title="Time in a replica, p95, by ingress",
        text="From hand-over to a replica to the last token.",
        unit="s",
        queries={"{{ingress}}": quantile(0.95, "qwen_ray_replica_seconds", "model_name, ingress")},
    ),
    Panel(
        title="Time in the queue, p95, by replica",
        text="From arrival at the replica to the first step. Grows when there is more work than the replica can do.",
        unit="s",
        queries={"{{replica}}": quantile(0.95, "vllm:request_queue_time_seconds", "model_name, replica")},
    ),
)
TRAFFIC = (
    Panel(
        title="Tokens a second",
        text="Prompt tokens as requests bring them, and generated ones.",
        unit="short",
        queries={
            "prompt {{model_name}}": per_second("vllm:prompt_tokens_total"),
            "generated {{model_name}}": per_second("vllm:generation_tokens_total"),
        },
    ),
    Panel(
        title="Generated tokens a second, by replica",
        text="As sampled by each engine. Replicas that are ready should have about the same.",
        unit="short",
        stacked=True,
        queries={"{{replica}}": per_second("qwen_ray_sampled_tokens_total", "model_name, replica")},
    ),
    Panel(
        title="Requests a second, by route",
        text="HTTP answers, without those to health checks and Prometheus.",
        unit="reqps",
        stacked=True,
        queries={"{{route}}": per_second("qwen_ray_http_requests_total", "route", ROUTES)},
    ),
    Panel(
        title="Errors by status",
        text="4xx: the client's (400 wrong, 401 no key, 429 too much). 5xx: ours (503 no replica, 504 late).",
        unit="reqps",
        stacked=True,
        queries={"{{status}}": per_second("qwen_ray_http_requests_total", "status", 'status=~"[45].."')},
    ),
    Panel(
        title="How sequences end",
        text="stop and length are good ends; abort: the client went away; error: something broke.",
        unit="cps",
        stacked=True,
        colours=ENDS,
        queries={"{{finished_reason}}": per_second("vllm:request_success_total", "finished_reason")},
    ),
    Panel(
        title="Hand-overs in an hour",
        text="Sequences that another replica carried on, because theirs died, hung or drained.",
        unit="short",
        queries={"{{ingress}}": grown("qwen_ray_hand_overs_total", "model_name, ingress")},
    ),
)
REQUESTS = (
    Panel(
        title="Replicas by state",
        text="repairing: single ranks are replaced, requests wait for seconds. loading: not yet, or no longer, ready.",
        unit="short",
        stacked=True,
        colours=STATES,
        queries={"{{state}}": most("qwen_ray_replicas", "state")},
    ),
    Panel(
        title="Queues",
        text="waiting: for room in a batch. unplaced: for a replica to be ready.",
        unit="short",
        queries={
            "waiting {{model_name}}": total("vllm:num_requests_waiting"),
            "unplaced {{model_name}}": total("qwen_ray_unplaced_sequences"),
        },
    ),
    Panel(
        title="Prefix cache hits",
        text="Part of the prompt tokens that need not be computed, because an earlier prompt began alike.",
        unit="percentunit",
        maximum=1,
        queries={"{{model_name}}": recorded("prefix_hit_ratio:rate5m")},
    ),
    Panel(
        title="Prompt tokens",
        text="Of a finished sequence.",
        unit="short",
        width=12,
        queries=percentiles("vllm:request_prompt_tokens"),
    ),
    Panel(
        title="Generated tokens of a request",
        text="Of a finished sequence.",
        unit="short",
        width=12,
        queries=percentiles("vllm:request_generation_tokens"),
    ),
)
SERVICE = Dashboard(
    name="service",
    title="Service",
    text="What users notice: is it there, how fast is it, how much is asked of it.",
    variables=VARIABLES,
    rows={"Objective": OBJECTIVE, "Latency": LATENCY, "Traffic": TRAFFIC, "Replicas and requests": REQUESTS},
)
