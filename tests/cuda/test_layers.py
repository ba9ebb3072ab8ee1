"""Layers on CUDA, and what stands between products there: Triton's kernels, interpreted where there is no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_parts import Tokens, forget, layer_kernels, moe_weights, one_by_one, random, some_layers

from qwen_ray.kernels import reference
from qwen_ray.kernels.registry import REFERENCE, Kernels

pytest.importorskip("triton")
import interpreted

from qwen_ray.kernels.cuda import pointwise

interpreted.improve()
DTYPES = [torch.float32, torch.float16]  # bfloat16 is not interpreted rightly
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    unit = torch.finfo(expected.dtype).eps * 4
    torch.testing.assert_close(found, expected, atol=8 * unit, rtol=unit)


@dtypes
@given(num_rows=st.integers(0, 5), size=st.integers(1, 300))
@settings(max_examples=10, deadline=None)
def test_what_is_added_is_normed_in_the_same_pass(dtype: torch.dtype, num_rows: int, size: int) -> None:
    x, added = random(num_rows, 2 * size, dtype=dtype)[:, :size], random(num_rows, size, dtype=dtype)
    weight = random(size, dtype=dtype)
    near(pointwise.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    total = x + added
    near(pointwise.add_norm(x, added, weight, 1e-5), reference.rms_norm(total, weight, 1e-5))
    assert torch.equal(x, total)


@dtypes
@pytest.mark.parametrize(("num_rows", "size"), [(0, 7), (3, 5), (2, 2100)])
def test_gates(dtype: torch.dtype, num_rows: int, size: int) -> None:
    gate_up = random(num_rows, 2 * size + 3, dtype=dtype)[:, : 2 * size]
    near(pointwise.silu_and_mul(gate_up), reference.silu_and_mul(gate_up))


@dtypes
@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(7, 1, 16), (6, 2, 20), (4, 4, 64)])
def test_heads_are_turned_and_stored(dtype: torch.dtype, has_norms: bool, heads: int, kv_heads: int, dim: int) -> None:
    num_tokens, slots = 5, torch.tensor([9, -1, 30, 2, 31])
    qkv = random(num_tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    cos, sin = random(num_tokens, dim // 2, dtype=dtype), random(num_tokens, dim // 2, dtype=dtype) / 2
    keys, values = (torch.full((4, 8, kv_heads, dim), 9.0, dtype=dtype) for _ in range(2))
    norms = (random(dim, dtype=dtype), random(dim, dtype=dtype) + 1) if has_norms else None
    found = pointwise.turn_and_store(qkv, norms, 1e-6, cos, sin, slots, (keys, values))
    q, k, v = qkv.view(num_tokens, -1, dim).split((heads, kv_heads, kv_heads), 1)
    if norms is not None:
        q, k = (reference.rms_norm(part, norm, 1e-6) for part, norm in zip((q, k), norms, strict=True))
    q, k = reference.rotate(q, k, cos, sin)
    near(found, q)
    expected = [torch.full_like(keys, 9.0) for _ in range(2)]
    own = slots >= 0
    reference.store_kv(k[own], v[own], expected[0], expected[1], slots[own])
    near(keys, expected[0])
    assert torch.equal(values, expected[1])


@pytest.mark.parametrize("bits", [None, 8, 4])
@given(
    counts=st.lists(st.sampled_from([1, 1, 3, 6]), min_size=1, max_size=4),
    context=st.integers(0, 40),
    heads=st.sampled_from([(6, 2), (7, 1)]),
    is_normed=st.booleans(),
    most=st.integers(0, 5),
)
@settings(max_examples=4, deadline=None)
def test_layers(
    bits: int | None, counts: list[int], context: int, heads: tuple[int, int], is_normed: bool, most: int
) -> None:
    """As the reference computes them, and so do their keys, values and counts of experts' tokens."""
    tokens = Tokens(counts, context, heads[1], 2 * (8 + heads[0]), torch.float32)
    layers = some_layers(tokens, heads[0], bits, sparse=most % 3, is_normed=is_normed, inner=30)
    x = random(tokens.num_rows, 72, dtype=torch.float32)
    reference_places = tokens.places(REFERENCE)
    expected, caches = one_by_one(REFERENCE, x, layers, reference_places)
    kernels = Kernels.on_cuda(torch.float32)
    at_once, places = layer_kernels(kernels), tokens.places(kernels)
    prepared = at_once.prepare_layers(layers)
    for last in (places, tokens.last_places(kernels, places, most)):
        for layer in layers:
            forget(layer.attention, places)
        found = at_once.layers(x.clone(), prepared, places, last)
        torch.testing.assert_close(found, last.passed_on(expected), atol=2e-3, rtol=2e-3)
        for layer, cache in zip(layers, caches, strict=True):
            for own, theirs in zip(layer.attention.kv_cache, cache, strict=True):
                torch.testing.assert_close(own, theirs, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, None), (torch.float16, 4)])
def test_a_token_alone_has_the_bits_that_it_has_in_a_prompt(dtype: torch.dtype, bits: int | None) -> None:
    """With kernels that say so: what is computed again after a failure goes on as it was."""
    tokens = Tokens([2, 1], 290, 1, 16, dtype)  # longer than what a decode adds up in one go
    layers = some_layers(tokens, 3, bits, is_normed=True, is_shared=True, inner=30)
    kernels = Kernels.on_cuda(dtype, deterministic=True)
    assert kernels.is_row_by_row
    at_once, places = layer_kernels(kernels), tokens.places(kernels)
    prepared = at_once.prepare_layers(layers)
    x = random(tokens.num_rows, 72, dtype=dtype)
    whole = at_once.layers(x.clone(), prepared, places, places)
    caches = [cache.clone() for layer in layers for cache in layer.attention.kv_cache]
    for layer in layers:
        forget(layer.attention, places)
    row = 0
    for table, count in zip(tokens.tables, tokens.counts, strict=True):
        for position in range(tokens.context, tokens.context + count):
            rows = slice(row, row + 1)
            own = replace(
                places,
                **{name: getattr(places, name)[rows] for name in ("cos", "sin", "slots", "positions")},
                plan=kernels.plan_attention(table[None], (1,), (position + 1,), 16),
            )
            assert torch.equal(at_once.layers(x[rows].clone(), prepared, own, own), whole[rows])
            row += 1
    again = [cache for layer in layers for cache in layer.attention.kv_cache]
    assert all(map(torch.equal, again, caches))


@pytest.mark.parametrize("is_shared", [True, False])
def test_what_is_nobodys_goes_to_no_expert(is_shared: bool) -> None:
    x, positions = random(6, 32, dtype=torch.float32), torch.tensor([0, 4, -1, 1, 2, -1])
    mine = positions >= 0
    found: list[torch.Tensor] = []
    counted: list[torch.Tensor] = []
    for rows in (torch.arange(6), mine.nonzero().flatten()):
        weights = moe_weights(32, 24, torch.float32, None, is_shared=is_shared)
        found.append(layer_kernels(Kernels.on_cuda(torch.float32)).moe(x[rows], weights, positions[rows]))
        counted.append(weights.experts.tokens[:-1])
    torch.testing.assert_close(found[0][mine], found[1])
    assert torch.equal(*counted)
    assert counted[0].sum() > 0
