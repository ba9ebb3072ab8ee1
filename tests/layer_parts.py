"""Layers of random weights, steps of random tokens, and what the single kernels make of them. Not a test itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch

from qwen_ray.kernels import quantized
from qwen_ray.kernels.layer import AttentionWeights, ExpertWeights, LayerWeights, MlpWeights, MoeWeights, Places
from qwen_ray.kernels.quantized import Matrices, PackedWeight
from qwen_ray.kernels.registry import Kernels, LayerKernels


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
        ids=torch.tensor([*range(SLOTS), NUM_EXPERTS]),
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


def one_by_one(
    kernels: Kernels, x: torch.Tensor, layers: list[LayerWeights], places: Places
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """What the single kernels make of x, and the caches as they are then."""
    expected = x
    caches = [(layer.attention.kv_cache[0].clone(), layer.attention.kv_cache[1].clone()) for layer in layers]
    for layer, cache in zip(layers, caches, strict=True):
        normed = kernels.rms_norm(expected, layer.attention_norm, 1e-6)
        expected = expected + attend(kernels, normed, replace(layer.attention, kv_cache=cache), places)
        normed = kernels.rms_norm(expected, layer.mlp_norm, 1e-6)
        if isinstance(layer.mlp, MoeWeights):
            expected = expected + routed(kernels, normed, layer.mlp, places.positions)
        else:
            expected = expected + gated(kernels, normed, layer.mlp)
    return expected, caches
