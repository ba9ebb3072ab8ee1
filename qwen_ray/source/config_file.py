"""A model's files → ModelConfig: config.json and generation_config.json, or GGUF metadata. Reads no weights."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from qwen_ray.core.model_config import ModelConfig, token_ids

# ggml's numbers of the types that are a dtype of their own.
_GGUF_DTYPES = {0: "float32", 1: "float16", 30: "bfloat16"}
# llama.cpp's names of architectures, and Hugging Face's.
_GGUF_ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
}


def load_config(path: Path) -> ModelConfig:
    """From a directory or a .gguf file. End tokens are those of config.json and generation_config.json together.

    A quantized GGUF file has no dtype of its own: its `dtype` is "float32", what its blocks dequantize to. Raises
    CheckpointError naming file and key.
    """
    if path.is_file():
        return _from_gguf(read_gguf_header(path))
    config = read_object(path / "config.json")
    generation = read_object(path / "generation_config.json") if (path / "generation_config.json").is_file() else {}
    ends = token_ids(config.get("eos_token_id")) + token_ids(generation.get("eos_token_id"))
    merged = {**config, "eos_token_id": list(dict.fromkeys(ends))}
    return ModelConfig.from_dict(merged, source=str(path / "config.json"))


def read_object(file: Path) -> dict[str, Any]:
    value = read_json(file)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: not a JSON object.")
    return value


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON ({error}).") from error


def _from_gguf(header: GgufHeader) -> ModelConfig:
    metadata = header.metadata
    kind = metadata.get("general.architecture")
    if kind not in _GGUF_ARCHITECTURES:
        known = ", ".join(_GGUF_ARCHITECTURES)
        raise CheckpointError(f"{header.path}: general.architecture is {kind!r}; served from GGUF are {known}.")
    is_moe = kind.endswith("moe")
    for key, served in {
        "attention.sliding_window": (0,),
        "expert_weights_scale": (0, 1),
        **({} if is_moe else {"expert_count": (0,)}),
    }.items():
        value = metadata.get(f"{kind}.{key}", 0)
        if value not in served:
            raise CheckpointError(f"{header.path}: {kind}.{key} is {value}, which is not served from GGUF.")
    heads = _need(header, f"{kind}.attention.head_count")
    hidden = _need(header, f"{kind}.embedding_length")
    head_dim = metadata.get(f"{kind}.attention.key_length", hidden // heads)
    raw: dict[str, Any] = {
        "model_type": _GGUF_ARCHITECTURES[kind],
        "vocab_size": _tensor(header, "token_embd.weight").shape[0],
        "hidden_size": hidden,
        "intermediate_size": _need(header, f"{kind}.feed_forward_length"),
        "num_hidden_layers": _need(header, f"{kind}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _need(header, f"{kind}.attention.head_count_kv"),
        "head_dim": head_dim,
        "rms_norm_eps": _need(header, f"{kind}.attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.get(f"{kind}.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(header, kind, head_dim),
        "max_position_embeddings": _need(header, f"{kind}.context_length"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "qkv_bias": "blk.0.attn_q.bias" in header.tensors,
        "dtype": _GGUF_DTYPES.get(_tensor(header, "blk.0.attn_q.weight").type, "float32"),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(header.eos_token_ids),
        **(_experts(header, kind) if is_moe else {}),
    }
    return ModelConfig.from_dict(raw, source=str(header.path))


def _experts(header: GgufHeader, kind: str) -> dict[str, Any]:
    """As llama.cpp understands them: every layer is sparse, sizes that the file leaves out follow from others."""
    metadata = header.metadata
    per_token, dense_size = _need(header, f"{kind}.expert_used_count"), _need(header, f"{kind}.feed_forward_length")
    shared_size = metadata.get(f"{kind}.expert_shared_feed_forward_length") or dense_size
    return {
        "num_experts": _need(header, f"{kind}.expert_count"),
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": metadata.get(f"{kind}.expert_feed_forward_length") or dense_size // max(per_token, 1),
        "shared_expert_intermediate_size": shared_size if kind == "qwen2moe" else 0,
        # Not in the file, but in llama.cpp's graphs.
        "norm_topk_prob": kind == "qwen3moe",
    }


def _need(header: GgufHeader, key: str) -> Any:
    value = header.metadata.get(key)
    if not isinstance(value, int | float):
        raise CheckpointError(f"{header.path}: {key} must be a number, got {value!r}.")
    return value


def _tensor(header: GgufHeader, name: str) -> GgufTensor:
    if name not in header.tensors:
        raise CheckpointError(f"{header.path}: it has no tensor {name}.")
    return header.tensors[name]


def _rope_scaling(header: GgufHeader, kind: str, head_dim: int) -> dict[str, Any] | None:
    """As config.json would spell it."""
    metadata = header.metadata
    scaling = metadata.get(f"{kind}.rope.scaling.type", "none")
    if "rope_freqs.weight" in header.tensors:
        return _llama3_scaling(header, kind, head_dim)
    if scaling == "none":
        return None
    if scaling not in ("linear", "yarn") or f"{kind}.rope.scaling.attn_factor" in metadata:
        raise CheckpointError(f"{header.path}: RoPE scaling {scaling!r} with its parameters is not served from GGUF.")
    return {
        "rope_type": scaling,
        "factor": _need(header, f"{kind}.rope.scaling.factor"),
        "original_max_position_embeddings": metadata.get(f"{kind}.rope.scaling.original_context_length"),
    }


def _llama3_scaling(header: GgufHeader, kind: str, head_dim: int) -> dict[str, Any]:
    """GGUF keeps Llama 3's scaling as one factor per frequency; all released models share the other parameters."""
    factors = _read_floats(header, "rope_freqs.weight")
    low, high, original = 1.0, 4.0, 8192
    factor, theta = max(factors, default=1.0), header.metadata.get(f"{kind}.rope.freq_base", 10000.0)
    expected: list[float] = []
    for index in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * index / head_dim)
        smooth = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        expected.append(1 / ((1 - smooth) / factor + smooth))
    if len(factors) != len(expected) or any(abs(a - b) > 1e-2 * b for a, b in zip(factors, expected, strict=True)):
        raise CheckpointError(f"{header.path}: rope_freqs.weight is not Llama 3's RoPE scaling; it is not served.")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _read_floats(header: GgufHeader, name: str) -> list[float]:
    tensor = header.tensors[name]
    if tensor.type != 0:
        raise CheckpointError(f"{header.path}: {name} must be float32.")
    layout = f"<{math.prod(tensor.shape)}f"
    with header.path.open("rb") as file:
        file.seek(tensor.start)
        return list(struct.unpack(layout, file.read(struct.calcsize(layout))))
