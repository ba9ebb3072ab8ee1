"""A mixture of experts on this CPU: how fast it decodes, what it reads for that, and what holds it back.

    .venv/bin/python benchmarks/moe.py [--rounds 3] [--output benchmarks/results/moe.json]

Qwen3-MoE's architecture with dummy weights in bf16, 2.03 billion parameters of which a token passes through 0.45, on
one rank with all cores: the engine and the worker as they serve, without Ray and HTTP. Decoding reads weights, so it is
held against the memory bus: the bytes of a step are those of the experts that its tokens went to (counted by the
layers, in a first round that is profiled, too: greedy tokens are the same each time), of all other weights and of the
KV cache; the bandwidth is measured before each workload of each round, and so is the rate of a large matrix product,
which is the limit for many rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import this_machine
import torch
from in_process import PROMPT_TOKENS, Bench, is_decode, step_seconds
from rich.console import Console
from rich.table import Table
from shapes import MOE
from step_profile import PartTime, StepProfile, kernel_by_kernel, lost, parts_table

from qwen_ray.core.plan import EngineConfig, ParallelPlan, ReplicaSpec
from qwen_ray.core.stats import StepStats
from qwen_ray.machine import num_cores
from qwen_ray.source.config_file import load_config

ELEMENT_BYTES = 2  # bf16
SKIPPED_STEPS = 2  # decoding, before a step is profiled


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    num_sequences: int
    num_output_tokens: int
    num_profiled: int  # steps

    @property
    def size(self) -> tuple[int, int]:
        return self.num_sequences, self.num_output_tokens


WORKLOADS = (
    Workload(num_sequences=1, num_output_tokens=32, num_profiled=6),
    Workload(num_sequences=32, num_output_tokens=16, num_profiled=2),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One run of a workload. Seconds; `decode_seconds` of its median step, `prefill_seconds` of all of its prompts'."""

    bandwidth: float  # bytes/s, read by all threads just before
    product_rate: float  # operations/s of a large matrix product, just before
    seconds: float
    prefill_seconds: float
    decode_seconds: float


@dataclass(slots=True, kw_only=True)
class Measured:
    """One workload. Experts and bytes are those of a decode step in the mean, `experts_touched` those of a layer."""

    workload: Workload
    experts_touched: float
    experts_if_uniform: float
    expert_bytes: float
    expert_bytes_if_uniform: float
    other_weight_bytes: int
    kv_bytes: float
    part_bytes: dict[str, float]  # the same bytes, by the part that reads them
    part_operations: dict[str, float]  # products with weights, of a decode step
    profile: dict[str, PartTime]
    rounds: list[Round] = field(default_factory=list)

    @property
    def step_bytes(self) -> float:
        return self.expert_bytes + self.other_weight_bytes + self.kv_bytes

    @property
    def step_operations(self) -> float:
        return sum(self.part_operations.values())

    @property
    def bandwidth(self) -> float:
        return statistics.median(r.bandwidth for r in self.rounds)

    @property
    def product_rate(self) -> float:
        return statistics.median(r.product_rate for r in self.rounds)

    @property
    def least_seconds(self) -> dict[str, float]:
        """By part: what the machine needs to read its bytes or to multiply, whichever is more."""
        return {
            name: max(num_bytes / self.bandwidth, self.part_operations.get(name, 0.0) / self.product_rate)
            for name, num_bytes in self.part_bytes.items()
        }

    @property
    def decode_seconds(self) -> float:
        return statistics.median(r.decode_seconds for r in self.rounds)

    @property
    def figures(self) -> dict[str, list[float]]:
        """By round."""
        num_sequences, num_outputs = self.workload.num_sequences, self.workload.num_output_tokens
        return {
            "decode_tokens_per_second": [num_sequences / r.decode_seconds for r in self.rounds],
            "decode_step_seconds": [r.decode_seconds for r in self.rounds],
            "output_tokens_per_second": [num_sequences * num_outputs / r.seconds for r in self.rounds],
            "prefill_tokens_per_second": [num_sequences * PROMPT_TOKENS / r.prefill_seconds for r in self.rounds],
            "bandwidth": [r.bandwidth for r in self.rounds],
            "decode_bandwidth": [self.step_bytes / r.decode_seconds for r in self.rounds],
            "product_rate": [r.product_rate for r in self.rounds],
            "fraction_of_product_rate": [self.step_operations / r.decode_seconds / r.product_rate for r in self.rounds],
            "fraction_of_bandwidth": [self.step_bytes / r.decode_seconds / r.bandwidth for r in self.rounds],
        }


def make_spec(directory: Path) -> ReplicaSpec:
    (directory / "config.json").write_text(json.dumps(MOE))
    config = load_config(directory)
    most = max(WORKLOADS, key=lambda w: w.num_sequences * (PROMPT_TOKENS + w.num_output_tokens))
    tokens = PROMPT_TOKENS + max(w.num_output_tokens for w in WORKLOADS)
    block_size = EngineConfig(num_blocks=1).block_size
    engine = EngineConfig(
        num_blocks=most.num_sequences * -(-tokens // block_size),
        max_model_len=tokens,
        max_num_batched_tokens=PROMPT_TOKENS * most.num_sequences,  # all prompts in one step, then nothing but decodes
        enable_prefix_caching=False,  # every round computes its prompts
    )
    return ReplicaSpec(
        name="moe",
        path=str(directory),
        config=config,
        plan=ParallelPlan.of(config),
        engine=engine,
        dtype="bfloat16",
        load_format="dummy",
        num_threads=num_cores(),
    )


def observe(bench: Bench, workload: Workload) -> Measured:
    """What its decode steps read and where their time goes. A round for this alone: looking takes time, too."""
    profile = StepProfile()
    touched: list[int] = []  # by decode step, in all layers
    before = bench.rank.worker.stats().expert_tokens

    def on_step(stats: StepStats) -> None:
        nonlocal before
        now = bench.rank.worker.stats().expert_tokens
        layers = zip(now, before, strict=True)
        if is_decode(stats):
            touched.append(sum(a > b for layer in layers for a, b in zip(*layer, strict=True)))
            if len(touched) == SKIPPED_STEPS:
                profile.start()
            elif len(touched) == SKIPPED_STEPS + workload.num_profiled:
                profile.stop()
        before = now

    model = bench.rank.worker._model
    assert model is not None, "loaded"
    with kernel_by_kernel(model):
        bench.run(*workload.size, on_step)
    config, moe = bench.spec.config, bench.spec.config.moe
    assert moe is not None
    num_layers = sum(map(config.is_sparse, range(config.num_hidden_layers)))
    expert_bytes = 3 * config.hidden_size * moe.moe_intermediate_size * ELEMENT_BYTES
    missed = (1 - moe.num_experts_per_tok / moe.num_experts) ** workload.num_sequences
    uniform = moe.num_experts * (1 - missed)
    kv_token_bytes = config.num_hidden_layers * 2 * config.kv_size * ELEMENT_BYTES
    # In the mean: the first decode step sees prompt + 1 tokens, the last prompt + output - 1.
    context = PROMPT_TOKENS + workload.num_output_tokens / 2
    parameters = {  # that a token passes through
        "experts": num_layers * moe.num_experts_per_tok * expert_bytes / ELEMENT_BYTES,
        "projections": config.num_hidden_layers * config.num_attention_parameters,
        "router": num_layers * moe.num_experts * config.hidden_size,
        "LM head": config.vocab_size * config.hidden_size,
    }
    kv_bytes = workload.num_sequences * context * kv_token_bytes
    weights_bytes = bench.rank.worker.stats().weights_bytes
    return Measured(
        workload=workload,
        experts_touched=statistics.mean(touched) / num_layers,
        experts_if_uniform=uniform,
        expert_bytes=statistics.mean(touched) * expert_bytes,
        expert_bytes_if_uniform=uniform * num_layers * expert_bytes,
        other_weight_bytes=weights_bytes - num_layers * moe.num_experts * expert_bytes,
        kv_bytes=kv_bytes,
        part_bytes={name: count * ELEMENT_BYTES for name, count in parameters.items()}
        | {"experts": statistics.mean(touched) * expert_bytes, "attention": kv_bytes},
        part_operations={name: 2 * workload.num_sequences * count for name, count in parameters.items()},
        profile=profile.parts(),
    )


def time_round(bench: Bench, workload: Workload, matrix: torch.Tensor) -> Round:
    steps: list[StepStats] = []
    bandwidth, product_rate = this_machine.read_bandwidth(matrix), this_machine.product_rate()
    seconds = bench.run(*workload.size, steps.append)
    return Round(
        bandwidth=bandwidth,
        product_rate=product_rate,
        seconds=seconds,
        prefill_seconds=sum(step_seconds(s) for s in steps if not is_decode(s)),
        decode_seconds=statistics.median(step_seconds(s) for s in steps if is_decode(s)),
    )


def report(bench: Bench, measured: list[Measured], seconds: float) -> dict[str, Any]:
    """What is kept: all rounds, and their medians."""
    config = bench.spec.config
    return {
        "machine": this_machine.describe(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "seconds": seconds,
        "num_threads": bench.spec.num_threads,
        "config": MOE,
        "num_parameters": config.num_parameters,
        "num_active_parameters": config.num_active_parameters,
        "workloads": [
            {
                **{name: value for name, value in asdict(m).items() if name != "rounds"},
                "rounds": m.figures,
                "median": {name: statistics.median(values) for name, values in m.figures.items()},
                "lost_seconds": lost(m.profile, m.least_seconds),
            }
            for m in measured
        ],
    }


def results_table(bench: Bench, measured: list[Measured]) -> Table:
    config, moe = bench.spec.config, bench.spec.config.moe
    assert moe is not None
    sizes = f"{config.num_parameters / 1e9:.2f} B parameters, {config.num_active_parameters / 1e9:.2f} B active"
    table = Table("", title=f"{sizes}, bf16, {bench.spec.num_threads} threads; medians (range of rounds)")
    for m in measured:
        table.add_column(f"batch {m.workload.num_sequences}", justify="right")
    for name, label, unit in (
        ("decode_tokens_per_second", "decode, tokens/s", 1.0),
        ("decode_step_seconds", "decode step, ms", 1e-3),
        ("output_tokens_per_second", "output with prompts, tokens/s", 1.0),
        ("prefill_tokens_per_second", "prefill, tokens/s", 1.0),
    ):
        table.add_row(label, *(spread(m.figures[name], unit) for m in measured))
    table.add_section()
    table.add_row(
        f"experts touched, of {moe.num_experts} (uniform)",
        *(f"{m.experts_touched:.1f} ({m.experts_if_uniform:.1f})" for m in measured),
    )
    table.add_row(
        "their bytes, GB (uniform)",
        *(f"{m.expert_bytes / 1e9:.3f} ({m.expert_bytes_if_uniform / 1e9:.3f})" for m in measured),
    )
    table.add_row("other weights, GB", *(f"{m.other_weight_bytes / 1e9:.3f}" for m in measured))
    table.add_row("KV cache, GB", *(f"{m.kv_bytes / 1e9:.3f}" for m in measured))
    table.add_section()
    table.add_row("memory bandwidth, GB/s", *(spread(m.figures["bandwidth"], 1e9) for m in measured))
    table.add_row("decoding reads, GB/s", *(spread(m.figures["decode_bandwidth"], 1e9) for m in measured))
    table.add_row("of the bandwidth, %", *(spread(m.figures["fraction_of_bandwidth"], 1e-2) for m in measured))
    table.add_row("large bf16 product, GFLOP/s", *(spread(m.figures["product_rate"], 1e9) for m in measured))
    table.add_row("of that rate, %", *(spread(m.figures["fraction_of_product_rate"], 1e-2) for m in measured))
    return table


def spread(values: list[float], unit: float) -> str:
    low, middle, high = (value / unit for value in (min(values), statistics.median(values), max(values)))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def sentence(m: Measured) -> str:
    """What holds it back, by what was measured."""
    losses = lost(m.profile, m.least_seconds)
    under_profiler = sum(part.total for part in m.profile.values())
    outside = {name: part.total - part.products for name, part in m.profile.items()}
    most = ", ".join(
        f"{name} {1e3 * seconds:.0f} ms ({1e3 * outside[name]:.0f} outside of torch's products)"
        for name, seconds in list(losses.items())[:4]
    )
    return (
        f"Batch {m.workload.num_sequences}: a step takes {1e3 * m.decode_seconds:.0f} ms, {1e3 * under_profiler:.0f} "
        f"under the profiler. To read its {m.step_bytes / 1e9:.2f} GB takes {1e3 * m.step_bytes / m.bandwidth:.0f} ms "
        f"at the measured bandwidth, to multiply its {m.step_operations / 1e9:.1f} GFLOP "
        f"{1e3 * m.step_operations / m.product_rate:.0f} ms at the measured rate. Above the greater of the two: "
        f"{most}. {100 * sum(outside.values()) / under_profiler:.0f} % of the profiled step is outside of torch's "
        "products; kernels of our own are outside, too."
    )


def measure(bench: Bench, num_rounds: int) -> list[Measured]:
    measured = [observe(bench, workload) for workload in WORKLOADS]  # the warm-up, too
    matrix = this_machine.make_matrix()
    for _ in range(num_rounds):
        for m in measured:
            m.rounds.append(time_round(bench, m.workload, matrix))
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "moe.json")
    args = parser.parse_args()
    this_machine.take_cpu_environment()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(make_spec(Path(directory)))
    measured = measure(bench, args.rounds)
    kept = report(bench, measured, time.perf_counter() - begun)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(kept, indent=1) + "\n")
    console = Console()
    console.print(results_table(bench, measured))
    for m in measured:
        title = f"batch {m.workload.num_sequences}: one decode step, kernel by kernel, under the profiler"
        console.print(parts_table(title, m.profile, m.part_bytes, m.least_seconds))
    for m in measured:
        console.print(sentence(m))
    console.print(", ".join(f"{name} {value}" for name, value in kept["machine"].items()), highlight=False)
    console.print(f"{kept['seconds']:.0f} s; kept in {args.output}")


if __name__ == "__main__":
    main()
