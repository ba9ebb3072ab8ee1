"""One tensor as it lies in a file, and how to read a rectangle of it.

Knows bytes, blocks and offsets; safetensors and GGUF both come down to this. Knows no names, models or ranks. Files are
read with `pread`, not mapped: mapped pages would count as the rank's memory, and what was read could not be counted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.plan import Span

PIECE_BYTES = 512 * 1024  # of the file, decoded at once: small enough for the processor's cache


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A matrix [rows, columns] or vector [columns], row after row; every row is a whole number of blocks.

    A block holds `block_size` elements in `block_bytes` bytes; `decode` makes a flat float tensor of whole blocks.
    `name` is the tensor's own name in `path`, `offset` its first byte. `paired_head_dim`: rows of a head lie as
    (0, d/2, 1, d/2 + 1, …) in place of (0, 1, 2, …), as llama.cpp stores Q and K of Llama.
    """

    name: str
    path: Path
    offset: int
    shape: tuple[int, ...]
    block_size: int
    block_bytes: int
    decode: Callable[[bytearray], torch.Tensor]
    paired_head_dim: int | None = None

    @property
    def num_bytes(self) -> int:
        num_rows, num_columns = self._matrix
        return num_rows * num_columns // self.block_size * self.block_bytes

    @property
    def _matrix(self) -> tuple[int, int]:
        return (self.shape[0], self.shape[1]) if len(self.shape) == 2 else (1, self.shape[0])

    def read(self, rows: Span | None, columns: Span | None, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
        """The rectangle `rows` × `columns` (a vector's elements are its `rows`) as a fresh tensor, and the bytes read.

        Of the columns the covering blocks are read, nothing else. Raises CheckpointError when the file ends early.
        """
        num_rows, num_columns = self._matrix
        if len(self.shape) == 1:
            rows, columns = None, rows
        rows, columns = rows or Span(0, num_rows), columns or Span(0, num_columns)
        first_block, last_block = columns.start // self.block_size, -(-columns.stop // self.block_size)
        cut = slice(columns.start - first_block * self.block_size, columns.stop - first_block * self.block_size)
        width = (last_block - first_block) * self.block_bytes
        out = torch.empty(len(rows), len(columns), dtype=dtype)
        with self.path.open("rb", buffering=0) as file:
            for piece in _pieces(rows, max(1, PIECE_BYTES // max(1, width))):
                data = self._read_rows(file.fileno(), piece, first_block * self.block_bytes, width)
                decoded = self.decode(data).view(len(piece), -1)
                out[piece.start - rows.start : piece.stop - rows.start] = decoded[:, cut]
        if self.paired_head_dim is not None:
            out = _unpair(out, rows, self.paired_head_dim)
        return out if len(self.shape) == 2 else out[0], len(rows) * width

    def _read_rows(self, descriptor: int, rows: Span, column_byte: int, width: int) -> bytearray:
        row_bytes = self._matrix[1] // self.block_size * self.block_bytes
        start = self.offset + rows.start * row_bytes + column_byte
        data = bytearray(len(rows) * width)
        if width == row_bytes:
            self._fill(descriptor, memoryview(data), start)
        else:
            for i in range(len(rows)):
                self._fill(descriptor, memoryview(data)[i * width : (i + 1) * width], start + i * row_bytes)
        return data

    def _fill(self, descriptor: int, view: memoryview, offset: int) -> None:
        while view:
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                raise CheckpointError(f"{self.path}: the file ends inside of tensor {self.name}.")
            view, offset = view[count:], offset + count


def _pieces(rows: Span, size: int) -> Iterator[Span]:
    for start in range(rows.start, rows.stop, size):
        yield Span(start, min(start + size, rows.stop))


def _unpair(part: torch.Tensor, rows: Span, head_dim: int) -> torch.Tensor:
    if rows.start % head_dim or rows.stop % head_dim:
        raise ValueError(f"rows {rows.start}:{rows.stop} are not whole heads of {head_dim}")
    pairs = part.view(-1, head_dim // 2, 2, part.shape[1])
    return pairs.transpose(1, 2).reshape(part.shape)
