"""The device that is measured, and the limits that its own chip shows: how fast it copies, reads and multiplies.

Knows clocks, memory counters and profilers of a GPU, and what stands in their place on a CPU. Knows no models.
"""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import torch
from in_process import STEP
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from qwen_ray.core.hardware import GIB
from qwen_ray.machine import memory_bytes

Work = Callable[[], object]
NUM_WARM_UPS = 3
ROW = 16_384  # numbers of the matrix that is read
NUM_KERNELS = 12  # the longest, that are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What was measured of the chip: bytes/s, operations/s."""

    copy_bandwidth: float  # read and written
    read_bandwidth: float
    product_rate: float  # bf16


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTime:
    """What a GPU did meanwhile: seconds in which it was busy, how many kernels and copies, seconds of the longest."""

    busy_seconds: float
    num_kernels: int
    kernels: dict[str, float]


class Device(Protocol):
    """`product_size` of the square matrices and `num_read_bytes` are far beyond what its caches hold."""

    device: torch.device
    product_size: int
    num_read_bytes: int

    def seconds(self, work: Work, rounds: int) -> list[float]:
        """Of each round, after a few that do not count."""
        ...

    def begin_peak(self) -> None: ...

    def peak_bytes(self) -> int:
        """The most that was allocated at one time since `begin_peak`."""
        ...

    def used_bytes(self) -> int:
        """Now, with what libraries and the allocator hold."""
        ...

    def total_bytes(self) -> int: ...

    def profile(self) -> DeviceProfile | None:
        """None where the processor that computes is the one that runs Python."""
        ...

    def describe(self) -> dict[str, str]: ...


class CpuDevice:
    """The stand-in: the same figures, so that the benchmark can be run where there is no GPU."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.product_size = 1024
        self.num_read_bytes = GIB // 4

    def seconds(self, work: Work, rounds: int) -> list[float]:
        found: list[float] = []
        for _ in range(NUM_WARM_UPS + rounds):
            begun = time.perf_counter()
            work()
            found.append(time.perf_counter() - begun)
        return found[NUM_WARM_UPS:]

    def begin_peak(self) -> None:
        """Linux keeps one peak, that of the process's whole life."""

    def peak_bytes(self) -> int:
        return _status_bytes("VmHWM")

    def used_bytes(self) -> int:
        return _status_bytes("VmRSS")

    def total_bytes(self) -> int:
        return memory_bytes()

    def profile(self) -> None:
        return None

    def describe(self) -> dict[str, str]:
        return {"device": platform.processor() or platform.machine(), "driver": "none", **_versions()}


class CudaDevice:
    """One NVIDIA GPU: CUDA's events for a clock, torch's allocator and profiler."""

    def __init__(self) -> None:
        torch.cuda.init()
        self.device = torch.device("cuda", 0)
        self.product_size = 8192
        self.num_read_bytes = 4 * GIB

    def seconds(self, work: Work, rounds: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for _ in range(NUM_WARM_UPS):
            work()
        for begin, end in events:
            begin.record()
            work()
            end.record()
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) * 1e-3 for begin, end in events]

    def begin_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def used_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def total_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.device).total_memory

    def profile(self) -> DeviceProfile:
        return DeviceProfile()

    def describe(self) -> dict[str, str]:
        return {"device": torch.cuda.get_device_name(self.device), "driver": _driver(), **_versions()}


class DeviceProfile:
    """Of what the GPU does between `start` and `stop`, by torch's profiler. The host is not looked at."""

    def __init__(self) -> None:
        self._profiler = profile(activities=[ProfilerActivity.CUDA])

    def start(self) -> None:
        torch.cuda.synchronize()
        self._profiler.start()

    def stop(self) -> DeviceTime | None:
        """None if the profiler saw nothing: some systems do not let it."""
        torch.cuda.synchronize()
        self._profiler.stop()
        events = [
            (event.name, event.time_range.start, event.time_range.end)
            for event in self._profiler.events() or ()
            if event.device_type == DeviceType.CUDA
            and event.name != STEP  # marks of the host's are on the device's time line, too
            and not event.is_user_annotation
        ]
        return device_time(events) if events else None


def device_time(events: Iterable[tuple[str, float, float]]) -> DeviceTime:
    """Of (name, start, end) in microseconds; what runs at the same time counts once in the time that it was busy."""
    by_name: defaultdict[str, float] = defaultdict(float)
    busy, until, count = 0.0, float("-inf"), 0
    for name, start, end in sorted(events, key=lambda event: event[1]):
        by_name[name] += (end - start) * 1e-6
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
        count += 1
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:NUM_KERNELS]
    return DeviceTime(busy_seconds=busy * 1e-6, num_kernels=count, kernels=dict(longest))


def open_device(kind: str) -> Device:
    return CudaDevice() if kind == "cuda" else CpuDevice()


@torch.inference_mode()
def measure_limits(device: Device) -> Limits:
    """Medians; of several ways to read, the fastest."""
    return Limits(
        copy_bandwidth=copy_bandwidth(device),
        read_bandwidth=read_bandwidth(device),
        product_rate=product_rate(device),
    )


def copy_bandwidth(device: Device) -> float:
    """Bytes/s read plus bytes/s written."""
    source = torch.ones(device.num_read_bytes // 8, device=device.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(device.seconds(lambda: target.copy_(source), 10))


def read_bandwidth(device: Device) -> float:
    """Bytes/s."""
    matrix = torch.ones(device.num_read_bytes // 4 // ROW, ROW, device=device.device)
    vector = matrix.new_ones(ROW)
    narrow = matrix.view(torch.bfloat16)
    half = narrow.new_ones(2 * ROW)
    ways: list[Work] = [matrix.sum, matrix.amax, lambda: matrix.mv(vector), lambda: narrow.mv(half)]
    return matrix.nbytes / min(statistics.median(device.seconds(way, 10)) for way in ways)


def product_rate(device: Device) -> float:
    """Operations/s of a product of two square bf16 matrices of random numbers."""
    size = device.product_size
    a, b = (torch.randn(size, size, device=device.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / statistics.median(device.seconds(lambda: torch.mm(a, b.T, out=out), 30))


def _status_bytes(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(key))


def _versions() -> dict[str, str]:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {"torch": torch.__version__, "cuda": torch.version.cuda or "none", "triton": triton}


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return answer.stdout.partition("\n")[0].strip() or "unknown"
