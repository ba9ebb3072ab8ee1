"""Weights in 8 or 4 bits: how a matrix is rounded and packed, and what it then stands for.

Only weights are kept so. Kernels may round activations to 8 bits on their way through a product, each 64 of a row by
themselves. Knows no layers and no checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

GROUPS = (32, 64, 128)  # weights that share a scale, in 4 bits
GROUP = 64  # unless asked for
STEPS = {8: 64, 4: 128}  # a packed row holds a multiple of so many weights
ROWS_AT_ONCE = 4096  # of a matrix that are rounded, or widened again: what lies beside it stays small


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A [out, in] matrix. 8 bits: a weight is (value - 128) * scale, with a scale for each row.

    4 bits: (value - 8) * scale, with a scale for each `group` of a row; of each 128 weights of a row, byte i holds
    weight i in its low and weight 64 + i in its high half. Weights behind the row's end are 0.
    """

    bits: int  # 8 or 4
    size: int  # in
    group: int  # 4 bits: one of GROUPS; 8 bits: 0
    values: torch.Tensor  # [out, bytes of a row] uint8
    scales: torch.Tensor  # 8 bits: [out] float32; 4 bits: [out, groups of a packed row] bfloat16

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    @property
    def num_weights(self) -> int:
        return self.values.shape[0] * self.size

    def rows(self, start: int, stop: int) -> PackedWeight:
        """Some of them, in the same memory."""
        return replace(self, values=self.values[start:stop], scales=self.scales[start:stop])


def make_room(bits: int, out_size: int, size: int, group: int = GROUP) -> PackedWeight:
    """For a matrix that `store` will fill. Raises ValueError for a group of 4-bit weights that is not one of GROUPS."""
    if bits == 4 and group not in GROUPS:
        raise ValueError(f"group is {group}; it must be one of {', '.join(map(str, GROUPS))}.")
    held = size + -size % STEPS[bits]
    values = torch.empty(out_size, held * bits // 8, dtype=torch.uint8)
    if bits == 8:
        return PackedWeight(bits=8, size=size, group=0, values=values, scales=torch.empty(out_size))
    scales = torch.empty(out_size, held // group, dtype=torch.bfloat16)
    return PackedWeight(bits=4, size=size, group=group, values=values, scales=scales)


def store(packed: PackedWeight, start: int, weight: torch.Tensor) -> None:
    """Round `weight` [n, in] of any floating dtype to the rows of `packed` from `start` on; each by itself.

    8 bits: each row to its own scale, no weight moves by more than half a scale. 4 bits: each group's weight of largest
    size becomes -8 times its scale, or all but; a weight moves by half a scale at most, and one that is as large as the
    largest, with the other sign, by a whole one.
    """
    if packed.size == 0:  # more ranks than columns to cut
        packed.scales.zero_()
        return
    round_rows = _round_to_8 if packed.bits == 8 else _round_to_4
    for first in range(0, weight.shape[0], ROWS_AT_ONCE):
        part = weight[first : first + ROWS_AT_ONCE].float()
        part = F.pad(part, (0, -part.shape[1] % STEPS[packed.bits]))
        own = packed.rows(start + first, start + first + part.shape[0])
        round_rows(part, own)


def _round_to_8(weight: torch.Tensor, to: PackedWeight) -> None:
    to.scales.copy_(weight.abs().amax(-1) / 127)
    steps = weight / torch.where(to.scales > 0, to.scales, 1.0)[:, None]
    to.values.copy_(steps.round_().clamp_(-127, 127).add_(128))


def _round_to_4(weight: torch.Tensor, to: PackedWeight) -> None:
    groups = weight.unflatten(1, (-1, to.group))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = (largest / -8).bfloat16()
    steps = groups / torch.where(scales == 0, 1.0, scales.float())
    values = steps.round_().clamp_(-8, 7).add_(8).to(torch.uint8).reshape(weight.shape[0], -1, 2, STEPS[4] // 2)
    to.values.copy_((values[:, :, 0] | values[:, :, 1] << 4).flatten(1))
    to.scales.copy_(scales[..., 0])


def quantize(weight: torch.Tensor, bits: int, group: int = GROUP) -> PackedWeight:
    """[out, in] of any floating dtype; see `store`."""
    out_size, size = weight.shape
    packed = make_room(bits, out_size, size, group)
    store(packed, 0, weight)
    return packed


def dequantize(packed: PackedWeight) -> torch.Tensor:
    """[out, in] float32."""
    if packed.bits == 8:
        return ((packed.values.float() - 128) * packed.scales[:, None])[:, : packed.size]
    halves = packed.values.unflatten(1, (-1, STEPS[4] // 2))
    values = torch.stack((halves & 15, halves >> 4), dim=2).flatten(1).unflatten(1, (-1, packed.group))
    return ((values.float() - 8) * packed.scales.float()[..., None]).flatten(1)[:, : packed.size]


def look_up(packed: PackedWeight, rows: torch.Tensor) -> torch.Tensor:
    """[T] to [T, in] float32."""
    return dequantize(replace(packed, values=packed.values[rows], scales=packed.scales[rows]))


def linear_packed(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """[T, in] by [out, in] to [T, out]. Widens the weights anew for each product: a definition, and a last resort."""
    out_size = weight.values.shape[0]
    out = x.new_empty(x.shape[0], out_size)
    for start in range(0, out_size, ROWS_AT_ONCE):
        own = slice(start, start + ROWS_AT_ONCE)
        wide = dequantize(weight.rows(own.start, own.stop)).to(x.dtype)
        out[:, own] = F.linear(x, wide, None if bias is None else bias[own])
    return out
