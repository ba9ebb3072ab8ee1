"""Qwen1.5-MoE and Qwen2-MoE (Yang et al. 2024): Qwen2 with experts, and one expert that all tokens share.

Layers that the config names (`mlp_only_layers`, `decoder_sparse_step`) have a plain MLP.
"""

from __future__ import annotations

import torch

from qwen_ray.core.model_config import ModelConfig
from qwen_ray.layers.attention import Attention
from qwen_ray.layers.batch import Places
from qwen_ray.layers.mlp import Mlp
from qwen_ray.layers.moe import Moe
from qwen_ray.layers.norm import RMSNorm
from qwen_ray.layers.site import Site
from qwen_ray.models.stage import DecoderLayer


class Qwen2MoeLayer(DecoderLayer):
    def __init__(self, config: ModelConfig, site: Site, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(site, config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, site)
        self.post_attention_layernorm = RMSNorm(site, config.hidden_size, config.rms_norm_eps)
        if config.is_sparse(layer):
            self.mlp = Moe(config, site, layer)
        else:
            self.mlp = Mlp(site, config.hidden_size, config.intermediate_size, site.shard.intermediate)

    def forward(self, x: torch.Tensor, places: Places) -> torch.Tensor:
        """[T, hidden] to [R, hidden], see `Places`."""
        x = places.passed_on(x) + self.self_attn(self.input_layernorm(x), places)
        y = self.post_attention_layernorm(x)
        return x + (self.mlp(y, places.positions) if isinstance(self.mlp, Moe) else self.mlp(y))
