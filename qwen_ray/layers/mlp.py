"""The gated MLP of a dense layer, or of a shared expert; Shazeer 2020."""

from __future__ import annotations

import torch
from torch import nn

from qwen_ray.core.plan import Span
from qwen_ray.layers.checkpoint import Checkpoint
from qwen_ray.layers.linear import ColumnParallelLinear, RowParallelLinear
from qwen_ray.layers.site import Site


class Mlp(nn.Module):
    def __init__(self, site: Site, hidden_size: int, size: int, own: Span) -> None:
        """Of the inner `size`, this rank holds `own`."""
        super().__init__()
        parts = {"gate_proj": (size, own), "up_proj": (size, own)}
        self._silu_and_mul = site.kernels.silu_and_mul
        self.gate_up_proj = ColumnParallelLinear(site, hidden_size, parts, bias=False)
        self.down_proj = RowParallelLinear(site, size, own, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] to [T, hidden]."""
        return self.down_proj(self._inner(x)) if x.shape[0] else x

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """What this rank adds to the sum over all tensor ranks."""
        return self.down_proj.partial(self._inner(x))

    def _inner(self, x: torch.Tensor) -> torch.Tensor:
        return self._silu_and_mul(self.gate_up_proj(x))

    def load(self, checkpoint: Checkpoint, prefix: str) -> None:
        self.gate_up_proj.load(checkpoint, prefix)
        self.down_proj.load(checkpoint, f"{prefix}.down_proj")
