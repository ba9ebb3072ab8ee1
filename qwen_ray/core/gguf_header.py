"""The header of a GGUF file: its metadata and where its tensors lie. Fast (a tenth of a second), standard library only.

Knows the container, version 2 and 3, little-endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Knows
nothing of models, tokenizers or quantization: tensor types are the container's own numbers.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_ray.core.errors import CheckpointError

# Value types of the format: number -> struct code. 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9
_MAX_DIMENSIONS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """`shape` is row-major (the file's, reversed); `type` is ggml's number; `start` is a byte offset in the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    path: Path
    metadata: dict[str, Any]  # scalars, strings, lists of them
    tensors: dict[str, GgufTensor]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End of text, of turn, of message: those that the file names, in this order."""
        keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
        return tuple(dict.fromkeys(int(self.metadata[key]) for key in keys if key in self.metadata))


def read_gguf_header(path: Path) -> GgufHeader:
    """Raises CheckpointError, naming the file, if it is none of ours, damaged or cut off."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data, path).header()
    except (OSError, ValueError, struct.error, OverflowError) as error:
        raise CheckpointError(f"{path}: not a readable GGUF file ({error}).") from error


class _Reader:
    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._at = 4

    def header(self) -> GgufHeader:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}; known are 2 and 3, little-endian")
        num_tensors, num_keys = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            metadata[key] = self._value(self._number("I"))
        infos = [self._tensor() for _ in range(num_tensors)]
        alignment = int(metadata.get("general.alignment", 32))
        if alignment < 1:
            raise ValueError(f"alignment {alignment}")
        first = -(-self._at // alignment) * alignment
        tensors = {
            name: GgufTensor(name=name, shape=shape, type=kind, start=first + offset)
            for name, shape, kind, offset in infos
        }
        return GgufHeader(path=self._path, metadata=metadata, tensors=tensors)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dimensions = self._number("I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} with {num_dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(num_dimensions))
        return name, shape[::-1], self._number("I"), self._number("Q")

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        # A vocabulary has a hundred thousand of these: everything in locals.
        data, at, end = self._data, self._at, len(self._data)
        length_at: Callable[[mmap.mmap, int], tuple[int]] = struct.Struct("<Q").unpack_from
        strings: list[str] = []
        for _ in range(count):
            (length,) = length_at(data, at)
            at += 8
            if length > end - at:
                raise ValueError("a string runs over the end of the file")
            strings.append(data[at : at + length].decode())
            at += length
        self._at = at
        return strings

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._number("I"), self._number("Q"))
        if kind not in _SCALARS:
            raise ValueError(f"unknown value type {kind}")
        return self._number(_SCALARS[kind])

    def _array(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            return self._strings(count)
        if kind == _ARRAY:
            raise ValueError("arrays of arrays")
        if kind not in _SCALARS:
            raise ValueError(f"unknown value type {kind}")
        layout = f"<{count}{_SCALARS[kind]}"
        values = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return list(values)
