"""Matrices that a checkpoint holds in 8 or 4 bits: several tensors each, put together to one under its usual name.

Knows what GPTQ, AWQ, compressed-tensors and DeepSeek's FP8 write, and in which order their numbers lie in a word. In 4
bits by groups, a matrix can be had as it lies; in any form, as what it stands for. Knows no ranks and no models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F

from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.packed_format import PackedFormat
from qwen_ray.core.plan import Span
from qwen_ray.kernels.quantized import GROUP, FourBits
from qwen_ray.worker.stored import StoredTensor, in_pieces

WORD_BITS = 32
AT_ONCE = 2**25  # numbers of a matrix: what lies beside it meanwhile stays small
MIDDLE = {4: 8, 8: 128}  # what stands for 0 where nothing else is said


class Stored(Protocol):
    """A matrix or vector in a checkpoint, whatever its form. `name` is that of a tensor in the file `path`."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self, rows: Span | None, columns: Span | None, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
        """A rectangle as a fresh tensor, and the bytes read."""
        ...

    def read_four_bits(self, rows: Span | None, columns: Span | None) -> tuple[FourBits | None, int]:
        """The same as it lies; None where that is not 4 bits with scales for each GROUP of the columns asked for."""
        ...


def put_together(stored: Mapping[str, StoredTensor], packed: PackedFormat | None) -> dict[str, Stored]:
    """The same tensors; in place of `….q_proj.qweight`, `….q_proj.scales` and so on there is `….q_proj.weight`.

    Raises CheckpointError where one of them is missing, its shape does not go with the others', or it is of none.
    """
    found: dict[str, Stored] = dict(stored) if packed is None else _put_together(stored, packed)
    for name, tensor in found.items():
        if isinstance(tensor, StoredTensor) and tensor.part_dtype is not None:
            raise CheckpointError(
                f"{tensor.path}: tensor {name} has dtype {tensor.part_dtype}, and nothing says what that stands for."
            )
    return found


def _put_together(stored: Mapping[str, StoredTensor], packed: PackedFormat) -> dict[str, Stored]:
    found: dict[str, Stored] = dict(stored)
    put = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed, "fp8": _scaled}[packed.method]
    # By what none of these matrices is without, and no other has.
    mark = {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_scale", "fp8": "weight_scale_inv"}
    for name in stored:
        prefix, _, last = name.rpartition(".")
        if last == mark[packed.method]:
            parts = _Parts(stored, prefix)
            found[f"{prefix}.weight"] = put(parts, packed)
            for used in parts.used - {"weight"}:
                del found[f"{prefix}.{used}"]
    return found


class _Parts:
    """The tensors of one matrix, and which of them were asked for."""

    def __init__(self, stored: Mapping[str, StoredTensor], prefix: str) -> None:
        self._stored = stored
        self._prefix = prefix
        self.used: set[str] = set()

    def has(self, last: str) -> bool:
        return f"{self._prefix}.{last}" in self._stored

    def get(self, last: str) -> StoredTensor:
        name = f"{self._prefix}.{last}"
        if name not in self._stored:
            beside = next(tensor for other, tensor in self._stored.items() if other.startswith(f"{self._prefix}."))
            raise CheckpointError(f"{beside.path}: tensor {name} is missing; {beside.name} is of no use without it.")
        self.used.add(last)
        return self._stored[name]

    def shaped(self, last: str, *expected: int) -> StoredTensor:
        tensor = self.get(last)
        if tensor.shape != expected:
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name} has the wrong shape; expected {expected}, found {tensor.shape}."
            )
        return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """A matrix of numbers of `bits` bits in int32 words, whose numbers lie along dimension `axis`, lowest bits first.

    `even_first`: of a word's eight numbers those with even places come first, as AWQ has it.
    """

    stored: StoredTensor
    bits: int
    axis: int
    even_first: bool = False

    def read(self, rows: Span, columns: Span) -> tuple[torch.Tensor, int]:
        """[rows, columns] uint8, and the bytes read."""
        in_word = WORD_BITS // self.bits
        own = columns if self.axis == 1 else rows
        words = Span(own.start // in_word, ceil(own.stop / in_word))
        cut = (rows, words) if self.axis == 1 else (words, columns)
        part, num_bytes = self.stored.read(*cut, torch.int32)
        part = part if self.axis == 1 else part.t().contiguous()
        if self.bits == 8:
            numbers = _bytes(part)
        elif self.even_first:
            numbers = _bytes(_by_places(part))
        else:
            numbers = torch.stack((_bytes(part & 0x0F0F0F0F), _bytes(part >> 4 & 0x0F0F0F0F)), dim=-1).flatten(1)
        skipped = own.start - words.start * in_word
        numbers = numbers[:, skipped : skipped + len(own)]
        return (numbers if self.axis == 1 else numbers.t()), num_bytes


def _bytes(words: torch.Tensor) -> torch.Tensor:
    """[n, m] int32 to [n, 4 m] uint8."""
    return words.reshape(-1).view(torch.uint8).view(words.shape[0], -1)


def _by_places(words: torch.Tensor) -> torch.Tensor:
    """AWQ's words [n, m], of numbers 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on, to [n, 2 m] of four bytes each.

    Bytes of a word are numbers 0 4 1 5 in their low halves and 2 6 3 7 in their high ones.
    """
    low, high = words & 0x0F0F0F0F, words >> 4 & 0x0F0F0F0F
    pairs = [(both & 0x00FF00FF) for both in (low, high, low >> 8, high >> 8)]  # 0 1, 2 3, 4 5, 6 7, a byte apart
    close = [(pair | pair >> 8) & 0xFFFF for pair in pairs]
    return torch.stack((close[0] | close[1] << 16, close[2] | close[3] << 16), dim=-1).flatten(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedMatrix:
    """[out, in] of whole numbers, and a scale and a zero for each group of a row: weight = (number - zero) * scale.

    `is_turned`: all that is stored has the rows as its dimension 1, as GPTQ and AWQ have it. `group_of`: [in], the
    group of each column; without it groups are of one size, in order. `zeros`: of each group, less `zero`; without
    them all are `zero`.
    """

    shape: tuple[int, int]
    numbers: Words
    scales: StoredTensor
    zeros: Words | None
    zero: int
    is_turned: bool
    group_of: StoredTensor | None = None

    @property
    def name(self) -> str:
        return self.numbers.stored.name

    @property
    def path(self) -> Path:
        return self.numbers.stored.path

    def read(self, rows: Span | None, columns: Span | None, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
        rows, columns = _whole(self.shape, rows, columns)

        group_of, own_bytes = self._groups(columns)
        groups, counts = group_of.unique_consecutive(return_counts=True)

        def widened(piece: Span) -> tuple[torch.Tensor, int]:
            numbers, scales, zeros, num_bytes = self._read(piece, columns)
            wide = numbers.float()
            if len(groups) > scales.shape[1]:  # not side by side
                return wide.sub_(zeros[:, group_of]).mul_(scales[:, group_of]), num_bytes
            for part, group in zip(wide.split(counts.tolist(), dim=1), groups.tolist(), strict=True):
                part.sub_(zeros[:, group, None]).mul_(scales[:, group, None])
            return wide, num_bytes

        out, num_bytes = _by_pieces(widened, rows, columns, dtype)
        return out, num_bytes + own_bytes

    def read_four_bits(self, rows: Span | None, columns: Span | None) -> tuple[FourBits | None, int]:
        rows, columns = _whole(self.shape, rows, columns)
        if self.numbers.bits != 4 or not rows or not columns:
            return None, 0
        group_of, num_bytes = self._groups(columns)
        group_of = F.pad(group_of, (0, -len(columns) % GROUP), value=int(group_of[-1])).view(-1, GROUP)
        first = group_of[:, 0]
        if (group_of != first[:, None]).any():
            return None, num_bytes
        parts: list[tuple[torch.Tensor, ...]] = []
        for piece in _pieces(rows, columns):
            numbers, scales, zeros, more = self._read(piece, columns)
            num_bytes += more
            parts.append((numbers, scales[:, first].half(), (-zeros * scales)[:, first].half()))
        values, scales, least = map(torch.cat, zip(*parts, strict=True))
        return FourBits(values=values, scales=scales, least=least), num_bytes

    def _groups(self, columns: Span) -> tuple[torch.Tensor, int]:
        """The group of each column, and the bytes read."""
        if self.group_of is None:
            size = ceil(self.shape[1] / self.scales.shape[0 if self.is_turned else 1])
            return torch.arange(columns.start, columns.stop) // size, 0
        group_of, num_bytes = self.group_of.read(columns, None, torch.int32)
        return group_of.long(), num_bytes

    def _read(self, rows: Span, columns: Span) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """Numbers [rows, columns], scales and zeros [rows, groups] float32; the bytes read."""
        every = Span(0, self.scales.shape[0 if self.is_turned else 1])
        numbers, num_bytes = self._turned(self.numbers.read, rows, columns)
        scales, more = self._turned(lambda a, b: self.scales.read(a, b, torch.float32), rows, every)
        num_bytes += more
        zeros = torch.full_like(scales, self.zero)
        if self.zeros is not None:
            stored, more = self._turned(self.zeros.read, rows, every)
            zeros += stored
            num_bytes += more
        return numbers, scales, zeros, num_bytes

    def _turned(
        self, read: Callable[[Span, Span], tuple[torch.Tensor, int]], rows: Span, columns: Span
    ) -> tuple[torch.Tensor, int]:
        if not self.is_turned:
            return read(rows, columns)
        part, num_bytes = read(columns, rows)
        return part.t().contiguous(), num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledMatrix:
    """[out, in] of numbers in 8 bits, and a scale for each block of it."""

    numbers: StoredTensor
    scales: StoredTensor  # [blocks down, blocks across]
    block: tuple[int, int]

    @property
    def name(self) -> str:
        return self.numbers.name

    @property
    def path(self) -> Path:
        return self.numbers.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.shape

    def read(self, rows: Span | None, columns: Span | None, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
        rows, columns = _whole(self.shape, rows, columns)

        def widened(piece: Span) -> tuple[torch.Tensor, int]:
            numbers, num_bytes = self.numbers.read(piece, columns, torch.float32)
            down, across = (
                Span(span.start // size, ceil(span.stop / size))
                for span, size in zip((piece, columns), self.block, strict=True)
            )
            scales, more = self.scales.read(down, across, torch.float32)
            of_rows = torch.arange(piece.start, piece.stop) // self.block[0] - down.start
            of_columns = torch.arange(columns.start, columns.stop) // self.block[1] - across.start
            return numbers.mul_(scales[of_rows][:, of_columns]), num_bytes + more

        return _by_pieces(widened, rows, columns, dtype)

    def read_four_bits(self, rows: Span | None, columns: Span | None) -> tuple[FourBits | None, int]:
        return None, 0


def _gptq(parts: _Parts, packed: PackedFormat) -> GroupedMatrix:
    words = parts.get("qweight")
    in_word = WORD_BITS // packed.bits
    in_size, out_size = words.shape[0] * in_word, words.shape[-1]
    scales = parts.get("scales")
    num_groups = scales.shape[0]
    return GroupedMatrix(
        shape=(out_size, in_size),
        numbers=Words(stored=words, bits=packed.bits, axis=0),
        scales=parts.shaped("scales", num_groups, out_size),
        zeros=Words(stored=parts.shaped("qzeros", num_groups, out_size // in_word), bits=packed.bits, axis=1),
        zero=1 if packed.zeros_less_one else 0,
        is_turned=True,
        group_of=parts.shaped("g_idx", in_size) if parts.has("g_idx") else None,
    )


def _awq(parts: _Parts, packed: PackedFormat) -> GroupedMatrix:
    words = parts.get("qweight")
    in_size, out_size = words.shape[0], words.shape[-1] * WORD_BITS // packed.bits
    num_groups = parts.get("scales").shape[0]
    zeros = parts.shaped("qzeros", num_groups, words.shape[-1])
    return GroupedMatrix(
        shape=(out_size, in_size),
        numbers=Words(stored=words, bits=packed.bits, axis=1, even_first=True),
        scales=parts.shaped("scales", num_groups, out_size),
        zeros=Words(stored=zeros, bits=packed.bits, axis=1, even_first=True),
        zero=0,
        is_turned=True,
    )


def _compressed(parts: _Parts, packed: PackedFormat) -> GroupedMatrix | ScaledMatrix:
    if not parts.has("weight_packed"):
        return _scaled(parts, packed)
    words = parts.get("weight_packed")
    parts.get("weight_shape")  # what follows from the others, and is read by nobody
    in_word = WORD_BITS // packed.bits
    out_size, in_size = words.shape[0], words.shape[-1] * in_word
    num_groups = parts.get("weight_scale").shape[-1]
    has_zeros = parts.has("weight_zero_point")
    zeros = parts.shaped("weight_zero_point", ceil(out_size / in_word), num_groups) if has_zeros else None
    return GroupedMatrix(
        shape=(out_size, in_size),
        numbers=Words(stored=words, bits=packed.bits, axis=1),
        scales=parts.shaped("weight_scale", out_size, num_groups),
        zeros=None if zeros is None else Words(stored=zeros, bits=packed.bits, axis=0),
        zero=MIDDLE[packed.bits] if zeros is None else 0,
        is_turned=False,
        group_of=parts.shaped("weight_g_idx", in_size) if parts.has("weight_g_idx") else None,
    )


def _scaled(parts: _Parts, packed: PackedFormat) -> ScaledMatrix:
    numbers = parts.get("weight")
    scales = parts.get("weight_scale_inv" if packed.method == "fp8" else "weight_scale")
    if len(numbers.shape) != 2 or len(scales.shape) != 2:
        raise CheckpointError(
            f"{scales.path}: tensor {scales.name} has the wrong shape; expected scales of the rows or blocks of a "
            f"matrix {numbers.shape}, found {scales.shape}."
        )
    block = packed.block or (ceil(numbers.shape[0] / scales.shape[0]), ceil(numbers.shape[1] / scales.shape[1]))
    blocks = tuple(ceil(size / of) for size, of in zip(numbers.shape, block, strict=True))
    return ScaledMatrix(numbers=numbers, scales=parts.shaped(scales.name.rpartition(".")[2], *blocks), block=block)


def _whole(shape: tuple[int, ...], rows: Span | None, columns: Span | None) -> tuple[Span, Span]:
    return Span(0, shape[0]) if rows is None else rows, Span(0, shape[1]) if columns is None else columns


def _pieces(rows: Span, columns: Span) -> Iterator[Span]:
    return in_pieces(rows, max(64, AT_ONCE // len(columns)))


def _by_pieces(
    read: Callable[[Span], tuple[torch.Tensor, int]], rows: Span, columns: Span, dtype: torch.dtype
) -> tuple[torch.Tensor, int]:
    out = torch.empty(len(rows), len(columns), dtype=dtype)
    num_bytes = 0
    if not columns:
        return out, 0
    for piece in _pieces(rows, columns):
        part, more = read(piece)
        out[piece.start - rows.start : piece.stop - rows.start] = part
        num_bytes += more
    return out, num_bytes
