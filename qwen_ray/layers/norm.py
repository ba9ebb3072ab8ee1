"""RMS norm. Every rank holds it whole."""

from __future__ import annotations

import torch
from torch import nn

from qwen_ray.layers.checkpoint import Checkpoint
from qwen_ray.layers.site import Site, weight


class RMSNorm(nn.Module):
    def __init__(self, site: Site, size: int, eps: float) -> None:
        super().__init__()
        self._rms_norm = site.kernels.rms_norm
        self._eps = eps
        self.weight = weight(site, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] to the same."""
        return self._rms_norm(x, self.weight, self._eps)

    def load(self, checkpoint: Checkpoint, prefix: str) -> None:
        self.weight.copy_(checkpoint.read(f"{prefix}.weight", tuple(self.weight.shape)))
