"""Attention, MLP and whole layers in one call each, against the single kernels: the same bits for whatever batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_parts import (
    Tokens,
    attend,
    attention_weights,
    forget,
    gated,
    layer_kernels,
    matrix,
    moe_weights,
    one_by_one,
    random,
    routed,
    some_layers,
)

from qwen_ray.kernels.cpu.library import VARIANTS, Library, open_library, processor_flags
from qwen_ray.kernels.layer import MlpWeights
from qwen_ray.kernels.registry import Kernels

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


@cases
@given(
    num_rows=st.one_of(st.integers(1, 40), st.integers(505, 540)),  # one part of a prompt, two
    hidden=st.integers(1, 90),
    inner=st.integers(1, 1100),
)
@settings(max_examples=5, deadline=None)
def test_mlp(library: Library, dtype: torch.dtype, bits: int | None, num_rows: int, hidden: int, inner: int) -> None:
    kernels = Kernels.on_cpu(library, dtype)
    gate_up, down = matrix(2 * inner, hidden, dtype, bits), matrix(hidden, inner, dtype, bits)
    x, weights = random(num_rows, hidden, dtype=dtype), MlpWeights(gate_up=gate_up, down=down)
    assert layer_kernels(kernels).takes(x)
    assert torch.equal(layer_kernels(kernels).mlp(x, weights), gated(kernels, x, weights))


@cases
@given(
    num_rows=st.one_of(st.integers(1, 40), st.integers(300, 540)),  # many for some experts
    hidden=st.integers(1, 90),
    inner=st.integers(1, 70),
    top_k=st.integers(1, 5),
)
@settings(max_examples=5, deadline=None)
def test_moe(
    library: Library, dtype: torch.dtype, bits: int | None, num_rows: int, hidden: int, inner: int, top_k: int
) -> None:
    kernels = Kernels.on_cpu(library, dtype)
    weights = moe_weights(hidden, inner, dtype, bits, top_k=top_k)
    x, positions = random(num_rows, hidden, dtype=dtype), torch.arange(num_rows)
    expected = routed(kernels, x, weights, positions)
    num_tokens = weights.experts.tokens.clone()
    assert torch.equal(layer_kernels(kernels).moe(x, weights, positions), expected)
    assert torch.equal(weights.experts.tokens, 2 * num_tokens)
    assert num_tokens.sum() <= num_rows * top_k
    weights = moe_weights(hidden, inner, dtype, bits, top_k=top_k, is_shared=True)
    assert weights.shared is not None
    mlp, gate = weights.shared
    expected += kernels.linear(x, gate, None).sigmoid() * gated(kernels, x, mlp)
    unit = 2**-7 if dtype is torch.bfloat16 else 1e-6  # torch's sigmoid is another
    torch.testing.assert_close(layer_kernels(kernels).moe(x, weights, positions), expected, atol=4 * unit, rtol=unit)


batches = given(
    counts=counts,
    context=st.integers(0, 700),
    heads=st.sampled_from([(6, 2), (7, 1), (1, 1)]),
    is_normed=st.booleans(),
    most=st.integers(0, 9),
)


@cases
@batches
@settings(max_examples=5, deadline=None)
def test_attention(
    library: Library,
    dtype: torch.dtype,
    bits: int | None,
    counts: list[int],
    context: int,
    heads: tuple[int, int],
    is_normed: bool,
    most: int,
) -> None:
    kernels = Kernels.on_cpu(library, dtype)
    tokens = Tokens(counts, context, heads[1], 2 * (8 + heads[0]), dtype)
    weights = attention_weights(tokens.cache(), heads[0], 72, bits, is_normed=is_normed)
    places = tokens.places(kernels)
    x = random(tokens.num_rows, 72, dtype=dtype)
    other = replace(weights, kv_cache=(weights.kv_cache[0].clone(), weights.kv_cache[1].clone()))
    expected = attend(kernels, x, other, places)
    assert torch.equal(layer_kernels(kernels).attention(x, weights, places), expected)
    assert all(map(torch.equal, weights.kv_cache, other.kv_cache))
    forget(weights, places)
    last = tokens.last_places(kernels, places, most)
    assert torch.equal(layer_kernels(kernels).attention(x, weights, last), last.passed_on(expected))
    assert all(map(torch.equal, weights.kv_cache, other.kv_cache))


@cases
@batches
@settings(max_examples=5, deadline=None)
def test_layers(
    library: Library,
    dtype: torch.dtype,
    bits: int | None,
    counts: list[int],
    context: int,
    heads: tuple[int, int],
    is_normed: bool,
    most: int,
) -> None:
    kernels = Kernels.on_cpu(library, dtype)
    tokens = Tokens(counts, context, heads[1], 2 * (8 + heads[0]), dtype)
    layers = some_layers(tokens, heads[0], bits, sparse=most % 3, is_normed=is_normed)
    places = tokens.places(kernels)
    x = random(tokens.num_rows, 72, dtype=dtype)
    expected, caches = one_by_one(kernels, x, layers, places)
    at_once = layer_kernels(kernels)
    prepared = at_once.prepare_layers(layers)
    for last in (places, tokens.last_places(kernels, places, most)):
        for layer in layers:
            forget(layer.attention, places)
        assert torch.equal(at_once.layers(x.clone(), prepared, places, last), last.passed_on(expected))
        for layer, cache in zip(layers, caches, strict=True):
            assert all(map(torch.equal, layer.attention.kv_cache, cache))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_every_instruction_set_gives_the_same_bits(dtype: torch.dtype, bits: int | None) -> None:
    """Of a long prompt and of single tokens: a request may go on on another machine."""
    found: list[torch.Tensor] = []
    tokens = Tokens([530, 1, 3], 20, 2, 32, dtype)
    for library in LIBRARIES:
        kernels = Kernels.on_cpu(library, dtype)
        at_once = layer_kernels(kernels)
        x = random(tokens.num_rows, 72, dtype=dtype)
        layers = at_once.prepare_layers(some_layers(tokens, 4, bits, is_shared=True, inner=150))
        places = tokens.places(kernels)
        found.append(at_once.layers(x, layers, places, places))
    assert all(torch.equal(x, found[0]) for x in found)


def test_what_torch_does_faster_is_left_to_it() -> None:
    """With AMX, many rows of bfloat16: part by part, so that its products are torch's."""
    for variant in VARIANTS:
        if variant.needs <= processor_flags() and (library := open_library(variant, has_amx=True)):
            kernels = layer_kernels(Kernels.on_cpu(library, torch.bfloat16))
            assert kernels.takes(random(16, 8, dtype=torch.bfloat16))
            assert not kernels.takes(random(17, 8, dtype=torch.bfloat16))
            assert not kernels.takes(random(3, 8, dtype=torch.float32))
            assert not Kernels.on_cpu(library, torch.bfloat16).is_row_by_row
            each = Kernels.on_cpu(library, torch.bfloat16, deterministic=True)  # a row's bits are its own
            assert each.is_row_by_row
            assert layer_kernels(each).takes(random(17, 8, dtype=torch.bfloat16))
