"""Weights in 8 and 4 bits: how far they move, and the kernels against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.kernels import quantized
from qwen_ray.kernels.cpu.library import VARIANTS, Library, open_library, processor_flags
from qwen_ray.kernels.quantized import (
    GROUPS,
    FourBits,
    PackedWeight,
    dequantize,
    make_room,
    make_stack,
    quantize,
    store,
)
from qwen_ray.kernels.registry import REFERENCE, Kernels

LIBRARIES = [library for v in VARIANTS if v.needs <= processor_flags() and (library := open_library(v))]
NAMES = ["torch", *(library.name for library in LIBRARIES)]
KINDS = [0, *GROUPS]  # 0: 8 bits, otherwise 4 bits in groups of so many
sizes = st.tuples(st.integers(1, 40), st.integers(1, 400))


def matrix(out_size: int, size: int) -> torch.Tensor:
    return torch.randn(out_size, size, generator=torch.Generator().manual_seed(out_size * 1000 + size))


def scales_of(packed: PackedWeight) -> torch.Tensor:
    """Of each weight."""
    scales = packed.scales.movedim(-1, 1).flatten(0, 1)[: packed.out_size].float()
    return scales.repeat_interleave(packed.group, dim=1)[:, : packed.size] if packed.group else scales[:, None]


def step_of(x: torch.Tensor) -> torch.Tensor:
    """How far an activation of [T, in] moves at most: [T, 1]. A byte reaches 6 times the mean size of 64."""
    groups = torch.nn.functional.pad(x.abs(), (0, -x.shape[1] % 64)).unflatten(1, (-1, 64))
    counts = torch.full(groups.shape[1:2], 64)
    counts[-1:] -= -x.shape[1] % 64
    reach = torch.minimum(groups.amax(-1), groups.sum(-1) / counts * 6)
    return reach.amax(-1, keepdim=True) / 254


def pack(weight: torch.Tensor, kind: int) -> PackedWeight:
    return quantize(weight, 4, kind) if kind else quantize(weight, 8)


@given(shape=sizes)
@settings(max_examples=20, deadline=None)
def test_8_bits_move_a_weight_by_half_a_step(shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    packed = quantize(weight, 8)
    assert packed.row_bytes % 64 == 0
    assert ((dequantize(packed) - weight).abs() <= scales_of(packed) * 0.5001).all()
    assert torch.equal(scales_of(packed)[:, 0], weight.abs().amax(-1) / 127)


@pytest.mark.parametrize("group", GROUPS)
@given(shape=sizes)
@settings(max_examples=20, deadline=None)
def test_4_bits_move_a_weight_by_half_a_step(group: int, shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    packed = quantize(weight, 4, group)
    assert packed.row_bytes * 2 % 128 == 0
    scales = scales_of(packed)
    # The least weight and the scale of a group are rounded, too: by a 2,048th part.
    slack = weight.abs().amax(dim=1, keepdim=True) / 1024
    assert ((dequantize(packed) - weight).abs() <= scales / 2 + slack).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_be_said_exactly_is_kept(kind: int) -> None:
    whole = torch.randint(-7, 8, (5, 320), generator=torch.Generator().manual_seed(0)).float()
    whole[:, ::32], whole[:, 1::32] = 127 if kind == 0 else -8, 7
    assert torch.equal(dequantize(pack(whole, kind)), whole)
    zeros = torch.zeros(3, 70)
    assert torch.equal(dequantize(pack(zeros, kind)), zeros)


def test_bytes_are_few() -> None:
    weight = matrix(64, 1024)
    assert quantize(weight, 8).num_bytes == 64 * 1024 + 64 * 4
    assert quantize(weight, 4, 64).num_bytes == 64 * 512 + 64 * 16 * 4


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_do_not_show(kind: int, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(50, 130)
    part = FourBits(
        values=torch.randint(0, 16, (50, 130), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        scales=matrix(50, 5).half(),
        least=matrix(50, 5).neg().half(),
    )
    found: list[torch.Tensor] = []
    for at_once in (quantized.WEIGHTS_AT_ONCE, 1):
        monkeypatch.setattr(quantized, "WEIGHTS_AT_ONCE", at_once)
        rooms = [make_room(4, 60, 130, kind) if kind else make_room(8, 60, 130), make_room(4, 60, 130)]
        store(rooms[0], start, weight)
        quantized.store_as_they_are(rooms[1], start, part)
        found.append(torch.stack([dequantize(room)[start : start + 50] for room in rooms]))
    assert torch.equal(found[0], found[1])
    values = part.values.float() * part.scales.float().repeat_interleave(32, 1)[:, :130]
    assert torch.equal(found[1][1], values + part.least.float().repeat_interleave(32, 1)[:, :130])


def test_other_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="group is 48; it must be one of 32, 64, 128"):
        make_room(4, 2, 96, 48)


@pytest.mark.parametrize("library", [None, *LIBRARIES], ids=NAMES)
@pytest.mark.parametrize("kind", KINDS)
@given(
    shape=st.one_of(sizes, st.tuples(st.integers(1, 40), st.integers(1000, 2600))),
    num_rows=st.integers(0, 21),
    has_bias=st.booleans(),
)
@settings(max_examples=8, deadline=None)
def test_products(library: Library | None, kind: int, shape: tuple[int, int], num_rows: int, has_bias: bool) -> None:
    packed = pack(matrix(*shape), kind)
    x = matrix(num_rows, shape[1])
    bias = matrix(1, shape[0])[0] if has_bias else None
    kernel = Kernels.on_cpu(library, torch.float32).linear_packed
    got = kernel(x, packed, bias)
    # The errors of activations add up as those of a random walk do.
    bound = step_of(x) * dequantize(packed).norm(dim=1) * 3 + 1e-4 if num_rows else 0
    assert ((got - REFERENCE.linear_packed(x, packed, bias)).abs() <= bound).all()
    if library is not None:
        for i in range(num_rows):
            assert torch.equal(kernel(x[i : i + 1], packed, bias)[0], got[i])


@pytest.mark.parametrize("library", LIBRARIES, ids=NAMES[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_that_are_whole_are_multiplied_exactly(library: Library, kind: int) -> None:
    packed = pack(matrix(37, 320), kind)
    x = torch.randint(-126, 127, (6, 320), generator=torch.Generator().manual_seed(1)).float()
    x[:, ::64] = 127  # and the mean is above a sixth of it
    got = Kernels.on_cpu(library, torch.float32).linear_packed(x, packed, None)
    torch.testing.assert_close(got, x @ dequantize(packed).t(), atol=2e-3, rtol=1e-5)
    assert torch.equal(got, Kernels.on_cpu(LIBRARIES[0], torch.float32).linear_packed(x, packed, None))


@pytest.mark.parametrize("library", LIBRARIES, ids=NAMES[1:])
@pytest.mark.parametrize("kind", KINDS)
@given(
    num_rows=st.integers(1, 9),
    spikes=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 299), st.integers(6, 10_000)), max_size=12),
)
@settings(max_examples=12, deadline=None)
def test_activations_that_stand_out_leave_the_others_their_precision(
    library: Library, kind: int, num_rows: int, spikes: list[tuple[int, int, int]]
) -> None:
    packed = pack(matrix(35, 300), kind)
    x = matrix(num_rows, 300).clamp(-2, 2)
    for row, column, size in spikes:
        x[row % num_rows, column] = size
    got = Kernels.on_cpu(library, torch.float32).linear_packed(x, packed, None)
    bound = step_of(x) * dequantize(packed).norm(dim=1) * 3 + 1e-5 * x.abs().amax() * 300
    assert ((got - x @ dequantize(packed).t()).abs() <= bound).all()
    for i in range(num_rows):
        alone = Kernels.on_cpu(LIBRARIES[0], torch.float32).linear_packed(x[i : i + 1], packed, None)[0]
        assert torch.equal(alone, got[i])


@pytest.mark.parametrize("library", [None, *LIBRARIES], ids=NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_and_what_is_not_finite(library: Library | None, kind: int) -> None:
    packed = pack(matrix(9, 130), kind)
    x = matrix(4, 130).bfloat16()
    x[1, 100], x[2, 5] = float("nan"), float("inf")
    got = Kernels.on_cpu(library, torch.bfloat16).linear_packed(x, packed, None)
    assert got.dtype is torch.bfloat16
    assert not got[1:3].isfinite().any()
    expected = x[::3].float() @ dequantize(packed).t()
    torch.testing.assert_close(got[::3].float(), expected, atol=0.3, rtol=0.05)


@pytest.mark.parametrize("library", [None, *LIBRARIES], ids=NAMES)
@pytest.mark.parametrize("bits", [8, 4])
@given(num_tokens=st.integers(0, 9), inner=st.integers(1, 70), absent=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=6, deadline=None)
def test_experts(library: Library | None, bits: int, num_tokens: int, inner: int, absent: float) -> None:
    num_slots, hidden, top_k = 5, 48, 2
    gate_up, down = (make_stack(num_slots, bits, *shape) for shape in ((2 * inner, hidden), (hidden, inner)))
    for slot in range(num_slots):
        for stack in (gate_up, down):
            store(stack[slot], 0, matrix(stack[slot].out_size, stack[slot].size + slot)[:, slot:] * 0.2)
    random = torch.Generator().manual_seed(num_tokens)
    x, weights = matrix(num_tokens, hidden), torch.rand(num_tokens, top_k, generator=random)
    slots = torch.rand(num_tokens, num_slots, generator=random).topk(top_k).indices
    slots = torch.where(torch.rand(num_tokens, top_k, generator=random) < absent, -1, slots)
    run_experts = Kernels.on_cpu(library, torch.float32).run_experts
    got = run_experts(x, slots, weights, gate_up, down)
    wide = [torch.stack([dequantize(stack[slot]) for slot in range(num_slots)]) for stack in (gate_up, down)]
    torch.testing.assert_close(got, REFERENCE.run_experts(x, slots, weights, *wide), atol=0.1, rtol=0.05)
    for i in range(num_tokens):
        own = slice(i, i + 1)
        alone = run_experts(x[own], slots[own], weights[own], gate_up, down)[0]
        torch.testing.assert_close(alone, got[i], atol=1e-5 if library is None else 0, rtol=0)
