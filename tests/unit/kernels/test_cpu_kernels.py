"""CPU kernels against the reference, and that neighbours do not change a sequence's bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.kernels import reference
from qwen_ray.kernels.cpu import attention
from qwen_ray.kernels.cpu.library import VARIANTS, Library, open_library, processor_flags
from qwen_ray.kernels.registry import REFERENCE, Kernels

BLOCK = 4
LIBRARIES = [library for v in VARIANTS if v.needs <= processor_flags() and (library := open_library(v))]
NAMES = ["torch", *(library.name for library in LIBRARIES)]
KERNELS = [Kernels.on_cpu(library, torch.float32) for library in (None, *LIBRARIES)]


@st.composite
def lengths(draw: st.DrawFn) -> tuple[int, int]:
    """(new tokens, context): decodes, whole prompts, chunks with a prefix."""
    context = draw(st.integers(1, 90))
    return draw(st.sampled_from([1, 1, context, (context + 1) // 2])), context


sequences = st.lists(lengths(), min_size=1, max_size=6)


class Case:
    """Random queries of some sequences, their blocks scattered over a cache whose other slots hold NaN."""

    def __init__(self, lens: list[tuple[int, int]], num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        generator = torch.Generator().manual_seed(len(lens) * 1000 + sum(n for _, n in lens))
        self.counts, self.contexts = tuple(c for c, _ in lens), tuple(n for _, n in lens)
        num_blocks = [-(-n // BLOCK) for n in self.contexts]
        order = (torch.randperm(sum(num_blocks), generator=generator) + 1).tolist()
        self.tables = torch.zeros(len(lens), max(num_blocks), dtype=torch.int64)
        shape = (len(order) + 1, BLOCK, num_kv_heads, head_dim)
        self.k, self.v = torch.full(shape, float("nan")), torch.full(shape, float("nan"))
        for s, (count, length) in enumerate(zip(num_blocks, self.contexts, strict=True)):
            self.tables[s, :count] = torch.tensor(order[:count])
            del order[:count]
            p = torch.arange(length)
            slots = self.tables[s][p // BLOCK] * BLOCK + p % BLOCK
            k, v = (torch.randn(length, num_kv_heads, head_dim, generator=generator) for _ in range(2))
            reference.store_kv(k, v, self.k, self.v, slots)
        self.q = torch.randn(sum(self.counts), num_heads, head_dim, generator=generator)

    def attend(self, kernels: Kernels, sequence: int | None = None) -> torch.Tensor:
        """Of all sequences together, or of one alone."""
        if sequence is None:
            q, tables, counts, contexts = self.q, self.tables, self.counts, self.contexts
        else:
            q = self.q.split(self.counts)[sequence]
            counts, contexts = (self.counts[sequence],), (self.contexts[sequence],)
            tables = self.tables[sequence : sequence + 1, : -(-contexts[0] // BLOCK)]
        plan = kernels.plan_attention(tables, counts, contexts, BLOCK)
        return kernels.paged_attention(q, self.k, self.v, plan, 0.3)


@pytest.mark.parametrize("kernels", KERNELS, ids=NAMES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(7, 1, 8), (9, 3, 16), (4, 4, 8), (5, 1, 72)])
@given(lens=sequences)
@settings(max_examples=15, deadline=None)
def test_attention_equals_the_reference(
    kernels: Kernels, num_heads: int, num_kv_heads: int, head_dim: int, lens: list[tuple[int, int]]
) -> None:
    case = Case(lens, num_heads, num_kv_heads, head_dim)
    ours = case.attend(kernels)
    assert not ours.isnan().any()
    torch.testing.assert_close(ours, case.attend(REFERENCE), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("kernels", [REFERENCE, *KERNELS], ids=["reference", *NAMES])
@given(lens=sequences)
@settings(max_examples=15, deadline=None)
def test_neighbours_do_not_change_a_bit(kernels: Kernels, lens: list[tuple[int, int]]) -> None:
    case = Case(lens, 6, 2, 16)
    together = case.attend(kernels).split(case.counts)
    for s in range(len(lens)):
        assert torch.equal(case.attend(kernels, s), together[s])


@pytest.mark.parametrize("library", [None, *LIBRARIES], ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_alone_equals_itself_among_32(library: Library | None, dtype: torch.dtype) -> None:
    case = Case([(1, 37 + 29 * i) for i in range(32)], 9, 3, 64)
    case.q, case.k, case.v = case.q.to(dtype), case.k.to(dtype), case.v.to(dtype)
    kernels = Kernels.on_cpu(library, dtype)
    torch.testing.assert_close(case.attend(kernels), case.attend(REFERENCE), atol=2e-2, rtol=2e-2)
    together = case.attend(kernels)
    for s in range(32):
        assert torch.equal(case.attend(kernels, s)[0], together[s])


def test_reference_attention_is_softmax_over_the_past() -> None:
    """Against the definition, written out for one head."""
    case = Case([(3, 5)], 1, 1, 8)
    slots = case.tables[0].repeat_interleave(BLOCK)[:5] * BLOCK + torch.arange(5) % BLOCK
    k, v = case.k.flatten(0, 1)[slots, 0], case.v.flatten(0, 1)[slots, 0]
    got = case.attend(REFERENCE)
    for row, last in enumerate((2, 3, 4)):
        weights = torch.softmax(k[: last + 1] @ case.q[row, 0] * 0.3, dim=0)
        torch.testing.assert_close(got[row, 0], weights @ v[: last + 1])


def test_padding_depends_on_the_length_alone_and_always_suffices() -> None:
    sizes = [attention.padded(n) for n in range(1, 3000)]
    assert all(size >= n for n, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes)
    assert all(size <= max(64, 1.5 * n) for n, size in enumerate(sizes, start=1))
    assert len(set(sizes)) <= 13


def test_store_kv_writes_its_slots_and_no_others() -> None:
    k_cache, v_cache = torch.zeros(3, BLOCK, 2, 4), torch.zeros(3, BLOCK, 2, 4)
    k, v = torch.randn(2, 2, 4), torch.randn(2, 2, 4)
    reference.store_kv(k, v, k_cache, v_cache, torch.tensor([9, 2]))
    assert torch.equal(k_cache[2, 1], k[0])
    assert torch.equal(v_cache[0, 2], v[1])
    assert k_cache.count_nonzero() == k.numel()


def test_silu_and_mul_takes_the_first_half_as_the_gate() -> None:
    gate, up = torch.randn(3, 5), torch.randn(3, 5)
    expected = gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(reference.silu_and_mul(torch.cat((gate, up), dim=-1)), expected)
