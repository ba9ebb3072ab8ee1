"""Cluster: ranks, where they are, how they start, fail and come back."""

from __future__ import annotations

from observability.panels.grafana import Dashboard, Panel
from observability.panels.queries import grown, mean, most, per_second, total
from observability.panels.service import STATES, VARIABLES

RANK = "replica, rank"
PLACED = "replica, rank, stage, dp_rank, tp_rank, ep_rank"
PLACE = "{{replica}} rank {{rank}}: stage {{stage}}, tp {{tp_rank}}, dp {{dp_rank}}, ep {{ep_rank}}"

REPLICAS = (
    Panel(
        title="Replicas by state",
        text="As the ingresses see them.",
        unit="short",
        stacked=True,
        colours=STATES,
        queries={"{{state}}": most("qwen_ray_replicas", "state")},
    ),
    Panel(
        title="Repairs and restarts in an hour",
        text="repair: single ranks were replaced, the others kept their weights. restart: all ranks were started anew.",
        unit="short",
        queries={
            "repairs {{replica}}": grown("qwen_ray_rank_repairs_total", "model_name, replica"),
            "restarts {{replica}}": grown("qwen_ray_replica_restarts_total", "model_name, replica"),
        },
    ),
    Panel(
        title="Loads of a shard",
        text="How often each rank's weights were loaded since its replica started: more than 1 after a repair.",
        unit="short",
        queries={"{{replica}} rank {{rank}}": total("qwen_ray_rank_loads_total", RANK)},
    ),
    Panel(
        title="Start-up phases",
        text="Of the last start. placed: a place was found and processes run. read: weights. warmed_up: ranks met.",
        unit="s",
        kind="bargauge",
        decimals=1,
        queries={
            "{{phase}}, {{replica}}": most("qwen_ray_start_seconds", "replica, phase"),
            "together, {{replica}}": most("qwen_ray_load_seconds", "replica"),
        },
    ),
    Panel(
        title="Phases of the last repair",
        text="From the last step before it to the first one after it. All 0: there was none.",
        unit="s",
        kind="bargauge",
        decimals=1,
        queries={"{{phase}}, {{replica}}": most("qwen_ray_repair_seconds", "replica, phase")},
    ),
    Panel(
        title="Loading, by rank",
        text="Each shard's time to load: one rank behind the others has a slow disk or a large shard.",
        unit="s",
        kind="bargauge",
        decimals=1,
        queries={PLACE: most("qwen_ray_rank_load_seconds", PLACED)},
    ),
)
RANKS = (
    Panel(
        title="Memory of ranks",
        text="All that the process (on a GPU: the device) holds for it.",
        unit="bytes",
        queries={PLACE: most("qwen_ray_rank_memory_bytes", PLACED)},
    ),
    Panel(
        title="Of it, weights and KV cache",
        text="What was planned for. What is between this and the whole: activations, libraries, the runtime.",
        unit="bytes",
        queries={
            "weights {{replica}} rank {{rank}}": most("qwen_ray_rank_weights_bytes", RANK),
            "KV cache {{replica}} rank {{rank}}": most("qwen_ray_rank_kv_bytes", RANK),
        },
    ),
    Panel(
        title="Read from the checkpoint",
        text="Each rank reads its own shard, and no more.",
        unit="bytes",
        kind="bargauge",
        queries={"{{replica}} rank {{rank}}": most("qwen_ray_rank_read_bytes", RANK)},
    ),
    Panel(
        title="Steps by rank",
        text="All ranks of a replica run the same steps: one that stops is the one that hangs.",
        unit="cps",
        queries={"{{replica}} rank {{rank}}": per_second("qwen_ray_rank_steps_total", RANK)},
    ),
    Panel(
        title="Busy ranks",
        text="Part of the time that a rank is in a step, waiting for other ranks included.",
        unit="percentunit",
        maximum=1,
        queries={"{{replica}} rank {{rank}}": per_second("qwen_ray_rank_step_seconds_total", RANK)},
    ),
    Panel(
        title="Tokens by rank",
        text="Tokens a second that each rank computes; all stages and tensor ranks compute the same ones.",
        unit="short",
        queries={"{{replica}} rank {{rank}}": per_second("qwen_ray_rank_tokens_total", RANK)},
    ),
    Panel(
        title="Carrying steps to ranks and back",
        text="Mean part of a step's time outside its sampling rank.",
        unit="s",
        width=24,
        height=6,
        queries={"{{replica}}": mean("qwen_ray_step_transport_seconds", "model_name, replica")},
    ),
)
EXPERTS = (
    Panel(
        title="Expert imbalance",
        text="Tokens of the fullest expert rank over those of the mean one, lately. All wait for it; 1 is even.",
        unit="none",
        decimals=2,
        steps=((None, "green"), (1.5, "red")),
        queries={"{{replica}}": most("qwen_ray_expert_imbalance", "model_name, replica")},
    ),
    Panel(
        title="Expert load by rank",
        text="Tokens a second that the experts of each rank compute. A token counts for each expert it is sent to.",
        unit="short",
        queries={"{{replica}} rank {{rank}}": per_second("qwen_ray_rank_expert_tokens_total", RANK)},
    ),
    Panel(
        title="Fullest experts",
        text="The ten experts that compute most, of all layers and replicas, in tokens a second.",
        unit="short",
        kind="bargauge",
        decimals=1,
        queries={
            "layer {{layer}}, expert {{expert}}": (
                f"topk(10, {per_second('qwen_ray_expert_tokens_total', 'layer, expert')})"
            )
        },
    ),
    Panel(
        title="Rebalances in an hour",
        text="Times that experts changed places while serving (--enable-eplb).",
        unit="short",
        width=12,
        queries={"{{replica}}": grown("qwen_ray_expert_rebalances_total", "model_name, replica")},
    ),
    Panel(
        title="Experts moved in an hour",
        text="Experts that each rank received from others.",
        unit="short",
        width=12,
        queries={"{{replica}} rank {{rank}}": grown("qwen_ray_rank_moved_experts_total", RANK)},
    ),
)
CLUSTER = Dashboard(
    name="cluster",
    title="Cluster",
    text="Ranks: where they are, what they hold, how they start and are repaired. Experts stay empty for dense models.",
    variables=VARIABLES,
    rows={"Replicas": REPLICAS, "Ranks": RANKS, "Experts": EXPERTS},
)
