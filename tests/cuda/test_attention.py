"""Paged attention in Triton against the reference, and row for row; interpreted where there is no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from attention_step import DEVICE, SPLIT, Step

from qwen_ray.kernels.cuda import attention
from qwen_ray.planner import memory


@pytest.mark.parametrize(
    ("dim", "heads", "dtype"),
    [
        (64, (7, 1), torch.float32),
        (64, (14, 2), torch.float16),
        (80, (2, 2), torch.float16),
        (96, (4, 1), torch.float16),
        (128, (5, 1), torch.float16),
        (256, (8, 1), torch.float16),
        (256, (1, 1), torch.float32),
        (8, (20, 1), torch.float32),
    ],
)
def test_sizes_of_heads_and_groups(dim: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    Step((1, 3, 1, 20), (40, 3, 7, 33), heads=heads, dim=dim, dtype=dtype).check()


@given(
    sequences=st.lists(
        st.tuples(st.one_of(st.just(1), st.integers(2, 40)), st.one_of(st.just(0), st.integers(0, 70))),
        min_size=1,
        max_size=5,
    ),
    block_size=st.sampled_from([1, 4, 16, 64]),
    num_shared=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
@settings(max_examples=10, deadline=None)
def test_batches_of_prompts_chunks_and_decodes(
    sequences: list[tuple[int, int]], block_size: int, num_shared: int, dtype: torch.dtype
) -> None:
    counts = tuple(count for count, _ in sequences)
    lens = tuple(count + earlier for count, earlier in sequences)
    Step(counts, lens, block_size=block_size, num_shared=num_shared, dtype=dtype).check()


@pytest.mark.parametrize("count", [1, 2])
def test_contexts_that_just_fill_a_split_or_a_block_of_the_loop(count: int) -> None:
    lens = (2, 15, 16, 17, SPLIT - 1, SPLIT, SPLIT + 1, 3 * SPLIT)
    Step((count,) * len(lens), lens, heads=(1, 1)).check()


@pytest.mark.parametrize("length", [attention.MOST_SPLITS * 16, attention.MOST_SPLITS * 16 + 1])
def test_splits_of_long_contexts_are_longer_not_more(length: int) -> None:
    Step((1,), (length,), heads=(1, 1)).check(split=16)


def test_neighbours_change_no_bits_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step((1, 9, 1, 1, 30), (100, 50, 1, 33, 31))
    whole = step.run()
    monkeypatch.setattr(attention, "FEWEST_WALKERS", 1)
    monkeypatch.setattr(attention, "PROGRAMS", 2)
    assert torch.equal(step.run(), whole)  # the same splits, by fewer programs
    first = 0
    for s, (count, length) in enumerate(zip(step.query_lens, step.context_lens, strict=True)):
        plan = attention.plan_attention(step.tables[s : s + 1].to(DEVICE), (count,), (length,), step.block_size)
        rows = slice(first, first + count)
        assert torch.equal(step.attend(replace(plan, split=SPLIT), step.q[rows]), whole[rows])
        first += count


def test_how_a_prompt_is_cut_changes_no_bits() -> None:
    """Of rows that are no decodes: neither where a chunk begins nor where its tiles do."""
    step = Step((70,), (80,), heads=(3, 1))
    whole = step.run()
    for first, end in ((0, 2), (1, 50), (37, 70), (68, 70)):
        plan = attention.plan_attention(step.tables.to(DEVICE), (end - first,), (10 + end,), step.block_size)
        assert torch.equal(step.attend(plan, step.q[first:end]), whole[first:end])


def test_without_decodes_one_query_has_the_bits_it_has_in_a_prompt() -> None:
    step = Step((70,), (80,), heads=(3, 1))
    whole = step.run()
    for row in (0, 1, 36, 69):
        of_row = step.tables.to(DEVICE), (1,), (11 + row,), step.block_size
        plan = attention.plan_attention(*of_row, has_decodes=False)
        assert torch.equal(step.attend(plan, step.q[row : row + 1]), whole[row : row + 1])


@pytest.mark.parametrize("has_decodes", [True, False])
@pytest.mark.parametrize("max_context", [SPLIT, 5 * SPLIT])
def test_a_plan_over_buffers_that_are_written_anew(max_context: int, has_decodes: bool) -> None:
    """As a CUDA graph has it: places that nobody has give zeros, and room for more changes no bits."""
    tables = torch.full((4, 12), -1, dtype=torch.int32, device=DEVICE)
    plan = replace(attention.decode_plan(tables, max_context, 16, has_decodes=has_decodes), split=SPLIT)
    for now in ((max_context, 3, 17), (1,), (SPLIT - 1, max_context - 1, 2, max_context)):
        step = Step((1,) * len(now), now)
        plan.lens.zero_()
        plan.lens[: len(now)] = torch.tensor(now)
        tables[: len(now), : step.tables.shape[1]] = step.tables
        got = step.attend(plan, torch.cat((step.q, torch.full((4 - len(now), 2, 16), torch.nan))))
        assert torch.equal(got[: len(now)], step.run(has_decodes=has_decodes))
        assert (got[len(now) :] == 0).all()


def test_queries_may_be_part_of_a_larger_tensor() -> None:
    step = Step((1, 20), (20, 20), heads=(4, 2))
    expected = step.run()
    fused = torch.full((21, 8, 16), torch.nan)
    fused[:, :4] = step.q
    step.q = fused[:, :4]
    assert torch.equal(step.run(), expected)
    step.q = step.q.mT.contiguous().mT  # and these are copied
    assert step.q.stride(2) != 1
    assert torch.equal(step.run(), expected)


def test_nothing_to_do() -> None:
    plan = attention.plan_attention(torch.zeros(0, 1, dtype=torch.int64, device=DEVICE), (), (), 16)
    q, cache = torch.zeros(0, 2, 16, device=DEVICE), torch.zeros(1, 16, 1, 16, device=DEVICE)
    assert attention.paged_attention(q, cache, cache, plan, 1.0).shape == (0, 2, 16)


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_not_finite_is_never_lost(count: int) -> None:
    for which in ("k", "v"):
        step = Step((count, count), (40, 40))
        getattr(step, which)[step.tables[1, 1], 3] = torch.nan
        got = step.run()
        assert got[:count].isfinite().all()
        assert got[count:].isnan().all()


@pytest.mark.parametrize("count", [1, 2])
def test_caches_of_more_than_two_to_the_31_numbers(count: int) -> None:
    """Of which two blocks are ever touched: the rest is no memory, only addresses."""
    last = 2**31 // (16 * 64)
    cache = torch.empty(last + 1, 16, 1, 64, dtype=torch.float16, device=DEVICE)
    small = Step((count,), (20,), dim=64, dtype=torch.float16)
    tables = torch.tensor([[last, 0]], device=DEVICE)
    for block, place in zip(small.tables[0], tables[0], strict=False):
        cache[place] = small.k[block].to(DEVICE)
    small.v = small.k
    plan = attention.plan_attention(tables, (count,), (20,), 16)
    got = attention.paged_attention(small.q.to(DEVICE), cache, cache, replace(plan, split=SPLIT), small.scale)
    assert torch.equal(got.cpu(), small.run())


def test_the_planner_counts_these_parts() -> None:
    assert (memory.SPLIT_TOKENS, memory.MOST_SPLITS) == (attention.SHORTEST_SPLIT, attention.MOST_SPLITS)
