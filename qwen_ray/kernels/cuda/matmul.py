"""Products on CUDA whose bits do not depend on how many rows there are: one tile and one order of sums for all.

torch chooses how it multiplies by a product's shape, so that a row's last bits depend on what is computed beside it.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# Kernels say what their parameters are to Triton; they are called with tensors of torch, and with warps and stages.

from __future__ import annotations

import torch

from qwen_ray.kernels import reference
from qwen_ray.kernels.cuda import matmul_kernels, packed, packed_experts, pointwise
from qwen_ray.kernels.cuda.packed_experts import PARTS_AT_ONCE, Tiles, in_tiles
from qwen_ray.kernels.quantized import Matrices, PackedStack, PackedWeight

ROWS = 64  # of a tile: as few as Hopper's units multiply
PROGRAMS = 132  # that are wanted: the units of an H100. A matrix of fewer outputs is cut into narrower tiles.
WIDEST, NARROWEST = 128, 32  # outputs of a tile


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `reference.linear`; elements of a row follow each other in the weight."""
    x = x if x.stride(1) == 1 else x.contiguous()
    (num_rows, size), out_size = x.shape, weight.shape[0]
    out = torch.empty(num_rows, out_size, dtype=x.dtype, device=x.device)
    if out.numel():
        outputs, depth, stages = tile(out_size, x.dtype)
        matmul_kernels.multiply[(-(-num_rows // ROWS) * -(-out_size // outputs),)](
            x,
            weight,
            weight if bias is None else bias,
            out,
            num_rows,
            out_size,
            size,
            x.stride(0),
            weight.stride(0),
            HAS_BIAS=bias is not None,
            IS_EVEN=size % depth == 0,
            ROWS=ROWS,
            OUTPUTS=outputs,
            DEPTH=depth,
            num_warps=4,
            num_stages=stages,
        )
    return out


def linear_packed(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """As `packed.linear_packed`; as few rows at a time as that has partial sums of, for which there is room."""
    if x.dtype in packed.DTYPES:
        pieces = [packed.multiply_few(rows, weight, bias, packed.ROWS[-1]) for rows in x.split(packed.FEW_ROWS)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return packed.multiply_wide(x, weight, bias, linear)


def tile(out_size: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Outputs of a tile, columns that it multiplies at once, stages: by the matrix alone."""
    if dtype is torch.float32:
        return NARROWEST, 16, 2
    outputs = WIDEST
    while outputs > NARROWEST and out_size < PROGRAMS * outputs:
        outputs //= 2
    return outputs, 64, 4


def run_experts(
    x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, gate_up: Matrices, down: Matrices
) -> torch.Tensor:
    """As `reference.run_experts`."""
    if x.shape[0] == 0 or len(gate_up) == 0:
        return torch.zeros_like(x)
    step = max(1, PARTS_AT_ONCE // slots.shape[1])
    pieces = zip(x.split(step), slots.split(step), weights.split(step), strict=True)
    return torch.cat([reference.sum_choices(_run(rows, own, gate_up, down), given) for rows, own, given in pieces])


def _run(x: torch.Tensor, slots: torch.Tensor, gate_up: Matrices, down: Matrices) -> torch.Tensor:
    """What every choice gives, [N, k, hidden]; nothing where it is not here."""
    if isinstance(gate_up, PackedStack) or isinstance(down, PackedStack):
        assert isinstance(gate_up, PackedStack), "both are packed, or neither"
        assert isinstance(down, PackedStack), "both are packed, or neither"
        if x.dtype in packed.DTYPES:
            return packed_experts.run_tiles(x, slots, gate_up, down)
        return packed_experts.run_by_slot(x, slots, gate_up, down, linear_packed)
    tiles = in_tiles(slots, len(gate_up), ROWS)
    inner = pointwise.silu_and_mul(_multiply(x, tiles, slots.shape[1], slots.numel(), gate_up))
    return _multiply(inner, tiles, 1, slots.numel(), down).view(*slots.shape, x.shape[1])


def _multiply(
    x: torch.Tensor, tiles: Tiles, choices_per_row: int, num_choices: int, stack: torch.Tensor
) -> torch.Tensor:
    """Row c // choices_per_row of x by the matrix of choice c: [choices, out], zeros for those that are not here."""
    assert stack.is_contiguous(), "found by counting"
    _, out_size, size = stack.shape
    out = x.new_zeros(num_choices, out_size)
    outputs, depth, stages = tile(out_size, x.dtype)
    matmul_kernels.multiply_tiles[(-(-out_size // outputs), len(tiles.slots))](
        x,
        stack,
        out,
        tiles.choices,
        tiles.slots,
        num_choices,
        out_size,
        size,
        x.stride(0),
        CHOICES_PER_ROW=choices_per_row,
        IS_EVEN=size % depth == 0,
        ROWS=ROWS,
        OUTPUTS=outputs,
        DEPTH=depth,
        num_warps=4,
        num_stages=stages,
    )
    return out
