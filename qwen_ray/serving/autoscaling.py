"""How many replicas there should be, from what the engines know: tokens waiting and KV cache held, not request counts.

A replica's pressure is 1 when its queue takes as long as 4 full steps, or when 90 % of its KV cache is held by
sequences. Serve asks `decide` a few times a second and adds its own delays (`upscale_delay_s`, `downscale_delay_s`)
and bounds. Hysteresis is twofold: up only above a mean pressure of 1; down by one only where those that stay would be
below 0.7; and either must last for its delay.

What is decided and why is put down in the GCS's key-value store: Serve decides in a process of its own, and ingresses
show it as metrics.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwen_ray.cluster.notes import read_note, write_note
from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.stats import EngineStats, ScalingStats

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

BACKLOG_STEPS = 4
FULL_KV_USAGE = 0.9
COMFORTABLE = 0.7

PRESSURE = "pressure"
KV_USAGE = "kv_usage"
NOTE = "autoscaling"


def pressures(engine: EngineStats, config: EngineConfig) -> dict[str, float]:
    """A replica's, by reason; the largest one counts."""
    backlog = engine.num_waiting_tokens / (BACKLOG_STEPS * config.max_num_batched_tokens)
    return {"backlog": backlog, "kv_cache": engine.kv_usage / FULL_KV_USAGE}


def autoscaling_stats(engine: EngineStats, config: EngineConfig) -> dict[str, float]:
    """What a replica reports to Serve."""
    return {
        PRESSURE: max(pressures(engine, config).values()),
        "waiting_tokens": float(engine.num_waiting_tokens),
        KV_USAGE: engine.kv_usage,
    }


def desired_replicas(pressures: Sequence[float], target: int) -> int:
    """From the pressures of the running replicas; `target` is what was last decided. No bounds, no delays."""
    if not pressures:
        return target
    total = sum(pressures)
    mean = total / len(pressures)
    if mean > 1.0:
        # At most twice as many at once: replicas that are still loading do not show in the pressures yet.
        return max(target, min(math.ceil(total), 2 * len(pressures)))
    if target > 1 and total / (target - 1) < COMFORTABLE:
        return target - 1
    return target


def decide(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Ray Serve's policy function."""
    metrics: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
    target = context.target_num_replicas
    asked = desired_replicas(list(metrics.get(PRESSURE, {}).values()), target)
    bounds = (context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas)
    before: ScalingStats | None = context.policy_state.get(NOTE)
    now = (before or ScalingStats(target=target, asked=target, min=bounds[0], max=bounds[1])).then(
        target, asked, _reason(metrics, asked - target), bounds
    )
    if now != before:
        write_note(context.app_name or "", NOTE, now)
    return asked, {NOTE: now}


async def last_decided(app: str) -> ScalingStats | None:
    """What `decide` has put down for the application, on whichever node; None if nothing yet."""
    return await asyncio.to_thread(read_note, app, NOTE, ScalingStats)


def _reason(metrics: Mapping[str, Mapping[Any, float]], difference: int) -> str:
    if difference <= 0:
        return "idle" if difference else ""
    full = sum(metrics.get(KV_USAGE, {}).values()) / FULL_KV_USAGE
    return "kv_cache" if full >= sum(metrics.get(PRESSURE, {}).values()) else "backlog"
