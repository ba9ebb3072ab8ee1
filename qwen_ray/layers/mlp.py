"""The gated MLP of a dense layer; Shazeer 2020."""

from __future__ import annotations

import torch
from torch import nn

from qwen_ray.core.model_config import ModelConfig
from qwen_ray.layers.checkpoint import Checkpoint
from qwen_ray.layers.linear import ColumnParallelLinear, RowParallelLinear
from qwen_ray.layers.site import Site


class Mlp(nn.Module):
    def __init__(self, config: ModelConfig, site: Site) -> None:
        super().__init__()
        size, own = config.intermediate_size, site.shard.intermediate
        parts = {"gate_proj": (size, own), "up_proj": (size, own)}
        self._silu_and_mul = site.kernels.silu_and_mul
        self.gate_up_proj = ColumnParallelLinear(site, config.hidden_size, parts, bias=False)
        self.down_proj = RowParallelLinear(site, size, own, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] to [T, hidden]."""
        return self.down_proj(self._silu_and_mul(self.gate_up_proj(x)))

    def load(self, checkpoint: Checkpoint, prefix: str) -> None:
        self.gate_up_proj.load(checkpoint, prefix)
        self.down_proj.load(checkpoint, f"{prefix}.down_proj")
