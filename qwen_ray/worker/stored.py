"""One tensor as it lies in a file, and how to read a rectangle of it.

Knows bytes, blocks and offsets; safetensors and GGUF both come down to this. Knows no names, models or ranks. Files are
read with `pread`, not mapped: mapped pages would count as the rank's memory, and what was read could not be counted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.plan import Span
from qwen_ray.kernels.quantized import GROUP, FourBits

PIECE_BYTES = 512 * 1024  # of the file, decoded at once: small enough for the processor's cache


@dataclass(frozen=True, slots=True)
class BlockField:
    """Chunks of `chunk_bytes` in a block, from byte `offset` on; the i-th group of elements needs `chunks[i]`."""

    offset: int
    chunk_bytes: int
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """A block holds `size` elements in `num_bytes` bytes.

    `fields` tell which bytes decode which of its groups of elements, all of one length. They stand in the order of
    their offsets and are all of the block; a layout without them is read by whole blocks.
    """

    size: int
    num_bytes: int
    fields: tuple[BlockField, ...] = ()

    def covering(self, columns: Span) -> Span:
        """The blocks of a row in which `columns` lie."""
        return Span(columns.start // self.size, -(-columns.stop // self.size))

    def bytes_needed(self, columns: Span) -> list[Span]:
        """To decode `columns` of a row: spans of the row's bytes, in order and apart from one another."""
        blocks = self.covering(columns)
        if not self.fields:
            return [blocks.scaled(self.num_bytes)]
        group = self.size // len(self.fields[0].chunks)
        needed: list[Span] = []
        for block in blocks:
            first = max(columns.start - block * self.size, 0) // group
            last = -(-min(columns.stop - block * self.size, self.size) // group)
            for field in self.fields:
                for chunk in sorted(set(field.chunks[first:last])):
                    start = block * self.num_bytes + field.offset + chunk * field.chunk_bytes
                    adjoins = needed and needed[-1].stop == start
                    needed.append(Span(needed.pop().start if adjoins else start, start + field.chunk_bytes))
        return needed


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A matrix [rows, columns] or vector [columns], row after row; every row is a whole number of blocks. A stack of
    matrices has the rows of all of them; it is not read but cut.

    `decode` makes a flat float tensor of whole blocks. It must not mind zeros in place of bytes that are not needed.
    `name` is the tensor's own name in `path`, `offset` its first byte. `paired_head_dim`: rows of a head lie as
    (0, d/2, 1, d/2 + 1, …) in place of (0, 1, 2, …), as llama.cpp stores Q and K of Llama. `part_dtype`: the name of a
    dtype whose numbers are no weights by themselves. `in_four_bits` is like `decode`, for what is in 4 bits: one row of
    whole blocks, whose size GROUP divides.
    """

    name: str
    path: Path
    offset: int
    shape: tuple[int, ...]
    block: BlockLayout
    decode: Callable[[bytearray], torch.Tensor]
    paired_head_dim: int | None = None
    part_dtype: str | None = None
    in_four_bits: Callable[[bytearray], FourBits] | None = None

    @property
    def num_bytes(self) -> int:
        return self._matrix[0] * self._row_bytes

    @property
    def _matrix(self) -> tuple[int, int]:
        return prod(self.shape[:-1]), self.shape[-1]

    @property
    def _row_bytes(self) -> int:
        return self.shape[-1] // self.block.size * self.block.num_bytes

    def cut(self, rows: Span) -> StoredTensor:
        """Some of the rows as a matrix of their own."""
        offset = self.offset + rows.start * self._row_bytes
        return replace(self, offset=offset, shape=(len(rows), self.shape[-1]))

    def read(self, rows: Span | None, columns: Span | None, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
        """The rectangle `rows` × `columns` (a vector's elements are its `rows`) as a fresh tensor, and the bytes read.

        Of each row what `columns` need is read, nothing else. Raises CheckpointError when the file ends early.
        """
        num_rows, num_columns = self._matrix
        if len(self.shape) == 1:
            rows, columns = None, rows
        rows = Span(0, num_rows) if rows is None else rows
        columns = Span(0, num_columns) if columns is None else columns
        if not rows or not columns:  # more ranks than units to cut
            return torch.empty([len(rows), len(columns)][-len(self.shape) :], dtype=dtype), 0
        first_column = self.block.covering(columns).start * self.block.size
        cut = slice(columns.start - first_column, columns.stop - first_column)
        out = torch.empty(len(rows), len(columns), dtype=dtype)
        for piece, data in self._read_pieces(rows, columns):
            out[piece.start - rows.start : piece.stop - rows.start] = self.decode(data).view(len(piece), -1)[:, cut]
        if self.paired_head_dim is not None:
            out = _unpair(out, rows, self.paired_head_dim)
        return out if len(self.shape) == 2 else out[0], len(rows) * sum(map(len, self.block.bytes_needed(columns)))

    def read_four_bits(self, rows: Span | None, columns: Span | None) -> tuple[FourBits | None, int]:
        """The same as it lies; None where it is in no 4 bits, or `columns` begin inside of a group."""
        num_rows, num_columns = self._matrix
        rows = Span(0, num_rows) if rows is None else rows
        columns = Span(0, num_columns) if columns is None else columns
        if self.in_four_bits is None or columns.start % GROUP or not rows or not columns:
            return None, 0
        first = self.block.covering(columns).start * self.block.size
        cut = slice(columns.start - first, columns.stop - first)
        cut_groups = slice(cut.start // GROUP, -(-cut.stop // GROUP))
        parts: list[list[torch.Tensor]] = [[], [], []]
        for piece, data in self._read_pieces(rows, columns):
            row = self.in_four_bits(data)
            for part, tensor, own in zip(
                parts, (row.values, row.scales, row.least), (cut, cut_groups, cut_groups), strict=True
            ):
                part.append(tensor.view(len(piece), -1)[:, own])
        whole = [torch.cat(part) for part in parts]
        if self.paired_head_dim is not None:
            whole = [_unpair(part, rows, self.paired_head_dim) for part in whole]
        values, scales, least = whole
        num_bytes = len(rows) * sum(map(len, self.block.bytes_needed(columns)))
        return FourBits(values=values, scales=scales, least=least), num_bytes

    def _read_pieces(self, rows: Span, columns: Span) -> Iterator[tuple[Span, bytearray]]:
        """Some rows at a time, and the blocks that `columns` of them lie in."""
        needed = self.block.bytes_needed(columns)
        covering = self.block.covering(columns).scaled(self.block.num_bytes)
        with self.path.open("rb", buffering=0) as file:
            for piece in in_pieces(rows, max(1, PIECE_BYTES // max(1, len(covering)))):
                yield piece, self._read_rows(file.fileno(), piece, covering, needed)

    def _read_rows(self, descriptor: int, rows: Span, covering: Span, needed: list[Span]) -> bytearray:
        """The bytes `covering` of each row, those `needed` of them read and the others zero."""
        row_bytes = self._row_bytes
        start = self.offset + rows.start * row_bytes
        data = bytearray(len(rows) * len(covering))
        if needed == [Span(0, row_bytes)]:
            self._fill(descriptor, memoryview(data), start)
            return data
        for i in range(len(rows)):
            row = memoryview(data)[i * len(covering) : (i + 1) * len(covering)]
            for span in needed:
                part = row[span.start - covering.start : span.stop - covering.start]
                self._fill(descriptor, part, start + i * row_bytes + span.start)
        return data

    def _fill(self, descriptor: int, view: memoryview, offset: int) -> None:
        while view:
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                raise CheckpointError(f"{self.path}: the file ends inside of tensor {self.name}.")
            view, offset = view[count:], offset + count


def in_pieces(rows: Span, size: int) -> Iterator[Span]:
    """Of `size` rows, the last perhaps of fewer."""
    for start in range(rows.start, rows.stop, size):
        yield Span(start, min(start + size, rows.stop))


def _unpair(part: torch.Tensor, rows: Span, head_dim: int) -> torch.Tensor:
    if rows.start % head_dim or rows.stop % head_dim:
        raise ValueError(f"rows {rows.start}:{rows.stop} are not whole heads of {head_dim}")
    pairs = part.view(-1, head_dim // 2, 2, part.shape[1])
    return pairs.transpose(1, 2).reshape(part.shape)
