"""Tiny checkpoints for the worker's tests, as files. Not a test itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType
from safetensors.torch import save_file

from qwen_ray.core.model_config import ModelConfig, MoeConfig, RopeConfig
from qwen_ray.core.plan import EngineConfig, ParallelPlan, ReplicaSpec, Shard
from qwen_ray.core.request import SamplingParams
from qwen_ray.core.step import Chunk, NewSequence, StepBatch, StepResult
from qwen_ray.models import registry
from qwen_ray.models.stage import Stage
from qwen_ray.parallel.groups import Groups
from qwen_ray.worker.gguf import IN_LAYER, TOP_LEVEL
from qwen_ray.worker.local import LocalExecutor
from qwen_ray.worker.weights import CountedCheckpoint

CPU = torch.device("cpu")
QWEN2 = ModelConfig(
    architecture="qwen2",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope=RopeConfig(),
    max_position_embeddings=128,
    tie_word_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
)
LLAMA = replace(QWEN2, architecture="llama", qkv_bias=False, tie_word_embeddings=True)


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by its Hugging Face name."""
    hidden, middle = config.hidden_size, config.intermediate_size
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for name, size in (("q", config.q_size), ("k", config.kv_size), ("v", config.kv_size)):
            found[f"{layer}.self_attn.{name}_proj.weight"] = (size, hidden)
            if config.qkv_bias:
                found[f"{layer}.self_attn.{name}_proj.bias"] = (size,)
        found[f"{layer}.self_attn.o_proj.weight"] = (hidden, config.q_size)
        found[f"{layer}.mlp.gate_proj.weight"] = (middle, hidden)
        found[f"{layer}.mlp.up_proj.weight"] = (middle, hidden)
        found[f"{layer}.mlp.down_proj.weight"] = (hidden, middle)
        found[f"{layer}.input_layernorm.weight"] = (hidden,)
        found[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    found["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (config.vocab_size, hidden)
    return found


def random_tensors(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(shape, generator=generator) * 0.3 + (1.0 if name.endswith("norm.weight") else 0.0)).to(dtype)
        for name, shape in shapes(config).items()
    }


def write_safetensors(directory: Path, tensors: dict[str, torch.Tensor], num_files: int = 1) -> Path:
    """One file, or `num_files` with an index."""
    directory.mkdir(exist_ok=True)
    if num_files == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map: dict[str, str] = {}
    for i in range(num_files):
        file_name = f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[i::num_files]}
        save_file(part, directory / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def to_gguf_name(name: str) -> str:
    for ours, theirs in TOP_LEVEL.items():
        if name == theirs:
            return ours
    prefix, kind = name.rsplit(".", 1)
    _, _, layer, module = prefix.split(".", 3)
    return f"blk.{layer}.{next(k for k, v in IN_LAYER.items() if v == module)}.{kind}"


def interleave(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to Q and K of a Llama."""
    return weight.view(num_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, config: ModelConfig, tensors: dict[str, torch.Tensor], matrix_type: GgmlType = GgmlType.F32
) -> Path:
    """Matrices as `matrix_type`, vectors as F32."""
    writer = gguf.GGUFWriter(path, config.architecture)
    for name, tensor in tensors.items():
        if config.architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = interleave(tensor, heads)
        kind = matrix_type if tensor.ndim == 2 else GgmlType.F32
        data = gguf.quantize(np.ascontiguousarray(tensor.numpy()), kind)
        writer.add_tensor(to_gguf_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load_shard(config: ModelConfig, shard: Shard, checkpoint: CountedCheckpoint) -> Stage:
    """One rank's part, loaded without its peers: loading needs none."""
    model = registry.build(config, shard, Groups(shard, CPU), CPU, torch.float32, max_len=16)
    model.load(checkpoint)
    checkpoint.check_extra(shard.layers)
    return model


def replica_spec(config: ModelConfig, path: Path, plan: ParallelPlan | None = None, **other: str) -> ReplicaSpec:
    engine = EngineConfig(num_blocks=64, block_size=4, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32)
    plan = plan or ParallelPlan.of(config)
    fields = {"name": "tiny", "dtype": "float32", "path": str(path), **other}
    return ReplicaSpec(config=config, plan=plan, engine=engine, **fields)


QWEN3_MOE = replace(
    QWEN2,
    architecture="qwen3_moe",
    qkv_bias=False,
    qk_norm=True,
    moe=MoeConfig(
        num_experts=5, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True, mlp_only_layers=(1,)
    ),
)
PROMPTS = [tuple(range(10)), (5, 80, 3), (17,)]
NUM_NEW = 8


def new(sequence_id: int, prompt: tuple[int, ...], sampling: SamplingParams) -> NewSequence:
    return NewSequence(
        sequence_id=sequence_id,
        token_ids=prompt,
        num_prompt_tokens=len(prompt),
        sampling=sampling,
        seed=11 + sequence_id,
        stop_token_ids=(),
    )


async def generate(
    executor: LocalExecutor, prompts: list[tuple[int, ...]], sampling: SamplingParams
) -> tuple[list[list[int]], StepResult]:
    """NUM_NEW tokens for each prompt, all in one batch; the tokens, and the first step's result."""
    batch = StepBatch(
        step_id=0,
        new=tuple(new(i, prompt, sampling) for i, prompt in enumerate(prompts)),
        chunks=tuple(
            Chunk(sequence_id=i, start=0, count=len(prompt), new_blocks=tuple(range(8 * i, 8 * i + 8)))
            for i, prompt in enumerate(prompts)
        ),
    )
    first = result = await executor.submit(batch)
    outputs: list[list[int]] = [[] for _ in prompts]
    for step in range(NUM_NEW):
        assert result.step_id == step
        for s in result.samples:
            outputs[s.sequence_id].append(s.token_id)
        chunks = tuple(
            Chunk(sequence_id=i, start=len(prompt) + step, count=1, new_tokens=(outputs[i][-1],))
            for i, prompt in enumerate(prompts)
        )
        result = await executor.submit(StepBatch(step_id=step + 1, chunks=chunks))
    await executor.submit(StepBatch(step_id=99, chunks=(), dropped=tuple(range(len(prompts)))))
    return outputs, first
