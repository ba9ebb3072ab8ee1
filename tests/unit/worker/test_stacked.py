"""Models with experts as transformers saves them and as llama.cpp stores them: one set of names, shapes and numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GgmlType
from safetensors.torch import save_file
from transformers import (
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.model_config import ModelConfig
from qwen_ray.core.plan import Span
from qwen_ray.source.config_file import load_config
from qwen_ray.worker.weights import CountedCheckpoint, open_checkpoint

NUM_EXPERTS = 5
SIZES: dict[str, Any] = {
    "vocab_size": 70,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    "rms_norm_eps": 2.0**-20,
    "eos_token_id": 3,
}
WIDE_HEADS: dict[str, Any] = {**SIZES, "head_dim": 32}
EXPERTS: dict[str, Any] = {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def random_weights(model: PreTrainedModel) -> PreTrainedModel:
    """No two tensors alike."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    return model


MODELS = {
    "qwen3": random_weights(Qwen3ForCausalLM(Qwen3Config(**WIDE_HEADS))),
    "qwen2moe": random_weights(
        Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=160))
    ),
    "qwen3moe": random_weights(Qwen3MoeForCausalLM(Qwen3MoeConfig(**WIDE_HEADS, **EXPERTS, norm_topk_prob=True))),
}
LLAMA_CPP_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@pytest.fixture(params=MODELS)
def architecture(request: pytest.FixtureRequest) -> str:
    """As llama.cpp calls it."""
    return request.param


def published(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of published checkpoints: every expert by itself."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        prefix, _, stack = name.rpartition(".experts.")
        if not prefix:
            tensors[name] = tensor
            continue
        for i, expert in enumerate(tensor):
            middle = expert.shape[0] // 2
            parts = {"down": expert} if stack == "down_proj" else {"gate": expert[:middle], "up": expert[middle:]}
            tensors |= {f"{prefix}.experts.{i}.{part}_proj.weight": weight for part, weight in parts.items()}
    return tensors


def read_all(checkpoint: CountedCheckpoint, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Every tensor of these names; the checkpoint has no other."""
    tensors = {name: checkpoint.read(name, shape) for name, shape in shapes.items()}
    checkpoint.check_extra(Span(0, 2))
    return tensors


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def in_llama_cpp(architecture: str, *, gate_and_up_together: bool = False) -> dict[str, np.ndarray]:
    """The model's tensors as llama.cpp's converter names and shapes them."""
    arrays: dict[str, np.ndarray] = {}
    stacks: dict[str, list[torch.Tensor]] = {}
    for name, tensor in published(MODELS[architecture]).items():
        if name in LLAMA_CPP_NAMES:
            arrays[LLAMA_CPP_NAMES[name]] = tensor.numpy()
            continue
        _, _, layer, module = name.split(".", 3)
        module, _, kind = module.rpartition(".")
        if module.startswith("mlp.experts."):
            projection = module.rpartition(".")[2]
            stacks.setdefault(f"{layer}.{projection}", []).append(tensor)
        else:
            arrays[f"blk.{layer}.{LLAMA_CPP_NAMES[module]}.{kind}"] = tensor.squeeze().numpy()
    stacked = {name: torch.stack(experts) for name, experts in stacks.items()}
    for layer in "01" if gate_and_up_together else "":
        parts = [stacked.pop(f"{layer}.{part}") for part in ("gate_proj", "up_proj")]
        stacked[f"{layer}.gate_up_proj"] = torch.cat(parts, dim=1)
    for name, tensor in stacked.items():
        layer, projection = name.split(".")
        arrays[f"blk.{layer}.{LLAMA_CPP_NAMES[f'mlp.experts.{projection}']}.weight"] = tensor.numpy()
    return arrays


def write_gguf(path: Path, architecture: str, kind: GgmlType, arrays: dict[str, np.ndarray]) -> Path:
    """With the metadata that llama.cpp's converter writes; matrices and stacks as `kind`."""
    config = MODELS[architecture].config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_eos_token_id(config.eos_token_id)
    if architecture.startswith("qwen3"):
        writer.add_key_length(config.head_dim)
    if architecture.endswith("moe"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if architecture == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    for name, array in arrays.items():
        own = kind if array.ndim > 1 else GgmlType.F32
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(array), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("original", [True, False], ids=["apart", "stacked"])
def test_what_transformers_saves(tmp_path: Path, architecture: str, original: bool) -> None:
    model = MODELS[architecture]
    model.save_pretrained(tmp_path, save_original_format=original)
    config = load_config(tmp_path)
    expected = published(model)
    assert_same(read_all(open_checkpoint(tmp_path, config, torch.float32), shapes(expected)), expected)


def test_a_gguf_file_says_what_config_json_says(tmp_path: Path, architecture: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", architecture, GgmlType.F32, in_llama_cpp(architecture))
    MODELS[architecture].config.save_pretrained(tmp_path)
    assert load_config(path) == replace(load_config(tmp_path), dtype="float32")


@pytest.mark.parametrize("kind", [GgmlType.F32, GgmlType.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    ("architecture", "together"),
    [("qwen3", False), ("qwen2moe", False), ("qwen3moe", False), ("qwen3moe", True)],
)
def test_a_gguf_file_by_hugging_faces_names(tmp_path: Path, architecture: str, together: bool, kind: GgmlType) -> None:
    arrays = in_llama_cpp(architecture, gate_and_up_together=together)
    path = write_gguf(tmp_path / "model.gguf", architecture, kind, arrays)
    expected = published(MODELS[architecture])
    if kind == GgmlType.Q8_0:
        expected = {name: rounded(tensor) for name, tensor in expected.items()}
    checkpoint = open_checkpoint(path, load_config(path), torch.float32)
    assert_same(read_all(checkpoint, shapes(expected)), expected)


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """A matrix to Q8_0 and back."""
    if min(tensor.shape) == 1 or tensor.ndim == 1:
        return tensor
    data = gguf.quantize(np.ascontiguousarray(tensor.numpy()), GgmlType.Q8_0)
    return torch.from_numpy(gguf.dequantize(data, GgmlType.Q8_0).copy())


def test_a_part_of_an_expert_and_no_other_byte(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "qwen3moe", GgmlType.F32, in_llama_cpp("qwen3moe"))
    tensors = published(MODELS["qwen3moe"])
    checkpoint = open_checkpoint(path, load_config(path), torch.float32)
    for projection, shape in {"gate": (32, 64), "up": (32, 64), "down": (64, 32)}.items():
        name = f"model.layers.1.mlp.experts.3.{projection}_proj.weight"
        before = checkpoint.bytes_read
        part = checkpoint.read(name, shape, rows=Span(4, 20), columns=Span(8, 24))
        assert torch.equal(part, tensors[name][4:20, 8:24])
        assert checkpoint.bytes_read - before == 16 * 16 * 4


@pytest.mark.parametrize("is_gguf", [False, True])
def test_experts_that_a_rank_leaves_to_another_are_no_surprise(tmp_path: Path, is_gguf: bool) -> None:
    MODELS["qwen3moe"].save_pretrained(tmp_path)
    config = load_config(tmp_path)
    gguf_file = write_gguf(tmp_path / "model.gguf", "qwen3moe", GgmlType.F32, in_llama_cpp("qwen3moe"))
    path = gguf_file if is_gguf else tmp_path
    asked = {name: shape for name, shape in shapes(published(MODELS["qwen3moe"])).items() if ".experts.4." not in name}
    read_all(open_checkpoint(path, config, torch.float32), asked)
    smaller = with_experts(config, NUM_EXPERTS - 1)
    with pytest.raises(CheckpointError, match=r"_exps\.weight" if is_gguf else r"experts\.4\."):
        read_all(open_checkpoint(path, smaller, torch.float32), asked)
    with pytest.raises(CheckpointError, match=r"experts\.4\.|_exps\.weight"):
        read_all(open_checkpoint(path, replace(config, moe=None), torch.float32), asked)


def with_experts(config: ModelConfig, num_experts: int) -> ModelConfig:
    assert config.moe is not None
    return replace(config, moe=replace(config.moe, num_experts=num_experts))


@pytest.mark.parametrize("shape", [(4, 7, 3), (14, 3)])
def test_stacks_of_other_shapes_are_named(tmp_path: Path, shape: tuple[int, ...]) -> None:
    MODELS["qwen3moe"].config.save_pretrained(tmp_path)
    save_file({"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(shape)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"gate_up_proj has the wrong shape.*gate_proj and up_proj, found \("):
        open_checkpoint(tmp_path, load_config(tmp_path), torch.float32)
