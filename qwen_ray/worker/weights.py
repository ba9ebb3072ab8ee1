"""Where a rank's weights come from: safetensors files, a GGUF file, or thin air.

Knows files and names. Does not know which part of a tensor belongs to whom: layers ask for their own
(`layers.checkpoint.Checkpoint`). Weights are never unpickled.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.model_config import ModelConfig
from qwen_ray.core.plan import Span
from qwen_ray.kernels.quantized import FourBits
from qwen_ray.worker.gguf import open_gguf
from qwen_ray.worker.packed import Stored, put_together
from qwen_ray.worker.stacked import unstacked
from qwen_ray.worker.stored import BlockLayout, StoredTensor

CPU = torch.device("cpu")
DUMMY_STD = 0.02
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Of what is a weight only together with other tensors; see `packed.py`.
PACKED_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
TOP_LEVEL_NAMES = frozenset({"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"})
EXPERT_NAME = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
# Tensors that old checkpoints carry and nobody needs: they follow from the config.
HARMLESS_SUFFIX = "rotary_emb.inv_freq"


class CountedCheckpoint(Protocol):
    """A `layers.checkpoint.Checkpoint` that counts, and knows what was left over."""

    bytes_read: int

    def read(
        self, name: str, shape: tuple[int, ...], *, rows: Span | None = None, columns: Span | None = None
    ) -> torch.Tensor: ...

    def read_four_bits(
        self, name: str, shape: tuple[int, ...], *, rows: Span | None = None, columns: Span | None = None
    ) -> FourBits | None: ...

    def check_extra(self, layers: Span) -> None:
        """After a rank with `layers` has loaded. Raises CheckpointError for tensors that no rank of the model asks for.

        Every rank answers for its own layers, and all for names outside of the model's layers. Those of the model's
        experts that a rank did not ask for are another's.
        """


def open_checkpoint(
    path: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    load_format: str = "auto",
    *,
    device: torch.device = CPU,
    on_read: Callable[[int], None] = lambda _: None,
) -> CountedCheckpoint:
    """A checkpoint whose tensors are read as `dtype`; `on_read` hears the size, as `dtype`, of each part read.

    `load_format`: auto (by what lies at `path`), safetensors, gguf, dummy. Raises CheckpointError.
    """
    if load_format == "dummy":
        return DummyCheckpoint(dtype, device, on_read)
    is_gguf = path.suffix == ".gguf" if load_format == "auto" else load_format == "gguf"
    if is_gguf and not path.is_file():
        raise CheckpointError(f"{path}: a GGUF checkpoint must be one file; there is none.")
    stored = open_gguf(path, config) if is_gguf else with_head_names(open_safetensors(path))
    return FileCheckpoint(put_together(unstacked(stored), config.packed), path, config, dtype, on_read)


def with_head_names(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Of a model saved without its head, as embedding models are, tensors lack the `model.` of one with a head."""
    if "embed_tokens.weight" not in stored:
        return stored
    return {name if name.startswith("lm_head.") else f"model.{name}": tensor for name, tensor in stored.items()}


class FileCheckpoint:
    """Tensors in files, by their Hugging Face names."""

    def __init__(
        self,
        stored: Mapping[str, Stored],
        path: Path,
        config: ModelConfig,
        dtype: torch.dtype,
        on_read: Callable[[int], None],
    ) -> None:
        self.bytes_read = 0
        self._stored = stored
        self._path = path
        self._config = config
        self._dtype = dtype
        self._on_read = on_read
        self._asked: set[str] = set()

    def read(
        self, name: str, shape: tuple[int, ...], *, rows: Span | None = None, columns: Span | None = None
    ) -> torch.Tensor:
        part, num_bytes = self._found(name, shape).read(rows, columns, self._dtype)
        self.bytes_read += num_bytes
        self._on_read(part.nbytes)
        return part

    def read_four_bits(
        self, name: str, shape: tuple[int, ...], *, rows: Span | None = None, columns: Span | None = None
    ) -> FourBits | None:
        part, num_bytes = self._found(name, shape).read_four_bits(rows, columns)
        self.bytes_read += num_bytes
        if part is not None:
            self._on_read(part.values.numel() * self._dtype.itemsize)
        return part

    def _found(self, name: str, shape: tuple[int, ...]) -> Stored:
        stored = self._stored.get(name)
        if stored is None:
            raise CheckpointError(f"{self._path}: tensor {name} is missing; expected shape {shape}, found none.")
        if stored.shape != shape:
            raise CheckpointError(
                f"{stored.path}: tensor {name} has the wrong shape; expected {shape}, found {stored.shape}."
            )
        self._asked.add(name)
        return stored

    def check_extra(self, layers: Span) -> None:
        extra = [name for name in self._stored if self._is_extra(name, layers)]
        if extra:
            first = self._stored[extra[0]]
            raise CheckpointError(
                f"{first.path}: tensor {first.name} of shape {first.shape} is not part of this model "
                f"({self._config.architecture}, {self._config.num_hidden_layers} layers); expected no such tensor, "
                f"found {len(extra)}."
            )

    def _is_extra(self, name: str, layers: Span) -> bool:
        if name in self._asked or name.endswith(HARMLESS_SUFFIX) or self._is_idle_bias(name):
            return False
        match = re.match(r"model\.layers\.(\d+)\.", name)
        if match is None:
            return name not in TOP_LEVEL_NAMES
        layer, moe = int(match[1]), self._config.moe
        expert = EXPERT_NAME.fullmatch(name, match.end())
        if expert and moe and self._config.is_sparse(layer) and int(expert[1]) < moe.num_experts:
            return False
        return layer in layers or layer >= self._config.num_hidden_layers

    def _is_idle_bias(self, name: str) -> bool:
        """GPTQ's tools give every matrix a bias, of zeros where the model has none."""
        if self._config.packed is None or not name.endswith(".bias"):
            return False
        return not self._stored[name].read(None, None, torch.float32)[0].any()


class DummyCheckpoint:
    """Random weights of the true shapes, made on the device; norms are 1. The same part is always the same."""

    def __init__(self, dtype: torch.dtype, device: torch.device, on_read: Callable[[int], None]) -> None:
        self.bytes_read = 0
        self._dtype = dtype
        self._device = device
        self._on_read = on_read

    def read(
        self, name: str, shape: tuple[int, ...], *, rows: Span | None = None, columns: Span | None = None
    ) -> torch.Tensor:
        spans = (rows, columns)[: len(shape)]
        part_shape = [len(span) if span is not None else size for span, size in zip(spans, shape, strict=True)]
        part = torch.empty(part_shape, dtype=self._dtype, device=self._device)
        if name.endswith("norm.weight"):
            part.fill_(1.0)
        else:
            generator = torch.Generator(device=self._device).manual_seed(zlib.crc32(f"{name} {spans}".encode()))
            part.normal_(0.0, DUMMY_STD, generator=generator)
        self._on_read(part.nbytes)
        return part

    def read_four_bits(
        self, name: str, shape: tuple[int, ...], *, rows: Span | None = None, columns: Span | None = None
    ) -> None:
        return None

    def check_extra(self, layers: Span) -> None:
        pass


def open_safetensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the safetensors files in `directory`: those of the index, or all where there is none."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return _open_index(index)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickled = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt*"))
        if pickled:
            raise CheckpointError(
                f"{pickled[0]}: pickled weights can run code when read and are not loaded; convert the model to "
                "safetensors (transformers: save_pretrained(..., safe_serialization=True))."
            )
        raise CheckpointError(f"{directory}: no *.safetensors file and no model.safetensors.index.json there.")
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in stored:
                raise CheckpointError(f"{file}: tensor {name} is also in {stored[name].path.name}.")
            stored[name] = tensor
    return stored


def _open_index(index: Path) -> dict[str, StoredTensor]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        file_names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors files ({error!r}).") from error
    if outside := [name for name in file_names if Path(name).name != name]:
        raise CheckpointError(f"{index}: {outside[0]!r} is not the name of a file beside the index.")
    headers = {name: read_header(index.parent / name) for name in file_names}
    stored: dict[str, StoredTensor] = {}
    for name, file_name in weight_map.items():
        if name not in headers[file_name]:
            raise CheckpointError(
                f"{index.parent / file_name}: tensor {name} is missing; {index.name} says it is there."
            )
        stored[name] = headers[file_name][name]
    return stored


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Format: u64 length, JSON header of that length, data."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"header of {length} bytes")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        data_bytes = file.stat().st_size - 8 - length
        return {name: _stored(file, name, entry, 8 + length, data_bytes) for name, entry in header.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: the file is missing.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a safetensors file ({error!r}).") from error


def _stored(file: Path, name: str, entry: dict[str, Any], data_start: int, data_bytes: int) -> StoredTensor:
    dtype = {**SAFETENSORS_DTYPES, **PACKED_DTYPES}.get(entry["dtype"])
    if dtype is None:
        raise CheckpointError(
            f"{file}: tensor {name} has dtype {entry['dtype']}; read are {', '.join(SAFETENSORS_DTYPES)}."
        )
    shape = tuple(int(size) for size in entry["shape"])
    start, stop = entry["data_offsets"]
    if stop - start != prod(shape) * dtype.itemsize or not 0 <= start <= stop <= data_bytes:
        raise CheckpointError(
            f"{file}: tensor {name} of shape {shape} should lie at bytes {start} to {stop} of {data_bytes}: "
            "the file is cut short or damaged."
        )
    return StoredTensor(
        name=name,
        path=file,
        offset=data_start + start,
        shape=shape,
        block=BlockLayout(size=1, num_bytes=dtype.itemsize),
        part_dtype=entry["dtype"] if entry["dtype"] in PACKED_DTYPES else None,
        decode=lambda data: torch.frombuffer(data, dtype=dtype),
    )
