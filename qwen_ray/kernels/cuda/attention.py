"""Paged attention on CUDA, in Triton: splits of the context for one query, tiles of queries for many.

Sums run in an order that the length of a row's own context decides, and for many queries its position: neighbours, how
many they are and how many programs share the work change no bits, nor does where a chunk begins. But a token that comes
alone has other last bits than the same one in a chunk, unless a plan sends it the way of many.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# Kernels say what their parameters are to Triton; they are called with tensors of torch, and with warps and stages.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from qwen_ray.kernels.cuda import attention_kernels as kernels

SHORTEST_SPLIT = 256  # tokens of a context that are taken together; more, where there would be more than MOST_SPLITS
MOST_SPLITS: int = kernels.MOST_SPLITS.value
PROGRAMS = 2048  # of a decode, if its sequences are few
FEWEST_WALKERS = 4  # programs that share a long context, however many its neighbours are
LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decodes:
    """B sequences of one query each. Lengths may be written anew between runs; 0: nobody, who gets zeros."""

    where: torch.Tensor  # [2, B] int32: rows of q, rows of the block tables
    lens: torch.Tensor  # [B] int32, of contexts
    max_context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefills:
    """N sequences of several queries each."""

    numbers: torch.Tensor  # [5, N] int32: first row of q, sequence, queries, context, queries of those before it
    num_queries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """What the kernels need to know of a step, on the device."""

    block_tables: torch.Tensor  # [S, max blocks] int32 or int64
    block_size: int
    decodes: Decodes | None
    prefills: Prefills | None
    is_hopper: bool  # see the function
    split: int = SHORTEST_SPLIT  # tests have shorter ones

    @property
    def lens(self) -> torch.Tensor:
        """Of a `decode_plan`."""
        if self.decodes is not None:
            return self.decodes.lens
        assert self.prefills is not None, "either"
        return self.prefills.numbers[3]


def plan_attention(
    block_tables: torch.Tensor,
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    block_size: int,
    *,
    has_decodes: bool = True,
) -> AttentionPlan:
    """As `reference.plan_attention`. One copy to the device, which the host does not wait for.

    Not `has_decodes`: one query goes the way of many, however long its context, so that its bits are those it has in a
    prompt.
    """
    assert block_tables.stride(1) == 1, "a sequence's blocks follow each other"
    decodes: list[tuple[int, int, int]] = []
    prefills: list[tuple[int, int, int, int]] = []
    row = 0
    for s, (count, length) in enumerate(zip(query_lens, context_lens, strict=True)):
        if count == 1 and has_decodes:
            decodes.append((row, s, length))
        elif count:
            prefills.append((row, s, count, length))
        row += count
    prefills.sort(key=lambda prefill: -prefill[3])  # the long ones first, so that none is alone at the end
    before = [0]
    for _, _, count, _ in prefills:
        before.append(before[-1] + count)
    columns = [*zip(*decodes, strict=True), *zip(*prefills, strict=True), before[:-1]]
    is_cuda = block_tables.device.type == "cuda"
    numbers = torch.tensor([n for column in columns for n in column], dtype=torch.int32, pin_memory=is_cuda)
    numbers = numbers.to(block_tables.device, non_blocking=True)
    of_decodes, of_prefills = numbers.split((3 * len(decodes), 5 * len(prefills)))
    where, lens = of_decodes.view(3, -1).split((2, 1))
    longest = max((length for _, _, length in decodes), default=0)
    return AttentionPlan(
        block_tables=block_tables,
        block_size=block_size,
        is_hopper=is_hopper(block_tables.device),
        decodes=Decodes(where=where, lens=lens[0], max_context=longest) if decodes else None,
        prefills=Prefills(numbers=of_prefills.view(5, -1), num_queries=before[-1]) if prefills else None,
    )


def decode_plan(
    block_tables: torch.Tensor, max_context: int, block_size: int, *, has_decodes: bool = True
) -> AttentionPlan:
    """One query for each of S sequences, which are read from the device at every run: for CUDA graphs.

    block_tables [S, max blocks] int32 and the plan's `lens` [S], zeros at first, may be overwritten between runs. No
    context is longer than `max_context`; a place that nobody has is given the length 0, reads no cache and gets zeros.
    `has_decodes`: as in `plan_attention`.
    """
    assert block_tables.stride(1) == 1, "a sequence's blocks follow each other"
    count = len(block_tables)
    each = torch.arange(count, dtype=torch.int32, device=block_tables.device)
    nothing = torch.zeros_like(each)
    where = torch.stack((each, each))
    numbers = torch.stack((each, each, nothing + 1, nothing, each))
    return AttentionPlan(
        block_tables=block_tables,
        block_size=block_size,
        decodes=Decodes(where=where, lens=nothing, max_context=max_context) if has_decodes else None,
        prefills=None if has_decodes else Prefills(numbers=numbers, num_queries=count),
        is_hopper=is_hopper(block_tables.device),
    )


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan, scale: float
) -> torch.Tensor:
    """As `reference.paged_attention`, for a scale above 0 and contiguous caches of q's dtype."""
    assert q.dtype is k_cache.dtype is v_cache.dtype, f"{q.dtype}, {k_cache.dtype}, {v_cache.dtype}"
    assert k_cache.is_contiguous(), "found by counting"
    assert v_cache.is_contiguous(), "found by counting"
    if q.stride(2) != 1 or q.stride(1) != q.shape[2]:
        q = q.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if plan.decodes is not None:
        _run_decodes(q, k_cache, v_cache, plan, plan.decodes, scale * LOG2_E, out)
    if plan.prefills is not None:
        _run_prefills(q, k_cache, v_cache, plan, plan.prefills, scale * LOG2_E, out)
    return out


def _run_decodes(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: AttentionPlan,
    decodes: Decodes,
    scale: float,
    out: torch.Tensor,
) -> None:
    (_, num_heads, dim), num_kv_heads, num_rows = q.shape, k_cache.shape[2], len(decodes.lens)
    group, padded = num_heads // num_kv_heads, triton.next_power_of_2(max(16, dim))
    num_splits = max(1, min(MOST_SPLITS, -(-decodes.max_context // plan.split)))
    walkers = min(num_splits, max(FEWEST_WALKERS, PROGRAMS // (num_rows * num_kv_heads)))
    # Made anew by every call: layers follow each other, so the allocator gives one place to all, and to all graphs.
    sums = torch.empty(num_rows, num_heads, num_splits, dim, dtype=torch.float32, device=q.device)
    tops, totals = torch.empty(2, num_rows, num_heads, num_splits, dtype=torch.float32, device=q.device)
    at_once, warps, stages = decode_tile(padded, q.dtype)
    kernels.decode[(num_kv_heads, num_rows, walkers)](
        q,
        k_cache,
        v_cache,
        out,
        sums,
        tops,
        totals,
        plan.block_tables,
        decodes.where,
        decodes.lens,
        plan.block_tables.stride(0),
        q.stride(0),
        num_splits,
        scale,
        IS_WHOLE=num_splits == 1,
        GROUP=group,
        M=max(16, triton.next_power_of_2(group)),
        N=at_once,
        DIM=dim,
        PADDED=padded,
        BLOCK_SIZE=plan.block_size,
        SPLIT=plan.split,
        num_warps=warps,
        num_stages=stages,
    )
    if num_splits > 1:
        kernels.combine[(num_heads, num_rows)](
            out, sums, tops, totals, decodes.where, decodes.lens, num_splits, DIM=dim, PADDED=padded, SPLIT=plan.split
        )


def _run_prefills(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: AttentionPlan,
    prefills: Prefills,
    scale: float,
    out: torch.Tensor,
) -> None:
    (_, num_heads, dim), num_kv_heads, num_prefills = q.shape, k_cache.shape[2], prefills.numbers.shape[1]
    group, padded = num_heads // num_kv_heads, triton.next_power_of_2(max(16, dim))
    rows, at_once, warps, stages = prefill_tile(padded, q.dtype, plan.is_hopper)
    rows = max(rows, triton.next_power_of_2(group))
    queries = rows // group
    kernels.prefill[(num_kv_heads, prefills.num_queries // queries + num_prefills)](
        q,
        k_cache,
        v_cache,
        out,
        plan.block_tables,
        prefills.numbers,
        num_prefills,
        plan.block_tables.stride(0),
        q.stride(0),
        scale,
        GROUP=group,
        QUERIES=queries,
        M=rows,
        N=at_once,
        DIM=dim,
        PADDED=padded,
        BLOCK_SIZE=plan.block_size,
        num_warps=warps,
        num_stages=stages,
    )


def decode_tile(padded: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Tokens that a program takes at once, warps, stages, for heads of `padded` numbers."""
    if dtype is torch.float32:
        return 16, 4, 2
    if padded <= 64:
        return 64, 4, 4
    return (64 if padded <= 128 else 32), 4, 3


def prefill_tile(padded: int, dtype: torch.dtype, is_hopper: bool) -> tuple[int, int, int, int]:
    """Rows, a query and a head each, and tokens that a program takes at once, warps, stages.

    As large as registers are enough for. Where `is_hopper` is not, shared memory may be 99 KiB.
    """
    if dtype is torch.float32:
        return 16, 16, 4, 2
    if padded <= 64:
        return 128, 64, 8, 3
    if is_hopper:
        return (128, 64, 8, 3) if padded <= 128 else (128, 32, 8, 2)
    return (64, 64, 8, 3) if padded <= 128 else (64, 32, 8, 2)


def is_hopper(device: torch.device) -> bool:
    """Or Blackwell for data centres: what has 227 KiB of shared memory."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)
