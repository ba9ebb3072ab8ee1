"""Ray's nodes as the planner's hardware, from answers as Ray gives them; no Ray is started."""

from __future__ import annotations

from typing import Any

import pytest

from qwen_ray.cluster.inventory import free_hardware, hardware
from qwen_ray.core.hardware import GIB


def node(name: str, *, alive: bool = True, labels: dict[str, str] | None = None, **resources: float) -> dict[str, Any]:
    named = {
        key.replace("accelerator_type_", "accelerator_type:").replace("__", "-"): v for key, v in resources.items()
    }
    return {
        "NodeID": name,
        "Alive": alive,
        "NodeManagerAddress": name,
        "Resources": named,
        "Labels": labels or {},
    }


def test_gpu_nodes_by_type_and_dead_nodes_left_out() -> None:
    found = hardware(
        [
            node("a", CPU=64, memory=500 * GIB, GPU=8, accelerator_type_H100=1),
            node("b", CPU=64, memory=500 * GIB, GPU=8, accelerator_type_H100=1, alive=False),
            node("c", CPU=16, memory=60 * GIB, GPU=4, labels={"ray.io/accelerator-type": "A10G"}),
        ]
    )
    gpus = [(n.name, n.num_devices, n.device.name) for n in found.nodes if n.device.kind == "cuda"]
    assert gpus == [("a", 8, "H100-80G"), ("c", 4, "A10-24G")]
    assert [(n.name, n.num_cores) for n in found.nodes if n.device.kind == "cpu"] == [("a", 64), ("c", 16)]


@pytest.mark.parametrize(("kind", "device"), [("A100", "A100-40G"), ("A100__80G", "A100-80G"), ("H200", "H200-141G")])
def test_of_several_sizes_the_smallest_unless_named(kind: str, device: str) -> None:
    found = hardware([node("a", CPU=1, GPU=2, **{f"accelerator_type_{kind}": 1})])
    assert [n.device.name for n in found.nodes] == [device]


def test_unknown_gpu_is_planned_as_a_slow_one(caplog: pytest.LogCaptureFixture) -> None:
    (found,) = hardware([node("a", GPU=1, accelerator_type_X9000=1)]).nodes
    assert found.device.name == "X9000"
    assert found.device.memory_bytes < 16 * GIB
    assert "unknown GPU 'X9000'" in caplog.text


def test_cpu_node_has_the_memory_that_ray_grants() -> None:
    (found,) = hardware([node("a", CPU=2, memory=17 * GIB, object_store_memory=7 * GIB)]).nodes
    assert (found.device.kind, found.device.memory_bytes, found.num_cores) == ("cpu", 17 * GIB, 2)


def test_free_hardware_leaves_out_what_is_taken() -> None:
    nodes = [
        node("a", CPU=8, memory=GIB, GPU=8, accelerator_type_L4=1),
        node("b", CPU=8, memory=GIB, GPU=8, accelerator_type_L4=1),
    ]
    found = free_hardware(nodes, {"a": {"CPU": 8.0, "memory": GIB, "GPU": 3.0}, "b": {"CPU": 1.5, "GPU": 0.5}})
    assert [(n.name, n.num_devices, n.device.name, n.num_cores) for n in found.nodes] == [
        ("a", 3, "L4-24G", 8),
        ("a", 1, "cpu-1G", 8),
    ]
