"""Every operation in plain torch: the specification that faster kernels are tested against.

Knows tensors. Knows no sequences, layers, shards or devices: each operation runs wherever its tensors are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qwen_ray.kernels.quantized import Matrices, PackedWeight, linear_packed

PIECE_LOGITS = 128  # that are compared at once, where the greatest is looked for


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[T, in] by [out, in] to [T, out]."""
    return F.linear(x, weight, bias)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """[T, hidden]; Zhang and Sennrich 2019. The norm in float32, the product with the weight in x's dtype."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, heads, D], k [T, KV heads, D], cos and sin [T, D / 2]; Su et al. 2021, halves paired as GPT-NeoX does."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotate_one(q, cos, sin), _rotate_one(k, cos, sin)


def _rotate_one(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 I] to [T, I]: silu of the first half times the second; Shazeer 2020."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def route(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Which experts each token goes to: logits [T, E] to weights [T, k] float32 and expert ids [T, k], best first.

    A softmax over all experts in float32; `renormalize`: the chosen weights are made to add up to 1.
    """
    weights, ids = logits.softmax(-1, dtype=torch.float32).topk(top_k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), ids


def greatest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of [n, vocab]: where its largest value is, the first of equals, and whether all values are finite.

    [n] int64 and [n] bool. Of a row that holds NaN the place is no matter. On a CPU torch finds a largest value many at
    a time, but its place one by one: so the place is looked for in the piece that has the value.
    """
    is_finite = logits.sum(-1, dtype=torch.float32).isfinite()
    num_pieces = logits.shape[1] // PIECE_LOGITS
    if logits.device.type != "cpu" or num_pieces < 2:
        return logits.argmax(-1), is_finite
    end = num_pieces * PIECE_LOGITS
    pieces = logits[:, :end].unflatten(1, (num_pieces, PIECE_LOGITS))
    best = pieces.amax(-1)
    piece = best.argmax(-1)
    rows = torch.arange(len(logits))
    places = piece * PIECE_LOGITS + pieces[rows, piece].argmax(-1)
    if end == logits.shape[1]:
        return places, is_finite
    rest, of_rest = logits[:, end:].max(-1)
    return torch.where(rest > best[rows, piece], end + of_rest, places), is_finite


def expert(rows: torch.Tensor, gate_up: torch.Tensor | PackedWeight, down: torch.Tensor | PackedWeight) -> torch.Tensor:
    """[T, hidden] to [T, hidden] by gate_up [2 I, hidden] and down [hidden, I]."""
    return _product(silu_and_mul(_product(rows, gate_up)), down)


def _product(rows: torch.Tensor, matrix: torch.Tensor | PackedWeight) -> torch.Tensor:
    return linear(rows, matrix, None) if isinstance(matrix, torch.Tensor) else linear_packed(rows, matrix, None)


def run_experts(
    x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, gate_up: Matrices, down: Matrices
) -> torch.Tensor:
    """The weighted sum of each token's experts, as far as they are here; Shazeer et al. 2017.

    x [N, hidden]; slots [N, k], -1: not here; weights [N, k] float32; gate_up [S, 2 I,
    hidden] and down [S, hidden, I] of the experts in slots 0 to S - 1. Returns [N, hidden].
    """
    parts = x.new_zeros(*slots.shape, x.shape[1])
    for slot in range(len(gate_up)):
        here = slots == slot
        parts[here] = expert(x[here.nonzero()[:, 0]], gate_up[slot], down[slot])
    return sum_choices(parts, weights)


def sum_choices(parts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What k experts gave, parts [N, k, hidden], times weights [N, k], added up in float32 from the first choice on."""
    total = parts[:, 0] * weights[:, :1]
    for choice in range(1, parts.shape[1]):
        total.addcmul_(parts[:, choice], weights[:, choice : choice + 1])
    return total.to(parts.dtype)


def store_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write k and v [T, KV heads, D] into the caches [blocks, block size, KV heads, D] at `slots` [T]."""
    k_cache.flatten(0, 1).index_copy_(0, slots, k)
    v_cache.flatten(0, 1).index_copy_(0, slots, v)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """What attention needs to know of a step, the same for all layers. See `layers/batch.py` for the fields."""

    block_tables: torch.Tensor
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_size: int


def plan_attention(
    block_tables: torch.Tensor, query_lens: tuple[int, ...], context_lens: tuple[int, ...], block_size: int
) -> AttentionPlan:
    """Prepare a step, once for all its layers.

    block_tables [S, max blocks]: where each sequence's tokens are cached. Sequence s has `query_lens[s]` rows of q,
    laid end to end, which are the last of its `context_lens[s]` tokens.
    """
    return AttentionPlan(
        block_tables=block_tables, query_lens=query_lens, context_lens=context_lens, block_size=block_size
    )


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan, scale: float
) -> torch.Tensor:
    """Causal attention of each sequence's new tokens over all its cached ones, themselves among them.

    q [T, heads, D], caches [blocks, block size, KV heads, D]; returns [T, heads, D]. Each sequence is computed alone:
    neighbours do not change its bits, nor does anything in the cache that is not its own.
    """
    group = q.shape[1] // k_cache.shape[2]
    outputs: list[torch.Tensor] = []
    for s, rows in enumerate(q.split(plan.query_lens)):
        length = plan.context_lens[s]
        blocks = plan.block_tables[s, : -(-length // plan.block_size)]
        k = k_cache[blocks].flatten(0, 1)[:length].repeat_interleave(group, dim=1)  # [context, heads, D]
        v = v_cache[blocks].flatten(0, 1)[:length].repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,chd->hqc", rows, k).float() * scale
        seen = causal_mask(rows.shape[0], length, q.device)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(q.dtype)
        outputs.append(torch.einsum("hqc,chd->qhd", weights, v))
    return torch.cat(outputs)


def causal_mask(num_queries: int, context_len: int, device: torch.device) -> torch.Tensor:
    """[queries, context] bool, True where a query sees: the queries are the context's last tokens."""
    mask = torch.ones(num_queries, context_len, dtype=torch.bool, device=device)
    return mask.tril(context_len - num_queries)
