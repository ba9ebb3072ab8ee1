"""Where the ranks of one replica go: one placement group, one bundle per pipeline stage.

A bundle lies on one node, so tensor and expert parallel stay inside a node and pipeline stages may spread. Knows Ray's
resources, not memory or threads: those are the planner's arithmetic, and Ray's own counting would only repeat it worse.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from qwen_ray.core.errors import PlanRefused
from qwen_ray.core.plan import CPU_ENVIRONMENT, ReplicaSpec

logger = logging.getLogger(__name__)

# A rank's claim on Ray's CPU count: a token of presence. Two cores must hold six ranks, a replica and an ingress; how
# many threads each rank runs is decided by the planner, in `ReplicaSpec.num_threads`.
RANK_CPUS = 0.05


def rank_resources(spec: ReplicaSpec) -> dict[str, float]:
    return {"CPU": RANK_CPUS, "GPU": 1.0} if spec.device == "cuda" else {"CPU": RANK_CPUS}


async def place(spec: ReplicaSpec, *, seconds: float) -> PlacementGroup:
    """A placement group with room for every rank. Raises PlanRefused after `seconds`, naming what is missing."""
    bundle = {name: amount * spec.plan.stage_size for name, amount in rank_resources(spec).items()}
    bundles = [dict(bundle) for _ in range(spec.plan.pp)]
    # Names are unique in a cluster, and a model has several replicas.
    group = placement_group(bundles, strategy="PACK", name=f"qwen-ray:{spec.name}-{secrets.token_hex(3)}")
    try:
        if await asyncio.to_thread(group.wait, seconds):
            return group
        shortage = _shortage(bundle, spec.plan.pp)
        raise PlanRefused(
            f"{spec.name}: no place for its ranks within {seconds:.0f} s. {shortage}", inequality=shortage
        )
    except BaseException:
        release(group)
        raise


def release(group: PlacementGroup) -> None:
    """Gives the resources back; Ray kills whatever still runs in them."""
    remove_placement_group(group)


def actor_options(
    spec: ReplicaSpec, group: PlacementGroup, stage: int, *, name: str, is_standby: bool = False
) -> dict[str, Any]:
    """For `ray.remote(**...)`: its bundle, its environment, and no second life: the group decides on repairs.

    `is_standby`: beside the ranks of that stage, who have claimed the whole bundle.
    """
    resources = {"CPU": 0.0} if is_standby else rank_resources(spec)
    return {
        "name": name,
        "num_cpus": resources["CPU"],
        "num_gpus": resources.get("GPU", 0),
        "max_restarts": 0,
        "max_task_retries": 0,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=stage
        ),
        "runtime_env": {"env_vars": environment(spec)},
    }


def environment(spec: ReplicaSpec) -> dict[str, str]:
    """Variables of a rank's process: they must be there before torch is."""
    threads = {"OMP_NUM_THREADS": str(spec.num_threads), "MKL_NUM_THREADS": str(spec.num_threads)}
    return threads if spec.device == "cuda" else threads | CPU_ENVIRONMENT


def _shortage(bundle: Mapping[str, float], count: int) -> str:
    free = available_resources_per_node()
    rooms = {str(node["NodeManagerAddress"]): free.get(node["NodeID"], {}) for node in ray.nodes() if node["Alive"]}
    needed = ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
    found = "; ".join(
        f"{address}: " + ", ".join(f"{room.get(name, 0.0):g} {name}" for name in bundle)
        for address, room in sorted(rooms.items())
    )
    return f"Needed: {count} time{'s' if count > 1 else ''} {needed}, each on one node; free: {found or 'no node'}."
