"""Attention, MLP and whole layers in one call each, against the single kernels: the same bits for whatever batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.kernels import quantized
from qwen_ray.kernels.cpu.library import VARIANTS, Library, open_library, processor_flags
from qwen_ray.kernels.layer import AttentionWeights, ExpertWeights, LayerWeights, MlpWeights, MoeWeights, Places
from qwen_ray.kernels.quantized import Matrices, PackedWeight
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


def gated(kernels: Kernels, x: torch.Tensor, weights: MlpWeights) -> torch.Tensor:
    return multiply(kernels, kernels.silu_and_mul(multiply(kernels, x, weights.gate_up)), weights.down)


NUM_EXPERTS, SLOTS = 11, 9  # on the second of two ranks; some experts have a copy on both, some two here


def experts(hidden: int, inner: int, dtype: torch.dtype, bits: int | None) -> ExpertWeights:
    places = torch.tensor([[SLOTS + i % SLOTS, i if i % 2 else SLOTS + (i + 4) % SLOTS] for i in range(NUM_EXPERTS)])
    return ExpertWeights(
        gate_up=stack(2 * inner, hidden, dtype, bits),
        down=stack(hidden, inner, dtype, bits),
        places=places,
        num_copies=torch.tensor([1 + i % 3 // 2 for i in range(NUM_EXPERTS)]),
        first_place=SLOTS,
        ids=torch.arange(SLOTS + 1),
        tokens=torch.zeros(NUM_EXPERTS + 1, dtype=torch.int64),
    )


def stack(out_size: int, size: int, dtype: torch.dtype, bits: int | None) -> Matrices:
    given = random(SLOTS, out_size, size, dtype=dtype) / size**0.5
    if bits is None:
        return given
    packed = quantized.make_stack(SLOTS, bits, out_size, size)
    for slot, weight in enumerate(given):
        quantized.store(packed[slot], 0, weight)
    return packed


def moe_weights(
    hidden: int, inner: int, dtype: torch.dtype, bits: int | None, *, top_k: int = 3, is_shared: bool = False
) -> MoeWeights:
    mlp = MlpWeights(gate_up=matrix(2 * inner, hidden, dtype, bits), down=matrix(hidden, inner, dtype, bits))
    return MoeWeights(
        router=random(NUM_EXPERTS, hidden, dtype=dtype),
        top_k=top_k,
        renormalize=top_k > 1,
        experts=experts(hidden, inner, dtype, bits),
        shared=(mlp, random(1, hidden, dtype=dtype) / hidden) if is_shared else None,
    )


def routed(kernels: Kernels, x: torch.Tensor, weights: MoeWeights, positions: torch.Tensor) -> torch.Tensor:
    """Counts as well."""
    own = weights.experts
    shares, ids = kernels.route(kernels.linear(x, weights.router, None), weights.top_k, weights.renormalize)
    slots = own.places[ids, positions[:, None] % own.num_copies[ids]] - own.first_place
    slots = torch.where((slots >= 0) & (slots < SLOTS), slots, -1)
    for slot in slots[slots >= 0].tolist():
        own.tokens[own.ids[slot]] += 1
    return kernels.run_experts(x, slots, shares, own.gate_up, own.down)


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


@dataclass(frozen=True)
class Tokens:
    """`counts` new ones of each sequence behind `context` cached ones, and a cache for all of them."""

    counts: list[int]
    context: int
    kv_heads: int
    dim: int
    dtype: torch.dtype

    @property
    def num_rows(self) -> int:
        return sum(self.counts)

    def cache(self, seed: int = 0) -> torch.Tensor:
        return random(2, self.tables.numel() + seed, 16, self.kv_heads, self.dim, dtype=self.dtype)

    @cached_property
    def tables(self) -> torch.Tensor:
        num_blocks = -(-max(self.lengths) // 16)
        return torch.randperm(num_blocks * len(self.counts)).view(len(self.counts), num_blocks)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.context + count for count in self.counts)

    def places(self, kernels: Kernels) -> Places:
        at = [torch.arange(self.context, length) for length in self.lengths]
        slots = [table[own // 16] * 16 + own % 16 for table, own in zip(self.tables, at, strict=True)]
        cos, sin = (random(self.num_rows, self.dim // 2, dtype=self.dtype) * scale for scale in (1.0, 0.5))
        plan = kernels.plan_attention(self.tables, tuple(self.counts), self.lengths, 16)
        return Places(cos=cos, sin=sin, slots=torch.cat(slots), rows=None, positions=torch.cat(at), plan=plan)

    def last_places(self, kernels: Kernels, places: Places, most: int) -> Places:
        """Of the last `most` tokens of each sequence; every third sequence has none."""
        lens = [0 if s % 3 == 2 else min(most, count) for s, count in enumerate(self.counts)]
        asking = [s for s, length in enumerate(lens) if length]
        ends = accumulate(self.counts)
        rows = torch.tensor([row for end, n in zip(ends, lens, strict=True) for row in range(end - n, end)]).long()
        chosen = [[values[s] for s in asking] for values in (lens, self.lengths)]
        plan = kernels.plan_attention(self.tables[asking], tuple(chosen[0]), tuple(chosen[1]), 16) if asking else None
        return replace(places, rows=rows, positions=places.positions[rows], plan=plan)


def attention_weights(
    cache: torch.Tensor, heads: int, hidden: int, bits: int | None, *, is_normed: bool
) -> AttentionWeights:
    kv_heads, dim = cache.shape[3:]
    size, dtype = (heads + 2 * kv_heads) * dim, cache.dtype
    return AttentionWeights(
        qkv=matrix(size, hidden, dtype, bits),
        bias=random(size, dtype=dtype) if is_normed else None,
        norms=(random(dim, dtype=dtype), random(dim, dtype=dtype) + 1) if is_normed else None,
        eps=1e-6,
        scale=dim**-0.5,
        kv_cache=(cache[0], cache[1]),
        o=matrix(hidden, heads * dim, dtype, bits),
    )


def attend(kernels: Kernels, x: torch.Tensor, weights: AttentionWeights, places: Places) -> torch.Tensor:
    keys, values = weights.kv_cache
    kv_heads, dim = keys.shape[2:]
    qkv = multiply(kernels, x, weights.qkv, weights.bias).view(len(x), -1, dim)
    q, k, v = qkv.split((qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads), 1)
    if weights.norms is not None:
        q, k = (kernels.rms_norm(part, norm, weights.eps) for part, norm in zip((q, k), weights.norms, strict=True))
    q, k = kernels.rotate(q, k, places.cos, places.sin)
    kernels.store_kv(k, v, keys, values, places.slots)
    attended = kernels.paged_attention(q, keys, values, places.plan, weights.scale)
    return multiply(kernels, attended.flatten(1), weights.o)


def forget(weights: AttentionWeights, places: Places) -> None:
    """What is cached of a step's tokens."""
    for cached in weights.kv_cache:
        cached.flatten(0, 1)[places.slots] = 0


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


def some_layers(
    tokens: Tokens,
    heads: int,
    bits: int | None,
    *,
    sparse: int = 1,
    is_normed: bool = False,
    is_shared: bool = False,
    inner: int = 1100,
) -> list[LayerWeights]:
    """Three, of 72 wide; one of them sparse."""
    dtype = tokens.dtype
    return [
        LayerWeights(
            attention_norm=random(72, dtype=dtype) + i,
            attention=attention_weights(tokens.cache(i), heads, 72, bits, is_normed=is_normed),
            mlp_norm=random(72, dtype=dtype) - i,
            mlp=moe_weights(72, inner, dtype, bits, is_shared=is_shared)
            if i == sparse
            else MlpWeights(gate_up=matrix(2 * inner, 72, dtype, bits), down=matrix(72, inner, dtype, bits)),
        )
        for i in range(3)
    ]


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
    x = expected = random(tokens.num_rows, 72, dtype=dtype)
    caches = [(layer.attention.kv_cache[0].clone(), layer.attention.kv_cache[1].clone()) for layer in layers]
    for layer, cache in zip(layers, caches, strict=True):
        normed = kernels.rms_norm(expected, layer.attention_norm, 1e-6)
        expected = expected + attend(kernels, normed, replace(layer.attention, kv_cache=cache), places)
        normed = kernels.rms_norm(expected, layer.mlp_norm, 1e-6)
        if isinstance(layer.mlp, MoeWeights):
            expected = expected + routed(kernels, normed, layer.mlp, places.positions)
        else:
            expected = expected + gated(kernels, normed, layer.mlp)
    at_once = layer_kernels(kernels)
    prepared = at_once.prepare_layers(layers)
    for last in (places, tokens.last_places(kernels, places, most)):
        found = x.clone()
        for layer in layers:
            forget(layer.attention, places)
        at_once.layers(found, prepared, places, last)
        assert torch.equal(last.passed_on(found), last.passed_on(expected))
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
        at_once.layers(x, layers, places, places)
        found.append(x)
    assert all(torch.equal(x, found[0]) for x in found)


def test_what_torch_does_faster_is_left_to_it() -> None:
    """With AMX, many rows of bfloat16: part by part, so that its products are torch's."""
    for variant in VARIANTS:
        if variant.needs <= processor_flags() and (library := open_library(variant, has_amx=True)):
            kernels = layer_kernels(Kernels.on_cpu(library, torch.bfloat16))
            assert kernels.takes(random(16, 8, dtype=torch.bfloat16))
            assert not kernels.takes(random(17, 8, dtype=torch.bfloat16))
            assert not kernels.takes(random(3, 8, dtype=torch.float32))
