"""Machines as the planner sees them: devices with memory, bandwidth and matmul rate, on nodes with links.

Device figures are the makers' data sheets (dense, without sparsity); `qwen-ray plan` multiplies them by the measured
efficiencies in `planner/cost.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from qwen_ray.core.errors import SettingsError

GB = 1e9
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, or the share of a CPU that one rank gets. Bytes, bytes/s, operations/s."""

    name: str
    memory_bytes: int
    memory_bandwidth: float
    flops: float  # dense bf16
    link_bandwidth: float  # to a device of the same node, one direction
    kind: str = "cuda"  # cuda | cpu


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    device: Device
    num_devices: int
    network_bandwidth: float = 50e9  # to another node, one direction: 400 Gbit/s
    network_latency: float = 10e-6
    name: str = ""
    num_cores: int = 0  # that ranks may use; 0: unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    nodes: tuple[Node, ...]

    @property
    def num_devices(self) -> int:
        return sum(node.num_devices for node in self.nodes)

    @property
    def description(self) -> str:
        """The short form that `parse` reads, equal neighbours counted together: `2x8xH100-80G`."""
        parts: list[tuple[str, int]] = []
        for node in self.nodes:
            text = f"{node.num_devices}x{node.device.name}"
            if parts and parts[-1][0] == text:
                parts[-1] = (text, parts[-1][1] + 1)
            else:
                parts.append((text, 1))
        return "+".join(text if count == 1 else f"{count}x{text}" for text, count in parts)

    @classmethod
    def parse(cls, text: str) -> Hardware:
        """From `8xH100-80G` (one node), `2x8xH100-80G` (two of them), `8xH100-80G+4xA100-40G`, `1xcpu-24G`.

        Raises SettingsError with the known devices.
        """
        nodes: list[Node] = []
        for part in text.replace(" ", "").split("+"):
            match = re.fullmatch(r"(?:(\d+)x)?(?:(\d+)x)?([A-Za-z][\w.]*?)(?:-(\d+)G(?:i?B)?)?", part)
            device = _device(match[3], match[4]) if match else None
            if match is None or device is None:
                raise SettingsError(
                    f"hardware {text!r}: {part!r} is not [NODESx]DEVICESxNAME[-MEMORYG]; known names: "
                    f"{', '.join(sorted({d.name for d in DEVICES}))}. Example: 2x8xH100-80G.",
                    field="hardware",
                )
            first, second = (int(g) if g else 1 for g in (match[1], match[2]))
            count, per_node = (first, second) if match[2] else (1, first)
            if not (1 <= count * per_node <= 100_000):
                raise SettingsError(f"hardware {text!r}: {count * per_node} devices.", field="hardware")
            nodes += [Node(device=device, num_devices=per_node)] * count
        return cls(nodes=tuple(nodes))


def _gpu(name: str, memory_gb: float, bandwidth_gbs: float, tflops: float, link_gbs: float) -> Device:
    return Device(
        name=name,
        memory_bytes=int(memory_gb * GIB),
        memory_bandwidth=bandwidth_gbs * GB,
        flops=tflops * 1e12,
        link_bandwidth=link_gbs * GB,
    )


# Usable memory in GiB as nvidia-smi reports it, a little under the number in the name.
DEVICES: tuple[Device, ...] = (
    _gpu("H100-80G", 79.6, 3350, 989, 450),
    _gpu("H200-141G", 139.8, 4800, 989, 450),
    _gpu("H20-96G", 95.6, 4000, 148, 450),
    _gpu("B200-180G", 178.0, 8000, 2250, 900),
    _gpu("A100-40G", 39.4, 1555, 312, 300),
    _gpu("A100-80G", 79.2, 2039, 312, 300),
    _gpu("A10-24G", 22.5, 600, 125, 32),
    _gpu("L4-24G", 22.5, 300, 121, 32),
    _gpu("L40S-48G", 44.9, 864, 362, 32),
    _gpu("T4-16G", 14.6, 320, 65, 16),
    _gpu("V100-32G", 31.7, 900, 125, 150),
    _gpu("RTX4090-24G", 23.5, 1008, 165, 32),
    _gpu("RTX5090-32G", 31.5, 1792, 210, 64),
    # A CPU "device" is one node's worth of sockets; the live inventory replaces memory by what it finds.
    Device(name="cpu-24G", memory_bytes=24 * GIB, memory_bandwidth=20e9, flops=1.2e12, link_bandwidth=5e9, kind="cpu"),
)


def cpu_device(*, num_cores: int, memory_bytes: int) -> Device:
    """A CPU node that was found rather than named: 10 GB/s and 0.6 TFLOP/s a core, as measured on a Xeon with AMX.

    Memory buses end at about 250 GB/s a socket, whatever its cores.
    """
    return Device(
        name=f"cpu-{memory_bytes / GIB:.0f}G",
        memory_bytes=memory_bytes,
        memory_bandwidth=min(10e9 * num_cores, 250e9),
        flops=0.6e12 * num_cores,
        link_bandwidth=5e9,
        kind="cpu",
    )


def _device(name: str, memory: str | None) -> Device | None:
    same = [d for d in DEVICES if d.name.rpartition("-")[0].lower() == name.lower()]
    if memory is None:
        return same[0] if len(same) == 1 else None
    for device in same:
        if device.name.endswith(f"-{memory}G"):
            return device
    if same and same[0].kind == "cpu":
        return replace(same[0], name=f"cpu-{memory}G", memory_bytes=int(memory) * GIB)
    return None
