"""Experts whose weights are in 8 or 4 bits, on CUDA.

Few tokens: their choices are sorted by expert in tiles, and one kernel multiplies each tile with its expert's packed
weights; the host never waits. Many tokens: expert by expert, as `packed.linear_packed` does; the host waits once to
hear how many choices each has.
"""

# What Triton's kernels say they take is what they get of it: tensors and numbers of the host's go in.
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qwen_ray.kernels import reference
from qwen_ray.kernels.cuda import experts, packed_kernels
from qwen_ray.kernels.cuda.packed import DTYPES, OUTPUTS, WORDS, linear_packed
from qwen_ray.kernels.quantized import Matrices, PackedStack, PackedWeight

FEW_CHOICES = 2048  # of tokens: up to so many the kernel multiplies, 8 for each row of the largest CUDA graph
ROWS = 16  # of a tile
PARTS_AT_ONCE = experts.PARTS_AT_ONCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Choices in order of their slots, in tiles of as many rows, for one slot each."""

    choices: torch.Tensor  # [tiles * rows] int32: which of the flattened choices; as many as there are: none
    slots: torch.Tensor  # [tiles] int32; -1: nothing to do


def run_experts(
    x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, gate_up: Matrices, down: Matrices
) -> torch.Tensor:
    """As `reference.run_experts`; matrices that are not packed are `experts.run_experts`'s."""
    if isinstance(gate_up, torch.Tensor) or isinstance(down, torch.Tensor):
        assert isinstance(gate_up, torch.Tensor), "both are packed, or neither"
        assert isinstance(down, torch.Tensor), "both are packed, or neither"
        return experts.run_experts(x, slots, weights, gate_up, down)
    if x.shape[0] == 0 or len(gate_up) == 0 or down[0].size == 0:
        return torch.zeros_like(x)
    if slots.numel() <= FEW_CHOICES and x.dtype in DTYPES:
        return reference.sum_choices(run_tiles(x, slots, gate_up, down), weights)
    step = max(1, PARTS_AT_ONCE // slots.shape[1])
    pieces = zip(x.split(step), slots.split(step), weights.split(step), strict=True)
    return torch.cat(
        [
            reference.sum_choices(run_by_slot(rows, own, gate_up, down, linear_packed), given)
            for rows, own, given in pieces
        ]
    )


def run_by_slot(
    x: torch.Tensor,
    slots: torch.Tensor,
    gate_up: PackedStack,
    down: PackedStack,
    linear_packed: Callable[[torch.Tensor, PackedWeight, torch.Tensor | None], torch.Tensor],
) -> torch.Tensor:
    """What every choice gives, [N, k, hidden]; nothing where it is not here. Waits for the device."""
    keys, order = slots.flatten().sort(stable=True)
    ends = torch.searchsorted(keys, torch.arange(-1, len(gate_up), dtype=keys.dtype, device=x.device), right=True)
    counts = ends.tolist()
    parts = x.new_zeros(slots.numel(), x.shape[1])
    for slot in range(len(gate_up)):
        own = order[counts[slot] : counts[slot + 1]]
        if len(own):
            inner = reference.silu_and_mul(linear_packed(x[own // slots.shape[1]], gate_up[slot], None))
            parts[own] = linear_packed(inner, down[slot], None)
    return parts.view(*slots.shape, x.shape[1])


def run_tiles(x: torch.Tensor, slots: torch.Tensor, gate_up: PackedStack, down: PackedStack) -> torch.Tensor:
    """The same, of DTYPES; the host does not wait."""
    tiles = in_tiles(slots, len(gate_up), ROWS)
    inner = reference.silu_and_mul(_multiply(x, tiles, slots.shape[1], slots.numel(), gate_up))
    parts = _multiply(inner, tiles, 1, slots.numel(), down)
    # What is not here nobody has written: it is whatever the memory held, NaN perhaps.
    return parts.view(*slots.shape, x.shape[1]).masked_fill_((slots < 0).unsqueeze(-1), 0)


def in_tiles(slots: torch.Tensor, num_slots: int, rows: int) -> Tiles:
    """Of slots [N, k], -1: not here, in tiles of so many rows.

    As many tiles as there can be: the device alone knows how many have choices.
    """
    flat, device = slots.flatten().long(), slots.device
    most = min(num_slots, len(flat)) + len(flat) // rows
    keys, order = torch.where(flat < 0, num_slots, flat).sort(stable=True)
    every = torch.arange(num_slots + 1, device=device)
    starts = torch.searchsorted(keys, every)  # of each slot's choices in their order; the last: of those of none
    counts = starts.diff()
    tile_ends = ((counts + rows - 1) // rows).cumsum(0)
    tile_slots = torch.searchsorted(tile_ends, torch.arange(most, device=device), right=True)
    # Places in tiles: those of a slot begin with its first tile.
    own = keys.clamp(max=num_slots - 1)
    first_tiles = tile_ends - (counts + rows - 1) // rows
    places = first_tiles[own] * rows + torch.arange(len(flat), device=device) - starts[own]
    places = torch.where(keys < num_slots, places, most * rows)  # behind the end
    choices = torch.full((most * rows + 1,), len(flat), dtype=torch.int32, device=device)
    choices.scatter_(0, places, order.int())
    is_used = tile_slots < num_slots
    return Tiles(choices=choices[:-1], slots=torch.where(is_used, tile_slots, -1).int())


def _multiply(
    x: torch.Tensor, tiles: Tiles, choices_per_row: int, num_choices: int, stack: PackedStack
) -> torch.Tensor:
    """Row c // choices_per_row of x by the matrix of choice c, for each that is here: [choices, out]."""
    matrix = stack[0]
    values, scales, *rest = stack.tensors
    out = x.new_empty(num_choices, matrix.out_size)
    num_words = matrix.values.shape[1]
    packed_kernels.multiply_tiles[(-(-matrix.out_size // OUTPUTS), len(tiles.slots))](
        x,
        values.view(torch.int32),
        scales,
        rest[0] if rest else scales,
        out,
        tiles.choices,
        tiles.slots,
        num_choices,
        matrix.out_size,
        matrix.size,
        num_words,
        x.stride(0),
        values[0].numel() // 4,
        scales[0].numel(),
        CHOICES_PER_ROW=choices_per_row,
        STEPS=-(-num_words // WORDS),
        BITS=matrix.bits,
        GROUP=matrix.group,
        ROWS=ROWS,
        OUTPUTS=OUTPUTS,
        WORDS=WORDS,
    )
    return out
