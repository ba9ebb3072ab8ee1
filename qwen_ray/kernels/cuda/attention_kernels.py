"""What `attention.py` launches: Triton's kernels, and the order of their sums.

A softmax goes on from tokens to tokens, as Milakov and Gimelshein 2018 have it, in powers of 2. Its state, in float32:
a row's largest score so far, its sum of weights, its weighted sum of values. Heads of DIM numbers are padded to PADDED.
"""

# pyright: reportAttributeAccessIssue=false
# Triton has no types for what a pointer points to.

from __future__ import annotations

import triton
import triton.language as tl

MOST_SPLITS = tl.constexpr(64)  # of a context
SPLITS_AT_ONCE = tl.constexpr(16)  # are added up as one sum


@triton.jit
def load_rows(cache: tl.tensor, offsets: tl.tensor, DIM: tl.constexpr, PADDED: tl.constexpr) -> tl.tensor:
    """[offsets, PADDED], zeros behind DIM."""
    dims = tl.arange(0, PADDED)
    places = cache + offsets[:, None] + dims[None, :]
    if DIM == PADDED:
        return tl.load(places)
    else:
        return tl.load(places, mask=dims[None, :] < DIM, other=0.0)


@triton.jit
def store_rows(
    out: tl.tensor, offsets: tl.tensor, rows: tl.tensor, is_real: tl.tensor, DIM: tl.constexpr, PADDED: tl.constexpr
) -> None:
    dims = tl.arange(0, PADDED)
    mask = is_real[:, None] & (dims < DIM)[None, :]
    tl.store(out + offsets[:, None] + dims[None, :], rows.to(out.dtype.element_ty), mask=mask)


@triton.jit
def mean(sums: tl.tensor, total: tl.tensor) -> tl.tensor:
    """[M, PADDED]; zeros where there was nothing to see."""
    return tl.div_rn(sums, tl.zeros_like(sums) + tl.where(total == 0, 1.0, total)[:, None])


@triton.jit
def offsets_of(table: tl.tensor, tokens: tl.tensor, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr) -> tl.tensor:
    """Where tokens of a sequence lie in the caches, for the KV head of this program: axis 0 counts all KV heads."""
    slots = tl.load(table + tokens // BLOCK_SIZE).to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
    return (slots * tl.num_programs(0) + tl.program_id(0)) * DIM


@triton.jit
def attend(
    q: tl.tensor,  # [M, PADDED]
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    seen: tl.tensor,  # [M]: how many tokens, from the context's first on, a row sees
    state: tl.tuple,  # [M], [M], [M, PADDED]
    scale: tl.tensor,
    IS_MASKED: tl.constexpr,  # or else all rows see all tokens
    N: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> tl.tuple:
    """Go on with a softmax over the tokens from `begin` to `end`, N at a time. Programs of axis 0 are the KV heads.

    Sums of products say `fma`: whether a compiler makes one must not depend on IS_MASKED. Behind the end the last token
    is read again and not seen, so nothing foreign is ever read.
    """
    top, total, sums = state
    last = tl.maximum(end - 1, 0)
    offsets = offsets_of(table, tl.minimum(begin + tl.arange(0, N), last), DIM, BLOCK_SIZE)
    for first in range(begin, end, N):
        tokens = first + tl.arange(0, N)
        k = load_rows(k_cache, offsets, DIM, PADDED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if IS_MASKED:
            scores = tl.where(tokens[None, :] < seen[:, None], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(tl.fma(scores, scale, -higher[:, None]))
        shrink = tl.exp2(top - higher)
        total = tl.fma(total, shrink, tl.sum(weights, 1))
        v = load_rows(v_cache, offsets, DIM, PADDED)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
        top = higher
        # Looked up one round ahead: so copies of several rounds can be under way, none waiting for where it is from.
        offsets = offsets_of(table, tl.minimum(tokens + N, last), DIM, BLOCK_SIZE)
    return top, total, sums


@triton.jit
def split_size(length: tl.tensor, SPLIT: tl.constexpr) -> tl.tensor:
    """How many tokens the splits of a context have: a multiple of SPLIT."""
    return tl.maximum(1, tl.cdiv(length, SPLIT * MOST_SPLITS)) * SPLIT


# What differs from step to step is compiled once: Triton would compile anew for numbers and places divisible by 16.
@triton.jit(
    do_not_specialize=["table_width", "num_splits"],
    do_not_specialize_on_alignment=["totals", "tables", "where", "lens"],
)
def decode(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    out: tl.tensor,
    all_sums: tl.tensor,  # [B, heads, splits, DIM]
    tops: tl.tensor,  # [B, heads, splits]
    totals: tl.tensor,  # [B, heads, splits]
    tables: tl.tensor,
    where: tl.tensor,  # [2, B]
    lens: tl.tensor,  # [B]
    table_width: tl.tensor,
    row_stride: tl.tensor,
    num_splits: tl.tensor,  # that there is room for
    scale: tl.tensor,
    IS_WHOLE: tl.constexpr,  # no context has more than one split, which gives what comes out
    GROUP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """Programs (KV head, sequence, walker): a walker takes every so many-th split, for all heads of the KV head."""
    kv_head, b, walker = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lens + b)
    size = split_size(length, SPLIT)
    if (walker > 0) & (walker * size >= length):
        return
    own, num_heads = tl.arange(0, M), tl.num_programs(0) * GROUP
    head = kv_head * GROUP + tl.minimum(own, GROUP - 1)  # whom nobody has is the last one again, and not stored
    row = tl.load(where + b).to(tl.int64)
    table = tables + tl.load(where + tl.num_programs(1) + b).to(tl.int64) * table_width
    queries = load_rows(q, row * row_stride + head * DIM, DIM, PADDED)
    for split in range(walker, tl.maximum(1, tl.cdiv(length, size)), tl.num_programs(2)):
        begin = split * size
        end = tl.minimum(begin + size, length)
        seen, state = tl.zeros([M], tl.int32) + end, nothing(M, PADDED)
        top, total, sums = attend(
            queries, k_cache, v_cache, table, begin, end, seen, state, scale, True, N, DIM, PADDED, BLOCK_SIZE
        )
        if IS_WHOLE:
            store_rows(out, (row * num_heads + head) * DIM, mean(sums, total), own < GROUP, DIM, PADDED)
        else:
            place = (b * num_heads + head).to(tl.int64) * num_splits + split
            tl.store(tops + place, top, mask=own < GROUP)
            tl.store(totals + place, total, mask=own < GROUP)
            store_rows(all_sums, place * DIM, sums, own < GROUP, DIM, PADDED)


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["totals", "where", "lens"])
def combine(
    out: tl.tensor,
    all_sums: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    where: tl.tensor,
    lens: tl.tensor,
    num_splits: tl.tensor,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """What `decode` left, added up in an order that knows how many splits the row has, not for how many there is room.

    Programs (head, sequence).
    """
    head, b = tl.program_id(0), tl.program_id(1)
    length = tl.load(lens + b)
    count = tl.cdiv(length, split_size(length, SPLIT))
    first_place = (b * tl.num_programs(0) + head).to(tl.int64) * num_splits
    splits, dims = tl.arange(0, MOST_SPLITS), tl.arange(0, PADDED)
    each = tl.load(tops + first_place + splits, mask=splits < count, other=float("-inf"))
    top = tl.where(count > 0, tl.max(each, 0), 0.0)
    total = tl.sum(tl.exp2(each - top) * tl.load(totals + first_place + splits, mask=splits < count, other=0.0), 0)
    sums = tl.zeros([PADDED], tl.float32)
    for first in range(0, count, SPLITS_AT_ONCE):
        some = first + tl.arange(0, SPLITS_AT_ONCE)
        is_real = some < count
        shrink = tl.exp2(tl.load(tops + first_place + some, mask=is_real, other=float("-inf")) - top)
        places = (first_place + some)[:, None] * DIM + dims[None, :]
        parts = tl.load(all_sums + places, mask=is_real[:, None] & (dims < DIM)[None, :], other=0.0)
        sums += tl.sum(parts * shrink[:, None], 0)
    row = tl.load(where + b).to(tl.int64)
    mean = tl.div_rn(sums, tl.zeros_like(sums) + tl.where(count == 0, 1.0, total))
    tl.store(out + (row * tl.num_programs(0) + head) * DIM + dims, mean.to(out.dtype.element_ty), mask=dims < DIM)


@triton.jit
def nothing(M: tl.constexpr, PADDED: tl.constexpr) -> tl.tuple:
    """The state of a softmax over no tokens."""
    return tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, PADDED], tl.float32)


@triton.jit(do_not_specialize=["num_prefills", "table_width"], do_not_specialize_on_alignment=["tables", "numbers"])
def prefill(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    out: tl.tensor,
    tables: tl.tensor,
    numbers: tl.tensor,  # [5, prefills]
    num_prefills: tl.tensor,
    table_width: tl.tensor,
    row_stride: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """Programs (KV head, tile): QUERIES of a sequence, each with all heads of the KV head.

    Tiles of prefill i, before which others have `before` queries, are counted from before // QUERIES + i on: that needs
    no list of tiles, leaves room for all, and at most one program without any.
    """
    kv_head, tile = tl.program_id(0), tl.program_id(1)
    i, stop = tile * 0, num_prefills
    while i + 1 < stop:
        middle = (i + stop) // 2
        is_after = tl.load(numbers + 4 * num_prefills + middle) // QUERIES + middle <= tile
        i, stop = tl.where(is_after, middle, i), tl.where(is_after, stop, middle)
    tile -= tl.load(numbers + 4 * num_prefills + i) // QUERIES + i
    count = tl.load(numbers + 2 * num_prefills + i)
    num_tiles = tl.cdiv(count, QUERIES)
    if tile >= num_tiles:
        return
    first = (num_tiles - 1 - tile) * QUERIES  # the last queries see most: they are not left for the end
    length = tl.load(numbers + 3 * num_prefills + i)
    table = tables + tl.load(numbers + num_prefills + i).to(tl.int64) * table_width
    rows, num_heads = tl.arange(0, M), tl.num_programs(0) * GROUP
    is_real = (rows < QUERIES * GROUP) & (rows < (count - first) * GROUP)
    query = tl.minimum(rows // GROUP, tl.minimum(QUERIES, count - first) - 1)  # rows too many are the last again
    head = kv_head * GROUP + rows % GROUP
    places = (tl.load(numbers + i) + first + query).to(tl.int64)  # of q
    queries = load_rows(q, places * row_stride + head * DIM, DIM, PADDED)
    seen_by_first = length - count + first + 1
    seen = seen_by_first + query
    seen_by_all = seen_by_first // N * N
    end = tl.minimum(seen_by_first + QUERIES - 1, length)
    state = nothing(M, PADDED)
    state = attend(
        queries, k_cache, v_cache, table, 0, seen_by_all, seen, state, scale, False, N, DIM, PADDED, BLOCK_SIZE
    )
    _, total, sums = attend(
        queries, k_cache, v_cache, table, seen_by_all, end, seen, state, scale, True, N, DIM, PADDED, BLOCK_SIZE
    )
    store_rows(out, (places * num_heads + head) * DIM, mean(sums, total), is_real, DIM, PADDED)
