"""The checkpoint that every server is given: a true shape, the true vocabulary, random weights of a fixed seed.

Knows the names of weights in Hugging Face's files. Nothing of what any server makes of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.peers import place
from benchmarks.peers.tokenizer import write_tokenizer
from benchmarks.shapes import DENSE, MOE

SHAPES: dict[str, dict[str, Any]] = {"dense": DENSE, "moe": MOE}
SEED = 20_260
STD = 0.02


def make(model: str) -> Path:
    """The folder of `model`, made now where it is missing."""
    target = place.checkpoint(model)
    if not target.exists():
        with place.made_whole(target) as folder:
            write(SHAPES[model], folder)
    return target


def write(config: dict[str, Any], folder: Path) -> None:
    """config.json, generation_config.json, model.safetensors and the tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generation = {"eos_token_id": config["eos_token_id"], "pad_token_id": config["bos_token_id"], "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    draw = torch.Generator().manual_seed(SEED)
    weights = {name: weight(name, shape, draw) for name, shape in parameters(config)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)


def weight(name: str, shape: tuple[int, ...], draw: torch.Generator) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape).normal_(std=STD, generator=draw).to(torch.bfloat16)


def parameters(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight, in the order of the layers."""
    hidden = config["hidden_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    query, key = (config[name] * head_dim for name in ("num_attention_heads", "num_key_value_heads"))
    is_moe = "num_experts" in config
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
            yield f"{prefix}.self_attn.{name}.weight", (rows, hidden)
            if not is_moe:  # Qwen2 has these biases, Qwen3 norms in their place
                yield f"{prefix}.self_attn.{name}.bias", (rows,)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, query)
        if is_moe:
            yield f"{prefix}.self_attn.q_norm.weight", (head_dim,)
            yield f"{prefix}.self_attn.k_norm.weight", (head_dim,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        if is_moe:
            yield f"{prefix}.mlp.gate.weight", (config["num_experts"], hidden)
        inner = config["moe_intermediate_size" if is_moe else "intermediate_size"]
        experts = [f"experts.{number}." for number in range(config["num_experts"])] if is_moe else [""]
        for expert in experts:
            yield f"{prefix}.mlp.{expert}gate_proj.weight", (inner, hidden)
            yield f"{prefix}.mlp.{expert}up_proj.weight", (inner, hidden)
            yield f"{prefix}.mlp.{expert}down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
