"""Rotary position embedding: the angles of every position, computed once.

Su et al. 2021, with the scalings that RopeConfig knows. The figures are those of transformers 5: frequencies, angles
and their sines in float32, then the compute dtype.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from qwen_ray.core.model_config import RopeConfig
from qwen_ray.layers.site import Site


class Rotary(nn.Module):
    """Tables of cosines and sines [max_len, head_dim / 2]."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, site: Site, rope: RopeConfig, head_dim: int, max_len: int) -> None:
        super().__init__()
        angles = torch.arange(max_len).float()[:, None] * frequencies(rope, head_dim)
        scale = attention_factor(rope)
        self.register_buffer("cos", (angles.cos() * scale).to(site.device, site.dtype), persistent=False)
        self.register_buffer("sin", (angles.sin() * scale).to(site.device, site.dtype), persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T] to cosines and sines [T, head_dim / 2]."""
        return self.cos[positions], self.sin[positions]


def frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair of dimensions, [head_dim / 2] float32."""
    frequency = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, frequency)
    if rope.kind == "yarn":
        return _yarn(rope, head_dim)
    return frequency


def attention_factor(rope: RopeConfig) -> float:
    """What cosines and sines are multiplied by: YaRN's temperature, 1 for the others."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0


def _llama3(rope: RopeConfig, frequency: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, those between interpolated."""
    original = _original_length(rope)
    wavelength = 2 * math.pi / frequency
    long, short = original / rope.low_freq_factor, original / rope.high_freq_factor
    smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    slowed = torch.where(wavelength > long, frequency / rope.factor, frequency)
    between = (1 - smooth) * slowed / rope.factor + smooth * slowed
    return torch.where((wavelength >= short) & (wavelength <= long), between, slowed)


def _yarn(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Peng et al. 2023, section 3.2: dimensions that turn often are kept, those that turn rarely slowed by `factor`."""
    original = _original_length(rope)

    def dimension(num_rotations: float) -> float:
        return head_dim * math.log(original / (num_rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = float(min(math.ceil(dimension(rope.beta_slow)), head_dim - 1))
    if low == high:
        high += 0.001
    keep = 1 - ((torch.arange(head_dim // 2).float() - low) / (high - low)).clamp(0, 1)
    period = rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return 1.0 / (rope.factor * period) * (1 - keep) + 1.0 / period * keep


def _original_length(rope: RopeConfig) -> int:
    assert rope.original_max_position_embeddings is not None, f"{rope.kind} needs the original context length"
    return rope.original_max_position_embeddings
