"""Checkpoints in few bits: rectangles against whole matrices, and models against those that they stand for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_forms import CONFIGS, FORMS, KEPT, in_float, packed_model
from safetensors.torch import save_file
from tiny_models import CPU, QWEN2, load_shard, random_tensors, write_safetensors

from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.model_config import ModelConfig, MoeConfig
from qwen_ray.core.packed_format import packed_format
from qwen_ray.core.plan import ParallelPlan, Span
from qwen_ray.kernels.quantized import dequantize
from qwen_ray.layers.matrix import Matrix, MatrixStack
from qwen_ray.models import registry
from qwen_ray.parallel.groups import Groups
from qwen_ray.worker import packed
from qwen_ray.worker.weights import FileCheckpoint, open_checkpoint

ROWS, COLUMNS = 48, 192
MLP = "model.layers.0.mlp"
MOE = replace(
    QWEN2,
    architecture="qwen3_moe",
    qkv_bias=False,
    qk_norm=True,
    moe=MoeConfig(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True),
)
NAME, SHAPE = "model.layers.0.mlp.up_proj.weight", (ROWS, COLUMNS)


def config(form: str) -> ModelConfig:
    return replace(QWEN2, packed=packed_format(CONFIGS[form], "config.json"))


def opened(path: Path, form: str, dtype: torch.dtype = torch.float32) -> FileCheckpoint:
    checkpoint = open_checkpoint(path, config(form), dtype)
    assert isinstance(checkpoint, FileCheckpoint)
    return checkpoint


@pytest.fixture(scope="module", params=FORMS)
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, torch.Tensor]:
    path = tmp_path_factory.mktemp("packed")
    parts, whole = FORMS[request.param](ROWS, COLUMNS, 7)
    save_file({NAME.removesuffix("weight") + last: part for last, part in parts.items()}, path / "model.safetensors")
    return request.param, path, whole


def spans(size: int, unit: int = 1) -> st.SearchStrategy[Span]:
    some = st.tuples(st.integers(0, size // unit), st.integers(0, size // unit))
    return some.map(sorted).map(lambda pair: Span(*pair).scaled(unit))


@settings(max_examples=40, deadline=None)
@given(rows=st.none() | spans(ROWS), columns=st.none() | spans(COLUMNS))
def test_a_rectangle_is_a_part_of_the_whole(
    matrix: tuple[str, Path, torch.Tensor], rows: Span | None, columns: Span | None
) -> None:
    form, path, whole = matrix
    part = opened(path, form).read(NAME, SHAPE, rows=rows, columns=columns)
    rows, columns = rows or Span(0, ROWS if rows is None else 0), columns or Span(0, COLUMNS if columns is None else 0)
    torch.testing.assert_close(part, whole[rows.start : rows.stop, columns.start : columns.stop], rtol=0, atol=0)


@settings(max_examples=40, deadline=None)
@given(rows=spans(ROWS), columns=spans(COLUMNS) | spans(COLUMNS, 32))
def test_what_lies_in_4_bits_is_kept_as_it_is(
    matrix: tuple[str, Path, torch.Tensor], rows: Span, columns: Span
) -> None:
    """If groups of 32 columns, from the first one asked for, lie in one group each of the checkpoint's 64."""
    form, path, whole = matrix
    part = opened(path, form).read_four_bits(NAME, SHAPE, rows=rows, columns=columns)
    starts = range(columns.start, columns.stop, 32)
    ours = (range(start, min(start + 32, columns.stop)) for start in starts)
    if form not in KEPT or not rows or not columns or any(group[0] // 64 != group[-1] // 64 for group in ours):
        assert part is None or form == "gptq_act_order"  # a few columns may lie in one group by chance
        return
    assert part is not None
    wide = whole[rows.start : rows.stop, columns.start : columns.stop]
    # The least weight, zero times scale, has 11 bits: of a step the 128th part, at most.
    steps = part.scales.float().repeat_interleave(32, dim=1)[:, : len(columns)]
    assert ((in_float(part) - wide).abs() <= steps / 128).all()


@pytest.mark.parametrize("form", FORMS)
def test_large_matrices_are_read_in_pieces(tmp_path: Path, form: str) -> None:
    parts, whole = FORMS[form](160, COLUMNS, 7)
    save_file(
        {NAME.removesuffix("weight") + last: part for last, part in parts.items()}, tmp_path / "model.safetensors"
    )
    one = opened(tmp_path, form)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "AT_ONCE", 1)  # 64 rows
        checkpoint = opened(tmp_path, form)
        assert torch.equal(checkpoint.read(NAME, (160, COLUMNS)), whole)
        kept = checkpoint.read_four_bits(NAME, (160, COLUMNS))
    expected = one.read_four_bits(NAME, (160, COLUMNS))
    assert (kept is None) == (expected is None) == (form not in KEPT)
    if kept is not None and expected is not None:
        assert torch.equal(kept.values, expected.values)
        assert torch.equal(kept.scales, expected.scales)
        assert torch.equal(kept.least, expected.least)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tp", [1, 3])
def test_a_model_is_what_it_stands_for_and_nothing_is_left_over(tmp_path: Path, form: str, tp: int) -> None:
    stored, wide = packed_model(random_tensors(QWEN2), form)
    if form.startswith("gptq"):  # as its tools do
        stored["model.layers.0.mlp.down_proj.bias"] = torch.zeros(QWEN2.hidden_size)
    path, plain = write_safetensors(tmp_path / "packed", stored), write_safetensors(tmp_path / "plain", wide)
    for shard in ParallelPlan.of(QWEN2, tp=tp).shards(QWEN2):
        checkpoint = opened(path, form)
        model = load_shard(config(form), shard, checkpoint)  # raises where something is left over
        expected = load_shard(QWEN2, shard, open_checkpoint(plain, QWEN2, torch.float32))
        for (name, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(one, other), name


@pytest.mark.parametrize("form", KEPT)
@pytest.mark.parametrize("tp", [1, 2])
def test_a_rank_in_int4_holds_what_the_checkpoint_does(tmp_path: Path, form: str, tp: int) -> None:
    stored, wide = packed_model(random_tensors(QWEN2), form)
    path = write_safetensors(tmp_path / "model", stored)
    for shard in ParallelPlan.of(QWEN2, tp=tp).shards(QWEN2):
        groups = Groups(shard, CPU)
        model = registry.build(QWEN2, shard, groups, CPU, torch.float32, max_len=16, quantization="int4")
        model.load(opened(path, form))
        middle = slice(shard.intermediate.start, shard.intermediate.stop)
        for name, expected in (
            ("gate_up_proj", torch.cat([wide[f"{MLP}.{part}_proj.weight"][middle] for part in ("gate", "up")])),
            ("down_proj", wide[f"{MLP}.down_proj.weight"][:, middle]),
        ):
            matrix = model.get_submodule(f"layers.0.mlp.{name}")
            assert isinstance(matrix, Matrix)
            assert matrix.packed is not None
            steps = matrix.packed.scales.amax().float()
            assert ((dequantize(matrix.packed) - expected).abs() <= steps / 128).all()


def with_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each MLP's matrices once for each of MOE's experts, and what else its layers have."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        of_experts = [name.replace(".mlp.", f".mlp.experts.{expert}.") for expert in range(3)]
        found |= {own: tensor + i for i, own in enumerate(of_experts)} if ".mlp." in name else {name: tensor}
    for layer in range(MOE.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found[f"{prefix}.mlp.gate.weight"] = torch.randn(3, MOE.hidden_size)
        found |= {f"{prefix}.self_attn.{name}_norm.weight": torch.ones(MOE.head_dim) for name in ("q", "k")}
    return found


@pytest.mark.parametrize("form", ["gptq", "awq", "fp8"])
def test_experts_too(tmp_path: Path, form: str) -> None:
    stored, wide = packed_model(with_experts(random_tensors(MOE)), form)
    path, plain = write_safetensors(tmp_path / "packed", stored), write_safetensors(tmp_path / "plain", wide)
    config_of_form = replace(MOE, packed=packed_format(CONFIGS[form], "config.json"))
    for shard in ParallelPlan.of(MOE, tp=2, ep=2).shards(MOE):
        model = load_shard(config_of_form, shard, open_checkpoint(path, config_of_form, torch.float32))
        expected = load_shard(MOE, shard, open_checkpoint(plain, MOE, torch.float32))
        for (name, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(one, other), name
        kept = registry.build(MOE, shard, Groups(shard, CPU), CPU, torch.float32, max_len=16, quantization="int4")
        kept.load(open_checkpoint(path, config_of_form, torch.float32))
        for name in ("gate_up", "down"):
            stack, whole = (each.get_submodule(f"layers.0.mlp.experts.{name}") for each in (kept, expected))
            assert isinstance(stack, MatrixStack)
            assert isinstance(whole, MatrixStack)
            assert stack.packed is not None
            assert whole.weight is not None
            off = torch.stack([dequantize(matrix) for matrix in stack.packed.matrices]) - whole.weight
            rounded = 1 / 128 if form in KEPT else 0.51  # of a step
            assert off.abs().max() <= stack.packed.tensors[1].amax().float() * rounded


def test_a_bias_that_matters_is_not_left_out(tmp_path: Path) -> None:
    stored, _ = packed_model(random_tensors(QWEN2), "gptq")
    stored["model.layers.0.mlp.down_proj.bias"] = torch.full((QWEN2.hidden_size,), 0.1)
    checkpoint = opened(write_safetensors(tmp_path / "model", stored), "gptq")
    (shard,) = ParallelPlan.of(QWEN2).shards(QWEN2)
    with pytest.raises(CheckpointError, match=r"down_proj\.bias of shape \(64,\) is not part of this model"):
        load_shard(config("gptq"), shard, checkpoint)


@pytest.mark.parametrize(
    ("form", "missing"), [("gptq", "qzeros"), ("awq", "scales"), ("compressed", "weight_shape"), ("fp8", "weight")]
)
def test_a_part_that_is_missing_is_named(tmp_path: Path, form: str, missing: str) -> None:
    stored, _ = packed_model(random_tensors(QWEN2), form)
    del stored[f"model.layers.1.self_attn.q_proj.{missing}"]
    path = write_safetensors(tmp_path / "model", stored)
    with pytest.raises(CheckpointError, match=rf"model\.layers\.1\.self_attn\.q_proj\.{missing} is missing"):
        opened(path, form)


@pytest.mark.parametrize(
    ("form", "last", "shape"),
    [
        ("gptq", "qzeros", (1, 4)),
        ("gptq", "g_idx", (32,)),
        ("awq", "qzeros", (2, 8)),
        ("fp8", "weight_scale_inv", (9, 9)),
    ],
)
def test_a_part_of_another_shape_is_named(tmp_path: Path, form: str, last: str, shape: tuple[int, ...]) -> None:
    stored, _ = packed_model(random_tensors(QWEN2), form)
    name = f"model.layers.0.self_attn.q_proj.{last}"
    stored[name] = torch.zeros(shape, dtype=stored[name].dtype)
    path = write_safetensors(tmp_path / "model", stored)
    with pytest.raises(CheckpointError, match=rf"q_proj\.{last} has the wrong shape; expected .*, found \({shape[0]},"):
        opened(path, form)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'; read are gptq, awq, fp8 and compressed"),
        ({}, "quant_method is None"),
        ({"quant_method": "gptq", "bits": 3}, "quantization_config.bits is 3; read are 4, 8"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:lm_head": {}}}, "dynamic is"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version is 'gemv'; read are 'gemm', 'GEMM'"),
        ({"quant_method": "fp8"}, "weight_block_size is None; fp8 is read by blocks"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format is 'marlin-24'"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
            "config_groups is {}",
        ),
        ({"quant_method": "awq", "bits": 4, "group_size": "big"}, "group_size is 'big'"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_name(raw: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        packed_format(raw, "config.json")
