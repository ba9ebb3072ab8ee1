"""Weights in 8 or 4 bits: how a matrix is rounded and packed, and what it then stands for.

Only weights are kept so. Kernels may round activations on their way through a product: each 64 of a row by themselves,
to 8 bits, or to 16 those that stand out. All runs where the packed tensors are. Knows no layers and no checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

GROUPS = (32, 64, 128)  # weights that share a scale, in 4 bits
GROUP = 32  # unless asked for: 5 bits a weight in all
STEPS = {8: 64, 4: 128}  # a packed row holds a multiple of so many weights
LANES = 16  # rows that lie side by side
ROWS_AT_ONCE = 4096  # of a matrix that are widened: what lies beside it stays small
WEIGHTS_AT_ONCE = 2**22  # of a matrix that are rounded, or nearly so many: up to 20 bytes each lie beside it meanwhile


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A [out, in] matrix. LANES rows lie side by side, 4 bytes of each of them in turn.

    8 bits: a weight is (value - 128) * scale, with a scale for each row; byte i of four is column i. 4 bits: least +
    value * scale, with both for each `group` of a row; byte i holds column i in its low and column 4 + i in its high
    half. Whatever stands behind the row's end, or in lanes behind the last row, is no matter.
    """

    bits: int  # 8 or 4
    out_size: int
    size: int  # in
    group: int  # 4 bits: one of GROUPS; 8 bits: 0
    values: torch.Tensor  # uint8 [out / LANES, row_bytes / 4, LANES, 4]
    scales: torch.Tensor  # 8 bits: [out / LANES, LANES] float32; 4 bits: [out / LANES, columns / group, LANES] float16
    least: torch.Tensor | None  # 8 bits: None; 4 bits: as the scales

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.values, self.scales) if self.least is None else (self.values, self.scales, self.least)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def num_weights(self) -> int:
        return self.out_size * self.size

    @property
    def row_bytes(self) -> int:
        """Of the values of a row."""
        return self.values.shape[1] * 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedStack:
    """Matrices of one shape. `tensors`: those of a `PackedWeight`, each [S, ...], that the matrices are parts of."""

    tensors: tuple[torch.Tensor, ...]
    matrices: tuple[PackedWeight, ...]

    def __len__(self) -> int:
        return len(self.matrices)

    def __getitem__(self, number: int) -> PackedWeight:
        return self.matrices[number]

    @property
    def num_weights(self) -> int:
        return sum(matrix.num_weights for matrix in self.matrices)


Matrices = torch.Tensor | PackedStack  # [S, out, in]


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBits:
    """Rows of a matrix that are in 4 bits already: weight j of a row is least + value * scale, those of j // GROUP."""

    values: torch.Tensor  # [n, in] uint8, up to 15
    scales: torch.Tensor  # [n, in / GROUP, rounded up] float16
    least: torch.Tensor  # as the scales


def make_room(
    bits: int, out_size: int, size: int, group: int = GROUP, device: torch.device | None = None
) -> PackedWeight:
    """For a matrix that `store` will fill, on the CPU or on `device`.

    Raises ValueError for a group of 4-bit weights that is not one of GROUPS.
    """
    return make_stack(1, bits, out_size, size, group, device)[0]


def make_stack(
    count: int, bits: int, out_size: int, size: int, group: int = GROUP, device: torch.device | None = None
) -> PackedStack:
    """The same, `count` times."""
    if bits == 4 and group not in GROUPS:
        raise ValueError(f"group is {group}; it must be one of {', '.join(map(str, GROUPS))}.")
    held, blocks = size + -size % STEPS[bits], -(-out_size // LANES)
    tensors = [torch.empty(count, blocks, held * bits // 32, LANES, 4, dtype=torch.uint8, device=device)]
    if bits == 8:
        tensors.append(torch.empty(count, blocks, LANES, device=device))
    else:
        shape = (count, blocks, held // group, LANES)
        tensors += (torch.empty(shape, dtype=torch.float16, device=device) for _ in range(2))
    for tensor in tensors:
        tensor[:, -1:].zero_()  # lanes that are no rows

    def matrix(values: torch.Tensor, scales: torch.Tensor, least: torch.Tensor | None = None) -> PackedWeight:
        kind = {"bits": bits, "out_size": out_size, "size": size, "group": group if bits == 4 else 0}
        return PackedWeight(values=values, scales=scales, least=least, **kind)

    return PackedStack(tensors=tuple(tensors), matrices=tuple(matrix(*own) for own in zip(*tensors, strict=True)))


def store(packed: PackedWeight, start: int, weight: torch.Tensor) -> None:
    """Round `weight` [n, in] of any floating dtype to the rows of `packed` from `start` on; each by itself.

    8 bits: each row to its own scale, no weight moves by more than half a scale. 4 bits: each group's least weight
    becomes 0 and its largest 15, or all but (scales are rounded themselves). It is rounded where `packed` is; devices
    divide differently, so that scales of one may differ from another's in their last bit.
    """
    if packed.size == 0:  # more ranks than columns to cut
        for tensor in packed.tensors:
            tensor.zero_()
        return
    round_rows = _round_to_8 if packed.bits == 8 else _round_to_4
    for rows in _in_pieces(packed, weight.shape[0]):
        part = weight[rows].to(packed.values.device).float()
        round_rows(F.pad(part, (0, -part.shape[1] % STEPS[packed.bits])), packed, start + rows.start)


def store_as_they_are(packed: PackedWeight, start: int, part: FourBits) -> None:
    """`part` [n, in] becomes the rows of `packed`, 4 bits by GROUP, from `start` on: nothing is rounded."""
    num_columns, num_groups = packed.values.shape[1] * 8, packed.scales.shape[1]
    for rows in _in_pieces(packed, part.values.shape[0]):
        values, scales, least = (
            F.pad(given[rows].to(packed.values.device), (0, num_held - given.shape[1]))
            for given, num_held in ((part.values, num_columns), (part.scales, num_groups), (part.least, num_groups))
        )
        _place(packed, start + rows.start, _in_halves(values), scales, least)


def _in_pieces(packed: PackedWeight, num_rows: int) -> Iterator[slice]:
    """Rows of about WEIGHTS_AT_ONCE weights each."""
    size = max(1, WEIGHTS_AT_ONCE * packed.bits // 8 // max(1, packed.row_bytes) // LANES) * LANES
    for first in range(0, num_rows, size):
        yield slice(first, min(first + size, num_rows))


def _round_to_8(weight: torch.Tensor, to: PackedWeight, start: int) -> None:
    scales = weight.abs().amax(-1) / 127
    steps = weight / torch.where(scales > 0, scales, 1.0)[:, None]
    _place(to, start, steps.round_().clamp_(-127, 127).add_(128).to(torch.uint8), scales)


def _round_to_4(weight: torch.Tensor, to: PackedWeight, start: int) -> None:
    groups = weight.unflatten(1, (-1, to.group))
    least, most = groups.aminmax(dim=-1)
    least, scales = least.half(), ((most - least) / 15).half()
    steps = (groups - least.float()[..., None]) / torch.where(scales > 0, scales, 1.0).float()[..., None]
    _place(to, start, _in_halves(steps.round_().clamp_(0, 15).to(torch.uint8).flatten(1)), scales, least)


def _in_halves(values: torch.Tensor) -> torch.Tensor:
    """[n, columns] up to 15, to [n, columns / 2]."""
    fours = values.contiguous().view(torch.int32)  # at a time
    return (fours[:, ::2] | fours[:, 1::2] << 4).view(torch.uint8)


def _place(
    to: PackedWeight, start: int, values: torch.Tensor, scales: torch.Tensor, least: torch.Tensor | None = None
) -> None:
    """`values` [n, row_bytes], and what belongs to their n rows, into their lanes."""
    num_rows = values.shape[0]
    fours = to.values.view(torch.int32).squeeze(-1), values.contiguous().view(torch.int32)
    placed = [fours, (to.scales, scales)]
    if to.least is not None and least is not None:
        placed.append((to.least, least))
    if start % LANES == 0 and num_rows % LANES == 0:  # several times as fast
        blocks = slice(start // LANES, (start + num_rows) // LANES)
        for tensor, part in placed:
            tensor[blocks].copy_(part.unflatten(0, (-1, LANES)).movedim(1, -1))
        return
    rows = torch.arange(start, start + num_rows, device=to.values.device)
    for tensor, part in placed:
        tensor[rows // LANES, ..., rows % LANES] = part


def quantize(weight: torch.Tensor, bits: int, group: int = GROUP) -> PackedWeight:
    """[out, in] of any floating dtype, on its device; see `store`."""
    out_size, size = weight.shape
    packed = make_room(bits, out_size, size, group, weight.device)
    store(packed, 0, weight)
    return packed


def dequantize(packed: PackedWeight, rows: torch.Tensor | None = None) -> torch.Tensor:
    """[out, in] float32; or [T, in], of `rows` [T] on the same device."""
    rows = torch.arange(packed.out_size, device=packed.values.device) if rows is None else rows
    block, lane = rows // LANES, rows % LANES
    values, scales = packed.values[block, :, lane], packed.scales[block, ..., lane].float()[..., None]
    if packed.least is None:
        return ((values.flatten(1).float() - 128) * scales)[:, : packed.size]
    values = torch.stack((values & 15, values >> 4), dim=2).flatten(1).unflatten(1, (-1, packed.group))
    least = packed.least[block, :, lane].float()[..., None]
    return (least + values.float() * scales).flatten(1)[:, : packed.size]


def linear_packed(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """[T, in] by [out, in] to [T, out]. Widens the weights anew for each product: a definition, and a last resort."""
    out = x.new_empty(x.shape[0], weight.out_size)
    for start in range(0, weight.out_size, ROWS_AT_ONCE):
        own = slice(start, min(start + ROWS_AT_ONCE, weight.out_size))
        wide = dequantize(weight, torch.arange(own.start, own.stop, device=x.device)).to(x.dtype)
        out[:, own] = F.linear(x, wide, None if bias is None else bias[own])
    return out
