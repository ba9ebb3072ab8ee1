"""What a Ray cluster is made of, as the planner's nouns.

Knows what Ray says of its nodes: resources, and the accelerator's type as a resource or a label. `machine.py` does the
same for one machine without Ray.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray._private.state import available_resources_per_node

from qwen_ray.core.hardware import DEVICES, Device, Hardware, Node, cpu_device

logger = logging.getLogger(__name__)

_TYPE_RESOURCE = "accelerator_type:"
_TYPE_LABEL = "ray.io/accelerator-type"


def hardware(nodes: Sequence[Mapping[str, Any]] | None = None) -> Hardware:
    """The whole cluster, used or not. `nodes` are in the form of `ray.nodes()`, which is asked when None.

    A machine with GPUs counts twice, as its GPUs and as its CPU: a plan is for the one kind or the other. Memory of a
    CPU is what Ray grants its workers: all that was free when Ray started, less the object store.
    """
    found: list[Node] = []
    for node in ray.nodes() if nodes is None else nodes:
        if node["Alive"]:
            found += _nodes(node, node["Resources"])
    return Hardware(nodes=tuple(found))


def free_hardware(
    nodes: Sequence[Mapping[str, Any]] | None = None, free: Mapping[str, Mapping[str, float]] | None = None
) -> Hardware:
    """What nobody has reserved: GPUs less those taken, cores less those claimed. `free`: resources by node id."""
    known = available_resources_per_node() if free is None else free
    found: list[Node] = []
    for node in ray.nodes() if nodes is None else nodes:
        if node["Alive"]:
            found += _nodes(node, known.get(node["NodeID"], {}))
    return Hardware(nodes=tuple(found))


def _nodes(node: Mapping[str, Any], resources: Mapping[str, float]) -> list[Node]:
    name = str(node["NodeManagerAddress"])
    num_cores = int(resources.get("CPU", 0))
    found: list[Node] = []
    if resources.get("GPU", 0) >= 1:
        device = _gpu(_accelerator_type(node), name)
        found.append(Node(device=device, num_devices=int(resources["GPU"]), name=name, num_cores=num_cores))
    if num_cores and resources.get("memory", 0) >= 1:
        cpu = cpu_device(num_cores=num_cores, memory_bytes=int(resources["memory"]))
        found.append(Node(device=cpu, num_devices=1, name=name, num_cores=num_cores))
    return found


def _accelerator_type(node: Mapping[str, Any]) -> str:
    for resource in node["Resources"]:
        if resource.startswith(_TYPE_RESOURCE):
            return resource.removeprefix(_TYPE_RESOURCE)
    return str(node.get("Labels", {}).get(_TYPE_LABEL, ""))


def _gpu(kind: str, node: str) -> Device:
    """Ray's name (`H100`, `A100-80G`, `A10G`), matched to the table; of several sizes the smallest, to be safe."""
    name = kind.lower().removeprefix("tesla-")
    for wanted in (name, name.removesuffix("g")):
        same = [d for d in DEVICES if d.kind == "cuda" and wanted in (d.name.lower(), d.name.lower().partition("-")[0])]
        if same:
            return min(same, key=lambda device: device.memory_bytes)
    slow = next(d for d in DEVICES if d.name == "T4-16G")
    logger.warning("node %s: unknown GPU %r; planning as for a %s", node, kind, slow.name)
    return replace(slow, name=kind or "unknown")
