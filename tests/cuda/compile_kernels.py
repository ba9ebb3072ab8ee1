"""Compiles Triton's kernels for GPUs that need not be here, as the functions around them launch them.

`python tests/cuda/compile_kernels.py` prints a line for each kernel that `CASES` come to: its registers, what of them
went to memory, its shared memory. Nothing is run: what the functions return is whatever memory held.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported, and whoever imports it

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from qwen_ray.kernels.cuda import attention, matmul, packed, packed_experts, pointwise
from qwen_ray.kernels.quantized import GROUPS, make_room, make_stack

CAPABILITIES = (80, 90)
PTXAS = Path(sys.modules["triton"].__file__ or "").parent / "backends/nvidia/bin/ptxas"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    case: str
    kernel: str
    capability: int
    registers: int
    spilled_bytes: int
    shared_bytes: int


class Absent:
    """A driver of a GPU that is not here."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def resources(ptx: str, capability: int) -> tuple[int, int]:
    """Registers of a thread, and bytes that did not fit into them, as the assembler says."""
    arch = f"sm_{capability}" + ("a" if capability == 90 else "")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [PTXAS, "-v", f"--gpu-name={arch}", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers is not None, said
    return int(registers[1]), int(spilled[1]) if spilled is not None else 0


def compile_case(name: str, capability: int) -> list[Compiled]:
    found: list[Compiled] = []
    run: Callable[..., Any] = JITFunction.run

    def only_compile(function: Any, *args: Any, **options: Any) -> Any:
        function.device_caches.clear()  # or else it is compiled for the first capability alone
        made = run(function, *args, **options | {"warmup": True})
        registers, spilled = resources(made.asm["ptx"], capability)
        found.append(
            Compiled(
                case=name,
                kernel=function.__name__,
                capability=capability,
                registers=registers,
                spilled_bytes=spilled,
                shared_bytes=made.metadata.shared,
            )
        )
        return made

    driver.set_active(cast(Any, Absent(capability)))
    setattr(JITFunction, "run", only_compile)  # noqa: B010 (a method of Triton's)
    try:
        CASES[name]()
    finally:
        setattr(JITFunction, "run", run)  # noqa: B010
    return found


def stand_between(dtype: torch.dtype, dim: int, has_norms: bool) -> None:
    """All that is no product and no attention."""
    x, weight = torch.empty(3, 3584, dtype=dtype), torch.empty(3584, dtype=dtype)
    pointwise.add_norm(x, x.clone(), weight, 1e-6)
    pointwise.rms_norm(x, weight, 1e-6)
    pointwise.silu_and_mul(torch.empty(3, 2 * 18944, dtype=dtype))
    keys, values = torch.empty(2, 10, 16, 4, dim, dtype=dtype)
    norms = (weight[:dim], weight[:dim]) if has_norms else None
    cos, slots = torch.empty(3, dim // 2, dtype=dtype), torch.zeros(3, dtype=torch.int64)
    pointwise.turn_and_store(torch.empty(3, 36 * dim, dtype=dtype), norms, 1e-6, cos, cos, slots, (keys, values))


def multiply_packed(dtype: torch.dtype, bits: int, group: int = 32) -> None:
    """Of few and many rows, cut along the columns and not."""
    for out_size, size in ((96, 4096), (8192, 256)):
        weight = make_room(bits, out_size, size, group)
        for num_rows in (1, 33):
            packed.linear_packed(torch.empty(num_rows, size, dtype=dtype), weight, torch.empty(out_size, dtype=dtype))
    packed.widen(weight, slice(0, 32), dtype)
    gate_up, down = make_stack(4, bits, 1536, 2048, group), make_stack(4, bits, 2048, 768, group)
    slots = torch.arange(8, dtype=torch.int32).view(4, 2) % 4
    packed_experts.run_experts(torch.zeros(4, 2048, dtype=dtype), slots, torch.zeros(4, 2), gate_up, down)


def attend(dtype: torch.dtype, dim: int, group: int) -> None:
    """A decode, its parts put together, a prefill; a decode without parts."""
    q = torch.zeros(6, 2 * group, dim, dtype=dtype)
    cache = torch.zeros(64, 16, 2, dim, dtype=dtype)
    plan = attention.plan_attention(torch.zeros(2, 64, dtype=torch.int64), (1, 5), (1000, 1000), 16)
    is_hopper = driver.active.get_current_target().arch == 90
    attention.paged_attention(q, cache, cache, replace(plan, is_hopper=is_hopper), 1.0)
    plan = attention.decode_plan(torch.zeros(6, 64, dtype=torch.int32), 200, 16)
    attention.paged_attention(q, cache, cache, plan, 1.0)


PACKED = [(torch.bfloat16, 8, 32), *((torch.bfloat16, 4, group) for group in GROUPS), (torch.float16, 4, 32)]


def multiply_row_by_row(dtype: torch.dtype) -> None:
    """Matrices of many and of few outputs, and experts."""
    for out_size, size in ((18944, 3584), (3584, 18944), (512, 900)):
        x, weight = torch.empty(3, size, dtype=dtype), torch.empty(out_size, size, dtype=dtype)
        matmul.linear(x, weight, weight[:, 0].contiguous())
    gate_up, down = torch.empty(4, 1536, 2048, dtype=dtype), torch.empty(4, 2048, 768, dtype=dtype)
    matmul.run_experts(torch.empty(3, 2048, dtype=dtype), torch.zeros(3, 2).long(), torch.ones(3, 2), gate_up, down)


CASES: dict[str, Callable[[], None]] = {
    f"between-{dim}-{dtype}": partial(stand_between, dtype, dim, dim == 128)
    for dtype in (torch.bfloat16, torch.float16)
    for dim in (64, 128)
}
CASES |= {
    f"row by row, {dtype}": partial(multiply_row_by_row, dtype)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
}
CASES |= {
    f"packed, {bits} bits by {group}, {dtype}": partial(multiply_packed, dtype, bits, group)
    for dtype, bits, group in PACKED
}
CASES |= {
    f"attention-{str(dtype).removeprefix('torch.')}-{dim}x{group}": partial(attend, dtype, dim, group)
    for dtype, dim, group in [
        (torch.bfloat16, 64, 7),
        (torch.bfloat16, 80, 1),
        (torch.bfloat16, 128, 7),
        (torch.bfloat16, 128, 8),
        (torch.bfloat16, 256, 8),
        (torch.float16, 64, 7),
        (torch.float16, 128, 7),
        (torch.float32, 64, 7),
        (torch.float32, 256, 8),
    ]
}


if __name__ == "__main__":
    for capability in CAPABILITIES:
        for case in CASES:
            for compiled in compile_case(case, capability):
                sys.stdout.write(json.dumps(asdict(compiled)) + "\n")
