"""Quantized weights in layers: what a rank holds of them, the same each time, and products that ignore their batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.core.model_config import ModelConfig, Quantization, RopeConfig
from qwen_ray.core.plan import ParallelPlan, Shard, Span
from qwen_ray.kernels.quantized import dequantize, quantize
from qwen_ray.layers.embedding import Embedding, Head
from qwen_ray.layers.linear import ColumnParallelLinear, RowParallelLinear
from qwen_ray.layers.matrix import Matrix
from qwen_ray.layers.site import Groups, Site

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    architecture="qwen2",
    vocab_size=90,
    hidden_size=80,
    intermediate_size=160,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=20,
    rms_norm_eps=1e-6,
    rope=RopeConfig(),
    max_position_embeddings=32,
    tie_word_embeddings=True,
    qkv_bias=False,
    qk_norm=False,
)
quantizations = pytest.mark.parametrize("quantization", ["int8", "int4"])


class Whole:
    """A checkpoint with one matrix under every name, and one vector."""

    def __init__(self, out_size: int, in_size: int) -> None:
        self.matrix = torch.randn(out_size, in_size, generator=torch.Generator().manual_seed(out_size))

    def read(
        self, name: str, shape: tuple[int, ...], *, rows: Span | None = None, columns: Span | None = None
    ) -> torch.Tensor:
        found = self.matrix if name.endswith("weight") else self.matrix[:, 0]
        assert tuple(found.shape) == shape
        found = found if rows is None else found[rows.start : rows.stop]
        return (found if columns is None else found[:, columns.start : columns.stop]).clone()

    def read_four_bits(self, *_asked: object, **_cut: object) -> None:
        return None


def site(quantization: Quantization, shard: Shard | None = None, dtype: torch.dtype = torch.float32) -> Site:
    shard = shard or ParallelPlan.of(CONFIG).shard(CONFIG, 0)
    return Site.of(shard, Groups(shard, CPU), CPU, dtype, quantization)


def held(matrix: Matrix) -> torch.Tensor:
    assert matrix.packed is not None
    return dequantize(matrix.packed)


@quantizations
@given(cut=st.tuples(st.integers(0, 160), st.integers(0, 160)).map(sorted))
@settings(max_examples=20, deadline=None)
def test_a_part_is_rounded_by_itself_wherever_it_is_cut(quantization: Quantization, cut: list[int]) -> None:
    """Groups begin with the part's first column: a cut that falls into a group of the whole matrix is no matter."""
    checkpoint, span = Whole(80, 160), Span(*cut)
    bits = 8 if quantization == "int8" else 4
    part = checkpoint.matrix[:, span.start : span.stop]
    row = RowParallelLinear(site(quantization), 160, span, 80)
    row.load(checkpoint, "down_proj")
    assert torch.equal(held(row), dequantize(quantize(part, bits)))
    x = torch.ones(3, len(span))
    torch.testing.assert_close(row.partial(x), x @ held(row).t(), atol=0.02, rtol=0.01)
    column = ColumnParallelLinear(site(quantization), 160, {"a": (80, Span(0, 80)), "b": (80, Span(3, 9))}, bias=True)
    column.load(checkpoint, "mlp")
    whole = dequantize(quantize(checkpoint.matrix, bits))
    assert torch.equal(held(column), torch.cat((whole, whole[3:9])))


@quantizations
def test_embedding_and_head_are_one_matrix_in_8_bits(quantization: Quantization) -> None:
    checkpoint = Whole(90, 80)
    here = site(quantization)
    embedding = Embedding(here, 90, 80)
    embedding.load(checkpoint, "model.embed_tokens")
    whole = dequantize(quantize(checkpoint.matrix, 8))
    ids = torch.tensor([3, 89, 3, 0])
    assert torch.equal(embedding(ids), whole[ids])
    head = Head(here, embedding)
    here.groups.tensor.gather = lambda x, sizes: x  # pyright: ignore[reportAttributeAccessIssue]
    x = torch.randn(2, 80, generator=torch.Generator().manual_seed(0))
    logits = head(x)
    assert logits is not None
    torch.testing.assert_close(logits, x @ whole.t(), atol=0.2, rtol=0.05)


@quantizations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(num_rows=st.integers(2, 40), data=st.data())
@settings(max_examples=15, deadline=None)
def test_a_row_does_not_depend_on_its_batch(
    quantization: Quantization, dtype: torch.dtype, num_rows: int, data: st.DataObject
) -> None:
    layer = ColumnParallelLinear(site(quantization, dtype=dtype), 160, {"a": (80, Span(0, 80))}, bias=False)
    layer.load(Whole(80, 160), "mlp")
    x = torch.randn(num_rows, 160, generator=torch.Generator().manual_seed(num_rows)).to(dtype)
    first = data.draw(st.integers(0, num_rows - 1))
    last = data.draw(st.integers(first + 1, num_rows))
    assert torch.equal(layer(x)[first:last], layer(x[first:last]))


def test_a_rank_that_comes_again_holds_the_same_bits() -> None:
    shard = replace(ParallelPlan.of(CONFIG, tp=2).shard(CONFIG, 1))
    layers = [RowParallelLinear(site("int4", shard), 160, Span(96, 160), 80) for _ in range(2)]
    for layer in layers:
        layer.load(Whole(80, 160), "down_proj")
    for one, other in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        assert torch.equal(one, other)
