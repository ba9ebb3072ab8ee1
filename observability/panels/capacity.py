"""Capacity and cost: what the devices give, what autoscaling makes of it, and what tokens cost."""

from __future__ import annotations

from observability.panels.grafana import Dashboard, Panel
from observability.panels.queries import grown, most, per_second, recorded, total
from observability.panels.service import VARIABLES

# A stat without a price says none: so does its text.
UNPRICED = "Empty unless observability.price_per_hour (of one replica) is set."

NOW = (
    Panel(
        title="Generated tokens a second, per rank",
        text="A rank holds one GPU; on CPUs it is a part of a machine.",
        unit="short",
        kind="stat",
        width=5,
        height=5,
        decimals=2,
        queries={"{{model_name}}": recorded("generation_tokens_per_rank:rate5m")},
    ),
    Panel(
        title="Ranks",
        text="Of all replicas that are ready.",
        unit="none",
        kind="stat",
        width=4,
        height=5,
        queries={"{{model_name}}": recorded("ranks")},
    ),
    Panel(
        title="Price by the hour",
        text=f"All replicas that are there, in the currency of the price. {UNPRICED}",
        unit="none",
        kind="stat",
        width=5,
        height=5,
        decimals=2,
        queries={"{{model_name}}": recorded("price_per_hour")},
    ),
    Panel(
        title="Price of a million generated tokens",
        text=f"At the rate of the last five minutes: idle replicas make tokens dear. {UNPRICED}",
        unit="none",
        kind="stat",
        width=5,
        height=5,
        decimals=2,
        queries={"{{model_name}}": recorded("price_per_million_generated_tokens")},
    ),
    Panel(
        title="Price of a million tokens in all",
        text=f"Of prompts and answers together, at the rate of the last five minutes. {UNPRICED}",
        unit="none",
        kind="stat",
        width=5,
        height=5,
        decimals=2,
        queries={
            "{{model_name}}": (
                f"{recorded('price_per_hour')} / 3600 * 1e6"
                f" / ({recorded('generation_tokens:rate5m')} + {recorded('prompt_tokens:rate5m')} > 0)"
            )
        },
    ),
)
USE = (
    Panel(
        title="Tokens a second, per rank",
        text="Of all ranks, what each gives on average.",
        unit="short",
        queries={
            "generated {{model_name}}": recorded("generation_tokens_per_rank:rate5m"),
            "prompt {{model_name}}": f"{recorded('prompt_tokens:rate5m')} / {recorded('ranks')}",
        },
    ),
    Panel(
        title="Price of a million generated tokens, over time",
        text=UNPRICED,
        unit="none",
        decimals=2,
        queries={"{{model_name}}": recorded("price_per_million_generated_tokens")},
    ),
    Panel(
        title="Busy ranks",
        text="Mean part of the time that ranks are in a step. Low, with a high price: fewer replicas would do.",
        unit="percentunit",
        maximum=1,
        queries={"{{model_name}}": (f"{per_second('qwen_ray_rank_step_seconds_total')} / {recorded('ranks')}")},
    ),
)
SCALING = (
    Panel(
        title="Pressure",
        text=(
            "How much too small a replica is, by reason: prompt tokens that wait (backlog), cache that is held. "
            "A mean above 1 for 10 s asks for more; one goes when the others would be below 0.7 for 5 minutes."
        ),
        unit="none",
        decimals=2,
        steps=((None, "green"), (1, "red")),
        queries={"{{reason}} {{replica}}": most("qwen_ray_autoscaling_pressure", "replica, reason")},
    ),
    Panel(
        title="Replicas",
        text="target: what is decided. asked: what the policy would have, before delays and the bounds min and max.",
        unit="short",
        queries={
            "{{which}}": most("qwen_ray_autoscaling_replicas", "which"),
            "ready": most("qwen_ray_replicas", where='state="ready"'),
        },
    ),
    Panel(
        title="Decisions in an hour, and why",
        text="backlog and kv_cache: more replicas. idle: fewer. settings: changed by hand.",
        unit="short",
        queries={
            "{{direction}}: {{reason}}": (
                "max by (direction, reason) "
                f"({grown('qwen_ray_autoscaling_decisions_total', 'ingress, direction, reason')})"
            )
        },
    ),
    Panel(
        title="Running, by replica",
        text="How evenly work is spread.",
        unit="short",
        stacked=True,
        width=12,
        queries={"{{replica}}": total("vllm:num_requests_running", "model_name, replica")},
    ),
    Panel(
        title="KV cache, by replica",
        text="What is free is room for more or longer requests.",
        unit="percentunit",
        maximum=1,
        width=12,
        queries={"{{replica}}": most("vllm:kv_cache_usage_perc", "model_name, replica")},
    ),
)
CAPACITY = Dashboard(
    name="capacity",
    title="Capacity and cost",
    text="What the devices give, what autoscaling decides and why, and what tokens cost.",
    variables=VARIABLES,
    rows={"Now": NOW, "Use": USE, "Autoscaling": SCALING},
)
