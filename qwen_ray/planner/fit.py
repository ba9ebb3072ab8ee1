"""Does one division of a model fit, with how many blocks of KV cache, and how fast would it be?

Turns degrees into a `Candidate`: places stages, divides layers, weighs ranks, and compares with the memory they share.
A refusal is an inequality with its numbers. Which degrees are worth trying is `search`'s question.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from qwen_ray.core.hardware import GIB
from qwen_ray.core.model_config import ModelConfig
from qwen_ray.core.plan import EngineConfig, ExpertPlacement, ParallelPlan, Span
from qwen_ray.planner.candidate import Candidate, PlanRequest
from qwen_ray.planner.cost import Estimate, Site, estimate
from qwen_ray.planner.experts import balance, even_slots, imbalance
from qwen_ray.planner.memory import RankMemory, in_words, layer_weights, rank_memory
from qwen_ray.planner.placement import Replica, divide_layers, node_memory, place_on_cpus, place_on_gpus

# A CPU node's memory belongs to others too: unless asked for more, KV caches take this much of it.
CPU_KV_BYTES = 4 * GIB
CPU_KV_FRACTION = 0.25
FP8_BLOCK = 128  # weights in either direction that share a scale


class Degrees(NamedTuple):
    """Of one stage."""

    tp: int
    dp_attention: int = 1
    ep: int = 1

    @property
    def stage_size(self) -> int:
        return self.tp * self.dp_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Memory that ranks share: one GPU, or a CPU node."""

    name: str
    num_bytes: int
    usable: int
    ranks: tuple[RankMemory, ...]

    @property
    def num_blocks(self) -> int:
        """That fit beside the rest; negative when the rest alone does not."""
        return (self.usable - self.needed(0)) // sum(rank.per_block for rank in self.ranks)

    def needed(self, num_blocks: int) -> int:
        return sum(rank.total(num_blocks) for rank in self.ranks)


def evaluate(request: PlanRequest, degrees: Degrees, pp: int) -> Candidate:
    """The candidate of these degrees: placed and estimated, or with the reason why it cannot hold."""
    contexts = _contexts(request)
    candidate = _evaluate(request, degrees, pp, next(contexts))
    for context in contexts:
        if candidate.fits:
            break
        candidate = _evaluate(request, degrees, pp, context)
    return candidate


def _contexts(request: PlanRequest) -> Iterator[int]:
    """Lengths to try. On CPU the activations grow with it: where it is not asked for, it is halved until they fit."""
    context = request.max_model_len or request.context_limit
    yield context
    shortest = min(request.context_limit, request.prompt_len + request.output_len)
    while request.kind == "cpu" and request.max_model_len is None and context > shortest:
        context = max(context // 2, shortest)
        yield context


def _evaluate(request: PlanRequest, degrees: Degrees, pp: int, context: int) -> Candidate:
    config, nodes, kind = request.config, request.hardware.nodes, request.kind
    plan = ParallelPlan.of(
        config,
        tp=degrees.tp,
        pp=pp,
        dp=request.dp or 1,
        ep=degrees.ep,
        dp_attention=degrees.dp_attention,
        experts=_place_experts(config, degrees.ep, request.num_redundant_experts, request.expert_load),
    )
    engine = EngineConfig(
        num_blocks=0,
        block_size=request.block_size,
        max_model_len=context,
        max_num_seqs=request.max_num_seqs,
        max_num_batched_tokens=request.max_num_batched_tokens,
        max_num_waiting=request.max_num_waiting,
        light_tenant_slowdown=request.light_tenant_slowdown,
        enable_prefix_caching=request.enable_prefix_caching,
        depth=pp,
        dp_attention=plan.dp_attention,
    )
    draft = Candidate(request=request, plan=plan, engine=engine)
    if broken := _broken_blocks(request, plan):
        return replace(draft, reason=broken)
    if request.deterministic and kind == "cuda" and plan.world_size > 1:
        # NCCL adds up in an order that depends on how much there is.
        return replace(draft, reason=f"deterministic on GPUs is for one rank: {plan.world_size} > 1")
    if kind == "cpu":
        replicas = place_on_cpus(nodes, pp=pp, dp=request.dp)
    else:
        replicas = place_on_gpus(nodes, stage_size=plan.stage_size, pp=pp)
    if len(replicas) < plan.dp:
        return replace(draft, reason=_too_few_devices(request, plan))

    plan = replace(plan, stages=_divide(draft, replicas[0]))
    draft = replace(draft, plan=plan, ranks=_weigh(request, plan, engine))
    needed, contradiction = _needed_blocks(draft)
    if contradiction:
        return replace(draft, reason=contradiction)
    pools = _pools_of_gpus(draft, replicas) if kind == "cuda" else _pools_of_nodes(draft, replicas)
    # The replicas that have most room; on GPUs those that have too little are left out.
    rooms = [pool.num_blocks for pool in pools]
    order = sorted(range(len(replicas)), key=lambda i: -rooms[i])
    kept = [i for i in order[: request.dp] if rooms[i] >= needed]
    tightest = pools[kept[-1] if len(kept) >= plan.dp else order[plan.dp - 1]]
    draft = replace(draft, usable_bytes=tightest.usable, needed_bytes=tightest.needed(needed))
    if len(kept) < plan.dp:
        return replace(draft, reason=_inequality(request, tightest, needed))
    return _accept(draft, tuple(replicas[i] for i in sorted(kept)), tightest, needed)


@lru_cache(maxsize=64)  # it is the same for many candidates, and not the least of their cost
def _place_experts(
    config: ModelConfig, ep: int, num_redundant: int, expert_load: tuple[tuple[float, ...], ...] | None
) -> ExpertPlacement | None:
    """As their load asks; where it is not known, each expert counts the same. None: dealt out in order."""
    moe = config.moe
    if moe is None or not (num_redundant or expert_load):
        return None
    num_slots = even_slots(moe.num_experts, ep, num_redundant)
    if expert_load:
        return balance(expert_load, ep=ep, num_slots=num_slots)
    (layer,) = balance([(1.0,) * moe.num_experts], ep=ep, num_slots=num_slots).slots
    return ExpertPlacement(slots=tuple(layer if config.is_sparse(i) else () for i in range(config.num_hidden_layers)))


def _weigh(request: PlanRequest, plan: ParallelPlan, engine: EngineConfig) -> tuple[RankMemory, ...]:
    config, dtype, moves_experts = request.config, request.weight_dtype, request.eplb_interval is not None
    return tuple(
        rank_memory(config, shard, dtype, engine, request.kind, moves_experts=moves_experts)
        for shard in plan.shards(config)
    )


def _divide(draft: Candidate, replica: Replica) -> tuple[Span, ...]:
    """Layers to stages by the room that embedding and head leave them; stages that share a CPU node get the same."""
    request, even = draft.request, draft.plan
    if even.pp == 1 or request.kind == "cpu":
        return even.stages
    room: list[int] = []
    for stage, index in enumerate(replica):
        shard = even.shard(request.config, stage * even.stage_size)
        held = rank_memory(request.config, shard, request.weight_dtype, draft.engine, request.kind)
        layers = layer_weights(request.config, shard, request.weight_dtype).total
        usable = request.hardware.nodes[index].device.memory_bytes * request.memory_utilization
        room.append(int(usable) - held.fixed + layers)
    return divide_layers(request.config.num_hidden_layers, room)


def _needed_blocks(draft: Candidate) -> tuple[int, str | None]:
    """The least number of blocks that will do, and why it contradicts what was asked for, if it does."""
    request = draft.request
    shortest = min(request.context_limit, request.prompt_len + request.output_len)
    least = math.ceil((request.max_model_len or shortest) / request.block_size)
    asked = _asked_blocks(draft)
    if asked is None:
        return least, None
    if asked < (least if request.max_model_len else 1):
        tokens = asked * request.block_size
        return asked, f"max_model_len {request.max_model_len or 1} > {tokens} tokens of the KV cache that was asked for"
    return asked, None


def _asked_blocks(draft: Candidate) -> int | None:
    request = draft.request
    if request.num_blocks is None and request.kv_memory_bytes is not None:
        return request.kv_memory_bytes // max(rank.kv_per_block for rank in draft.ranks)
    return request.num_blocks


def _pools_of_gpus(draft: Candidate, replicas: Sequence[Replica]) -> list[Pool]:
    """For each replica, the GPU that has the least room for KV cache."""
    request, stage_size = draft.request, draft.plan.stage_size
    known: dict[tuple[str, ...], Pool] = {}
    tightest: list[Pool] = []
    for replica in replicas:
        devices = [request.hardware.nodes[index].device for index in replica]
        kinds = tuple(device.name for device in devices)
        if kinds not in known:
            pools = [
                Pool(
                    name=f"rank {rank.rank}'s {devices[rank.rank // stage_size].name}",
                    num_bytes=devices[rank.rank // stage_size].memory_bytes,
                    usable=int(devices[rank.rank // stage_size].memory_bytes * request.memory_utilization),
                    ranks=(rank,),
                )
                for rank in draft.ranks
            ]
            known[kinds] = min(pools, key=lambda pool: pool.num_blocks)
        tightest.append(known[kinds])
    return tightest


def _pools_of_nodes(draft: Candidate, replicas: Sequence[Replica]) -> list[Pool]:
    """For each replica, the CPU node with the least room among those it stands on; replicas share nodes."""
    request, stage_size = draft.request, draft.plan.stage_size
    held: dict[int, list[RankMemory]] = {}
    for replica in replicas:
        for rank in draft.ranks:
            held.setdefault(replica[rank.rank // stage_size], []).append(rank)
    pools: dict[int, Pool] = {}
    for index, ranks in held.items():
        node = request.hardware.nodes[index]
        pools[index] = Pool(
            name=node.name or node.device.name,
            num_bytes=node_memory(node),
            usable=int(node_memory(node) * request.memory_utilization),
            ranks=tuple(ranks),
        )
    return [min((pools[index] for index in replica), key=lambda pool: pool.num_blocks) for replica in replicas]


def _accept(draft: Candidate, replicas: tuple[Replica, ...], tightest: Pool, needed: int) -> Candidate:
    """A candidate that fits: its KV cache, context, threads and estimates decided."""
    request = draft.request
    num_blocks = _asked_blocks(draft) or tightest.num_blocks
    if request.kind == "cpu" and _asked_blocks(draft) is None:
        budget = min(CPU_KV_BYTES, int(CPU_KV_FRACTION * tightest.num_bytes))
        modest = budget // sum(rank.kv_per_block for rank in tightest.ranks)
        useful = request.max_num_seqs * math.ceil(draft.engine.max_model_len / request.block_size)
        num_blocks = min(num_blocks, max(needed, min(modest, useful)))
    context = min(draft.engine.max_model_len, num_blocks * request.block_size)
    engine = replace(draft.engine, num_blocks=num_blocks, max_model_len=context)
    plan = replace(draft.plan, dp=len(replicas))
    fitted = replace(
        draft,
        plan=plan,
        engine=engine,
        ranks=_weigh(request, plan, engine),
        placement=replicas,
        num_threads=_threads(request, plan.stage_size, replicas),
    )
    fitted = replace(fitted, estimate=_estimate(fitted))
    return replace(fitted, miss=_missed_aims(fitted))


def _ranks_on(replicas: Sequence[Replica], stage_size: int) -> Counter[int]:
    """How many ranks each node holds."""
    return Counter({i: n * stage_size for i, n in Counter(i for replica in replicas for i in replica).items()})


def _threads(request: PlanRequest, stage_size: int, replicas: Sequence[Replica]) -> int:
    ranks = _ranks_on(replicas, stage_size)
    return max(1, min(request.hardware.nodes[i].num_cores // n for i, n in ranks.items()))


def _estimate(fitted: Candidate) -> Estimate:
    """Of the slowest replica, for all of them."""
    request, engine, plan = fitted.request, fitted.engine, fitted.plan
    output_len = min(request.output_len, max(1, engine.max_model_len // 2))
    prompt_len = max(1, min(request.prompt_len, engine.max_model_len - output_len))
    wanted = math.ceil(request.concurrency / plan.dp)
    room = min(engine.max_num_seqs, engine.num_kv_tokens // (prompt_len + output_len)) * plan.dp_attention
    load = request.expert_load
    found = [
        estimate(
            request.config,
            plan,
            request.weight_dtype,
            sites,
            num_running=max(1, min(wanted, room)),
            prompt_len=prompt_len,
            output_len=output_len,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            imbalance=imbalance(load, plan.experts) if load and plan.experts else 1.0,
        )
        for sites in _unlike_sites(fitted)
    ]
    return max(found, key=lambda one: one.tpot)


def _unlike_sites(fitted: Candidate) -> Iterable[tuple[Site, ...]]:
    """The stages' sites of one replica of every sort: those alike in devices and hops are equally fast."""
    nodes, is_shared = fitted.request.hardware.nodes, fitted.request.kind == "cpu"
    load = _ranks_on(fitted.placement, fitted.plan.stage_size)
    shares = {i: max(1.0, n / nodes[i].num_devices) if is_shared else 1.0 for i, n in load.items()}
    sorts: dict[tuple[object, ...], Replica] = {}
    for replica in fitted.placement:
        hops = tuple(a == b for a, b in pairwise(replica))
        sorts.setdefault((hops, *((nodes[i].device.name, shares[i]) for i in replica)), replica)
    return [
        tuple(Site(node=nodes[i], index=i, ranks_per_device=shares[i]) for i in replica) for replica in sorts.values()
    ]


def _missed_aims(fitted: Candidate) -> str | None:
    estimated, slo = fitted.estimate, fitted.request.slo
    if estimated is None:
        return None
    aims = (("TTFT", estimated.ttft, slo.ttft), ("TPOT", estimated.tpot, slo.tpot))
    missed = [f"{name} {s * 1e3:.1f} ms > {aim * 1e3:.1f} ms" for name, s, aim in aims if aim is not None and s > aim]
    return ", ".join(missed) or None


def _broken_blocks(request: PlanRequest, plan: ParallelPlan) -> str | None:
    """Why experts in FP8 cannot be cut so: their scales are those of whole blocks."""
    if request.weight_dtype != "fp8" or request.config.moe is None:
        return None
    for part in {len(shard.expert_intermediate) for shard in plan.shards(request.config)}:
        if part % FP8_BLOCK:
            return f"parts of {part} of each expert: {part} mod {FP8_BLOCK} = {part % FP8_BLOCK} > 0 (an FP8 block)"
    return None


def _too_few_devices(request: PlanRequest, plan: ParallelPlan) -> str:
    largest = max(node.num_devices for node in request.hardware.nodes)
    stage = f"tp {plan.tp}" + (f" x dp_attention {plan.dp_attention}" if plan.dp_attention > 1 else "")
    if plan.stage_size > largest:
        return f"{stage} > {largest} devices of the largest node"
    total = f"{plan.world_size * plan.dp} devices > {request.hardware.num_devices}"
    return f"{stage} x pp {plan.pp} x dp {plan.dp} = {total} in groups of {plan.stage_size} on one node"


def _inequality(request: PlanRequest, pool: Pool, num_blocks: int) -> str:
    kv = sum(rank.kv_per_block for rank in pool.ranks) * num_blocks
    parts = [
        ("weights", sum(rank.weights for rank in pool.ranks)),
        (f"KV cache {num_blocks * request.block_size} tokens", kv),
        ("rotary tables", sum(rank.tables for rank in pool.ranks)),
        ("activations", sum(rank.activations + rank.gather_per_block * num_blocks for rank in pool.ranks)),
        ("reserve", sum(rank.reserve for rank in pool.ranks)),
    ]
    total = " + ".join(f"{name} {in_words(size)}" for name, size in parts if size)
    shared = f"{len(pool.ranks)} ranks on {pool.name}" if len(pool.ranks) > 1 else pool.name
    whole = f"{in_words(pool.num_bytes)} x {request.memory_utilization:g}"
    limit = f"{in_words(pool.usable)} usable of {shared} ({whole})"
    return f"{total} = {in_words(pool.needed(num_blocks))} > {limit}"
