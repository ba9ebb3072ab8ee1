"""A matrix on this rank, or several of one shape: as the checkpoint has it, or rounded to 8 or 4 bits while it is read.

What the checkpoint has in 4 bits stays as it is there. Knows how a matrix is held, filled and multiplied, and which
matrices get how many bits. What its rows and columns are, and where the others lie, is said by what inherits from it.
Every rank rounds its own part by itself, always alike: groups of 4-bit weights begin with the part's first column.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from qwen_ray.core.plan import Span
from qwen_ray.kernels import quantized
from qwen_ray.kernels.quantized import PackedStack, PackedWeight
from qwen_ray.layers.checkpoint import Checkpoint
from qwen_ray.layers.site import Site, weight


def layer_bits(site: Site) -> int | None:
    """Of a layer's projections."""
    return {"none": None, "int8": 8, "int4": 4}[site.quantization]


def vocab_bits(site: Site) -> int | None:
    """Of embedding and head, which lose most by being rounded."""
    return None if site.quantization == "none" else 8


class Matrix(nn.Module):
    """[out, in]: `weight`, or where `bits` is not None what `packed` says, whose tensors are the parameters."""

    def __init__(self, site: Site, out_size: int, in_size: int, bits: int | None) -> None:
        super().__init__()
        self._linear = site.kernels.linear
        self._linear_packed = site.kernels.linear_packed
        self._dtype = site.dtype
        self.packed = None if bits is None else quantized.make_room(bits, out_size, in_size, device=site.device)
        self.weight = weight(site, out_size, in_size) if bits is None else None
        tensors = () if self.packed is None else self.packed.tensors
        self.parts = nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in tensors)

    @property
    def held(self) -> torch.Tensor | PackedWeight:
        if self.packed is not None:
            return self.packed
        assert self.weight is not None, "either packed or not"
        return self.weight

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[T, in] to [T, out]."""
        held = self.held
        return self._linear(x, held, bias) if isinstance(held, torch.Tensor) else self._linear_packed(x, held, bias)

    def look_up(self, rows: torch.Tensor) -> torch.Tensor:
        """[T] to [T, in]."""
        held = self.held
        if isinstance(held, torch.Tensor):
            return F.embedding(rows, held)
        return quantized.dequantize(held, rows).to(self._dtype)

    def take(self, start: int, checkpoint: Checkpoint, name: str, shape: tuple[int, ...], **cut: Span | None) -> None:
        """What the checkpoint has under `name`, or the `rows` or `columns` of it, becomes the rows from `start` on."""
        _take(self.held, start, checkpoint, name, shape, **cut)


class MatrixStack(nn.Module):
    """[S, out, in]: S matrices of one shape, held as `Matrix` holds one."""

    def __init__(self, site: Site, count: int, out_size: int, in_size: int, bits: int | None) -> None:
        super().__init__()
        self.packed = None if bits is None else quantized.make_stack(count, bits, out_size, in_size, device=site.device)
        self.weight = weight(site, count, out_size, in_size) if bits is None else None
        tensors = () if self.packed is None else self.packed.tensors
        self.parts = nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in tensors)

    @property
    def held(self) -> torch.Tensor | PackedStack:
        if self.packed is not None:
            return self.packed
        assert self.weight is not None, "either packed or not"
        return self.weight

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """[S, ...] each: all that matrix s is made of lies in row s of them."""
        held = self.held
        return (held,) if isinstance(held, torch.Tensor) else held.tensors

    def take(
        self, number: int, start: int, checkpoint: Checkpoint, name: str, shape: tuple[int, ...], **cut: Span | None
    ) -> None:
        """As `Matrix.take`, of one of them."""
        _take(self.held[number], start, checkpoint, name, shape, **cut)


def _take(
    to: torch.Tensor | PackedWeight,
    start: int,
    checkpoint: Checkpoint,
    name: str,
    shape: tuple[int, ...],
    **cut: Span | None,
) -> None:
    if isinstance(to, torch.Tensor):
        part = checkpoint.read(name, shape, **cut)
        to[start : start + part.shape[0]].copy_(part)
        return
    four_bits = checkpoint.read_four_bits(name, shape, **cut) if to.bits == 4 else None
    if four_bits is not None:
        quantized.store_as_they_are(to, start, four_bits)
    else:
        quantized.store(to, start, checkpoint.read(name, shape, **cut))
