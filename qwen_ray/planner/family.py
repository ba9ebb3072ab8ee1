"""The Qwen family's architecture facts, so that a plan needs neither network nor checkpoint.

Knows the published sizes (their config.json files and technical reports: Qwen2.5 arXiv 2412.15115, Qwen2 2407.10671,
Qwen3 2505.09388) under the names that Hugging Face gives them, Qwen's own quantized variants among them, and the
built-in demo model. A model that is served is described by its own config.json; these facts only plan.
"""

from __future__ import annotations

from dataclasses import replace

from qwen_ray.core.model_config import ModelConfig, MoeConfig, RopeConfig
from qwen_ray.core.packed_format import PackedFormat

_SMALL_VOCAB, _LARGE_VOCAB = 151936, 152064


def _qwen2(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, *, tied: bool) -> ModelConfig:
    # The small models of Qwen2.5 share their embedding; the large ones pad the vocabulary for wide tensor parallelism.
    return ModelConfig(
        architecture="qwen2",
        vocab_size=_SMALL_VOCAB if tied else _LARGE_VOCAB,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=1e6),
        max_position_embeddings=32768,
        tie_word_embeddings=tied,
        qkv_bias=True,
        qk_norm=False,
    )


def _qwen2_moe(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, moe: MoeConfig) -> ModelConfig:
    dense = _qwen2(hidden, intermediate, layers, heads, kv_heads, tied=False)
    return replace(dense, architecture="qwen2_moe", vocab_size=_SMALL_VOCAB, moe=moe)


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, *, tied: bool) -> ModelConfig:
    return ModelConfig(
        architecture="qwen3",
        vocab_size=_SMALL_VOCAB,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=1e6),
        max_position_embeddings=40960,
        tie_word_embeddings=tied,
        qkv_bias=False,
        qk_norm=True,
    )


def _qwen3_moe(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, num_experts: int, expert_size: int
) -> ModelConfig:
    moe = MoeConfig(
        num_experts=num_experts, num_experts_per_tok=8, moe_intermediate_size=expert_size, norm_topk_prob=True
    )
    dense = _qwen3(hidden, intermediate, layers, heads, kv_heads, tied=False)
    return replace(dense, architecture="qwen3_moe", moe=moe)


_QWEN2_5 = {
    "0.5b": _qwen2(896, 4864, 24, 14, 2, tied=True),
    "1.5b": _qwen2(1536, 8960, 28, 12, 2, tied=True),
    "3b": _qwen2(2048, 11008, 36, 16, 2, tied=True),
    "7b": _qwen2(3584, 18944, 28, 28, 4, tied=False),
    "14b": _qwen2(5120, 13824, 48, 40, 8, tied=False),
    "32b": _qwen2(5120, 27648, 64, 40, 8, tied=False),
    "72b": _qwen2(8192, 29568, 80, 64, 8, tied=False),
}
_QWEN2_DENSE = ("0.5b", "1.5b", "7b", "72b")  # sizes of Qwen2 that Qwen2.5 took over
_QWEN2_57B = _qwen2_moe(
    3584,
    18944,
    28,
    28,
    4,
    MoeConfig(
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=2560,
        norm_topk_prob=False,
        shared_expert_intermediate_size=20480,
    ),
)
_QWEN1_5_MOE = _qwen2_moe(
    2048,
    5632,
    24,
    16,
    16,
    MoeConfig(
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        norm_topk_prob=False,
        shared_expert_intermediate_size=5632,
    ),
)
_QWEN3 = {
    "0.6b": _qwen3(1024, 3072, 28, 16, 8, tied=True),
    "1.7b": _qwen3(2048, 6144, 28, 16, 8, tied=True),
    "4b": _qwen3(2560, 9728, 36, 32, 8, tied=True),
    "8b": _qwen3(4096, 12288, 36, 32, 8, tied=False),
    "14b": _qwen3(5120, 17408, 40, 40, 8, tied=False),
    "32b": _qwen3(5120, 25600, 64, 64, 8, tied=False),
    "30b-a3b": _qwen3_moe(2048, 6144, 48, 32, 4, 128, 768),
    "235b-a22b": _qwen3_moe(4096, 12288, 94, 64, 4, 128, 1536),
}
_QWEN3_CODER_480B = _qwen3_moe(6144, 8192, 62, 96, 8, 160, 2560)
_QWEN3_WITHOUT_BASE = ("32b", "235b-a22b")  # no pretrained-only version was published
# The July 2025 releases: 256k positions, another RoPE base.
_QWEN3_2507_THETA = {"4b": 5e6, "30b-a3b": 1e7, "235b-a22b": 5e6}
# Pretrained models that were published with more positions than their chat versions.
_LONG_BASE = ("1.5b", "7b", "14b", "32b", "72b")

_SMOLLM2_135M = ModelConfig(
    architecture="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=100000.0),
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    qkv_bias=False,
    qk_norm=False,
)


def _names() -> dict[str, ModelConfig]:
    # The demo's file is quantized: it has no dtype of its own, and its blocks dequantize to float32.
    names = {"demo": replace(_SMOLLM2_135M, dtype="float32")}
    names |= {"smollm2-135m": _SMOLLM2_135M, "smollm2-135m-instruct": _SMOLLM2_135M}
    for size, config in _QWEN2_5.items():
        base = replace(config, max_position_embeddings=131072) if size in _LONG_BASE else config
        names |= {f"qwen2.5-{size}": base, f"qwen2.5-{size}-instruct": config}
        if size != "72b":
            names |= {f"qwen2.5-coder-{size}": config, f"qwen2.5-coder-{size}-instruct": config}
    for size in _QWEN2_DENSE:
        names[f"qwen2-{size}"] = replace(_QWEN2_5[size], max_position_embeddings=131072)
        names[f"qwen2-{size}-instruct"] = _QWEN2_5[size]
    names["qwen2-57b-a14b"] = replace(_QWEN2_57B, max_position_embeddings=131072)
    names["qwen2-57b-a14b-instruct"] = _QWEN2_57B
    names["qwen1.5-moe-a2.7b"] = names["qwen1.5-moe-a2.7b-chat"] = replace(_QWEN1_5_MOE, max_position_embeddings=8192)
    for size, config in _QWEN3.items():
        names[f"qwen3-{size}"] = config
        if size not in _QWEN3_WITHOUT_BASE:
            names[f"qwen3-{size}-base"] = replace(config, max_position_embeddings=32768)
    for size, theta in _QWEN3_2507_THETA.items():
        later = replace(_QWEN3[size], max_position_embeddings=262144, rope=RopeConfig(theta=theta))
        names |= {f"qwen3-{size}-instruct-2507": later, f"qwen3-{size}-thinking-2507": later}
    coder = replace(_QWEN3_CODER_480B, max_position_embeddings=262144, rope=RopeConfig(theta=1e7))
    names["qwen3-coder-480b-a35b-instruct"] = coder
    names["qwen3-coder-30b-a3b-instruct"] = replace(names["qwen3-30b-a3b-instruct-2507"], intermediate_size=5472)
    return names


FAMILY: dict[str, ModelConfig] = _names()


# Qwen's own: what its name ends with, how its matrices lie in the checkpoint, and the dtype of all else.
_PACKED: dict[str, tuple[PackedFormat, str]] = {
    "-awq": (PackedFormat(method="awq", bits=4, group=128), "float16"),
    "-gptq-int4": (PackedFormat(method="gptq", bits=4, zeros_less_one=True, group=128), "float16"),
    "-gptq-int8": (PackedFormat(method="gptq", bits=8, zeros_less_one=True, group=128), "float16"),
    "-fp8": (PackedFormat(method="fp8", bits=8, block=(128, 128)), "bfloat16"),
}


def lookup(name: str) -> ModelConfig | None:
    """The facts of `Qwen/Qwen2.5-72B-Instruct`, `qwen3-8b`, `demo`…; None for a name that is not in the table."""
    owner, _, model = name.strip().lower().rpartition("/")
    if owner not in ("", "qwen", "huggingfacetb"):
        return None
    for suffix, (packed, dtype) in _PACKED.items():
        if model.endswith(suffix) and (plain := FAMILY.get(model.removesuffix(suffix))):
            return replace(plain, packed=packed, dtype=dtype)
    return FAMILY.get(model)
