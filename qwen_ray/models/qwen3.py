"""Qwen3 dense (Yang et al. 2025): Qwen2 with norms on queries and keys, heads of their own size, and no biases.

The attention layer knows these from the config.
"""

from __future__ import annotations

import torch

from qwen_ray.core.model_config import ModelConfig
from qwen_ray.layers.attention import Attention
from qwen_ray.layers.batch import Places
from qwen_ray.layers.mlp import Mlp
from qwen_ray.layers.norm import RMSNorm
from qwen_ray.layers.site import Site
from qwen_ray.models.stage import DecoderLayer


class Qwen3Layer(DecoderLayer):
    def __init__(self, config: ModelConfig, site: Site, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(site, config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, site)
        self.post_attention_layernorm = RMSNorm(site, config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(site, config.hidden_size, config.intermediate_size, site.shard.intermediate)

    def forward(self, x: torch.Tensor, places: Places) -> torch.Tensor:
        """[T, hidden] to [R, hidden], see `Places`."""
        x = places.passed_on(x) + self.self_attn(self.input_layernorm(x), places)
        return x + self.mlp(self.post_attention_layernorm(x))
