"""Rectangles of safetensors files: the right numbers, no byte too many, and errors that say what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_models import CPU, QWEN2, load_shard, random_tensors, shapes, write_safetensors

from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.plan import ParallelPlan, Span
from qwen_ray.worker.weights import CountedCheckpoint, open_checkpoint

NAME = "model.layers.1.mlp.down_proj.weight"
PLANS = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 2), (3, 3)]


def opened(path: Path, dtype: torch.dtype = torch.float32) -> CountedCheckpoint:
    return open_checkpoint(path, QWEN2, dtype)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16", "float64"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    tensor = torch.randn(13, 7, generator=torch.Generator().manual_seed(1)).to(getattr(torch, request.param))
    path = tmp_path_factory.mktemp("stored")
    save_file({"a": torch.zeros(3), "matrix": tensor, "vector": tensor[:, 0].contiguous()}, path / "x.safetensors")
    return path, tensor


def spans(size: int) -> st.SearchStrategy[Span | None]:
    some = st.tuples(st.integers(0, size), st.integers(0, size)).filter(lambda pair: pair[0] <= pair[1])
    return st.none() | some.map(lambda pair: Span(*pair))


def as_slice(span: Span | None) -> slice:
    return slice(None) if span is None else slice(span.start, span.stop)


@settings(max_examples=40, deadline=None)
@given(rows=spans(13), columns=spans(7))
def test_a_rectangle_is_what_slicing_gives_and_only_it_is_read(
    stored: tuple[Path, torch.Tensor], rows: Span | None, columns: Span | None
) -> None:
    path, tensor = stored
    checkpoint = opened(path, torch.bfloat16)
    part = checkpoint.read("matrix", (13, 7), rows=rows, columns=columns)
    expected = tensor[as_slice(rows), as_slice(columns)]
    assert torch.equal(part, expected.to(torch.bfloat16))
    assert checkpoint.bytes_read == expected.numel() * tensor.element_size()
    assert torch.equal(checkpoint.read("vector", (13,), rows=rows), tensor[as_slice(rows), 0].to(torch.bfloat16))


def test_matrices_larger_than_one_piece(tmp_path: Path) -> None:
    tensor = torch.randn(700, 999)
    save_file({"matrix": tensor}, tmp_path / "x.safetensors")
    checkpoint = opened(tmp_path)
    assert torch.equal(checkpoint.read("matrix", (700, 999), rows=Span(3, 650)), tensor[3:650])
    assert torch.equal(checkpoint.read("matrix", (700, 999), columns=Span(1, 998)), tensor[:, 1:998])


@pytest.mark.parametrize("num_files", [1, 3])
def test_the_parts_of_all_ranks_make_the_whole(tmp_path: Path, num_files: int) -> None:
    tensors = random_tensors(QWEN2)
    write_safetensors(tmp_path, tensors, num_files)
    whole = load_shard(QWEN2, ParallelPlan.of(QWEN2).shard(QWEN2, 0), opened(tmp_path))
    halves = [load_shard(QWEN2, shard, opened(tmp_path)) for shard in ParallelPlan.of(QWEN2, tp=2).shards(QWEN2)]
    assert torch.equal(whole.get_parameter("lm_head.matrix.weight"), tensors["lm_head.weight"])
    for name in ("embed_tokens.weight", "lm_head.matrix.weight"):
        parts = [half.get_parameter(name) for half in halves]
        assert torch.equal(torch.cat(parts), whole.get_parameter(name))
    down = [half.get_parameter("layers.1.mlp.down_proj.weight") for half in halves]
    assert torch.equal(torch.cat(down, dim=1), tensors[NAME])


@pytest.mark.parametrize(("tp", "pp"), PLANS)
@pytest.mark.parametrize("tied", [False, True])
def test_no_rank_reads_more_than_its_shard(tmp_path: Path, tp: int, pp: int, tied: bool) -> None:
    config = replace(QWEN2, tie_word_embeddings=tied)
    write_safetensors(tmp_path, random_tensors(config, torch.bfloat16), 2)
    for shard in ParallelPlan.of(config, tp=tp, pp=pp).shards(config):
        checkpoint = open_checkpoint(tmp_path, config, torch.float32)
        model = load_shard(config, shard, checkpoint)
        num_elements = sum(parameter.numel() for parameter in model.parameters())
        assert num_elements * 2 <= checkpoint.bytes_read <= 1.05 * num_elements * 2


def test_progress_adds_up_to_the_shard(tmp_path: Path) -> None:
    write_safetensors(tmp_path, random_tensors(QWEN2, torch.bfloat16))
    seen: list[int] = []
    checkpoint = open_checkpoint(tmp_path, QWEN2, torch.float32, on_read=seen.append)
    model = load_shard(QWEN2, ParallelPlan.of(QWEN2).shard(QWEN2, 0), checkpoint)
    assert sum(seen) == sum(parameter.nbytes for parameter in model.parameters())


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = random_tensors(QWEN2)
    del tensors[NAME]
    write_safetensors(tmp_path, tensors)
    with pytest.raises(CheckpointError) as error:
        load_shard(QWEN2, ParallelPlan.of(QWEN2).shard(QWEN2, 0), opened(tmp_path))
    for fact in (NAME, str(tmp_path), "(64, 128)", "missing"):
        assert fact in str(error.value)


def test_a_wrong_shape_is_shown_beside_the_right_one(tmp_path: Path) -> None:
    tensors = random_tensors(QWEN2) | {NAME: torch.zeros(64, 127)}
    write_safetensors(tmp_path, tensors)
    with pytest.raises(CheckpointError) as error:
        load_shard(QWEN2, ParallelPlan.of(QWEN2).shard(QWEN2, 0), opened(tmp_path))
    for fact in (NAME, "model.safetensors", "(64, 128)", "(64, 127)"):
        assert fact in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["visual.patch_embed.weight", "model.layers.3.mlp.up_proj.weight", "model.layers.0.self_attn.q_norm.weight"],
)
def test_an_extra_tensor_is_named_by_some_rank(tmp_path: Path, name: str) -> None:
    write_safetensors(tmp_path, random_tensors(QWEN2) | {name: torch.zeros(5, 2)})
    messages: list[str] = []
    for shard in ParallelPlan.of(QWEN2, pp=3).shards(QWEN2):
        try:
            load_shard(QWEN2, shard, opened(tmp_path))
        except CheckpointError as error:
            messages.append(str(error))
    assert messages
    for fact in (name, "model.safetensors", "(5, 2)"):
        assert fact in messages[0]


def test_harmless_extras_are_passed_over(tmp_path: Path) -> None:
    config = replace(QWEN2, tie_word_embeddings=True)
    extra = {"lm_head.weight": torch.zeros(96, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    write_safetensors(tmp_path, random_tensors(config) | extra)
    for shard in ParallelPlan.of(config, pp=2).shards(config):
        load_shard(config, shard, open_checkpoint(tmp_path, config, torch.float32))


def test_a_dtype_that_is_no_float_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path, random_tensors(QWEN2) | {NAME: torch.zeros(64, 128, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=rf"{NAME}.*I8"):
        opened(tmp_path)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*convert the model to safetensors"):
        opened(tmp_path)


def test_an_empty_directory_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        opened(tmp_path)


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    write_safetensors(tmp_path, random_tensors(QWEN2))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*cut short"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 8, b"\x05\0\0\0\0\0\0\0nope!", b"\x02\0\0\0\0\0\0\0[]", b'\x09\0\0\0\0\0\0\0{"a": {}}'],
)
def test_a_file_that_is_something_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a safetensors file"):
        opened(tmp_path)


def test_an_index_that_lies(tmp_path: Path) -> None:
    write_safetensors(tmp_path, random_tensors(QWEN2), 2)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    file_name = good[NAME]
    for weight_map, expected in [
        (good | {"no.such.tensor": file_name}, "no.such.tensor"),
        (good | {NAME: "absent.safetensors"}, "absent.safetensors"),
        (good | {NAME: "../outside.safetensors"}, "not the name of a file"),
        (good | {NAME: 7}, "not an index"),
        ([], "not an index"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=expected):
            opened(tmp_path)


def test_dummy_weights_have_the_true_shapes_and_come_out_the_same_again(tmp_path: Path) -> None:
    shard = ParallelPlan.of(QWEN2, tp=2).shard(QWEN2, 1)
    models = [load_shard(QWEN2, shard, open_checkpoint(tmp_path, QWEN2, torch.float32, "dummy")) for _ in range(2)]
    for (name, first), second in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(first, second), name
        if name.endswith("norm.weight"):
            assert torch.equal(first, torch.ones_like(first))
    embedding = models[0].get_parameter("embed_tokens.weight")
    assert 0.015 < float(embedding.std()) < 0.025
    assert models[0].get_parameter("layers.0.mlp.down_proj.weight").device == CPU


def test_shapes_cover_the_model() -> None:
    num_elements = sum(torch.Size(shape).numel() for shape in shapes(QWEN2).values())
    assert num_elements == QWEN2.num_parameters
