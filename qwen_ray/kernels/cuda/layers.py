"""Layers on CUDA: products by torch or from packed weights, and one kernel for all that stands between two of them.

Nothing here waits for the device, or asks it anything: a step of decodes can be captured as a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qwen_ray.kernels import reference
from qwen_ray.kernels.cuda import attention, pointwise
from qwen_ray.kernels.layer import AttentionWeights, LayerWeights, MlpWeights, MoeWeights, Places
from qwen_ray.kernels.quantized import Matrices, PackedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """See `Kernels`."""

    linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    linear_packed: Callable[[torch.Tensor, PackedWeight, torch.Tensor | None], torch.Tensor]
    run_experts: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Matrices, Matrices], torch.Tensor]

    def multiply(
        self, x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if isinstance(weight, torch.Tensor):
            return self.linear(x, weight, bias)
        return self.linear_packed(x, weight, bias)


class CudaLayers:
    """`LayerKernels` for layers that compute in one dtype."""

    def __init__(self, dtype: torch.dtype, products: Products) -> None:
        self._dtype = dtype
        self._run_experts = products.run_experts
        self._multiply = products.multiply

    def takes(self, x: torch.Tensor) -> bool:
        return x.dtype is self._dtype

    def mlp(self, x: torch.Tensor, weights: MlpWeights) -> torch.Tensor:
        return self._multiply(pointwise.silu_and_mul(self._multiply(x, weights.gate_up)), weights.down)

    def moe(self, x: torch.Tensor, weights: MoeWeights, positions: torch.Tensor) -> torch.Tensor:
        """As `LayerKernels.moe`. A token at a negative position is nobody's: no expert computes or counts it."""
        own = weights.experts
        shares, ids = reference.route(self._multiply(x, weights.router), weights.top_k, weights.renormalize)
        copies = positions[:, None] % own.num_copies[ids]
        slots = own.places[ids, copies] - own.first_place
        is_here = (slots >= 0) & (slots < len(own.down)) & (positions >= 0)[:, None]
        slots = torch.where(is_here, slots, -1)
        counted = own.ids[slots].flatten()
        own.tokens.scatter_add_(0, counted, torch.ones_like(counted))
        out = self._run_experts(x, slots, shares, own.gate_up, own.down)
        if weights.shared is not None:
            shared, gate = weights.shared
            out += self._multiply(x, gate).sigmoid() * self.mlp(x, shared)
        return out

    def attention(self, x: torch.Tensor, weights: AttentionWeights, places: Places) -> torch.Tensor:
        qkv = self._multiply(x, weights.qkv, weights.bias)
        q = pointwise.turn_and_store(
            qkv, weights.norms, weights.eps, places.cos, places.sin, places.slots, weights.kv_cache
        )
        if places.plan is None:
            return x[:0]
        attended = attention.paged_attention(places.passed_on(q), *weights.kv_cache, places.plan, weights.scale)
        return self._multiply(attended.flatten(1), weights.o)

    def prepare_layers(self, layers: Sequence[LayerWeights]) -> tuple[LayerWeights, ...]:
        return tuple(layers)

    def layers(self, x: torch.Tensor, prepared: tuple[LayerWeights, ...], places: Places, last: Places) -> torch.Tensor:
        eps = prepared[0].attention.eps
        added = None
        for layer in prepared:
            own = last if layer is prepared[-1] else places
            added = self.attention(pointwise.add_norm(x, added, layer.attention_norm, eps), layer.attention, own)
            x = own.passed_on(x)
            normed = pointwise.add_norm(x, added, layer.mlp_norm, eps)
            if isinstance(layer.mlp, MlpWeights):
                added = self.mlp(normed, layer.mlp)
            else:
                added = self.moe(normed, layer.mlp, own.positions)
        return x if added is None else x.add_(added)
