"""What a dense layer is made of and where a step's tokens are, as kernels are told that compute a layer at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qwen_ray.kernels.quantized import PackedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    """This rank's part of an attention layer. Matrices are as they are, or packed."""

    qkv: torch.Tensor | PackedWeight  # [(heads + 2 KV heads) D, hidden]
    bias: torch.Tensor | None  # of these
    norms: tuple[torch.Tensor, torch.Tensor] | None  # of q and k, each [D]
    eps: float
    scale: float
    kv_cache: tuple[torch.Tensor, torch.Tensor]  # each [blocks, block size, KV heads, D]
    o: torch.Tensor | PackedWeight  # [hidden, heads * D]


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpWeights:
    """This rank's part of a gated MLP. Matrices are as they are, or packed."""

    gate_up: torch.Tensor | PackedWeight  # [2 I, hidden]
    down: torch.Tensor | PackedWeight  # [hidden, I]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """A dense layer, and the norms [hidden] of what its two parts are given; all have the same eps."""

    attention_norm: torch.Tensor
    attention: AttentionWeights
    mlp_norm: torch.Tensor
    mlp: MlpWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where a step's T tokens are: the same for all layers."""

    cos: torch.Tensor  # [T, D / 2], of the rotary angles
    sin: torch.Tensor
    slots: torch.Tensor  # [T], of keys and values
    plan: Any  # of Kernels.plan_attention
