"""config.json of the Qwen3 and MoE models as published, and what follows from them."""

from __future__ import annotations

from typing import Any

import pytest

from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.model_config import ModelConfig

# What all have in common, spelled as transformers 4 did.
COMMON: dict[str, Any] = {
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
    "initializer_range": 0.02, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3: dict[str, Any] = COMMON | {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
    "max_position_embeddings": 40960, "num_key_value_heads": 8, "rope_scaling": None, "sliding_window": None,
    "transformers_version": "4.51.0",
}  # fmt: skip
QWEN2_MOE: dict[str, Any] = COMMON | {
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "decoder_sparse_step": 1,
    "norm_topk_prob": False, "output_router_logits": False, "router_aux_loss_coef": 0.001,
}  # fmt: skip
QWEN3_MOE: dict[str, Any] = COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False, "head_dim": 128,
    "decoder_sparse_step": 1, "max_position_embeddings": 40960, "mlp_only_layers": [], "norm_topk_prob": True,
    "num_experts": 128, "num_experts_per_tok": 8, "num_key_value_heads": 4, "output_router_logits": False,
    "rope_scaling": None, "router_aux_loss_coef": 0.001, "sliding_window": None, "transformers_version": "4.51.0",
}  # fmt: skip


def sizes(hidden: int, intermediate: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "max_window_layers": layers, "num_attention_heads": heads, **others,
    }  # fmt: skip


# With billions of parameters, all and those that one token passes through; the latter as rounded by the model cards.
MODELS: dict[str, tuple[dict[str, Any], float, float]] = {
    "Qwen3-0.6B": (QWEN3 | sizes(1024, 3072, 28, 16, tie_word_embeddings=True), 0.6, 0.6),
    "Qwen3-1.7B": (QWEN3 | sizes(2048, 6144, 28, 16, tie_word_embeddings=True), 1.7, 1.7),
    "Qwen3-4B": (QWEN3 | sizes(2560, 9728, 36, 32, tie_word_embeddings=True), 4.0, 4.0),
    "Qwen3-8B": (QWEN3 | sizes(4096, 12288, 36, 32), 8.2, 8.2),
    "Qwen3-14B": (QWEN3 | sizes(5120, 17408, 40, 40), 14.8, 14.8),
    "Qwen3-32B": (QWEN3 | sizes(5120, 25600, 64, 64), 32.8, 32.8),
    "Qwen1.5-MoE-A2.7B": (
        QWEN2_MOE
        | sizes(
            2048, 5632, 24, 16, max_window_layers=21, num_key_value_heads=16, max_position_embeddings=8192,
            sliding_window=32768, moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_experts=60,
            num_experts_per_tok=4,
        ),
        14.3,
        2.7,
    ),
    "Qwen2-57B-A14B": (
        QWEN2_MOE
        | sizes(
            3584, 18944, 28, 28, num_key_value_heads=4, max_position_embeddings=131072, sliding_window=65536,
            moe_intermediate_size=2560, shared_expert_intermediate_size=20480, num_experts=64, num_experts_per_tok=8,
        ),
        57.4,
        14.2,
    ),
    "Qwen3-30B-A3B": (QWEN3_MOE | sizes(2048, 6144, 48, 32, moe_intermediate_size=768), 30.5, 3.3),
    "Qwen3-235B-A22B": (QWEN3_MOE | sizes(4096, 12288, 94, 64, moe_intermediate_size=1536), 235.1, 22.0),
    "Qwen3-Coder-480B-A35B": (
        QWEN3_MOE
        | sizes(
            6144, 8192, 62, 96, num_key_value_heads=8, moe_intermediate_size=2560, num_experts=160, qkv_bias=False,
            rope_theta=10000000, max_position_embeddings=262144, shared_expert_intermediate_size=0, use_qk_norm=True,
        ),
        480.2,
        35.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_published_configs_are_read(name: str) -> None:
    raw, billions, active_billions = MODELS[name]
    config = ModelConfig.from_dict(raw)
    assert (config.architecture, config.hidden_size, config.head_dim) == (raw["model_type"], raw["hidden_size"], 128)
    is_qwen3 = config.architecture.startswith("qwen3")
    assert (config.qkv_bias, config.qk_norm) == (not is_qwen3, is_qwen3)
    assert (config.dtype, config.eos_token_ids) == ("bfloat16", (151645,))
    assert round(config.num_parameters / 1e9, 1) == billions
    assert config.num_active_parameters / 1e9 == pytest.approx(active_billions, rel=0.02)
    if config.moe is not None:
        assert all(config.is_sparse(layer) for layer in range(config.num_hidden_layers))
        assert config.moe.norm_topk_prob == is_qwen3
        assert config.moe.shared_expert_intermediate_size == raw.get("shared_expert_intermediate_size", 0)


def test_transformers_5_spells_the_number_of_experts_otherwise() -> None:
    raw = MODELS["Qwen3-30B-A3B"][0]
    renamed = {"num_local_experts" if key == "num_experts" else key: value for key, value in raw.items()}
    assert ModelConfig.from_dict(renamed) == ModelConfig.from_dict(raw)


def test_dense_layers_among_sparse_ones() -> None:
    raw = MODELS["Qwen3-30B-A3B"][0] | {"decoder_sparse_step": 3, "mlp_only_layers": [2, 8]}
    config = ModelConfig.from_dict(raw)
    assert [layer for layer in range(12) if config.is_sparse(layer)] == [5, 11]


@pytest.mark.parametrize("key", ["num_experts", "num_experts_per_tok", "moe_intermediate_size"])
def test_what_a_moe_must_tell(key: str) -> None:
    raw = {name: value for name, value in MODELS["Qwen3-30B-A3B"][0].items() if name != key}
    with pytest.raises(CheckpointError, match=r"num_(local_)?experts" if key == "num_experts" else key):
        ModelConfig.from_dict(raw)


@pytest.mark.parametrize(("name", "key"), [("Qwen3-8B", "attention_bias"), ("Qwen2-57B-A14B", "use_sliding_window")])
def test_what_is_not_served_is_refused(name: str, key: str) -> None:
    with pytest.raises(CheckpointError, match=key):
        ModelConfig.from_dict(MODELS[name][0] | {key: True})
