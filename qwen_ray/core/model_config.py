"""A model's architecture, read from its config.json; and the arithmetic that follows from it.

Knows every field that changes what is computed, and refuses what it does not know: a checkpoint is never served
wrongly in silence. Knows nothing of ranks, devices or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.packed_format import PackedFormat, packed_format

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
RopeKind = Literal["default", "llama3", "yarn", "linear"]
Quantization = Literal["none", "int8", "int4"]
Architecture = Literal["llama", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe"]
ARCHITECTURES: tuple[Architecture, ...] = ("llama", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding. `llama3`: Llama 3.1's scaling; `yarn`: Peng et al. 2023, as in Qwen2.5's model cards."""

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: 0.1 ln(factor) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    shared_expert_intermediate_size: int = 0
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    dtype: str = "bfloat16"  # the checkpoint's own
    packed: PackedFormat | None = None  # the checkpoint's matrices, if they are not all of `dtype`
    moe: MoeConfig | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, source: str = "config.json") -> ModelConfig:
        """From a Hugging Face config.json (transformers 4 or 5 spelling). Raises CheckpointError naming the key."""
        kind = raw.get("model_type")
        if kind not in ARCHITECTURES:
            raise CheckpointError(f"{source}: model_type is {kind!r}; served are {', '.join(ARCHITECTURES)}.")
        _refuse_unknown_features(raw, source)
        heads = _integer(raw, "num_attention_heads", source)
        hidden = _integer(raw, "hidden_size", source)
        config = cls(
            architecture=kind,
            vocab_size=_integer(raw, "vocab_size", source),
            hidden_size=hidden,
            intermediate_size=_integer(raw, "intermediate_size", source),
            num_hidden_layers=_integer(raw, "num_hidden_layers", source),
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or hidden // heads,
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope=_rope(raw, source),
            max_position_embeddings=_integer(raw, "max_position_embeddings", source),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=bool(raw.get("attention_bias", raw.get("qkv_bias", kind in ("qwen2", "qwen2_moe")))),
            qk_norm=kind in ("qwen3", "qwen3_moe"),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch."),
            packed=packed_format(raw["quantization_config"], source) if raw.get("quantization_config") else None,
            moe=_moe(raw, source) if kind.endswith("_moe") else None,
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=token_ids(raw.get("eos_token_id")),
        )
        is_dense = not any(map(config.is_sparse, range(config.num_hidden_layers)))
        return replace(config, moe=None) if is_dense else config

    def is_sparse(self, layer: int) -> bool:
        """Whether `layer` has experts in place of one MLP."""
        moe = self.moe
        if moe is None or layer in moe.mlp_only_layers:
            return False
        return moe.num_experts > 0 and (layer + 1) % moe.decoder_sparse_step == 0

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def num_embedding_parameters(self) -> int:
        """Input embedding and, where it is not tied to it, the output head."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def num_attention_parameters(self) -> int:
        """Of one layer: projections, biases, QK norms."""
        projections = self.hidden_size * (2 * self.q_size + 2 * self.kv_size)
        biases = self.q_size + 2 * self.kv_size if self.qkv_bias else 0
        return projections + biases + (2 * self.head_dim if self.qk_norm else 0)

    def num_layer_parameters(self, layer: int, *, active: bool = False) -> int:
        """Of one layer with its two norms; `active`: only what one token passes through."""
        mlp = 3 * self.hidden_size * self.intermediate_size
        moe = self.moe
        if moe is not None and self.is_sparse(layer):
            experts = moe.num_experts_per_tok if active else moe.num_experts
            mlp = 3 * self.hidden_size * moe.moe_intermediate_size * experts + self.hidden_size * moe.num_experts
            if moe.shared_expert_intermediate_size:
                mlp += 3 * self.hidden_size * moe.shared_expert_intermediate_size + self.hidden_size
        return self.num_attention_parameters + mlp + 2 * self.hidden_size

    @property
    def num_parameters(self) -> int:
        layers = sum(self.num_layer_parameters(i) for i in range(self.num_hidden_layers))
        return layers + self.num_embedding_parameters + self.hidden_size

    @property
    def num_active_parameters(self) -> int:
        layers = sum(self.num_layer_parameters(i, active=True) for i in range(self.num_hidden_layers))
        return layers + self.num_embedding_parameters + self.hidden_size


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """`eos_token_id` as Hugging Face files spell it: absent, one id, or several."""
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _integer(raw: Mapping[str, Any], key: str, source: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{source}: {key} must be a positive integer, got {value!r}.")
    return value


def _refuse_unknown_features(raw: Mapping[str, Any], source: str) -> None:
    act = raw.get("hidden_act", "silu")
    if act != "silu":
        raise CheckpointError(f"{source}: hidden_act is {act!r}; only 'silu' is served.")
    if raw.get("mlp_bias"):
        raise CheckpointError(f"{source}: mlp_bias is true; MLPs with biases are not served.")
    if raw.get("attention_bias") and raw["model_type"] in ("llama", "qwen3", "qwen3_moe"):
        raise CheckpointError(f"{source}: attention_bias is true; output projections with a bias are not served.")
    if raw.get("use_sliding_window"):
        raise CheckpointError(f"{source}: use_sliding_window is true; sliding-window attention is not served.")


def _rope(raw: Mapping[str, Any], source: str) -> RopeConfig:
    # transformers 5 writes one `rope_parameters`; before it there were `rope_theta` and `rope_scaling`.
    spec: Mapping[str, Any] = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = spec.get("rope_type") or spec.get("type") or "default"
    if kind not in ("default", "llama3", "yarn", "linear"):
        raise CheckpointError(f"{source}: RoPE type {kind!r} is not served; known: default, linear, llama3, yarn.")
    theta = float(spec.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    if "factor" not in spec:
        raise CheckpointError(f"{source}: rope_scaling of type {kind!r} has no factor.")
    original = spec.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings")
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=float(spec["factor"]),
        original_max_position_embeddings=original or raw.get("max_position_embeddings"),
        low_freq_factor=float(spec.get("low_freq_factor", 1.0)),
        high_freq_factor=float(spec.get("high_freq_factor", 4.0)),
        beta_fast=float(spec.get("beta_fast") or 32.0),
        beta_slow=float(spec.get("beta_slow") or 1.0),
        attention_factor=spec.get("attention_factor"),
    )


def _moe(raw: Mapping[str, Any], source: str) -> MoeConfig:
    key = "num_experts" if "num_experts" in raw else "num_local_experts"
    return MoeConfig(
        num_experts=_integer(raw, key, source),
        num_experts_per_tok=_integer(raw, "num_experts_per_tok", source),
        moe_intermediate_size=_integer(raw, "moe_intermediate_size", source),
        norm_topk_prob=bool(raw.get("norm_topk_prob", False)),
        shared_expert_intermediate_size=raw.get("shared_expert_intermediate_size") or 0,
        decoder_sparse_step=raw.get("decoder_sparse_step") or 1,
        mlp_only_layers=tuple(raw.get("mlp_only_layers") or ()),
    )
