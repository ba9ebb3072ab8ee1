"""A MoE checkpoint with known truth: the dense demo model by sparse upcycling (Komatsuzaki et al. 2023). Not a test.

Every MLP is copied into every expert and the router is random. Whatever the router picks, weights that add up to 1 give
the dense MLP's output: the model must say what the demo model says. It is a Qwen2-MoE without biases and without a
shared expert, whose attention is Llama's.
"""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qwen_ray.core.model_config import ModelConfig
from qwen_ray.source.config_file import load_config
from qwen_ray.text.gguf_tokenizer import read_gguf_vocabulary
from qwen_ray.worker.gguf import open_gguf

Tensors = dict[str, torch.Tensor]


def upcycle(gguf: Path, folder: Path, *, num_experts: int = 4, top_k: int = 2, perturbation: float = 0.0) -> Path:
    """Write config, weights in float32 (1.5 GB of the demo model with 4 experts) and tokenizer into `folder`.

    `perturbation`: how much the weights of each expert differ from the dense MLP's, relative to their own deviation;
    experts that differ do not give the dense model's output. Returns `folder`.
    """
    config = load_config(gguf)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_moe(config, num_experts, top_k)))
    write_tokenizer(folder, gguf)
    stored = open_gguf(gguf, config)
    files: dict[str, list[str]] = {}  # a file for each layer, so that little is in memory at a time
    for name in stored:
        layer = re.match(r"model\.layers\.(\d+)", name)
        if layer or name != "lm_head.weight" or not config.tie_word_embeddings:
            files.setdefault(f"layer-{int(layer[1]):02}" if layer else "outside-of-layers", []).append(name)
    weight_map: dict[str, str] = {}
    for stem, names in files.items():
        tensors: Tensors = {}
        for name in names:
            tensor, _ = stored[name].read(None, None, torch.float32)
            tensors |= experts(name, tensor, num_experts, perturbation) if ".mlp." in name else {name: tensor}
        if stem.startswith("layer"):
            router = f"model.layers.{int(stem.removeprefix('layer-'))}.mlp.gate.weight"
            tensors[router] = noise(router, (num_experts, config.hidden_size)) * 0.1
        save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"{stem}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def experts(name: str, tensor: torch.Tensor, num_experts: int, perturbation: float) -> Tensors:
    """`model.layers.0.mlp.up_proj.weight` of every expert."""
    found: Tensors = {}
    for expert in range(num_experts):
        own = name.replace(".mlp.", f".mlp.experts.{expert}.")
        found[own] = tensor.clone()
        if perturbation:
            found[own] += perturbation * tensor.std() * noise(own, tuple(tensor.shape))
    return found


def noise(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Of one tensor always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def shape_of(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of the demo model, whatever is made of it."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def to_moe(config: ModelConfig, num_experts: int, top_k: int) -> dict[str, Any]:
    """config.json of the dense `config` with experts in place of its MLPs."""
    assert config.rope.kind == "default", "the demo model's"
    assert not config.qkv_bias, "a Llama's"
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        **shape_of(config),
        "qkv_bias": False,
        "use_sliding_window": False,
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "moe_intermediate_size": config.intermediate_size,
        "shared_expert_intermediate_size": 0,
        "decoder_sparse_step": 1,
        "torch_dtype": "float32",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }


def write_tokenizer(folder: Path, gguf: Path) -> None:
    vocabulary = read_gguf_vocabulary(gguf)
    vocabulary.backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": vocabulary.chat_templates["default"],
        **vocabulary.special_tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
