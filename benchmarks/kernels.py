"""The CPU kernels one by one, ours and torch's in turn: matrix products with few rows, attention, what stands between.

    .venv/bin/python benchmarks/kernels.py [--rounds 5] [--threads 2] [--only linear]

Weights are those of all layers of Qwen2.5-0.5B one after the other, so that none stays in a cache: bytes/s are held
against the bandwidth that is measured in the same round, operations/s against a large product of torch. Medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import this_machine
import torch
from rich.console import Console
from rich.table import Table

from qwen_ray.kernels.cpu import library
from qwen_ray.kernels.registry import Kernels

NUM_LAYERS = 24
SHAPES = ((1152, 896), (896, 896), (9728, 896), (896, 4864))  # qkv, o, gate and up, down
HEAD = (151_936, 896)
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
CONTEXTS = ((1, 128), (1, 4096), (32, 256))  # sequences, tokens of each
BLOCK_SIZE = 16
HEADS, KV_HEADS, HEAD_DIM = 14, 2, 64

Way = Callable[[], object]


def in_turn(ways: dict[str, Way], rounds: int) -> dict[str, float]:
    """Median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for done in range(rounds + 1):  # the first warms up
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            if done:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


def kernels(dtype: torch.dtype) -> dict[str, Kernels]:
    return {"torch": Kernels.on_cpu(None, dtype), "ours": Kernels.on_cpu(library.load(), dtype)}


def linear(dtype: torch.dtype, rounds: int) -> Table:
    table = Table("rows", title=f"all products of one step, {dtype}")
    for name in ("torch ms", "ours ms", "times", "ours GB/s", "ours GFLOP/s"):
        table.add_column(name, justify="right")
    weights = [torch.empty(shape, dtype=dtype).normal_(0, 0.02) for _ in range(NUM_LAYERS) for shape in SHAPES]
    weights.append(torch.empty(HEAD, dtype=dtype).normal_(0, 0.02))
    num_bytes = sum(w.nbytes for w in weights)
    for rows in ROWS:
        inputs = {size: torch.randn(rows, size).to(dtype) for size in (896, 4864)}

        def step(k: Kernels, inputs: dict[int, torch.Tensor] = inputs) -> None:
            for w in weights:
                k.linear(inputs[w.shape[1]], w, None)

        found = in_turn(
            {name: lambda k=k: step(k) for name, k in kernels(dtype).items()}, rounds if rows < 64 else min(rounds, 2)
        )
        operations = 2 * rows * sum(w.numel() for w in weights)
        table.add_row(
            str(rows),
            *(f"{1e3 * seconds:.1f}" for seconds in found.values()),
            f"{found['torch'] / found['ours']:.2f}",
            f"{num_bytes / found['ours'] / 1e9:.1f}",
            f"{operations / found['ours'] / 1e9:.0f}",
        )
    return table


def attention(dtype: torch.dtype, rounds: int) -> Table:
    table = Table("sequences x tokens", title=f"decode attention of {NUM_LAYERS} layers, {dtype}")
    for name in ("torch ms", "ours ms", "times"):
        table.add_column(name, justify="right")
    for num_sequences, context in CONTEXTS:
        num_blocks = num_sequences * -(-context // BLOCK_SIZE)
        shape = (num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
        caches = [[torch.randn(shape).to(dtype) for _ in range(2)] for _ in range(NUM_LAYERS)]
        tables = torch.randperm(num_blocks).view(num_sequences, -1)
        q = torch.randn(num_sequences, HEADS, HEAD_DIM).to(dtype)
        lens = ((1,) * num_sequences, (context,) * num_sequences)

        def step(k: Kernels) -> None:
            plan = k.plan_attention(tables, *lens, BLOCK_SIZE)  # noqa: B023
            for keys, values in caches:  # noqa: B023
                k.paged_attention(q, keys, values, plan, 0.125)  # noqa: B023

        found = in_turn({name: lambda k=k: step(k) for name, k in kernels(dtype).items()}, rounds)
        table.add_row(
            f"{num_sequences} x {context}",
            *(f"{1e3 * seconds:.2f}" for seconds in found.values()),
            f"{found['torch'] / found['ours']:.2f}",
        )
    return table


def pointwise(dtype: torch.dtype, rounds: int) -> Table:
    table = Table("rows", title=f"norms, rotation and gate of {NUM_LAYERS} layers, {dtype}")
    for name in ("torch ms", "ours ms", "times"):
        table.add_column(name, justify="right")
    for rows in (1, 32):
        x, gate_up = torch.randn(rows, 896).to(dtype), torch.randn(rows, 9728).to(dtype)
        q, k_, weight = (
            torch.randn(rows, HEADS, HEAD_DIM).to(dtype),
            torch.randn(rows, KV_HEADS, HEAD_DIM).to(dtype),
            x[0],
        )
        cos, sin = torch.randn(2, rows, HEAD_DIM // 2).to(dtype)

        def step(k: Kernels) -> None:
            for _ in range(NUM_LAYERS):
                k.rms_norm(x, weight, 1e-6)  # noqa: B023
                k.rotate(q, k_, cos, sin)  # noqa: B023
                k.rms_norm(x, weight, 1e-6)  # noqa: B023
                k.silu_and_mul(gate_up)  # noqa: B023

        found = in_turn({name: lambda k=k: step(k) for name, k in kernels(dtype).items()}, 4 * rounds)
        table.add_row(
            str(rows),
            *(f"{1e3 * seconds:.2f}" for seconds in found.values()),
            f"{found['torch'] / found['ours']:.2f}",
        )
    return table


PARTS = {"linear": linear, "attention": attention, "pointwise": pointwise}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    args = parser.parse_args()
    this_machine.take_cpu_environment()
    torch.set_num_threads(args.threads)
    console = Console()
    matrix = this_machine.make_matrix()
    for dtype in (torch.bfloat16, torch.float32):
        if args.dtype in (None, str(dtype).removeprefix("torch.")):
            for name, part in PARTS.items():
                if args.only in (None, name):
                    with torch.inference_mode():
                        table = part(dtype, args.rounds)
                    console.print(table)
                    console.print(f"bandwidth {this_machine.read_bandwidth(matrix) / 1e9:.1f} GB/s")
    console.print(f"large bf16 product {this_machine.product_rate() / 1e9:.0f} GFLOP/s, {args.threads} threads")
    console.print(", ".join(f"{name} {value}" for name, value in this_machine.describe().items()), highlight=False)


if __name__ == "__main__":
    main()
