"""The checks of one node, each a function from the question to findings. Knows this machine; not Ray, not a model.

What they find is found by trying: a file is written, a port bound, a compiler run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qwen_ray.doctor.finding import Finding
from qwen_ray.doctor.listeners import can_bind, listener
from qwen_ray.kernels.cpu.library import COMPILERS, VARIANTS, find, processor_flags
from qwen_ray.machine import haproxy

DEV_SHM = Path("/dev/shm")
# Ray's object store, as `serve` asks for it; and what NCCL's ranks of one machine share, with room to spare.
OBJECT_STORE_BYTES = 128 * 2**20
NCCL_SHM_BYTES = 2**30
COMMAND_SECONDS = 60.0
TORCH_SECONDS = 90.0  # to be imported, on a busy machine
ASK_TORCH = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.device_count())"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a node is asked. `port` is None where nothing of ours need listen; sizes in bytes."""

    cache_dir: str
    host: str = "127.0.0.1"
    port: int | None = None
    fetch_bytes: int = 0  # of the model, still to come
    model: str = ""


def gpus(question: Question) -> list[Finding]:
    """Those that the driver knows, against those that torch can use: torch is asked in a process of its own."""
    driver = _driver_gpus()
    answer = _run([sys.executable, "-c", ASK_TORCH], seconds=TORCH_SECONDS)
    if answer.returncode != 0:
        message = f"torch cannot be imported: {_last_line(answer.stderr)}"
        return [Finding(check="gpus", verdict="fail", message=message, advice="Install torch anew.")]
    build, cuda, seen = answer.stdout.split()[-3:]
    if driver in (None, 0) and seen == "0":
        return [_finding("gpus", "no NVIDIA driver, or no GPU: models run on the CPU")]
    message = f"the driver has {driver}, torch {build} can use {seen}"
    if driver is None or str(driver) == seen:
        return [_finding("gpus", message)]
    advice = (
        "This torch is built for CPUs: install a CUDA build of it."
        if cuda == "None"
        else f"Check CUDA_VISIBLE_DEVICES, and that the driver is new enough for CUDA {cuda} (nvidia-smi)."
    )
    return [Finding(check="gpus", verdict="fail", message=message, advice=advice)]


def shared_memory(question: Question) -> list[Finding]:
    """/dev/shm. Our CPU ranks share memory without it."""
    has_gpus = bool(_driver_gpus())
    needed = OBJECT_STORE_BYTES + (NCCL_SHM_BYTES if has_gpus else 0)
    usage = shutil.disk_usage(DEV_SHM)
    message = f"{DEV_SHM} has {_size(usage.free)} free of {_size(usage.total)}"
    if usage.free >= needed:
        return [_finding("shared memory", message)]
    whom = "Ray's object store and NCCL need" if has_gpus else "Ray's object store needs"
    advice = "Make it larger: docker run --shm-size=2g, an emptyDir of medium Memory, mount -o remount,size=2g."
    message = f"{message}; {whom} {_size(needed)}"
    return [Finding(check="shared memory", verdict="fail", message=message, advice=advice)]


def ports(question: Question) -> list[Finding]:
    """The one that serve listens on; its others it looks for itself."""
    host, port = question.host, question.port
    if port is None:
        return []
    try:
        is_free = can_bind(host, port)
    except OSError as error:
        message = f"{host}:{port} cannot be listened on: {error.strerror}"
        return [
            Finding(check="ports", verdict="fail", message=message, advice="Give --host an address of this machine.")
        ]
    if is_free:
        return [_finding("ports", f"port {port} of {host} is free")]
    message = f"port {port} of {host} is taken by {listener(port) or 'a process of another user'}"
    return [Finding(check="ports", verdict="fail", message=message, advice="Stop it, or serve with another --port.")]


def disk(question: Question) -> list[Finding]:
    """Whether weights can be put into the cache: it is written to, and its free space counted."""
    folder = Path(question.cache_dir)
    advice = "Give --cache-dir (QWEN_RAY_CACHE_DIR) a directory that you may write to, on a disk with room."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(bytes(2**16))
            trial.flush()
            os.fsync(trial.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        message = f"{folder} cannot be written to: {error.strerror}"
        return [Finding(check="disk", verdict="fail", message=message, advice=advice)]
    message = f"{folder} has {_size(free)} free"
    if not question.fetch_bytes:
        return [_finding("disk", message + (f"; {question.model} is there already" if question.model else ""))]
    message += f"; {question.model} needs {_size(question.fetch_bytes)}"
    if free > question.fetch_bytes:
        return [_finding("disk", message)]
    return [Finding(check="disk", verdict="fail", message=message, advice=advice)]


def kernels(question: Question) -> list[Finding]:
    """Which CPU kernels are used, and whether they can be compiled where they are not there yet."""
    flags = processor_flags()
    variant = next((one for one in VARIANTS if one.needs <= flags), None)
    if variant is None:
        return [_finding("kernels", "none of our own for this processor: torch's are used")]
    if (built := find(variant)) is not None:
        return [_finding("kernels", f"{variant.name}, built ({built})")]
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        message = f"no C++ compiler for those of {variant.name}: torch's are used, which are slower"
        return [Finding(check="kernels", verdict="warn", message=message, advice="apt-get install g++")]
    with tempfile.TemporaryDirectory() as room:
        source = Path(room) / "trial.cpp"
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        answer = _run(
            [compiler, "-std=c++17", "-fopenmp", *variant.flags, "-o", str(source.with_suffix("")), str(source)]
        )
    if answer.returncode != 0:
        message = f"{compiler} cannot compile those of {variant.name}: {_last_line(answer.stderr)}"
        return [Finding(check="kernels", verdict="warn", message=message, advice="apt-get install g++ libc6-dev")]
    return [_finding("kernels", f"{variant.name}, compiled by {compiler} at the first start")]


def proxy(question: Question) -> list[Finding]:
    """HAProxy, which stands before Ray Serve."""
    program = haproxy()
    advice = "pip install 'ray[serve]', which brings one, or apt-get install haproxy."
    if program is None:
        return [Finding(check="haproxy", verdict="fail", message="there is none", advice=advice)]
    answer = _run([str(program), "-v"])
    if answer.returncode != 0:
        message = f"{program} does not run: {_last_line(answer.stderr)}"
        return [Finding(check="haproxy", verdict="fail", message=message, advice=advice)]
    return [_finding("haproxy", f"{answer.stdout.splitlines()[0].partition(' - ')[0]} ({program})")]


CHECKS: dict[str, Callable[[Question], list[Finding]]] = {
    "gpus": gpus,
    "shared memory": shared_memory,
    "ports": ports,
    "disk": disk,
    "kernels": kernels,
    "haproxy": proxy,
}


def _driver_gpus() -> int | None:
    """As nvidia-smi counts them; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    answer = _run(["nvidia-smi", "-L"])
    return sum(line.startswith("GPU ") for line in answer.stdout.splitlines()) if answer.returncode == 0 else 0


def _run(command: list[str], *, seconds: float = COMMAND_SECONDS) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it says nothing"])[-1]


def _finding(check: str, message: str) -> Finding:
    return Finding(check=check, verdict="ok", message=message)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
