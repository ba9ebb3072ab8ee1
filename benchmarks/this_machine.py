"""The machine that a benchmark runs on: what it is, and how fast it reads and multiplies at the moment.

Knows torch, because its threads do both. A figure without these says nothing.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from qwen_ray.core.plan import CPU_ENVIRONMENT
from qwen_ray.machine import memory_bytes, num_cores

READ_SHAPE = (98_304, 4096)  # float32, 1.6 GB: far more than a last-level cache holds
PRODUCT_SHAPE = (1024, 2048, 4096)
NUM_READS = 3


def make_matrix() -> torch.Tensor:
    """What `read_bandwidth` reads."""
    return torch.ones(READ_SHAPE)


def read_bandwidth(matrix: torch.Tensor) -> float:
    """Bytes/s by all threads: of two ways to read, the median of the faster one."""
    vector = matrix.new_ones(matrix.shape[1])
    ways: tuple[Callable[[], torch.Tensor], ...] = (matrix.sum, lambda: matrix.mv(vector))
    rates: list[list[float]] = [[] for _ in ways]
    for _ in range(NUM_READS):
        for way, done in zip(ways, rates, strict=True):
            begun = time.perf_counter()
            way()
            done.append(matrix.nbytes / (time.perf_counter() - begun))
    return max(map(statistics.median, rates))


def product_rate() -> float:
    """Operations/s of a large bf16 matrix product by all threads, the median."""
    rows, inner, columns = PRODUCT_SHAPE
    a, b = (torch.ones(shape, dtype=torch.bfloat16) for shape in ((rows, inner), (columns, inner)))
    rates: list[float] = []
    for _ in range(NUM_READS):
        begun = time.perf_counter()
        F.linear(a, b)
        rates.append(2 * rows * inner * columns / (time.perf_counter() - begun))
    return statistics.median(rates)


def describe() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": num_cores(),
        "memory_bytes": memory_bytes(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "matrix_instructions": sorted(
            {word for word in flags if word.startswith(("amx", "avx512_bf16", "avx512_vnni"))}
        ),
        "qwen_ray": version("qwen-ray"),
        "load_average": os.getloadavg()[0],  # at the end: what runs beside it should be nothing
    }


def take_cpu_environment() -> None:
    """What a rank is told; begins anew where it is missing: OpenMP reads its variables once, when torch is imported."""
    if missing := {name: value for name, value in CPU_ENVIRONMENT.items() if name not in os.environ}:
        os.execve(sys.executable, sys.orig_argv, os.environ | missing)
