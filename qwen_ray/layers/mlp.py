"""The gated MLP of a dense layer, or of a shared expert; Shazeer 2020."""

from __future__ import annotations

import torch
from torch import nn

from qwen_ray.core.plan import Span
from qwen_ray.kernels.layer import MlpWeights
from qwen_ray.layers.checkpoint import Checkpoint
from qwen_ray.layers.linear import ColumnParallelLinear, RowParallelLinear
from qwen_ray.layers.site import Site


class Mlp(nn.Module):
    def __init__(self, site: Site, hidden_size: int, size: int, own: Span) -> None:
        """Of the inner `size`, this rank holds `own`."""
        super().__init__()
        parts = {"gate_proj": (size, own), "up_proj": (size, own)}
        self._silu_and_mul = site.kernels.silu_and_mul
        self._at_once = site.kernels.of_layers
        self.gate_up_proj = ColumnParallelLinear(site, hidden_size, parts, bias=False)
        self.down_proj = RowParallelLinear(site, size, own, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] to [T, hidden]."""
        return self.down_proj.all_reduce(self.partial(x)) if x.shape[0] else x

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """What this rank adds to the sum over all tensor ranks."""
        if self._at_once is not None and self._at_once.takes(x):
            return self._at_once.mlp(x, self.weights)
        return self.down_proj.partial(self._silu_and_mul(self.gate_up_proj(x)))

    @property
    def weights(self) -> MlpWeights:
        return MlpWeights(gate_up=self.gate_up_proj.held, down=self.down_proj.held)

    def load(self, checkpoint: Checkpoint, prefix: str) -> None:
        self.gate_up_proj.load(checkpoint, prefix)
        self.down_proj.load(checkpoint, f"{prefix}.down_proj")
