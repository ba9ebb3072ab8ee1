"""Products with packed weights in Triton's kernels, interpreted where there is no GPU, against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.kernels import quantized, reference
from qwen_ray.kernels.quantized import GROUP, GROUPS, PackedStack, PackedWeight

pytest.importorskip("triton")
from qwen_ray.kernels.cuda import packed, packed_experts

KINDS = [0, *GROUPS]  # 0: 8 bits, otherwise 4 bits in groups of so many
kinds = pytest.mark.parametrize("kind", KINDS)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def pack(weight: torch.Tensor, kind: int) -> PackedWeight:
    return quantized.quantize(weight, 4, kind) if kind else quantized.quantize(weight, 8)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@given(shape=st.tuples(st.integers(0, 40), st.integers(0, 400)), data=st.data())
@settings(max_examples=4, deadline=None)
def test_widened_weights_are_those_of_the_definition(
    kind: int, dtype: torch.dtype, shape: tuple[int, int], data: st.DataObject
) -> None:
    weight = pack(random(*shape), kind) if all(shape) else quantized.make_room(8, *shape, device=DEVICE)
    start = data.draw(st.integers(0, shape[0]))
    stop = data.draw(st.integers(start, shape[0]))
    expected = quantized.dequantize(weight)[start:stop].to(dtype)
    assert torch.equal(packed.widen(weight, slice(start, stop), dtype), expected)


@kinds
@given(
    shape=st.tuples(st.integers(1, 40), st.sampled_from([1, 63, 130, 900])),
    num_rows=st.sampled_from([0, 1, 2, 16, 17, 32, 33, 64, 65, 70]),
    has_bias=st.booleans(),
    is_strided=st.booleans(),
)
@settings(max_examples=5, deadline=None)
def test_products(kind: int, shape: tuple[int, int], num_rows: int, has_bias: bool, is_strided: bool) -> None:
    weight = pack(random(*shape), kind)
    x = random(num_rows, shape[1] + 5).half()
    x = x[:, 5:] if is_strided else x[:, 5:].contiguous()
    bias = random(shape[0]).half() if has_bias else None
    wide = quantized.dequantize(weight)
    if kind or num_rows > packed.FEW_ROWS:  # or else whole numbers are multiplied, and then their scale
        wide = wide.half().float()
    expected = x.float() @ wide.t() + (0 if bias is None else bias)
    got = packed.linear_packed(x, weight, bias)
    assert got.dtype is x.dtype
    torch.testing.assert_close(got.float(), expected, atol=2e-3, rtol=1e-3)


@kinds
@pytest.mark.parametrize("shape", [(37, 320), (5, 1100)])
def test_whole_numbers_are_multiplied_exactly(kind: int, shape: tuple[int, int]) -> None:
    """Each column is told from each other one: x is a row of them at a time."""
    whole = torch.randint(-7, 8, shape, generator=torch.Generator().manual_seed(0)).float()
    whole[:, ::32], whole[:, 1::32] = 127 if kind == 0 else -8, 7
    weight = pack(whole.to(DEVICE), kind)
    columns = torch.randperm(shape[1], generator=torch.Generator().manual_seed(1))[:33]
    x = torch.zeros(33, shape[1], dtype=torch.float16, device=DEVICE)
    x[torch.arange(33), columns] = 1
    torch.testing.assert_close(packed.linear_packed(x, weight, None), whole.t()[columns].half(), atol=2e-3, rtol=1e-3)


def test_a_matrix_is_cut_by_its_own_sizes_alone() -> None:
    for num_words, out_size in ((1, 1), (64, 16), (512, 4096), (1536, 4096), (112, 151_936), (10_000, 1)):
        splits = packed.num_splits(num_words, out_size)
        steps = -(-num_words // packed.WORDS)
        each = -(-steps // splits)
        assert (splits - 1) * each < steps <= splits * each
        assert splits == 1 or each >= packed.LEAST_STEPS
    assert packed.num_splits(1536, 4096) > 1
    assert packed.num_splits(112, 151_936) == 1


@kinds
@pytest.mark.parametrize("counts", [(1, 5, 16), (17, 40, 64)])
def test_a_row_does_not_depend_on_those_behind_it(kind: int, counts: tuple[int, ...]) -> None:
    """On a GPU not on those before it either; the interpreter's products are numpy's."""
    weight, bias = pack(random(20, 1100), kind), random(20).half()
    x = random(counts[-1], 1100).half()
    whole = packed.linear_packed(x, weight, bias)
    x[counts[0] :] = float("nan")
    for count in counts[:-1]:
        got = packed.linear_packed(x[:count], weight, bias)
        assert torch.equal(got[: counts[0]], whole[: counts[0]])
        assert got[counts[0] :].isnan().all()


@pytest.mark.parametrize("bits", [8, 4])
def test_what_stands_behind_a_matrix_is_no_matter(bits: int) -> None:
    weight = quantized.quantize(random(5, 70), bits)
    x = random(3, 70).half()
    expected = packed.linear_packed(x, weight, None), packed.widen(weight, slice(0, 5), torch.float32)
    weight.values[:, :, 5:] = 255
    for tensor in weight.tensors[1:]:
        tensor[..., 5:] = float("nan")
        if bits == 4:
            tensor[:, 3:] = float("nan")
    assert torch.equal(packed.linear_packed(x, weight, None), expected[0])
    assert torch.equal(packed.widen(weight, slice(0, 5), torch.float32), expected[1])


@pytest.mark.parametrize("kind", [0, 32])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "few_choices"),
    [(torch.float16, 3e-3, packed_experts.FEW_CHOICES), (torch.float16, 3e-3, 0), (torch.float32, 1e-4, 0)],
)
@given(
    num_tokens=st.integers(0, 20),
    num_slots=st.integers(0, 4),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 80)),
    absent=st.sampled_from([0.0, 0.5, 1.0]),
    parts_at_once=st.sampled_from([7, packed_experts.PARTS_AT_ONCE]),
)
@settings(max_examples=4, deadline=None)
def test_experts(
    kind: int,
    dtype: torch.dtype,
    tolerance: float,
    few_choices: int,
    num_tokens: int,
    num_slots: int,
    sizes: tuple[int, int],
    absent: float,
    parts_at_once: int,
) -> None:
    """Of few choices in one kernel, of many one by one."""
    inner, hidden = sizes
    gate_up, down = stack(num_slots, 2 * inner, hidden, kind), stack(num_slots, hidden, inner, kind)
    x, weights = random(num_tokens, hidden).to(dtype), random(num_tokens, 2).abs()
    slots = choose(num_tokens, num_slots, absent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_experts, "FEW_CHOICES", few_choices)
        patch.setattr(packed_experts, "PARTS_AT_ONCE", parts_at_once)
        got = packed_experts.run_experts(x, slots, weights, gate_up, down)
    expected = reference.run_experts(x.float(), slots, weights, gate_up, down)
    torch.testing.assert_close(got.float(), expected, atol=tolerance * hidden**0.5, rtol=tolerance)


def stack(count: int, out_size: int, size: int, kind: int) -> PackedStack:
    bits, group = (4, kind) if kind else (8, GROUP)
    made = quantized.make_stack(count, bits, out_size, size, group, device=DEVICE)
    for number in range(count):
        quantized.store(made[number], 0, random(out_size, size + number)[:, number:] / size**0.5)
    return made


def choose(num_tokens: int, num_slots: int, absent: float) -> torch.Tensor:
    """[tokens, 2], different ones for a token."""
    generator = torch.Generator().manual_seed(num_tokens)
    slots = torch.rand(num_tokens, max(2, num_slots), generator=generator).topk(2).indices
    slots[slots >= num_slots] = -1
    return torch.where(torch.rand(num_tokens, 2, generator=generator) < absent, -1, slots).to(DEVICE)


@given(
    num_tokens=st.integers(1, 70),
    num_slots=st.integers(1, 9),
    absent=st.sampled_from([0.0, 0.3, 1.0]),
    most=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_each_choice_is_in_a_tile_of_its_slot(num_tokens: int, num_slots: int, absent: float, most: bool) -> None:
    slots = choose(num_tokens, num_slots, absent)
    if most:  # of the first
        slots = torch.where(slots >= 0, 0, slots)
    tiles = packed_experts.in_tiles(slots, num_slots, packed_experts.ROWS)
    flat, seen = slots.flatten().tolist(), []
    for slot, choices in zip(tiles.slots.tolist(), tiles.choices.view(-1, packed_experts.ROWS).tolist(), strict=True):
        here = [choice for choice in choices if choice < len(flat)]
        assert [flat[choice] for choice in here] == [slot] * len(here)
        assert (slot >= 0) == bool(here)
        seen += here
    assert sorted(seen) == [choice for choice, slot in enumerate(flat) if slot >= 0]


def test_experts_that_are_not_packed_are_others() -> None:
    x, gate_up, down = random(3, 8), random(2, 6, 8), random(2, 8, 3)
    given = x, torch.tensor([[0, 1], [1, -1], [-1, -1]], device=DEVICE), random(3, 2), gate_up, down
    assert torch.equal(packed_experts.run_experts(*given), reference.run_experts(*given))
