"""Products of which a row's bits depend on that row alone; interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.kernels import quantized, reference
from qwen_ray.kernels.quantized import PackedStack, PackedWeight

pytest.importorskip("triton")
import interpreted

from qwen_ray.kernels.cuda import matmul

interpreted.improve()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE))


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected.to(found.dtype), atol=tolerance, rtol=tolerance)


@dtypes
@given(
    num_rows=st.integers(0, 140),
    out_size=st.integers(1, 100),
    size=st.integers(1, 150),
    has_bias=st.booleans(),
    is_cut=st.booleans(),
)
@settings(max_examples=8, deadline=None)
def test_products(dtype: torch.dtype, num_rows: int, out_size: int, size: int, has_bias: bool, is_cut: bool) -> None:
    x = random(num_rows, size + 3, dtype=dtype)[:, :size] if is_cut else random(num_rows, size, dtype=dtype)
    weight, bias = random(out_size, size, dtype=dtype) / size**0.5, random(out_size, dtype=dtype) if has_bias else None
    found = matmul.linear(x, weight, bias)
    near(found, reference.linear(x.float(), weight.float(), None if bias is None else bias.float()))
    for rows in (slice(0, 1), slice(num_rows // 2, num_rows // 2 + 3), slice(num_rows // 3, None)):
        assert torch.equal(matmul.linear(x[rows], weight, bias), found[rows])


def test_a_tile_is_chosen_by_the_matrix_alone() -> None:
    """The widest with which all of a GPU's units have something to do."""
    sizes = [matmul.tile(out_size, torch.bfloat16)[0] for out_size in (64, 4_608, 8_448, 16_895, 16_896, 151_936)]
    assert sizes == [32, 32, 64, 64, 128, 128]


@dtypes
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_products(dtype: torch.dtype, bits: int) -> None:
    x = random(70, 200, dtype=dtype)
    weight: PackedWeight = quantized.quantize(random(50, 200, dtype=torch.float32) / 200**0.5, bits)
    found = matmul.linear_packed(x, weight, None)
    near(found, quantized.linear_packed(x.float(), weight, None))
    for rows in (slice(0, 1), slice(5, 22), slice(40, 70)):
        assert torch.equal(matmul.linear_packed(x[rows], weight, None), found[rows])


@dtypes
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("parts_at_once", [40, 16384])
def test_experts(dtype: torch.dtype, bits: int | None, parts_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "PARTS_AT_ONCE", parts_at_once)
    num_slots, hidden, inner, top_k = 5, 40, 24, 3
    x = random(40, hidden, dtype=dtype)
    slots = torch.randint(-1, num_slots, (40, top_k), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    slots[slots == 3] = -1  # one expert without tokens
    weights = random(40, top_k, dtype=torch.float32).abs()
    gate_up, down = (stack(num_slots, *shape, dtype, bits) for shape in ((2 * inner, hidden), (hidden, inner)))
    found = matmul.run_experts(x, slots, weights, gate_up, down)
    wide = (m.float() if isinstance(m, torch.Tensor) else m for m in (gate_up, down))
    near(found, reference.run_experts(x.float(), slots, weights, *wide))
    for rows in (slice(0, 1), slice(7, 30)):
        assert torch.equal(matmul.run_experts(x[rows], slots[rows], weights[rows], gate_up, down), found[rows])
    assert matmul.run_experts(x[:0], slots[:0], weights[:0], gate_up, down).shape == (0, hidden)


def stack(count: int, out_size: int, size: int, dtype: torch.dtype, bits: int | None) -> torch.Tensor | PackedStack:
    given = random(count, out_size, size, dtype=dtype) / size**0.5
    if bits is None:
        return given
    packed = quantized.make_stack(count, bits, out_size, size, device=DEVICE)
    for own, weight in zip(packed.matrices, given, strict=True):
        quantized.store(own, 0, weight)
    return packed
