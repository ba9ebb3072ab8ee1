"""Attention and MLP in one call each, against the single kernels: the same bits, whatever is in the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.kernels import quantized
from qwen_ray.kernels.cpu.library import VARIANTS, Library, open_library, processor_flags
from qwen_ray.kernels.quantized import PackedWeight
from qwen_ray.kernels.registry import Kernels, LayerKernels

LIBRARIES = [library for v in VARIANTS if v.needs <= processor_flags() and (library := open_library(v))]
cases = pytest.mark.parametrize(
    ("library", "dtype", "bits"),
    [
        pytest.param(library, dtype, bits, id=f"{library.name}-{dtype}-{bits}")
        for library in LIBRARIES
        for dtype in (torch.float32, torch.bfloat16)
        for bits in (None, 8, 4)
    ],
)
counts = st.lists(st.integers(1, 12), min_size=1, max_size=5)  # new tokens of each sequence


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def matrix(out_size: int, size: int, dtype: torch.dtype, bits: int | None) -> torch.Tensor | PackedWeight:
    weight = random(out_size, size, dtype=dtype) / size**0.5
    if bits is None:
        return weight
    packed = quantized.make_room(bits, out_size, size)
    quantized.store(packed, 0, weight)
    return packed


def multiply(
    kernels: Kernels, x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return (
        kernels.linear(x, weight, bias) if isinstance(weight, torch.Tensor) else kernels.linear_packed(x, weight, bias)
    )


def layer_kernels(kernels: Kernels) -> LayerKernels:
    assert kernels.of_layers is not None
    return kernels.of_layers


@cases
@given(num_rows=st.integers(1, 40), hidden=st.integers(1, 90), inner=st.integers(1, 1100))
@settings(max_examples=5, deadline=None)
def test_mlp(library: Library, dtype: torch.dtype, bits: int | None, num_rows: int, hidden: int, inner: int) -> None:
    kernels = Kernels.on_cpu(library, dtype)
    gate_up, down = matrix(2 * inner, hidden, dtype, bits), matrix(hidden, inner, dtype, bits)
    x = random(num_rows, hidden, dtype=dtype)
    assert layer_kernels(kernels).takes(x)
    expected = multiply(kernels, kernels.silu_and_mul(multiply(kernels, x, gate_up)), down)
    assert torch.equal(layer_kernels(kernels).mlp(x, gate_up, down), expected)


@cases
@given(
    counts=counts, context=st.integers(0, 700), heads=st.sampled_from([(6, 2), (7, 1), (1, 1)]), is_normed=st.booleans()
)
@settings(max_examples=5, deadline=None)
def test_attention(
    library: Library,
    dtype: torch.dtype,
    bits: int | None,
    counts: list[int],
    context: int,
    heads: tuple[int, int],
    is_normed: bool,
) -> None:
    kernels = Kernels.on_cpu(library, dtype)
    num_heads, num_kv_heads = heads
    dim, hidden, num_rows = 2 * (8 + num_heads), 72, sum(counts)
    lengths = tuple(context + count for count in counts)
    num_blocks = -(-max(lengths) // 16)
    tables = torch.randperm(num_blocks * len(counts)).view(len(counts), num_blocks)
    slots = torch.cat(
        [
            table[torch.arange(context, length) // 16] * 16 + torch.arange(context, length) % 16
            for table, length in zip(tables, lengths, strict=True)
        ]
    )
    cache = random(2, tables.numel(), 16, num_kv_heads, dim, dtype=dtype)
    qkv = matrix((num_heads + 2 * num_kv_heads) * dim, hidden, dtype, bits)
    o = matrix(hidden, num_heads * dim, dtype, bits)
    bias = random((num_heads + 2 * num_kv_heads) * dim, dtype=dtype) if is_normed else None
    norms = (random(dim, dtype=dtype), random(dim, dtype=dtype) + 1) if is_normed else None
    cos, sin = random(num_rows, dim // 2, dtype=dtype), random(num_rows, dim // 2, dtype=dtype) * 0.5
    x = random(num_rows, hidden, dtype=dtype)
    plan = kernels.plan_attention(tables, tuple(counts), lengths, 16)

    expected_cache = cache.clone()
    q, k, v = multiply(kernels, x, qkv, bias).view(num_rows, -1, dim).split((num_heads, num_kv_heads, num_kv_heads), 1)
    if norms is not None:
        q, k = kernels.rms_norm(q, norms[0], 1e-6), kernels.rms_norm(k, norms[1], 1e-6)
    q, k = kernels.rotate(q, k, cos, sin)
    kernels.store_kv(k, v, *expected_cache, slots)
    attended = kernels.paged_attention(q, *expected_cache, plan, dim**-0.5)
    expected = multiply(kernels, attended.flatten(1), o)

    got = layer_kernels(kernels).attention(
        x, qkv, bias, norms, 1e-6, (cos, sin), (cache[0], cache[1]), slots, plan, dim**-0.5, o
    )
    assert torch.equal(got, expected)
    assert torch.equal(cache, expected_cache)


def test_what_torch_does_faster_is_left_to_it() -> None:
    """With AMX, many rows of bfloat16: part by part, so that its products are torch's."""
    for variant in VARIANTS:
        if variant.needs <= processor_flags() and (library := open_library(variant, has_amx=True)):
            kernels = layer_kernels(Kernels.on_cpu(library, torch.bfloat16))
            assert kernels.takes(random(16, 8, dtype=torch.bfloat16))
            assert not kernels.takes(random(17, 8, dtype=torch.bfloat16))
            assert not kernels.takes(random(3, 8, dtype=torch.float32))
