"""Rectangles of GGUF tensors against whole-tensor dequantization by the gguf package."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GgmlType
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_forms import in_float
from tiny_models import CPU, LLAMA, QWEN2, load_shard, random_tensors, to_gguf_name, write_gguf

from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.model_config import ModelConfig, RopeConfig
from qwen_ray.core.plan import ParallelPlan, Span
from qwen_ray.kernels.cpu.library import VARIANTS, Library, open_library, processor_flags
from qwen_ray.kernels.quantized import dequantize
from qwen_ray.layers.matrix import Matrix
from qwen_ray.models import registry
from qwen_ray.parallel.groups import Groups
from qwen_ray.planner.family import lookup
from qwen_ray.worker.gguf import FIELDS, IN_FOUR_BITS, decoder, open_gguf, to_hf_name
from qwen_ray.worker.stored import BlockLayout
from qwen_ray.worker.weights import open_checkpoint

ROWS, COLUMNS = 24, 1024
PLAIN = [GgmlType.F32, GgmlType.F16, GgmlType.BF16]
SMALL = [GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1]
# Where the half floats of a block lie.
K_QUANTS = {
    GgmlType.Q2_K: slice(80, 84),
    GgmlType.Q3_K: slice(108, 110),
    GgmlType.Q4_K: slice(0, 4),
    GgmlType.Q5_K: slice(0, 4),
    GgmlType.Q6_K: slice(208, 210),
}
HALVES = {kind: slice(0, 4 if kind.name.endswith("_1") else 2) for kind in SMALL} | K_QUANTS
READ = os.preadv
PLANS = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 3), (2, 2)]
LIBRARIES = [opened for v in VARIANTS if v.needs <= processor_flags() and (opened := open_library(v))]


def encoded(kind: GgmlType) -> np.ndarray:
    """A [24, 1024] matrix in the bytes of `kind`."""
    random = np.random.default_rng(kind.value)
    if kind in K_QUANTS:  # the package cannot make them: random bytes with sane scales
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (ROWS * COLUMNS // block_size, block_bytes), dtype=np.uint8)
        scales = blocks[:, K_QUANTS[kind]]
        scales[:] = random.uniform(0.1, 2.0, (len(blocks), scales.shape[1] // 2)).astype(np.float16).view(np.uint8)
        return blocks.reshape(ROWS, -1)
    return gguf.quantize(random.standard_normal((ROWS, COLUMNS), dtype=np.float32), kind)


def write_tensors(path: Path, tensors: dict[str, np.ndarray], kind: GgmlType | None = None) -> Path:
    """`kind`: what bytes encode; without it, arrays say it."""
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_array("tokenizer.ggml.tokens", ["a", "ü", "語"])
    for name, data in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=[*PLAIN, *SMALL, *K_QUANTS], ids=lambda kind: kind.name)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, int]:
    data = encoded(request.param)
    path = tmp_path_factory.mktemp("gguf") / "matrix.gguf"
    write_tensors(path, {"first": data[:1], "matrix": data}, request.param)
    whole = torch.from_numpy(gguf.dequantize(data, request.param).copy())
    assert whole.isfinite().all()
    assert whole.std() > 0
    return path, whole, request.param


@pytest.mark.parametrize("kernels", [None, *LIBRARIES], ids=lambda kernels: kernels.name if kernels else "package")
@pytest.mark.parametrize("kind", [*SMALL, *K_QUANTS], ids=lambda kind: kind.name)
def test_any_bytes_are_decoded_as_by_the_package_to_the_last_bit(kind: GgmlType, kernels: Library | None) -> None:
    random = np.random.default_rng(kind.value)
    blocks = random.integers(0, 256, (77, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    halves = blocks[:, HALVES[kind]]
    signed = random.uniform(-2, 2, (len(blocks), halves.shape[1] // 2)) * 10.0 ** -random.integers(0, 8, (77, 1))
    halves[:] = signed.astype(np.float16).view(np.uint8)  # the least are subnormal
    expected = gguf.dequantize(blocks.reshape(1, -1), kind).reshape(-1)
    assert torch.equal(decoder(kind, kernels)(bytearray(blocks.tobytes())), torch.from_numpy(expected))


def spans(size: int, unit: int = 1) -> st.SearchStrategy[Span]:
    some = st.tuples(st.integers(0, size // unit - 1), st.integers(1, size // unit))
    return some.filter(lambda pair: pair[0] < pair[1]).map(lambda pair: Span(*pair).scaled(unit))


@settings(max_examples=25, deadline=None)
@given(rows=spans(ROWS), columns=spans(COLUMNS) | spans(COLUMNS, 32))
def test_a_rectangle_is_a_part_of_the_whole_and_at_most_covering_blocks_are_read(
    stored: tuple[Path, torch.Tensor, GgmlType], rows: Span, columns: Span
) -> None:
    path, whole, kind = stored
    checkpoint = open_checkpoint(path, QWEN2, torch.float32)
    part = checkpoint.read("matrix", (ROWS, COLUMNS), rows=rows, columns=columns)
    assert torch.equal(part, whole[rows.start : rows.stop, columns.start : columns.stop])
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    covering = (-(-columns.stop // block_size) - columns.start // block_size) * block_bytes
    own = len(columns) / block_size * block_bytes
    if kind in K_QUANTS and (columns.start % 256 or columns.stop % 256):
        assert len(rows) * own < checkpoint.bytes_read <= len(rows) * covering
    else:
        assert checkpoint.bytes_read == len(rows) * covering


@settings(max_examples=25, deadline=None)
@given(rows=spans(ROWS), columns=spans(COLUMNS) | spans(COLUMNS, 32))
def test_what_lies_in_4_bits_is_kept_as_it_is(
    stored: tuple[Path, torch.Tensor, GgmlType], rows: Span, columns: Span
) -> None:
    path, whole, kind = stored
    checkpoint = open_checkpoint(path, QWEN2, torch.float32)
    part = checkpoint.read_four_bits("matrix", (ROWS, COLUMNS), rows=rows, columns=columns)
    if kind not in IN_FOUR_BITS or columns.start % 32:
        assert part is None
        return
    assert part is not None
    wide = whole[rows.start : rows.stop, columns.start : columns.stop]
    # Scales of Q4_K, 6 bits times a half float, have 11 bits then; the others' are those of the file.
    steps = part.scales.float().repeat_interleave(32, dim=1)[:, : len(columns)]
    bound = (steps * 15 + wide.abs()) / 1024 if kind == GgmlType.Q4_K else torch.zeros(())
    assert ((in_float(part) - wide).abs() <= bound).all()


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.name)
def test_the_fields_of_a_block_are_all_of_its_bytes(kind: GgmlType) -> None:
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    layout = BlockLayout(size=size, num_bytes=num_bytes, fields=FIELDS[kind])
    assert layout.bytes_needed(Span(size, 3 * size)) == [Span(num_bytes, 3 * num_bytes)]


def test_what_is_counted_is_what_is_read(
    stored: tuple[Path, torch.Tensor, GgmlType], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _, _ = stored
    sizes: list[int] = []

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(READ(descriptor, buffers, offset))
        return sizes[-1]

    checkpoint = open_checkpoint(path, QWEN2, torch.float32)
    monkeypatch.setattr(os, "preadv", preadv)
    checkpoint.read("matrix", (ROWS, COLUMNS), rows=Span(2, 9), columns=Span(96, 800))
    assert checkpoint.bytes_read == sum(sizes) > 0


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("size", ["0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B"])
def test_ranks_that_cut_k_quants_between_blocks_read_little_more_than_their_shards(
    tmp_path: Path, size: str, kind: GgmlType
) -> None:
    """Rows are cut exactly; of the matrices whose columns are cut one row is read and stands for all.

    A matrix whose columns 256 does not divide is never stored in a K-quant.
    """
    config = lookup(f"Qwen/Qwen2.5-{size}")
    assert config is not None
    hidden, head_dim = config.hidden_size, config.head_dim
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    cut = {"heads": config.q_size, "intermediate": config.intermediate_size}
    rows = {
        name: np.zeros((1, width // block_size * block_bytes), np.uint8)
        for name, width in cut.items()
        if width % block_size == 0
    }
    stored = open_gguf(write_tensors(tmp_path / "rows.gguf", rows, kind), config)
    for shard in (shard for tp in range(2, 9) for shard in ParallelPlan.of(config, tp=tp).shards(config)):
        parts = {"heads": shard.heads.scaled(head_dim), "intermediate": shard.intermediate}
        excess = sum(
            row.read(None, parts[name], torch.float32)[1] - len(parts[name]) / block_size * block_bytes
            for name, row in stored.items()
        )
        attention = 2 * hidden * (len(shard.heads) + len(shard.kv_heads)) * head_dim
        layer = attention + 3 * hidden * len(shard.intermediate)
        ends = len(shard.vocab) * hidden * (1 if config.tie_word_embeddings else 2)
        own = (len(shard.layers) * layer + ends) / block_size * block_bytes
        assert own + len(shard.layers) * hidden * excess <= (1.09 if kind == GgmlType.Q3_K else 1.05) * own, shard


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


@pytest.mark.parametrize("config", [QWEN2, LLAMA], ids=lambda config: config.architecture)
@pytest.mark.parametrize("kind", [GgmlType.Q4_0, GgmlType.Q4_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("tp", [1, 2])
def test_a_rank_in_int4_holds_what_the_file_does(tmp_path: Path, config: ModelConfig, kind: GgmlType, tp: int) -> None:
    path = write_gguf(tmp_path / "model.gguf", config, random_tensors(config), kind)
    for shard in ParallelPlan.of(config, tp=tp).shards(config):
        wide = load_shard(config, shard, open_checkpoint(path, config, torch.float32))
        kept = registry.build(config, shard, Groups(shard, CPU), CPU, torch.float32, max_len=16, quantization="int4")
        kept.load(open_checkpoint(path, config, torch.float32))
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            matrix = kept.get_submodule(f"layers.0.{name}")
            assert isinstance(matrix, Matrix)
            assert matrix.packed is not None
            assert torch.equal(dequantize(matrix.packed), wide.get_parameter(f"layers.0.{name}.weight")), name


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
    arrays = {to_gguf_name(name): tensor.numpy() for name, tensor in tensors.items()}
    path = write_tensors(tmp_path / "model.gguf", arrays | {"rope_freqs.weight": np.ones(8, np.float32)})
    shard = ParallelPlan.of(LLAMA).shard(LLAMA, 0)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight of shape \(8,\)"):
        load_shard(LLAMA, shard, open_checkpoint(path, LLAMA, torch.float32))
    rope = RopeConfig(kind="llama3", factor=8.0, original_max_position_embeddings=32)
    scaled = replace(LLAMA, rope=rope)
    load_shard(scaled, shard, open_checkpoint(path, scaled, torch.float32))


def test_types_that_are_not_read_are_named(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "model.gguf", {"output_norm.weight": np.zeros(64, np.int32)})
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
