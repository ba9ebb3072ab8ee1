"""Where a layer is built: everything that its constructor needs beside its own sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from qwen_ray.core.model_config import Quantization
from qwen_ray.core.plan import Shard
from qwen_ray.kernels.registry import Kernels
from qwen_ray.parallel.groups import Groups

__all__ = ["Groups", "Site", "weight"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One rank's part of the model, its peers, its device and what runs there."""

    shard: Shard
    groups: Groups
    kernels: Kernels
    device: torch.device
    dtype: torch.dtype
    quantization: Quantization = "none"

    @classmethod
    def of(
        cls,
        shard: Shard,
        groups: Groups,
        device: torch.device,
        dtype: torch.dtype,
        quantization: Quantization = "none",
        *,
        deterministic: bool = False,
    ) -> Site:
        kernels = Kernels.of(device, dtype, deterministic=deterministic)
        return cls(shard=shard, groups=groups, kernels=kernels, device=device, dtype=dtype, quantization=quantization)


def weight(site: Site, *shape: int) -> nn.Parameter:
    """Room for weights, not yet filled."""
    return nn.Parameter(torch.empty(shape, dtype=site.dtype, device=site.device), requires_grad=False)
