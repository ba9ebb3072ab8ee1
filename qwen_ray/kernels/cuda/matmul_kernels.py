"""Triton's kernels of `matmul.py`: a program has a tile of the result, and adds up its products along whole rows."""

# pyright: reportAttributeAccessIssue=false
# Triton has no types for what a pointer points to.

from __future__ import annotations

import triton
import triton.language as tl

NEIGHBOURS = tl.constexpr(16)  # tiles of rows that share the weights they read


@triton.jit
def add_up_products(
    x_rows: tl.tensor,  # [ROWS, 1], where each begins
    w_rows: tl.tensor,  # [OUTPUTS, 1]
    size: tl.tensor,
    IS_EVEN: tl.constexpr,  # size is a multiple of DEPTH
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> tl.tensor:
    """[ROWS, OUTPUTS] float32."""
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for first in range(0, size, DEPTH):
        at = (first + tl.arange(0, DEPTH))[None, :]
        if IS_EVEN:
            x, w = tl.load(x_rows + at), tl.load(w_rows + at)
        else:
            x, w = tl.load(x_rows + at, mask=at < size, other=0.0), tl.load(w_rows + at, mask=at < size, other=0.0)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["num_rows"])
def multiply(
    x: tl.tensor,
    w: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    out_size: tl.tensor,
    size: tl.tensor,
    x_stride: tl.tensor,
    w_stride: tl.tensor,
    HAS_BIAS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Programs go through the tiles of NEIGHBOURS times ROWS rows, one part of the outputs after the other."""
    num_row_tiles, num_parts = tl.cdiv(num_rows, ROWS), tl.cdiv(out_size, OUTPUTS)
    here = tl.program_id(0) % (NEIGHBOURS * num_parts)
    first_tile = tl.program_id(0) // (NEIGHBOURS * num_parts) * NEIGHBOURS
    neighbours = tl.minimum(num_row_tiles - first_tile, NEIGHBOURS)
    rows = (first_tile + here % neighbours) * ROWS + tl.arange(0, ROWS)
    outputs = here // neighbours * OUTPUTS + tl.arange(0, OUTPUTS)
    # Rows and outputs too many are the last ones again, and not stored.
    x_rows = x + tl.minimum(rows, num_rows - 1)[:, None].to(tl.int64) * x_stride
    w_rows = w + tl.minimum(outputs, out_size - 1)[:, None].to(tl.int64) * w_stride
    total = add_up_products(x_rows, w_rows, size, IS_EVEN, ROWS, OUTPUTS, DEPTH)
    is_output = outputs < out_size
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
    places = out + rows[:, None].to(tl.int64) * out_size + outputs[None, :]
    tl.store(places, total.to(out.dtype.element_ty), mask=(rows < num_rows)[:, None] & is_output[None, :])


@triton.jit(do_not_specialize=["num_choices"])
def multiply_tiles(
    x: tl.tensor,
    w: tl.tensor,  # [slots, out, in]
    out: tl.tensor,
    choices: tl.tensor,  # [tiles * ROWS]
    slots: tl.tensor,  # [tiles]; -1: nothing to do
    num_choices: tl.tensor,
    out_size: tl.tensor,
    size: tl.tensor,
    x_stride: tl.tensor,
    CHOICES_PER_ROW: tl.constexpr,
    IS_EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Rows of x that a tile's choices belong to by OUTPUTS rows of its slot's matrix, to `out` [choices, out]."""
    slot = tl.load(slots + tl.program_id(1)).to(tl.int64)
    if slot >= 0:
        own = tl.load(choices + tl.program_id(1) * ROWS + tl.arange(0, ROWS))
        outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        x_rows = x + (tl.minimum(own, num_choices - 1) // CHOICES_PER_ROW)[:, None].to(tl.int64) * x_stride
        w_rows = w + (slot * out_size + tl.minimum(outputs, out_size - 1))[:, None] * size
        total = add_up_products(x_rows, w_rows, size, IS_EVEN, ROWS, OUTPUTS, DEPTH)
        places = out + own[:, None].to(tl.int64) * out_size + outputs[None, :]
        is_wanted = (own < num_choices)[:, None] & (outputs < out_size)[None, :]
        tl.store(places, total.to(out.dtype.element_ty), mask=is_wanted)
