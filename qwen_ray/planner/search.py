"""Which division of a model over the hardware is best, or why there is none.

`plan` tries every tensor degree that a node allows with the pipeline degrees that can matter, and for experts how many
ranks may share them and how many copies of the attention these may make. It lets `fit` judge each,
fills what is left with replicas, and takes the one with the most throughput among those that hold the whole context
and meet the aims. Pure arithmetic: a thousand GPUs are some hundred candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from qwen_ray.core.errors import PlanRefused
from qwen_ray.core.hardware import GIB, Hardware
from qwen_ray.core.plan import ParallelPlan, split_heads
from qwen_ray.planner.candidate import Candidate, PlanReport, PlanRequest
from qwen_ray.planner.cost import Estimate
from qwen_ray.planner.fit import Degrees, evaluate
from qwen_ray.planner.memory import model_weights

GPUS_PER_NODE = 8  # of the machines that advice is given in; up to here every tensor degree is tried
MAX_STAGE_SIZE = 64  # ranks that share experts
MAX_ADVISED_NODES = 64


def plan(request: PlanRequest) -> PlanReport:
    """Raises PlanRefused only for what no hardware could change: degrees or a context beyond the model's."""
    report = _search(request)
    return report if report.chosen else replace(report, advice=tuple(_advice(report)))


def _search(request: PlanRequest) -> PlanReport:
    ParallelPlan.of(request.config, tp=request.tp or 1, pp=request.pp or 1)
    if request.max_model_len and request.max_model_len > request.context_limit:
        inequality = f"max_model_len {request.max_model_len} > {request.context_limit} positions of the model"
        raise PlanRefused(f"{inequality}.", inequality=inequality)
    nodes = [node for node in request.hardware.nodes if node.device.kind == request.kind and node.num_devices]
    if not nodes:
        raise PlanRefused(f"There is no {request.kind} device here.", inequality=f"1 > 0 {request.kind} devices")
    nodes.sort(key=lambda node: (-node.device.memory_bytes, node.device.name))
    request = replace(request, hardware=Hardware(nodes=tuple(nodes)))

    candidates: list[Candidate] = []
    for degrees in _stage_degrees(request):
        num_full = 0
        for pp in _pipeline_degrees(request, degrees.stage_size):
            candidate = evaluate(request, degrees, pp)
            candidates.append(candidate)
            num_full += candidate.fits and candidate.is_full_context
            if num_full == 2:
                break  # more stages would only add hops and bubbles
    candidates.sort(key=_demerit)
    return PlanReport(
        request=request, candidates=tuple(candidates), chosen=candidates[0] if candidates[0].fits else None
    )


def _stage_degrees(request: PlanRequest) -> Sequence[Degrees]:
    """How the ranks of a stage may divide its work. Raises PlanRefused where there is no such way."""
    config, ep, copies = request.config, request.ep, request.dp_attention
    if config.moe is None:
        _refuse_experts(request)
    if config.moe is None or request.kind == "cpu":
        return [Degrees(tp, copies or max(1, (ep or 1) // tp), ep or 1) for tp in _tensor_degrees(request)]
    largest = max(node.num_devices for node in request.hardware.nodes)
    sizes = {math.lcm((request.tp or 1) * (copies or 1), ep or 1), min(largest, MAX_STAGE_SIZE)}
    sizes |= {2**i for i in range(min(largest, MAX_STAGE_SIZE).bit_length())}
    # Experts cut over tensor ranks; whole experts, dealt to all ranks of the stage or as many as are asked for.
    degrees = _tensor_degrees(request)
    found = dict.fromkeys(Degrees(tp) for tp in degrees)
    found |= dict.fromkeys(
        Degrees(tp, size // tp, ep or size) for size in sorted(sizes) for tp in degrees if size % tp == 0
    )
    possible = [one for one in found if _is_possible(request, config.moe.num_experts, one)]
    if not possible:
        ParallelPlan.of(config, tp=request.tp or 1, ep=ep or 1, dp_attention=copies)
        raise PlanRefused(
            f"{request.num_redundant_experts} redundant experts are more than can lie on different expert ranks.",
            inequality=f"{request.num_redundant_experts} > {config.moe.num_experts} x ({ep or largest} - 1)",
        )
    return possible


def _refuse_experts(request: PlanRequest) -> None:
    """Raises PlanRefused where experts of a dense model are asked for."""
    asked = {
        "ep": (request.ep or 1) - 1,
        "dp_attention": (request.dp_attention or 1) - 1,
        "num_redundant_experts": request.num_redundant_experts,
        "expert_load": len(request.expert_load or ()),
    }
    for name, beyond in asked.items():
        if beyond:
            raise PlanRefused(
                f"{name} is for a model with experts; this one is dense.", inequality=f"{name} > 0 experts"
            )


def _is_possible(request: PlanRequest, num_experts: int, degrees: Degrees) -> bool:
    asked = (request.tp, request.dp_attention, request.ep)
    return (
        all(wish in (None, degree) for wish, degree in zip(asked, degrees, strict=True))
        and degrees.stage_size % degrees.ep == 0
        and degrees.tp <= request.config.num_attention_heads
        and degrees.ep <= num_experts
        and request.num_redundant_experts <= num_experts * (degrees.ep - 1)
    )


def _tensor_degrees(request: PlanRequest) -> Sequence[int]:
    if request.tp is not None:
        return (request.tp,)
    if request.kind == "cpu":
        return (1,)  # ranks of one node share its cores and its memory bus: they gain nothing unless asked for
    largest = max(node.num_devices for node in request.hardware.nodes)
    heads, kv_heads = request.config.num_attention_heads, request.config.num_key_value_heads
    degrees: list[int] = []
    fewest = heads + 1  # on wider nodes only degrees that leave the fullest rank fewer heads
    for tp in range(1, min(largest, heads) + 1):
        most = max(len(own) for own, _ in split_heads(heads, kv_heads, tp))
        if tp <= GPUS_PER_NODE or most < fewest:
            degrees.append(tp)
        fewest = min(fewest, most)
    return degrees


def _pipeline_degrees(request: PlanRequest, stage_size: int) -> Iterator[int]:
    """Of all degrees that there is room for, those whose largest stage is smaller than with one stage less."""
    if request.pp is not None:
        yield request.pp
        return
    num_layers, nodes = request.config.num_hidden_layers, request.hardware.nodes
    num_stages = len(nodes) if request.kind == "cpu" else sum(node.num_devices // stage_size for node in nodes)
    largest = 0
    for pp in range(1, min(num_layers, max(num_stages, 1)) + 1):
        if math.ceil(num_layers / pp) != largest:
            largest = math.ceil(num_layers / pp)
            yield pp


def _demerit(candidate: Candidate) -> tuple[float, ...]:
    """Smaller is better: whole context, aims, throughput, few ranks. The rejected come last, the nearest first."""
    plan, estimated = candidate.plan, candidate.estimate
    if estimated is None:
        shortage = candidate.needed_bytes / candidate.usable_bytes if candidate.usable_bytes else math.inf
        return (2.0, shortage, plan.world_size, plan.pp)
    overshoot = _overshoot(candidate.request, estimated)
    return (float(not candidate.is_full_context), overshoot, -estimated.tokens_per_s, plan.world_size, plan.pp)


def _overshoot(request: PlanRequest, estimated: Estimate) -> float:
    """By what factor the worst aim is missed; 1 when all are met."""
    aims = ((estimated.ttft, request.slo.ttft), (estimated.tpot, request.slo.tpot))
    return max([1.0, *(seconds / aim for seconds, aim in aims if aim)])


def _advice(report: PlanReport) -> Iterator[str]:
    """What would fit: other degrees, a shorter context, or more of such devices; redundant experts left out."""
    request = report.request
    free = replace(request, tp=None, pp=None, dp=None, ep=None, dp_attention=None)
    free = replace(free, num_redundant_experts=0, expert_load=None)
    if request not in (free,) and (found := _search(free).chosen):
        without = ", without redundant experts" if request.num_redundant_experts else ""
        yield f"It fits with {found.degrees} dp={found.plan.dp}{without}."
    if request.max_model_len is not None and (found := _search(replace(free, max_model_len=None)).chosen):
        yield f"It fits with max_model_len {found.engine.max_model_len}."
    if request.kind == "cpu":
        closest = report.candidates[0]
        if closest.needed_bytes:
            gib = math.ceil(closest.needed_bytes / request.memory_utilization / GIB)
            yield f"A node with {gib} GiB would hold it."
        return
    more = _smallest_that_fits(free)
    if more:
        degrees = f"{more.degrees}, {more.engine.max_model_len} tokens of context"
        yield f"{more.request.hardware.description} would hold it ({degrees})."


def _smallest_that_fits(request: PlanRequest) -> Candidate | None:
    """On devices like the largest here: up to eight on a node, then nodes of eight."""
    node = request.hardware.nodes[0]
    weights = model_weights(request.config, request.weight_dtype).total
    least = weights / (node.device.memory_bytes * request.memory_utilization)
    sizes = [(1, n) for n in range(1, GPUS_PER_NODE + 1)]
    sizes += [(2**i, GPUS_PER_NODE) for i in range(1, MAX_ADVISED_NODES.bit_length())]
    for num_nodes, num_devices in sizes:
        if num_nodes * num_devices < least:
            continue
        nodes = (replace(node, num_devices=num_devices),) * num_nodes
        chosen = _search(replace(request, hardware=Hardware(nodes=nodes))).chosen
        if chosen:
            return chosen
    return None
