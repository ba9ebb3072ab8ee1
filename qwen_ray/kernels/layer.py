"""What a layer is made of and where a step's tokens are, as kernels are told that compute a layer at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qwen_ray.kernels.quantized import Matrices, PackedWeight


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
class ExpertWeights:
    """A layer's experts on this rank, each in a slot. A place is a slot of any rank; see `layers/expert_map.py`."""

    gate_up: Matrices  # [S, 2 I, hidden]
    down: Matrices  # [S, hidden, I]
    places: torch.Tensor  # [E, most copies] int64
    num_copies: torch.Tensor  # [E] int64: a token takes one by its position
    first_place: int  # of those that are here
    ids: torch.Tensor  # [S] int64, or longer
    tokens: torch.Tensor  # [E] int64, or longer: how many each has computed here, counted on


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeWeights:
    """This rank's part of a sparse MLP."""

    router: torch.Tensor  # [E, hidden]
    top_k: int
    renormalize: bool
    experts: ExpertWeights
    shared: tuple[MlpWeights, torch.Tensor] | None  # and what gates it, [1, hidden]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """A layer, and the norms [hidden] of what its two parts are given; all have the same eps."""

    attention_norm: torch.Tensor
    attention: AttentionWeights
    mlp_norm: torch.Tensor
    mlp: MlpWeights | MoeWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where a step's T tokens are: the same for all layers, but the last one, which passes on R of them.

    There attention, and what follows, is computed of those R rows alone; keys and values are stored of all.
    """

    cos: torch.Tensor  # [T, D / 2], of the rotary angles
    sin: torch.Tensor
    slots: torch.Tensor  # [T], of keys and values
    rows: torch.Tensor | None  # [R] int64: indices into T, rising; None: all
    positions: torch.Tensor  # [R] int64, in their sequences
    plan: Any  # of Kernels.plan_attention, for the R; None where there are none

    def passed_on(self, x: torch.Tensor) -> torch.Tensor:
        """[T, ...] to [R, ...]."""
        return x if self.rows is None else x[self.rows]
