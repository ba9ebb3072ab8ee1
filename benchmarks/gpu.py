"""Qwen's models on one GPU, beside the limits of that very chip: one table, a row as soon as it is measured.

    python benchmarks/gpu.py [--models qwen2.5-7b,qwen3-8b] [--seconds 470] [--output benchmarks/results/gpu.json]
    python benchmarks/gpu.py --device cpu --models tiny

First the chip: bytes/s that it copies (read plus written) and reads, operations/s of a large bf16 product of random
numbers. Then each model with random weights of its true shapes, in a process of its own: tokens/s of a prefill and of
decodes with 1, 64 and 256 sequences behind 1,024 tokens each; what fraction that is of the bandwidth (weights and KV
cache that a step must read) and of the rate; where the time of a step goes; memory beside what the planner says;
whether a sequence is told the same alone and in company. Last transformers with the same shapes, if it is installed.

Results are kept by model: a run of some replaces theirs, and leaves those of others where device and versions are the
same. Needs torch, numpy, tokenizers, jinja2, llguidance and gguf (with tqdm and pyyaml), on a GPU what torch's kernels
need, and transformers if that is to be measured; neither Ray nor pydantic, rich or safetensors. Where qwen-ray is not
installed, PYTHONPATH=. does.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from gpu_device import Limits, measure_limits, open_device
from gpu_measure import measure_model
from gpu_models import CPU_SIZES, CUDA_MODELS, CUDA_SIZES, MODELS, TINY_MODELS
from gpu_rows import PEER, Kept, Row, head_line, line
from gpu_transformers import measure_transformers

from qwen_ray.machine import num_cores

PEERS = tuple(f"{PEER}{name}" for name in ("qwen2.5-0.5b", "qwen2.5-7b", "tiny"))
DEFAULT = {
    "cuda": (*CUDA_MODELS, *(name for name in PEERS if name.removeprefix(PEER) in CUDA_MODELS)),
    "cpu": (*TINY_MODELS, f"{PEER}tiny"),
}
LEAST_SECONDS = 10.0  # without so many, nothing is begun


def measure(connection: Connection, name: str, kind: str, limits: Limits | None) -> None:
    """In a process of its own: one model's rows, or without `limits` those of the device."""
    if kind == "cpu":
        torch.set_num_threads(num_cores())
    sizes = CUDA_SIZES if kind == "cuda" else CPU_SIZES
    try:
        device = open_device(kind)
        if limits is None:
            connection.send((device.describe(), measure_limits(device)))
            return
        part, own = (measure_transformers, name.removeprefix(PEER)) if name in PEERS else (measure_model, name)
        for row in part(own, sizes, device, limits):
            connection.send(row)
    except Exception as error:
        traceback.print_exc()
        first = str(error).partition("\n")[0][:200]
        connection.send(Row(model=name, what="", note=f"failed: {type(error).__name__}: {first}"))


def answers(name: str, kind: str, limits: Limits | None, until: float) -> Iterator[object]:
    """What `measure` sends; the process is ended when the time is over."""
    context = get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(sending, name, kind, limits), daemon=True)
    process.start()
    sending.close()
    try:
        while receiving.poll(max(0.0, until - time.monotonic())):
            yield receiving.recv()
        yield Row(model=name, what="", note="the time is over")
    except EOFError:
        process.join()
        if process.exitcode:
            yield Row(model=name, what="", note=f"its process ended with {process.exitcode}")
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def run(names: list[str], kind: str, kept: Kept, until: float) -> None:
    (first, *_) = answers("", kind, None, until)
    if isinstance(first, Row):
        raise SystemExit(first.note)
    assert isinstance(first, tuple), "measure sends this first"
    described, limits = first
    kept.begin(described, asdict(limits) | {"date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())})
    print(", ".join(f"{name} {value}" for name, value in described.items()))
    print(
        f"copies {limits.copy_bandwidth / 1e9:,.0f} GB/s (read and written), reads {limits.read_bandwidth / 1e9:,.0f} "
        f"GB/s, multiplies bf16 at {limits.product_rate / 1e12:,.1f} TFLOP/s",
        flush=True,
    )
    print(head_line(), flush=True)
    for name in names:
        if until - time.monotonic() < LEAST_SECONDS:
            print(line(Row(model=name, what="", note="not begun: the time is over")), flush=True)
            continue
        kept.forget(name)
        for row in answers(name, kind, limits, until):
            assert isinstance(row, Row), "measure sends nothing else"
            print(line(kept.add(row)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(DEFAULT), default="cuda")
    parser.add_argument("--models", help=f"of {', '.join((*MODELS, *PEERS))}; some, with commas between them")
    parser.add_argument("--seconds", type=float, default=470.0, help="after which nothing more is measured")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    args = parser.parse_args()
    names = args.models.split(",") if args.models else list(DEFAULT[args.device])
    if unknown := [name for name in names if name not in (*MODELS, *PEERS)]:
        parser.error(f"no such model: {', '.join(unknown)}")
    begun = time.monotonic()
    run(names, args.device, Kept(path=args.output), begun + args.seconds)
    print(f"{time.monotonic() - begun:.0f} s; kept in {args.output}")


if __name__ == "__main__":
    main()
