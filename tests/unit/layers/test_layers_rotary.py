"""Rotary embeddings and norms against transformers, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from qwen_ray.core.model_config import ModelConfig
from qwen_ray.core.plan import ParallelPlan
from qwen_ray.kernels import reference
from qwen_ray.layers.rotary import Rotary
from qwen_ray.layers.site import Site
from qwen_ray.parallel.groups import Groups

LENGTH = 300
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn-own-factors": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64,
        "attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0,
    },
    "yarn-long-theta": {"rope_type": "yarn", "rope_theta": 1e7, "factor": 0.5, "original_max_position_embeddings": 6},
}  # fmt: skip


def configs(rope: dict[str, Any]) -> tuple[LlamaConfig, ModelConfig, Site]:
    theirs = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, rope_parameters=rope,
    )  # fmt: skip
    ours = ModelConfig.from_dict(theirs.to_dict())
    shard = ParallelPlan.of(ours).shard(ours, 0)
    device = torch.device("cpu")
    return theirs, ours, Site.of(shard, Groups(shard, device), device, torch.float32)


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_equals_transformers(rope: dict[str, Any], dtype: torch.dtype) -> None:
    theirs, ours, site = configs(rope)
    site = Site.of(site.shard, site.groups, site.device, dtype)
    positions = torch.arange(LENGTH)
    q, k = torch.randn(LENGTH, 2, ours.head_dim).to(dtype), torch.randn(LENGTH, 1, ours.head_dim).to(dtype)
    got = reference.rotate(q, k, *Rotary(site, ours.rope, ours.head_dim, LENGTH)(positions))
    cos, sin = LlamaRotaryEmbedding(theirs)(q, positions[None])
    want = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other[0].transpose(0, 1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_transformers(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = (torch.randn(9, 64) * 30).to(dtype)
    assert torch.equal(reference.rms_norm(x, norm.weight, 1e-5), norm(x))
