"""Packed weights on an NVIDIA GPU are, and give, what they do on a CPU. Only run where there is one (see Makefile)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qwen_ray.kernels import quantized, reference
from qwen_ray.kernels.cuda import packed, packed_experts
from qwen_ray.kernels.quantized import GROUP, GROUPS, FourBits, PackedStack, PackedWeight

pytestmark = pytest.mark.gpu

GPU = "cuda"
KINDS = [0, *GROUPS]  # 0: 8 bits, otherwise 4 bits in groups of so many
SHAPES = [(1, 1), (40, 300), (1000, 896), (5, 9000), (5000, 130)]
kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(GPU)


def pack(weight: torch.Tensor, kind: int) -> PackedWeight:
    return quantized.quantize(weight, 4, kind) if kind else quantized.quantize(weight, 8)


def stack(count: int, out_size: int, size: int, kind: int) -> PackedStack:
    made = quantized.make_stack(count, 4 if kind else 8, out_size, size, kind or GROUP, device=torch.device(GPU))
    for number in range(count):
        quantized.store(made[number], 0, random(out_size, size + number)[:, number:] / size**0.5)
    return made


def without_waiting(work: Callable[..., Any], *given: Any) -> Any:
    """As a CUDA graph would want it."""
    work(*given)  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        return work(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@kinds
@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_is_rounded_as_on_a_cpu(kind: int, shape: tuple[int, int]) -> None:
    weight = random(*shape)
    found, expected = pack(weight, kind), pack(weight.cpu(), kind)
    step = expected.scales.amax().float().item()
    assert found.values.device == weight.device
    torch.testing.assert_close(quantized.dequantize(found).cpu(), quantized.dequantize(expected), atol=step, rtol=0)
    rows = torch.randint(0, shape[0], (9,))
    assert torch.equal(quantized.dequantize(found, rows.to(GPU)), quantized.dequantize(found)[rows.to(GPU)])


@pytest.mark.parametrize("start", [0, 3])
def test_four_bits_are_kept_as_they_are(start: int) -> None:
    values = torch.randint(0, 16, (37, 100), dtype=torch.uint8)
    part = FourBits(values=values, scales=torch.rand(37, 4).half(), least=-torch.rand(37, 4).half())
    there, here = (quantized.make_room(4, 40, 100, device=torch.device(device)) for device in (GPU, "cpu"))
    for room in (there, here):
        quantized.store_as_they_are(room, start, part)
    own = slice(start, start + 37)
    assert torch.equal(quantized.dequantize(there).cpu()[own], quantized.dequantize(here)[own])


@kinds
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_widened_weights_are_those_of_the_definition(kind: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = pack(random(*shape), kind)
    assert torch.equal(packed.widen(weight, slice(0, shape[0]), dtype), quantized.dequantize(weight).to(dtype))


@kinds
@dtypes
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_products(kind: int, dtype: torch.dtype, has_bias: bool, shape: tuple[int, int]) -> None:
    weight = pack(random(*shape), kind)
    bias = random(shape[0]).to(dtype) if has_bias else None
    for num_rows in (0, 1, 7, 16, 17, 33, 64, 65, 300):
        x = random(num_rows, shape[1] + 1).to(dtype)[:, 1:]
        expected = x.double() @ quantized.dequantize(weight).double().t() + (0 if bias is None else bias)
        found = packed.linear_packed(x, weight, bias)
        assert found.dtype is dtype
        # Of weights and of the result: an 8th bit, an 11th, a 24th, or TF32's 11th.
        relative = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-3}[dtype]
        torch.testing.assert_close(found.double(), expected, atol=relative * 4 * shape[1] ** 0.5, rtol=relative)


@kinds
@pytest.mark.parametrize("dtype", packed.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_does_not_depend_on_its_batch(kind: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight, bias = pack(random(*shape), kind), random(shape[0]).to(dtype)
    x = random(64, shape[1]).to(dtype)
    whole = without_waiting(packed.linear_packed, x, weight, bias)
    for own in (slice(0, 1), slice(63, 64), slice(7, 23), slice(20, 37), slice(5, 60)):
        assert torch.equal(packed.linear_packed(x[own], weight, bias), whole[own])


@pytest.mark.parametrize("kind", [0, 32])
@dtypes
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 64, 600])
@pytest.mark.parametrize(("hidden", "inner"), [(256, 128), (250, 125)])
def test_experts_equal_the_reference(kind: int, dtype: torch.dtype, num_tokens: int, hidden: int, inner: int) -> None:
    gate_up, down = stack(12, 2 * inner, hidden, kind), stack(12, hidden, inner, kind)
    x, weights = random(num_tokens, hidden).to(dtype), random(num_tokens, 4).softmax(-1)
    slots = random(num_tokens, 12).topk(4).indices
    slots = torch.where((slots % 3 == 0) | (slots == 5), -1, slots)  # on other ranks; and one without tokens
    found = packed_experts.run_experts(x, slots, weights, gate_up, down)
    wide = [torch.stack([quantized.dequantize(matrix) for matrix in each.matrices]) for each in (gate_up, down)]
    expected = reference.run_experts(x.float(), slots, weights, *wide).to(dtype)
    tolerance = 2e-3 if dtype is torch.float32 else 4e-2
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_a_decode_makes_the_host_wait_for_nothing() -> None:
    gate_up, down = stack(8, 256, 256, 32), stack(8, 256, 128, 32)
    x, slots = random(3, 256).bfloat16(), random(3, 8).topk(2).indices
    together = without_waiting(packed_experts.run_experts, x, slots, random(3, 2), gate_up, down)
    for i in range(3):
        own = slice(i, i + 1)
        alone = packed_experts.run_experts(x[own], slots[own], random(3, 2)[own], gate_up, down)
        assert torch.equal(alone, together[own])
