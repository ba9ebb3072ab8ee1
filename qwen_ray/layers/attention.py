"""Grouped-query attention over a paged KV cache.

Knows its own heads and where its cache lies. The cache itself is made and owned by the worker, which sets `kv_cache`
once, before the first forward pass.
"""

from __future__ import annotations

import torch
from torch import nn

from qwen_ray.core.model_config import ModelConfig
from qwen_ray.kernels.layer import AttentionWeights, Places
from qwen_ray.layers.checkpoint import Checkpoint
from qwen_ray.layers.linear import ColumnParallelLinear, RowParallelLinear
from qwen_ray.layers.norm import RMSNorm
from qwen_ray.layers.site import Site


class Attention(nn.Module):
    """`kv_cache` is (keys, values), each [blocks, block size, num_kv_heads, head_dim] in the compute dtype."""

    kv_cache: tuple[torch.Tensor, torch.Tensor]

    def __init__(self, config: ModelConfig, site: Site) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.num_heads = len(site.shard.heads)
        self.num_kv_heads = len(site.shard.kv_heads)
        self._kernels = site.kernels
        self._scale = config.head_dim**-0.5
        self._eps = config.rms_norm_eps
        queries, keys = site.shard.heads.scaled(self.head_dim), site.shard.kv_heads.scaled(self.head_dim)
        parts = {
            "q_proj": (config.q_size, queries),
            "k_proj": (config.kv_size, keys),
            "v_proj": (config.kv_size, keys),
        }
        self.qkv_proj = ColumnParallelLinear(site, config.hidden_size, parts, bias=config.qkv_bias)
        self.o_proj = RowParallelLinear(site, config.q_size, queries, config.hidden_size)
        self.q_norm = RMSNorm(site, self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(site, self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: torch.Tensor, places: Places) -> torch.Tensor:
        """[T, hidden] to [R, hidden], see `Places`; writes T keys and values into the cache."""
        if x.shape[0] == 0:
            return x
        at_once = self._kernels.of_layers
        if at_once is not None and at_once.takes(x):
            out = at_once.attention(x, self.weights, places)
        else:
            attended = self._attend(x, places)
            out = x[:0] if attended is None else self.o_proj.partial(attended)
        return self.o_proj.all_reduce(out) if out.shape[0] else out

    @property
    def weights(self) -> AttentionWeights:
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = self.q_norm.weight, self.k_norm.weight
        return AttentionWeights(
            qkv=self.qkv_proj.held,
            bias=self.qkv_proj.bias,
            norms=norms,
            eps=self._eps,
            scale=self._scale,
            kv_cache=self.kv_cache,
            o=self.o_proj.held,
        )

    def _attend(self, x: torch.Tensor, places: Places) -> torch.Tensor | None:
        """[T, hidden] to [R, this rank's heads * head_dim], None where that is none."""
        qkv = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)  # each [T, heads, D]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self._kernels.rotate(q, k, places.cos, places.sin)
        k_cache, v_cache = self.kv_cache
        self._kernels.store_kv(k, v, k_cache, v_cache, places.slots)
        if places.plan is None:
            return None
        return self._kernels.paged_attention(places.passed_on(q), k_cache, v_cache, places.plan, self._scale).flatten(1)

    def load(self, checkpoint: Checkpoint, prefix: str) -> None:
        self.qkv_proj.load(checkpoint, prefix)
        self.o_proj.load(checkpoint, f"{prefix}.o_proj")
        if self.q_norm is not None and self.k_norm is not None:
            self.q_norm.load(checkpoint, f"{prefix}.q_norm")
            self.k_norm.load(checkpoint, f"{prefix}.k_norm")
