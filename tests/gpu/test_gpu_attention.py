"""Paged attention on an NVIDIA GPU gives what the reference gives on a CPU. Only run where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from attention_step import Step

from qwen_ray.kernels.cuda import attention

pytestmark = pytest.mark.gpu
MIXED = (1, 700, 1, 33, 1, 2, 1, 128), (5000, 700, 1, 1000, 256, 2, 257, 128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("dim", "heads"),
    [(64, (14, 2)), (80, (4, 4)), (96, (8, 2)), (128, (28, 4)), (128, (16, 2)), (128, (5, 1)), (256, (8, 1))],
)
def test_attention_equals_the_reference(dim: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    Step(*MIXED, dim=dim, heads=heads, dtype=dtype, num_shared=2).check(attention.SHORTEST_SPLIT)


@pytest.mark.parametrize("length", [attention.MOST_SPLITS * attention.SHORTEST_SPLIT + extra for extra in (0, 1)])
def test_long_contexts(length: int) -> None:
    Step((1, 3), (length, length), dim=128, heads=(7, 1), dtype=torch.bfloat16).check(attention.SHORTEST_SPLIT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128])
def test_neighbours_change_no_bits_of_a_row(dim: int, dtype: torch.dtype) -> None:
    step = Step(*MIXED, dim=dim, heads=(14, 2), dtype=dtype)
    whole = step.run(attention.SHORTEST_SPLIT)
    first = 0
    for s, (count, length) in enumerate(zip(step.query_lens, step.context_lens, strict=True)):
        rows = slice(first, first + count)
        plan = attention.plan_attention(step.tables[s : s + 1].cuda(), (count,), (length,), step.block_size)
        assert torch.equal(step.attend(plan, step.q[rows]), whole[rows])
        first += count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128])
def test_how_a_prompt_is_cut_changes_no_bits(dim: int, dtype: torch.dtype) -> None:
    step = Step((600,), (900,), dim=dim, heads=(14, 2), dtype=dtype)
    whole = step.run()
    for first, end in ((0, 2), (1, 300), (37, 600), (598, 600)):
        plan = attention.plan_attention(step.tables.cuda(), (end - first,), (300 + end,), step.block_size)
        assert torch.equal(step.attend(plan, step.q[first:end]), whole[first:end])


@pytest.mark.parametrize("has_decodes", [True, False])
def test_a_graph_follows_its_buffers(has_decodes: bool) -> None:
    """And gives, to the last bit, what a plan of the step itself gives; places that nobody has give zeros."""
    num_places, max_context = 8, 3000
    tables = torch.zeros(num_places, 200, dtype=torch.int32, device="cuda")
    q = torch.zeros(num_places, 14, 64, dtype=torch.bfloat16, device="cuda")
    k = torch.zeros(1000, 16, 2, 64, dtype=torch.bfloat16, device="cuda")
    v = torch.zeros_like(k)
    plan = attention.decode_plan(tables, max_context, 16, has_decodes=has_decodes)
    attention.paged_attention(q, k, v, plan, 0.125)  # compiled before anything is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.paged_attention(q, k, v, plan, 0.125)
    for now in ((max_context, 1, 256, 257, 900, 17, 2000, 64), (5, 1000), (max_context,) * 4):
        step = Step((1,) * len(now), now, dim=64, heads=(14, 2), dtype=torch.bfloat16)
        assert len(step.k) <= len(k)
        plan.lens.zero_()
        plan.lens[: len(now)] = torch.tensor(now)
        tables[: len(now), : step.tables.shape[1]] = step.tables
        q[: len(now)] = step.q
        k[: len(step.k)], v[: len(step.v)] = step.k, step.v
        graph.replay()
        assert torch.equal(out[: len(now)].cpu(), step.run(attention.SHORTEST_SPLIT, has_decodes=has_decodes))
        assert (out[len(now) :] == 0).all()


def test_the_host_waits_for_nothing() -> None:
    step = Step(*MIXED, dim=64, heads=(14, 2), dtype=torch.bfloat16)
    q, k, v, tables = (x.cuda() for x in (step.q, step.k, step.v, step.tables))

    def run() -> None:
        plan = attention.plan_attention(tables, *MIXED, step.block_size)
        attention.paged_attention(q, k, v, plan, step.scale)

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
