"""A plan in words, tables and JSON. Decides nothing, and prints nothing: callers do.

GB are 10^9 bytes and MB 10^6 throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from typing import Any

from qwen_ray.core.plan import ExpertPlacement, Span
from qwen_ray.planner.candidate import Candidate, PlanReport
from qwen_ray.planner.cost import exchange_bytes_per_token, reduce_bytes_per_token
from qwen_ray.planner.experts import imbalance, layer_imbalances
from qwen_ray.planner.memory import CPU_PROCESS_BYTES, STANDBY_BYTES, copied_weights, in_words, model_weights

COLUMNS = (
    *("weights/rank", "KV/token", "activations", "reserve"),
    *("KV tokens", "sequences", "TTFT", "TPOT", "tokens/s", "verdict"),
)
FP8_NOTE = (
    "fp8 is the layers' matrices, at 1 byte; all else, KV cache and activations too, is bfloat16, and computing is "
    "taken to be no faster. It can be planned with, not served."
)
QUANTIZATION_NOTE = (
    "int8 and int4 are the layers' matrices, embedding and head (these in int8) with their scales; biases, norms, KV "
    "cache and activations are {}."
)
MAX_FITTING, MAX_REJECTED = 12, 8  # rows that are shown
MAX_PLACES = 8  # lines


def header(report: PlanReport) -> tuple[str, ...]:
    """Names of the columns of `rows`. `dp-att` is dp_attention."""
    return (*("tp", "pp", "dp"), *(("ep", "dp-att") if report.request.config.moe else ()), *COLUMNS)


def rows(report: PlanReport) -> list[tuple[str, ...]]:
    """One row per candidate that is worth showing: the best that fit, the nearest that do not."""
    fitting = [candidate for candidate in report.candidates if candidate.fits]
    rejected = [candidate for candidate in report.candidates if not candidate.fits]
    return [_row(candidate, report) for candidate in (*fitting[:MAX_FITTING], *rejected[:MAX_REJECTED])]


def describe(report: PlanReport) -> str:
    """The whole report as plain text."""
    request = report.request
    config = request.config
    active = f", {config.num_active_parameters / 1e9:.2f} B active" if config.moe else ""
    shown = rows(report)
    lines = [
        f"{request.model or config.architecture}: {config.num_parameters / 1e9:.2f} B parameters{active}, "
        f"{request.weight_dtype}, {config.num_hidden_layers} layers, {config.num_attention_heads} heads, "
        f"{config.num_key_value_heads} KV heads",
        f"{request.hardware.description}: {_count(request.hardware.num_devices, 'device')}, "
        f"{request.memory_utilization:.0%} of their memory may be used; estimates are for {request.concurrency} "
        f"requests at once of {request.prompt_len} + {request.output_len} tokens",
        *([FP8_NOTE] if request.weight_dtype == "fp8" else []),
        *([QUANTIZATION_NOTE.format(request.compute_dtype)] if request.quantization != "none" else []),
        "",
        *_aligned([header(report), *shown]),
    ]
    if len(report.candidates) > len(shown):
        lines.append(f"and {len(report.candidates) - len(shown)} more")
    lines.append("")
    lines += placement_lines(report.chosen) if report.chosen else ["Nothing fits.", *report.advice]
    return "\n".join(lines)


def placement_lines(candidate: Candidate) -> list[str]:
    """The chosen plan in words: what each rank holds, and where it stands."""
    plan, engine = candidate.plan, candidate.engine
    lines = [
        f"Chosen: {candidate.degrees} dp={plan.dp}: "
        f"{_count(plan.dp, 'replica')} of {_count(plan.world_size, 'rank')}, "
        f"{engine.max_model_len} tokens of context, {candidate.num_kv_tokens} tokens of KV cache a replica "
        f"({_count(candidate.max_sequences, 'sequence')} at full length)",
    ]
    if candidate.miss:
        lines.append(f"No plan meets the aims; this one comes closest: {candidate.miss}.")
    for (_, *_), group in groupby(
        candidate.ranks, key=lambda r: (r.rank // plan.stage_size, *_sizes(candidate, r.rank))
    ):
        members = [rank.rank for rank in group]
        layers = plan.stages[members[0] // plan.stage_size]
        who = f"rank {members[0]}" if len(members) == 1 else f"ranks {members[0]} to {members[-1]}, each"
        parts = [f"{name} {in_words(size)}" for name, size in _sizes_by_name(candidate, members[0]).items() if size]
        total = in_words(candidate.rank_bytes(members[0]))
        lines.append(f"  {who} (layers {_span(layers)}): {' + '.join(parts)} = {total}")
    if candidate.request.kind == "cpu":
        beside = f"each rank's process takes about {in_words(CPU_PROCESS_BYTES)} (Python, torch, Ray)"
        if candidate.request.standby_ranks:
            beside += f", and one that stands by for each stage {in_words(STANDBY_BYTES)}"
        lines.append(f"  beside this, {beside}")
    if plan.world_size > 1:
        lines.append(f"  {_weights_line(candidate)}")
    lines += [f"  {line}" for line in _expert_lines(candidate)]
    places = list(_places(candidate))
    rest = len(places) - MAX_PLACES
    return lines + places[:MAX_PLACES] + ([f"  and so on: {rest} more"] if rest > 0 else [])


def _weights_line(candidate: Candidate) -> str:
    """Where the bytes of all ranks come from: the checkpoint, and what more than one rank holds."""
    request = candidate.request
    everything = sum(rank.weights for rank in candidate.ranks)
    checkpoint = model_weights(request.config, request.weight_dtype).total
    text = f"weights of all ranks {in_words(everything)} = checkpoint {in_words(checkpoint)}"
    copies = _copies(candidate)
    if not copies:
        return text
    parts = ", ".join(f"{name} {in_words(size)}" for name, size in copies.items())
    return f"{text} + copies {in_words(sum(copies.values()))} ({parts})"


def _copies(candidate: Candidate) -> dict[str, int]:
    request = candidate.request
    sizes = copied_weights(request.config, candidate.plan, request.weight_dtype).by_part
    return {name: size for name, size in sizes.items() if size}


def _expert_lines(candidate: Candidate) -> Iterator[str]:
    config, plan = candidate.request.config, candidate.plan
    moe = config.moe
    if moe is None or plan.experts is None:
        return
    num_sparse = sum(map(config.is_sparse, range(config.num_hidden_layers)))
    slots = sorted({plan.experts.num_slots(rank) for rank in range(plan.ep)})
    redundant = (
        f" and {candidate.request.num_redundant_experts} copies" if candidate.request.num_redundant_experts else ""
    )
    cut = f", each cut over {_count(plan.expert_tp, 'rank')}" if plan.expert_tp > 1 else ""
    yield (
        f"{moe.num_experts} experts{redundant} in each of {_count(num_sparse, 'layer')}, of which a token passes "
        f"{moe.num_experts_per_tok}: {_count(plan.ep, 'expert rank')} of {' or '.join(map(str, slots))} slots{cut}"
    )
    yield f"between the ranks of a stage: {_exchange(candidate)} for each token and layer"
    if found := _expert_imbalance(candidate):
        yield (
            f"fullest expert rank over the mean one, by the load given: {found['placed']:.2f} as placed (worst layer "
            f"{found['worst_layer_placed']:.2f}), {found['even']:.2f} dealt out in order (worst layer "
            f"{found['worst_layer_even']:.2f})"
        )


def _exchange(candidate: Candidate) -> str:
    """What a layer with experts costs in messages, beside attention's own all-reduce."""
    config, plan, dtype = candidate.request.config, candidate.plan, candidate.request.weight_dtype
    parts: list[str] = []
    if sent := exchange_bytes_per_token(config, plan, dtype):
        parts.append(f"{sent / 1e3:.1f} kB in two all-to-alls")
    if reduced := reduce_bytes_per_token(config, plan, dtype):
        parts.append(f"{reduced / 1e3:.1f} kB in an all-reduce")
    return " and ".join(parts) or "nothing"


def _expert_imbalance(candidate: Candidate) -> dict[str, float] | None:
    """By the load that was given: of the placement, and of one copy of each expert dealt out in order."""
    load, plan = candidate.request.expert_load, candidate.plan
    if load is None or plan.experts is None:
        return None
    even = ExpertPlacement.even(candidate.request.config, plan.ep)
    return {
        "placed": imbalance(load, plan.experts),
        "worst_layer_placed": max(layer_imbalances(load, plan.experts)),
        "even": imbalance(load, even),
        "worst_layer_even": max(layer_imbalances(load, even)),
    }


def to_json(report: PlanReport) -> dict[str, Any]:
    """Plain JSON types with stable keys. Sizes in bytes, times in seconds."""
    request = report.request
    config = request.config
    return {
        "model": request.model,
        "architecture": config.architecture,
        "num_parameters": config.num_parameters,
        "num_active_parameters": config.num_active_parameters,
        "hardware": request.hardware.description,
        "num_devices": request.hardware.num_devices,
        "device": request.kind,
        "dtype": request.dtype or config.dtype,
        "quantization": request.quantization,
        "checkpoint_bytes": model_weights(config, request.weight_dtype).total,
        "memory_utilization": request.memory_utilization,
        "concurrency": request.concurrency,
        "prompt_len": request.prompt_len,
        "output_len": request.output_len,
        "candidates": [_candidate_json(candidate) for candidate in report.candidates],
        "chosen": _candidate_json(report.chosen) if report.chosen else None,
        "placement": _placement_json(report.chosen) if report.chosen else None,
        "inequality": None if report.chosen else report.candidates[0].reason,
        "advice": list(report.advice),
    }


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    plan, estimated = candidate.plan, candidate.estimate
    request = candidate.request
    return {
        "tp": plan.tp,
        "pp": plan.pp,
        "dp": plan.dp,
        "ep": plan.ep,
        "dp_attention": plan.dp_attention,
        "num_redundant_experts": request.num_redundant_experts,
        "expert_imbalance": _expert_imbalance(candidate),
        "all_to_all_bytes_per_token_and_layer": exchange_bytes_per_token(request.config, plan, request.weight_dtype),
        "fits": candidate.fits,
        "reason": candidate.reason,
        "miss": candidate.miss,
        "stages": [[span.start, span.stop] for span in plan.stages],
        "weights_bytes_per_rank": [rank.weights for rank in candidate.ranks],
        "copies_bytes": _copies(candidate) if candidate.ranks else {},
        "tables_bytes_per_rank": [rank.tables for rank in candidate.ranks],
        "kv_bytes_per_rank": [rank.kv_per_block * candidate.engine.num_blocks for rank in candidate.ranks],
        "activation_bytes_per_rank": [
            rank.activations + rank.gather_per_block * candidate.engine.num_blocks for rank in candidate.ranks
        ],
        "held_bytes_per_rank": [rank.held(candidate.engine.num_blocks) for rank in candidate.ranks],
        "reserve_bytes_per_rank": [rank.reserve for rank in candidate.ranks],
        "total_bytes_per_rank": [candidate.rank_bytes(rank.rank) for rank in candidate.ranks],
        "usable_bytes": candidate.usable_bytes,
        "kv_bytes_per_token": candidate.kv_bytes_per_token,
        "kv_tokens": candidate.num_kv_tokens,
        "num_blocks": candidate.engine.num_blocks,
        "block_size": candidate.engine.block_size,
        "max_model_len": candidate.engine.max_model_len,
        "max_sequences": candidate.max_sequences,
        "num_threads": candidate.num_threads,
        "ttft_s": estimated.ttft if estimated else None,
        "tpot_s": estimated.tpot if estimated else None,
        "tokens_per_s": estimated.tokens_per_s if estimated else None,
    }


def _placement_json(candidate: Candidate) -> list[dict[str, Any]]:
    nodes, plan = candidate.request.hardware.nodes, candidate.plan
    return [
        {
            "replica": replica,
            "stages": [
                {
                    "stage": stage,
                    "layers": list(asdict(plan.stages[stage]).values()),
                    "node": index,
                    "node_name": nodes[index].name,
                    "device": nodes[index].device.name,
                    "ranks": list(range(stage * plan.stage_size, (stage + 1) * plan.stage_size)),
                }
                for stage, index in enumerate(places)
            ],
        }
        for replica, places in enumerate(candidate.placement)
    ]


def _row(candidate: Candidate, report: PlanReport) -> tuple[str, ...]:
    plan, estimated = candidate.plan, candidate.estimate
    degrees = (str(plan.tp), str(plan.pp), str(plan.dp))
    if candidate.request.config.moe:
        degrees = (*degrees, str(plan.ep), str(plan.dp_attention))
    if not candidate.ranks:
        return (*degrees, *["-"] * (len(COLUMNS) - 1), f"no: {candidate.reason}")
    sizes = (
        in_words(max(rank.weights for rank in candidate.ranks)),
        f"{candidate.kv_bytes_per_token / 1e3:.1f} kB",
        in_words(max(rank.activations for rank in candidate.ranks)),
        in_words(max(rank.reserve for rank in candidate.ranks)),
    )
    if estimated is None:
        return (*degrees, *sizes, "-", "-", "-", "-", "-", f"no: {candidate.reason}")
    notes = [candidate.miss or "", "" if candidate.is_full_context else f"context {candidate.engine.max_model_len}"]
    verdict = "chosen" if candidate is report.chosen else "fits"
    return (
        *degrees,
        *sizes,
        str(candidate.num_kv_tokens),
        str(candidate.max_sequences),
        f"{estimated.ttft * 1e3:.0f} ms",
        f"{estimated.tpot * 1e3:.1f} ms",
        f"{estimated.tokens_per_s:.0f}",
        ", ".join([verdict, *filter(None, notes)]),
    )


def _aligned(table: list[tuple[str, ...]]) -> Iterator[str]:
    """Columns to the right, the last one, which is prose, to the left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for *cells, last in table:
        yield "  ".join([*(cell.rjust(width) for cell, width in zip(cells, widths, strict=False)), last])


def _sizes_by_name(candidate: Candidate, rank: int) -> dict[str, int]:
    memory = candidate.ranks[rank]
    return {
        "weights": memory.weights,
        "KV cache": memory.kv_per_block * candidate.engine.num_blocks,
        "rotary tables": memory.tables,
        "activations": memory.activations + memory.gather_per_block * candidate.engine.num_blocks,
        "reserve": memory.reserve,
    }


def _sizes(candidate: Candidate, rank: int) -> tuple[int, ...]:
    return tuple(_sizes_by_name(candidate, rank).values())


def _places(candidate: Candidate) -> Iterator[str]:
    """Where replicas stand; neighbours on the same nodes are told together."""
    nodes = candidate.request.hardware.nodes
    for places, group in groupby(enumerate(candidate.placement), key=lambda pair: pair[1]):
        members = [replica for replica, _ in group]
        who = f"replica {members[0]}" if len(members) == 1 else f"replicas {members[0]} to {members[-1]}"
        stages = [list(stages) for _, stages in groupby(range(len(places)), key=lambda stage: places[stage])]
        where = [
            f"{'stage' if len(own) == 1 else 'stages'} {_span(Span(own[0], own[-1] + 1))} on node {places[own[0]]}"
            f" ({nodes[places[own[0]]].name or nodes[places[own[0]]].device.name})"
            for own in stages
        ]
        yield f"  {who}: {', '.join(where)}"


def _span(span: Span) -> str:
    return str(span.start) if len(span) == 1 else f"{span.start} to {span.stop - 1}"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
