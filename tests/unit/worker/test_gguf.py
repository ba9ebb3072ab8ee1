"""Rectangles of GGUF tensors against whole-tensor dequantization by the gguf package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GgmlType
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import LLAMA, QWEN2, load_shard, random_tensors, to_gguf_name, write_gguf

from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.model_config import ModelConfig, RopeConfig
from qwen_ray.core.plan import ParallelPlan, Span
from qwen_ray.worker.gguf import to_hf_name
from qwen_ray.worker.weights import open_checkpoint

ROWS, COLUMNS = 24, 1024
PLAIN = [GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.Q4_1]
K_QUANTS = [GgmlType.Q4_K, GgmlType.Q5_K, GgmlType.Q6_K]
PLANS = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 3), (2, 2)]


def encoded(kind: GgmlType) -> np.ndarray:
    """A [24, 1024] matrix in the bytes of `kind`."""
    random = np.random.default_rng(kind.value)
    if kind in K_QUANTS:  # the package cannot make them: random bytes with sane scales (half floats near 1)
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (ROWS * COLUMNS // block_size, block_bytes), dtype=np.uint8)
        scales = slice(208, 210) if kind == GgmlType.Q6_K else slice(0, 4)
        blocks[:, scales] = np.frombuffer(np.full(2, 0.75, np.float16).tobytes(), np.uint8)[
            : scales.stop - scales.start
        ]
        return blocks.reshape(ROWS, -1)
    return gguf.quantize(random.standard_normal((ROWS, COLUMNS), dtype=np.float32), kind)


@pytest.fixture(scope="module", params=PLAIN + K_QUANTS, ids=lambda kind: kind.name)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, int]:
    data = encoded(request.param)
    path = tmp_path_factory.mktemp("gguf") / "matrix.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_array("tokenizer.ggml.tokens", ["a", "ü", "語"])
    writer.add_tensor("first", np.zeros(5, np.float32))
    writer.add_tensor("matrix", data, raw_dtype=request.param)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = torch.from_numpy(gguf.dequantize(data, request.param).copy())
    assert whole.isfinite().all()
    assert whole.std() > 0
    return path, whole, request.param


@settings(max_examples=15, deadline=None)
@given(
    rows=st.tuples(st.integers(0, ROWS - 1), st.integers(1, ROWS)).filter(lambda pair: pair[0] < pair[1]),
    columns=st.tuples(st.integers(0, COLUMNS - 1), st.integers(1, COLUMNS)).filter(lambda pair: pair[0] < pair[1]),
)
def test_a_rectangle_is_a_part_of_the_whole_and_covering_blocks_are_read(
    stored: tuple[Path, torch.Tensor, GgmlType], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    path, whole, kind = stored
    checkpoint = open_checkpoint(path, QWEN2, torch.float32)
    part = checkpoint.read("matrix", (ROWS, COLUMNS), rows=Span(*rows), columns=Span(*columns))
    assert torch.equal(part, whole[slice(*rows), slice(*columns)])
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    num_blocks = -(-columns[1] // block_size) - columns[0] // block_size
    assert checkpoint.bytes_read == (rows[1] - rows[0]) * num_blocks * block_bytes


@pytest.mark.parametrize("config", [QWEN2, LLAMA], ids=lambda config: config.architecture)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (3, 2)])
def test_every_shard_of_a_gguf_equals_that_of_the_tensors_it_was_made_from(
    tmp_path: Path, config: ModelConfig, tp: int, pp: int
) -> None:
    """Names, and for Llama the order of Q and K rows."""
    tensors = random_tensors(config)
    path = write_gguf(tmp_path / "model.gguf", config, tensors)
    for shard in ParallelPlan.of(config, tp=tp, pp=pp).shards(config):
        model = load_shard(config, shard, open_checkpoint(path, config, torch.float32))
        first = shard.layers.start
        heads, kv_heads = shard.heads.scaled(config.head_dim), shard.kv_heads.scaled(config.head_dim)
        prefix = f"model.layers.{first}.self_attn"
        expected = torch.cat(
            [
                tensors[f"{prefix}.q_proj.weight"][heads.start : heads.stop],
                tensors[f"{prefix}.k_proj.weight"][kv_heads.start : kv_heads.stop],
                tensors[f"{prefix}.v_proj.weight"][kv_heads.start : kv_heads.stop],
            ]
        )
        assert torch.equal(model.get_parameter("layers.0.self_attn.qkv_proj.weight"), expected)
        middle = slice(shard.intermediate.start, shard.intermediate.stop)
        down = tensors[f"model.layers.{first}.mlp.down_proj.weight"][:, middle]
        assert torch.equal(model.get_parameter("layers.0.mlp.down_proj.weight"), down)


@pytest.mark.parametrize(("tp", "pp"), PLANS)
@pytest.mark.parametrize("kind", [GgmlType.Q4_1, GgmlType.Q8_0, GgmlType.F16], ids=lambda kind: kind.name)
def test_no_rank_reads_more_than_its_shard(tmp_path: Path, kind: GgmlType, tp: int, pp: int) -> None:
    """In the file's own encoding. Heads of 32 columns, so that cuts fall between quantized blocks."""
    config = replace(LLAMA, head_dim=32)
    path = write_gguf(tmp_path / "model.gguf", config, random_tensors(config), kind)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    for shard in ParallelPlan.of(config, tp=tp, pp=pp).shards(config):
        checkpoint = open_checkpoint(path, config, torch.float32)
        model = load_shard(config, shard, checkpoint)
        own = sum(p.numel() / block_size * block_bytes if p.ndim == 2 else p.numel() * 4 for p in model.parameters())
        assert own <= checkpoint.bytes_read <= 1.05 * own


def test_a_file_without_an_output_matrix_heads_with_the_embedding(tmp_path: Path) -> None:
    untied = replace(LLAMA, tie_word_embeddings=False)
    tensors = random_tensors(LLAMA)
    path = write_gguf(tmp_path / "model.gguf", untied, tensors)
    model = load_shard(untied, ParallelPlan.of(untied).shard(untied, 0), open_checkpoint(path, untied, torch.float32))
    assert torch.equal(model.get_parameter("lm_head.matrix.weight"), tensors["model.embed_tokens.weight"])


def test_rope_frequencies_belong_to_llama3_scaling_only(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA)
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, tensor in tensors.items():
        writer.add_tensor(to_gguf_name(name), tensor.numpy())
    writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shard = ParallelPlan.of(LLAMA).shard(LLAMA, 0)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight of shape \(8,\)"):
        load_shard(LLAMA, shard, open_checkpoint(path, LLAMA, torch.float32))
    rope = RopeConfig(kind="llama3", factor=8.0, original_max_position_embeddings=32)
    scaled = replace(LLAMA, rope=rope)
    load_shard(scaled, shard, open_checkpoint(path, scaled, torch.float32))


def test_types_that_are_not_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_tensor("output_norm.weight", np.zeros(64, np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"output_norm\.weight has type I32"):
        open_checkpoint(path, QWEN2, torch.float32)


def test_a_file_that_is_cut_short_or_something_else(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", QWEN2, random_tensors(QWEN2))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="ends inside of tensor"):
        open_checkpoint(path, QWEN2, torch.float32)
    path.write_bytes(b"GGML" * 10)
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        open_checkpoint(path, QWEN2, torch.float32)
    with pytest.raises(CheckpointError, match="must be one file"):
        open_checkpoint(tmp_path, QWEN2, torch.float32, "gguf")


def test_names() -> None:
    assert to_hf_name("blk.17.ffn_down.weight") == "model.layers.17.mlp.down_proj.weight"
    assert to_hf_name("blk.0.attn_k.bias") == "model.layers.0.self_attn.k_proj.bias"
    assert to_hf_name("token_embd.weight") == "model.embed_tokens.weight"
    assert to_hf_name("blk.0.ssm_in.weight") == "blk.0.ssm_in.weight"
