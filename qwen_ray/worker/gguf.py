"""GGUF files (llama.cpp's format, version 3) as stored tensors under their Hugging Face names.

Knows the header, the names and llama.cpp's order of rows; how quantized blocks are decoded is the `gguf` package's
knowledge. The header is read here: the package's reader makes Python objects of every token of the vocabulary and needs
3 s and 170 MB for what takes 50 ms.
"""

from __future__ import annotations

import mmap
import re
import struct
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType
from gguf import GGUFValueType as ValueType

from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.model_config import ModelConfig
from qwen_ray.worker.stored import StoredTensor

SERVED_TYPES = (
    *(GgmlType.F32, GgmlType.F16, GgmlType.BF16),
    *(GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1),
    *(GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.Q4_K, GgmlType.Q5_K, GgmlType.Q6_K),
)
TOP_LEVEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SCALARS = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}


def open_gguf(path: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """Every tensor of the file; one that has no Hugging Face name keeps its own. Raises CheckpointError."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Header(data)
            tensors = header.tensors()
            size = len(data)
    except (ValueError, struct.error) as error:
        raise CheckpointError(f"{path}: not a GGUF file that can be read ({error}).") from error
    if header.fields.get("split.count", 1) > 1:
        raise CheckpointError(f"{path}: one of {header.fields['split.count']} parts; join them with llama-gguf-split.")
    stored: dict[str, StoredTensor] = {}
    for name, shape, kind, offset in tensors:
        hf_name = to_hf_name(name)
        tensor = _stored(path, name, hf_name, shape, kind, offset, config)
        if offset + tensor.num_bytes > size:
            raise CheckpointError(f"{path}: the file of {size} bytes ends inside of tensor {name}.")
        stored[hf_name] = tensor
    if config.rope.kind == "llama3":
        stored.pop("rope_freqs.weight", None)  # the scaling that the config describes, tabulated
    if "lm_head.weight" not in stored and "model.embed_tokens.weight" in stored:
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
    return stored


def to_hf_name(name: str) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in IN_LAYER:
        return f"model.layers.{match[1]}.{IN_LAYER[match[2]]}.{match[3]}"
    return TOP_LEVEL.get(name, name)


def _stored(
    path: Path, name: str, hf_name: str, shape: tuple[int, ...], kind: int, offset: int, config: ModelConfig
) -> StoredTensor:
    if kind not in SERVED_TYPES:
        found = {member.value: member.name for member in GgmlType}.get(kind, kind)
        served = ", ".join(member.name for member in SERVED_TYPES)
        raise CheckpointError(f"{path}: tensor {name} has type {found}; read are {served}.")
    ggml_type = GgmlType(kind)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    if len(shape) not in (1, 2) or shape[-1] % block_size:
        raise CheckpointError(f"{path}: tensor {name} of type {ggml_type.name} has shape {shape}.")
    is_paired = config.architecture == "llama" and hf_name.endswith(("q_proj.weight", "k_proj.weight"))

    def decode(data: bytearray) -> torch.Tensor:
        flat = gguf.dequantize(np.frombuffer(data, dtype=np.uint8).reshape(1, -1), ggml_type)
        return torch.from_numpy(flat.reshape(-1))

    return StoredTensor(
        name=name,
        path=path,
        offset=offset,
        shape=shape,
        block_size=block_size,
        block_bytes=block_bytes,
        decode=decode,
        paired_head_dim=config.head_dim if is_paired else None,
    )


class _Header:
    """A cursor over the head of the file. `fields` keeps the scalars and strings of the metadata, not its arrays."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 4
        if data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._scalar("I")
        if version != 3:
            raise ValueError(f"version {version}; read is 3, little-endian")
        self._num_tensors = self._scalar("Q")
        num_fields = self._scalar("Q")
        self.fields: dict[str, Any] = {}
        for _ in range(num_fields):
            name = self._string()
            self.fields[name] = self._value(ValueType(self._scalar("I")))

    def tensors(self) -> list[tuple[str, tuple[int, ...], int, int]]:
        """(name, shape with the contiguous dimension last, GGML type, offset in the file) of each tensor."""
        found: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(self._num_tensors):
            name = self._string()
            num_dims = self._scalar("I")
            shape = tuple(self._scalar("Q") for _ in range(num_dims))[::-1]
            found.append((name, shape, self._scalar("I"), self._scalar("Q")))
        alignment = self.fields.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        start = -(-self._at // alignment) * alignment
        return [(name, shape, kind, start + offset) for name, shape, kind, offset in found if prod(shape)]

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def _value(self, kind: ValueType) -> Any:
        if kind == ValueType.STRING:
            return self._string()
        if kind != ValueType.ARRAY:
            return self._scalar(SCALARS[kind])
        item, count = ValueType(self._scalar("I")), self._scalar("Q")
        if item in SCALARS:
            self._at += count * struct.calcsize(f"<{SCALARS[item]}")
        elif item == ValueType.STRING:
            for _ in range(count):
                length = self._scalar("Q")
                self._at += length
        else:
            raise ValueError("an array of arrays in the metadata")
        return None
