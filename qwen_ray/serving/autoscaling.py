"""How many replicas there should be, from what the engines know: tokens waiting and KV cache held, not request counts.

A replica's pressure is 1 when its queue takes as long as 4 full steps, or when 90 % of its KV cache is held by
sequences. Serve asks `decide` a few times a second and adds its own delays (`upscale_delay_s`, `downscale_delay_s`)
and bounds. Hysteresis is twofold: up only above a mean pressure of 1; down by one only where those that stay would be
below 0.7; and either must last for its delay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.stats import EngineStats

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

BACKLOG_STEPS = 4
FULL_KV_USAGE = 0.9
COMFORTABLE = 0.7

PRESSURE = "pressure"


def autoscaling_stats(engine: EngineStats, config: EngineConfig) -> dict[str, float]:
    """What a replica reports to Serve."""
    backlog = engine.num_waiting_tokens / (BACKLOG_STEPS * config.max_num_batched_tokens)
    return {
        PRESSURE: max(backlog, engine.kv_usage / FULL_KV_USAGE),
        "waiting_tokens": float(engine.num_waiting_tokens),
        "kv_usage": engine.kv_usage,
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
    pressures = list(metrics.get(PRESSURE, {}).values())
    return desired_replicas(pressures, context.target_num_replicas), {}
