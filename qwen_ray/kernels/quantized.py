"""Weights in 8 or 4 bits: how a matrix is rounded and packed, and what it then stands for.

Only weights are kept so. Kernels may round activations on their way through a product: beside weights in 8 bits to 16,
each 512 of a row by themselves, beside weights in 4 bits to 8, each 64. Knows no layers and no checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

GROUPS = (32, 64, 128)  # weights that share a scale, in 4 bits
GROUP = 32  # unless asked for: 5 bits a weight in all
STEPS = {8: 64, 4: 128}  # a packed row holds a multiple of so many weights
ROWS_AT_ONCE = 4096  # of a matrix that are rounded, or widened again: what lies beside it stays small


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A [out, in] matrix. 8 bits: a weight is (value - 128) * scale, with a scale for each row.

    4 bits: least + value * scale, with both for each `group` of a row; of each 128 weights of a row, byte i holds
    weight i in its low and weight 64 + i in its high half. Whatever stands behind the row's end is no matter.
    """

    bits: int  # 8 or 4
    size: int  # in
    group: int  # 4 bits: one of GROUPS; 8 bits: 0
    values: torch.Tensor  # [out, bytes of a row] uint8
    scales: torch.Tensor  # 8 bits: [out] float32; 4 bits: [out, groups of a packed row] float16
    least: torch.Tensor | None  # 8 bits: None; 4 bits: as the scales

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.values, self.scales) if self.least is None else (self.values, self.scales, self.least)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def num_weights(self) -> int:
        return self.values.shape[0] * self.size

    def rows(self, which: slice | torch.Tensor) -> PackedWeight:
        """Some of them; of a slice, in the same memory."""
        least = None if self.least is None else self.least[which]
        return replace(self, values=self.values[which], scales=self.scales[which], least=least)


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBits:
    """Rows of a matrix that are in 4 bits already: weight j of a row is least + value * scale, those of j // GROUP."""

    values: torch.Tensor  # [n, in] uint8, up to 15
    scales: torch.Tensor  # [n, in / GROUP, rounded up] float16
    least: torch.Tensor  # as the scales

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.values, self.scales, self.least))


def make_room(bits: int, out_size: int, size: int, group: int = GROUP) -> PackedWeight:
    """For a matrix that `store` will fill. Raises ValueError for a group of 4-bit weights that is not one of GROUPS."""
    if bits == 4 and group not in GROUPS:
        raise ValueError(f"group is {group}; it must be one of {', '.join(map(str, GROUPS))}.")
    held = size + -size % STEPS[bits]
    values = torch.empty(out_size, held * bits // 8, dtype=torch.uint8)
    if bits == 8:
        return PackedWeight(bits=8, size=size, group=0, values=values, scales=torch.empty(out_size), least=None)
    scales, least = (torch.empty(out_size, held // group, dtype=torch.float16) for _ in range(2))
    return PackedWeight(bits=4, size=size, group=group, values=values, scales=scales, least=least)


def store(packed: PackedWeight, start: int, weight: torch.Tensor) -> None:
    """Round `weight` [n, in] of any floating dtype to the rows of `packed` from `start` on; each by itself.

    8 bits: each row to its own scale, no weight moves by more than half a scale. 4 bits: each group's least weight
    becomes 0 and its largest 15, or all but (scales are rounded themselves).
    """
    if packed.size == 0:  # more ranks than columns to cut
        for tensor in packed.tensors:
            tensor.zero_()
        return
    round_rows = _round_to_8 if packed.bits == 8 else _round_to_4
    for first in range(0, weight.shape[0], ROWS_AT_ONCE):
        part = weight[first : first + ROWS_AT_ONCE].float()
        part = F.pad(part, (0, -part.shape[1] % STEPS[packed.bits]))
        own = packed.rows(slice(start + first, start + first + part.shape[0]))
        round_rows(part, own)


def _round_to_8(weight: torch.Tensor, to: PackedWeight) -> None:
    to.scales.copy_(weight.abs().amax(-1) / 127)
    steps = weight / torch.where(to.scales > 0, to.scales, 1.0)[:, None]
    to.values.copy_(steps.round_().clamp_(-127, 127).add_(128))


def _round_to_4(weight: torch.Tensor, to: PackedWeight) -> None:
    assert to.least is not None, "4 bits have it"
    groups = weight.unflatten(1, (-1, to.group))
    least, most = groups.aminmax(dim=-1)
    to.least.copy_(least)
    to.scales.copy_((most - least) / 15)
    scales = to.scales.float()
    steps = (groups - to.least.float()[..., None]) / torch.where(scales > 0, scales, 1.0)[..., None]
    to.values.copy_(_in_halves(steps.round_().clamp_(0, 15).to(torch.uint8).flatten(1)))


def _in_halves(values: torch.Tensor) -> torch.Tensor:
    """[n, whole steps] of up to 15, two to a byte."""
    halves = values.unflatten(1, (-1, 2, STEPS[4] // 2))
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)


def store_as_they_are(packed: PackedWeight, start: int, part: FourBits) -> None:
    """`part` [n, in] becomes the rows of `packed`, 4 bits by GROUP, from `start` on: nothing is rounded."""
    assert packed.least is not None, "4 bits have it"
    own = slice(start, start + part.values.shape[0])
    for to, scales in ((packed.scales, part.scales), (packed.least, part.least)):
        to[own].zero_()
        to[own, : scales.shape[1]] = scales
    packed.values[own] = _in_halves(F.pad(part.values, (0, -part.values.shape[1] % STEPS[4])))


def quantize(weight: torch.Tensor, bits: int, group: int = GROUP) -> PackedWeight:
    """[out, in] of any floating dtype; see `store`."""
    out_size, size = weight.shape
    packed = make_room(bits, out_size, size, group)
    store(packed, 0, weight)
    return packed


def dequantize(packed: PackedWeight) -> torch.Tensor:
    """[out, in] float32."""
    if packed.least is None:
        return ((packed.values.float() - 128) * packed.scales[:, None])[:, : packed.size]
    halves = packed.values.unflatten(1, (-1, STEPS[4] // 2))
    values = torch.stack((halves & 15, halves >> 4), dim=2).flatten(1).unflatten(1, (-1, packed.group))
    wide = packed.least.float()[..., None] + values.float() * packed.scales.float()[..., None]
    return wide.flatten(1)[:, : packed.size]


def look_up(packed: PackedWeight, rows: torch.Tensor) -> torch.Tensor:
    """[T] to [T, in] float32."""
    return dequantize(packed.rows(rows))


def linear_packed(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """[T, in] by [out, in] to [T, out]. Widens the weights anew for each product: a definition, and a last resort."""
    out_size = weight.values.shape[0]
    out = x.new_empty(x.shape[0], out_size)
    for start in range(0, out_size, ROWS_AT_ONCE):
        own = slice(start, start + ROWS_AT_ONCE)
        wide = dequantize(weight.rows(own)).to(x.dtype)
        out[:, own] = F.linear(x, wide, None if bias is None else bias[own])
    return out
