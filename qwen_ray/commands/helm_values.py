"""A plan as values of the chart helm/qwen-ray: the model with its degrees, and the pods that hold it.

A node of the hardware that was planned for is a pod. Knows what the chart calls things; decides nothing but how much
memory and CPU a pod asks for beside its GPUs.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import yaml

from qwen_ray.config import ModelSettings, Settings
from qwen_ray.core.errors import PlanRefused
from qwen_ray.core.hardware import GIB, Node
from qwen_ray.planner.candidate import Candidate, PlanReport
from qwen_ray.planner.memory import model_weights

CPUS_PER_GPU = 4
PROCESS_BYTES = 4 * GIB  # of the host's memory, for each rank on a GPU
POD_BYTES = 4 * GIB  # Ray, an ingress, a replica
SHARED_BYTES_PER_RANK = GIB
ROOM_FOR_WEIGHTS = 1.25


def helm_values(settings: Settings, report: PlanReport) -> str:
    """YAML. Raises PlanRefused when nothing fits, or less than the replicas that are asked for."""
    chosen = report.require()
    model = settings.models[0]
    least = model.replicas.min
    most = model.replicas.max if "max" in model.replicas.model_fields_set else max(least, chosen.plan.dp)
    if most > chosen.plan.dp:
        raise PlanRefused(
            f"{report.request.hardware.description} holds {chosen.plan.dp} replicas of {chosen.degrees}, not {most}.",
            inequality=f"{most} replicas > {chosen.plan.dp}",
        )
    weights = model_weights(report.request.config, report.request.weight_dtype).total
    values: dict[str, Any] = {
        "models": [_model(model, chosen, least, most)],
        **({"engine": engine} if (engine := settings.engine.model_dump(mode="json", exclude_unset=True)) else {}),
        "workerGroups": _groups(chosen, least, most),
        "weights": {"size": f"{math.ceil(weights * ROOM_FOR_WEIGHTS / GIB / 10) * 10}Gi"},
    }
    head = f"# {report.request.hardware.description}: {chosen.degrees}, {most} replicas at most.\n"
    return head + yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=110)


def _model(model: ModelSettings, chosen: Candidate, least: int, most: int) -> dict[str, Any]:
    given = model.model_dump(mode="json", exclude_unset=True, exclude={"plan", "replicas", "max_model_len"})
    plan = {"tp": chosen.plan.tp, "pp": chosen.plan.pp}
    if chosen.request.config.moe:
        plan |= {"ep": chosen.plan.ep, "dp_attention": chosen.plan.dp_attention}
    return {
        "name": model.name,
        "source": model.source,
        **{key: value for key, value in given.items() if key not in ("name", "source")},
        "plan": plan,
        "max_model_len": chosen.engine.max_model_len,
        "replicas": {"min": least, "max": most},
    }


def _groups(chosen: Candidate, least: int, most: int) -> list[dict[str, Any]]:
    """One for each kind of node that the replicas stand on, as many pods as the fewest and the most of them need."""
    nodes = chosen.request.hardware.nodes
    kinds = {(node.device.name, node.num_devices): node for node in nodes}
    used = [{index for replica in chosen.placement[:count] for index in replica} for count in (least, most)]
    pods = [Counter((nodes[i].device.name, nodes[i].num_devices) for i in indices) for indices in used]
    return [
        {
            "name": f"{count}x{name}".lower().replace(".", "-")[:30],
            "minReplicas": pods[0][name, count],
            "maxReplicas": pods[1][name, count],
            "gpus": count if node.device.kind == "cuda" else 0,
            **_room(chosen, node),
        }
        for (name, count), node in kinds.items()
        if pods[1][name, count]
    ]


def _room(chosen: Candidate, node: Node) -> dict[str, Any]:
    """What a pod asks for. Ray grants ranks on CPUs what its pod has left, and threads by its CPUs."""
    if node.device.kind == "cpu":
        num_ranks = chosen.plan.stage_size
        num_cpus, memory = max(node.num_cores, num_ranks), node.device.memory_bytes + POD_BYTES
    else:
        num_ranks = node.num_devices
        num_cpus = CPUS_PER_GPU * num_ranks
        memory = POD_BYTES + PROCESS_BYTES * num_ranks
    size = f"{math.ceil(memory / GIB)}Gi"
    return {
        "resources": {"requests": {"cpu": str(num_cpus), "memory": size}, "limits": {"memory": size}},
        "shmSize": f"{math.ceil(SHARED_BYTES_PER_RANK * num_ranks / GIB)}Gi",
    }
