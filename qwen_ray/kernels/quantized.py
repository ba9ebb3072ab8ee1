"""Weights in 8 or 4 bits: how a matrix is rounded and packed, and what it then stands for.

Only weights are kept so. Kernels may round activations to 8 bits on their way through a product, each 64 of a row by
themselves. Knows no layers and no checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

GROUPS = (32, 64, 128)  # weights that share a scale, in 4 bits
INT8_STEP, INT4_STEP = 64, 128  # a packed row holds a multiple of so many weights


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


def quantize_int8(weight: torch.Tensor) -> PackedWeight:
    """[out, in] of any floating dtype, each row to its own scale: no weight moves by more than half a scale."""
    rows = weight.float()
    scales = rows.abs().amax(-1) / 127
    steps = rows / torch.where(scales > 0, scales, 1.0)[:, None]
    values = (steps.round().clamp(-127, 127) + 128).to(torch.uint8)
    padding = -weight.shape[1] % INT8_STEP
    return PackedWeight(
        bits=8, size=weight.shape[1], group=0, values=F.pad(values, (0, padding), value=128), scales=scales
    )


def quantize_int4(weight: torch.Tensor, group: int = 64) -> PackedWeight:
    """[out, in] of any floating dtype; each group's weight of largest size becomes -8 times its scale, or all but.

    A weight moves by half a scale at most; one that is as large as the largest, with the other sign, by a whole one.
    Raises ValueError for a group that is not one of GROUPS.
    """
    if group not in GROUPS:
        raise ValueError(f"group is {group}; it must be one of {', '.join(map(str, GROUPS))}.")
    padded = F.pad(weight.float(), (0, -weight.shape[1] % INT4_STEP))
    groups = padded.unflatten(1, (-1, group))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = (largest / -8).bfloat16()
    steps = groups / torch.where(scales == 0, 1.0, scales.float())
    values = (steps.round().clamp(-8, 7) + 8).to(torch.uint8).reshape(weight.shape[0], -1, 2, INT4_STEP // 2)
    packed = (values[:, :, 0] | values[:, :, 1] << 4).flatten(1)
    return PackedWeight(bits=4, size=weight.shape[1], group=group, values=packed, scales=scales[..., 0].contiguous())


def dequantize(packed: PackedWeight) -> torch.Tensor:
    """[out, in] float32."""
    if packed.bits == 8:
        return ((packed.values.float() - 128) * packed.scales[:, None])[:, : packed.size]
    halves = packed.values.unflatten(1, (-1, INT4_STEP // 2))
    values = torch.stack((halves & 15, halves >> 4), dim=2).flatten(1).unflatten(1, (-1, packed.group))
    return ((values.float() - 8) * packed.scales.float()[..., None]).flatten(1)[:, : packed.size]


def linear_packed(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """[T, in] by [out, in] to [T, out]."""
    return F.linear(x, dequantize(weight).to(x.dtype), bias)
