from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.model_config import MoeConfig, RopeConfig
from qwen_ray.source.config_file import load_config

QWEN = {
    "model_type": "qwen2",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "eos_token_id": 9,
}


def write_directory(folder: Path, config: Any = QWEN, generation: Any = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def write_gguf(
    folder: Path,
    architecture: str = "qwen2",
    *,
    tensors: dict[str, np.ndarray] | None = None,
    weight_type: type = np.float32,
    **changes: Any,
) -> Path:
    """A header with QWEN's numbers; `changes` are metadata, with `__` for dots, None leaves one out."""
    path = folder / "model.gguf"
    values: dict[str, Any] = {
        "block_count": 2,
        "context_length": 128,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in values.items():
        if isinstance(value, str):
            writer.add_string(f"{architecture}.{name}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{name}", value)
        elif value is not None:
            writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 9)
    writer.add_uint32("tokenizer.ggml.eot_token_id", 3)
    standard = {"token_embd.weight": (100, 64), "blk.0.attn_q.weight": (64, 64)}
    for name, shape in standard.items():
        writer.add_tensor(name, np.zeros(shape, weight_type))
    for name, values_ in (tensors or {}).items():
        writer.add_tensor(name, values_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_directory_ends_with_the_tokens_of_both_files(tmp_path: Path) -> None:
    config = load_config(write_directory(tmp_path, generation={"eos_token_id": [7, 9]}))
    assert config.eos_token_ids == (9, 7)
    assert (config.architecture, config.vocab_size, config.qkv_bias) == ("qwen2", 100, True)


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "No such file"), ("{", "not JSON"), ("[]", "not a JSON object"), ("{}", "model_type is None")],
)
def test_a_wrong_config_names_the_file(tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{says}"):
        load_config(tmp_path)


def test_gguf_gives_what_the_directory_gives(tmp_path: Path) -> None:
    biased = {"blk.0.attn_q.bias": np.zeros(64, np.float32)}
    from_gguf = load_config(write_gguf(tmp_path, tensors=biased))
    same = {**QWEN, "rms_norm_eps": from_gguf.rms_norm_eps, "torch_dtype": "float32", "eos_token_id": [9, 3]}
    assert from_gguf == load_config(write_directory(tmp_path, same))
    assert from_gguf.rms_norm_eps == pytest.approx(1e-5)


def test_gguf_facts_that_stand_in_its_tensors(tmp_path: Path) -> None:
    plain = load_config(write_gguf(tmp_path, "llama", weight_type=np.float16))
    assert (plain.qkv_bias, plain.tie_word_embeddings, plain.dtype) == (False, True, "float16")
    untied = load_config(write_gguf(tmp_path, "qwen3", tensors={"output.weight": np.zeros((100, 64), np.float32)}))
    assert (untied.tie_word_embeddings, untied.qk_norm) == (False, True)


def test_gguf_head_size_of_its_own(tmp_path: Path) -> None:
    assert load_config(write_gguf(tmp_path, "qwen3", attention__key_length=32)).head_dim == 32


def test_gguf_yarn(tmp_path: Path) -> None:
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 32}
    rope = load_config(write_gguf(tmp_path, **yarn)).rope
    assert (rope.kind, rope.factor, rope.original_max_position_embeddings) == ("yarn", 4.0, 32)


def llama3_factors(factor: float, theta: float, head_dim: int) -> np.ndarray:
    """As Llama 3.1's reference code scales each frequency (meta-llama/llama-models, apply_scaling)."""
    factors: list[float] = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (index / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_gguf_llama3_scaling_is_recognized_by_its_factors(tmp_path: Path) -> None:
    options = {"attention__key_length": 128, "rope__freq_base": 500000.0}
    factors = llama3_factors(32.0, 500000.0, 128)
    path = write_gguf(tmp_path, "llama", tensors={"rope_freqs.weight": factors}, **options)
    assert load_config(path).rope == RopeConfig(
        theta=500000.0, kind="llama3", factor=32.0, original_max_position_embeddings=8192
    )
    other = write_gguf(tmp_path, "llama", tensors={"rope_freqs.weight": factors[::-1].copy()}, **options)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is not Llama 3's"):
        load_config(other)


def test_gguf_experts(tmp_path: Path) -> None:
    moe: dict[str, Any] = {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 40}
    qwen3 = load_config(write_gguf(tmp_path, "qwen3moe", **moe))
    assert (qwen3.architecture, qwen3.qk_norm) == ("qwen3_moe", True)
    assert qwen3.moe == MoeConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=40, norm_topk_prob=True)
    qwen2 = load_config(write_gguf(tmp_path, "qwen2moe", **moe, expert_shared_feed_forward_length=72))
    assert (qwen2.architecture, qwen2.intermediate_size) == ("qwen2_moe", 96)
    assert qwen2.moe == MoeConfig(
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        norm_topk_prob=False,
        shared_expert_intermediate_size=72,
    )


def test_gguf_sizes_of_experts_that_follow_from_the_dense_size(tmp_path: Path) -> None:
    """As in the files of Qwen1.5-MoE that were made before there were keys for them."""
    moe = load_config(write_gguf(tmp_path, "qwen2moe", expert_count=8, expert_used_count=4)).moe
    assert moe is not None
    assert (moe.moe_intermediate_size, moe.shared_expert_intermediate_size) == (24, 96)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "gemma3"}, "is 'gemma3'; served from GGUF are llama, qwen2, qwen3, qwen2moe, qwen3moe"),
        ({"architecture": "qwen3moe", "expert_count": 8}, "qwen3moe.expert_used_count must be a number"),
        ({"architecture": "qwen3moe", "expert_count": 8, "expert_used_count": 0}, "num_experts_per_tok must be"),
        (
            {"architecture": "qwen3moe", "expert_count": 8, "expert_used_count": 2, "expert_weights_scale": 2.5},
            "expert_weights_scale is 2.5",
        ),
        ({"block_count": None}, "qwen2.block_count must be a number"),
        ({"attention__sliding_window": 4096}, "qwen2.attention.sliding_window is 4096"),
        ({"expert_count": 8}, "qwen2.expert_count is 8"),
        ({"rope__scaling__type": "longrope"}, "RoPE scaling 'longrope'"),
        ({"rope__scaling__type": "yarn"}, "qwen2.rope.scaling.factor must be a number"),
    ],
)
def test_what_gguf_cannot_say_or_is_not_served_is_an_error(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        load_config(write_gguf(tmp_path, **changes))
