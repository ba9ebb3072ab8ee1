"""Paged attention on CPU, through torch's fused attention.

One-token sequences go together, as many as keep their gathered keys and values in a core's cache. What each is padded
to depends on its own length alone, so that neighbours do not change its bits; the padding repeats its own first token,
so that nothing foreign is ever read.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qwen_ray.kernels.reference import causal_mask

SHORTEST = 64  # tokens that a one-token sequence's context is padded to at least
TOKENS_AT_ONCE = 2048  # gathered for one call, unless a single sequence has more


@dataclass(frozen=True, slots=True, kw_only=True)
class Decodes:
    """B sequences of one new token each, their contexts padded to L tokens."""

    rows: torch.Tensor  # [B] of q
    slots: torch.Tensor  # [B * L]
    seen: torch.Tensor  # [B, 1, 1, L] bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """A chunk of one sequence."""

    rows: slice  # of q
    slots: torch.Tensor  # [context]
    seen: torch.Tensor | None  # [queries, context] bool; None: the chunk is the whole context


class Scratch:
    """Room for gathered keys and values, used again by every part of every layer: fresh memory costs page faults."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._rooms: list[torch.Tensor] = []

    def gather(self, cache: torch.Tensor, slots: torch.Tensor, which: int) -> torch.Tensor:
        """Tokens [n, KV heads, D] of a cache [blocks, block size, KV heads, D]; `which`: 0 or 1, two live at a time."""
        heads, dim = cache.shape[2:]
        if not self._rooms:
            self._rooms = [cache.new_empty(self._num_tokens, heads * dim) for _ in range(2)]
        room = self._rooms[which][: slots.shape[0]]
        torch.index_select(cache.view(-1, heads * dim), 0, slots, out=room)
        return room.view(-1, heads, dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    decodes: tuple[Decodes, ...]
    prefills: tuple[Prefill, ...]
    scratch: Scratch


def plan_attention(
    block_tables: torch.Tensor, query_lens: tuple[int, ...], context_lens: tuple[int, ...], block_size: int
) -> AttentionPlan:
    """As `reference.plan_attention`."""
    by_padding: dict[int, list[tuple[int, int]]] = defaultdict(list)  # padded length: (sequence, row)
    row = 0
    for s, (count, length) in enumerate(zip(query_lens, context_lens, strict=True)):
        if count == 1:
            by_padding[padded(length)].append((s, row))
        row += count
    lens = torch.tensor(context_lens)
    decodes = [
        _plan_decodes(block_tables, lens, block_size, size, group[i : i + at_once])
        for size, group in by_padding.items()
        for at_once in [max(1, TOKENS_AT_ONCE // size)]
        for i in range(0, len(group), at_once)
    ]
    prefills = plan_prefills(block_tables, query_lens, context_lens, block_size)
    most = max(part.slots.shape[0] for part in [*decodes, *prefills])
    return AttentionPlan(decodes=tuple(decodes), prefills=prefills, scratch=Scratch(most))


def plan_prefills(
    block_tables: torch.Tensor, query_lens: tuple[int, ...], context_lens: tuple[int, ...], block_size: int
) -> tuple[Prefill, ...]:
    """Of the sequences with more than one new token."""
    prefills: list[Prefill] = []
    row = 0
    for s, (count, length) in enumerate(zip(query_lens, context_lens, strict=True)):
        if count > 1:
            seen = None if count == length else causal_mask(count, length, block_tables.device)
            slots = _slots(block_tables[s], torch.arange(length), block_size)
            prefills.append(Prefill(rows=slice(row, row + count), slots=slots, seen=seen))
        row += count
    return tuple(prefills)


def _plan_decodes(
    block_tables: torch.Tensor, context_lens: torch.Tensor, block_size: int, size: int, group: list[tuple[int, int]]
) -> Decodes:
    sequences, rows = torch.tensor(group).unbind(1)
    positions = torch.arange(size).expand(len(group), size)
    seen = positions < context_lens[sequences].unsqueeze(1)
    slots = _slots(block_tables[sequences], torch.where(seen, positions, 0), block_size)
    return Decodes(rows=rows, slots=slots.flatten(), seen=seen[:, None, None, :])


def _slots(tables: torch.Tensor, positions: torch.Tensor, block_size: int) -> torch.Tensor:
    """Where the tokens at `positions` [..., n] of sequences with block tables [..., blocks] are cached, [..., n]."""
    return tables.gather(-1, positions // block_size) * block_size + positions % block_size


def padded(length: int) -> int:
    """The next power of two, or three quarters of it."""
    power = max(SHORTEST, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > SHORTEST and length <= power * 3 // 4 else power


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan, scale: float
) -> torch.Tensor:
    """As `reference.paged_attention`."""
    gather = plan.scratch.gather
    out = torch.empty_like(q)
    for part in plan.decodes:
        k, v = gather(k_cache, part.slots, 0), gather(v_cache, part.slots, 1)
        out.index_copy_(0, part.rows, _decode(q.index_select(0, part.rows), k, v, part.seen, scale))
    attend_prefills(q, k_cache, v_cache, plan.prefills, plan.scratch, scale, out)
    return out


def attend_prefills(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    prefills: tuple[Prefill, ...],
    scratch: Scratch,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Fill their rows of `out` [T, heads, D]."""
    for chunk in prefills:
        k, v = scratch.gather(k_cache, chunk.slots, 0), scratch.gather(v_cache, chunk.slots, 1)
        out[chunk.rows] = _prefill(q[chunk.rows], k, v, chunk.seen, scale)


def _decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float) -> torch.Tensor:
    """q [B, heads, D], k and v [B * L, KV heads, D] to [B, heads, D]."""
    batch, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    # The query heads of a KV head stand in for queries: they see the same.
    q = q.view(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    k = k.view(batch, -1, num_kv_heads, head_dim).transpose(1, 2)  # [B, KV heads, L, D]
    v = v.view(batch, -1, num_kv_heads, head_dim).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).reshape(batch, num_heads, head_dim)


def _prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """q [queries, heads, D], k and v [context, KV heads, D] to [queries, heads, D]."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, tokens, D]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)
