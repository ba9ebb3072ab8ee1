"""The tensors of a GGUF file under their Hugging Face names.

Knows llama.cpp's names, its order of rows and its tensor types; how a quantized block is decoded is the knowledge of
`kernels/cpu/gguf.cpp`, and of the `gguf` package where nothing could be compiled; the layout of the file is that of
`core.gguf_header`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType

from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.gguf_header import GgufTensor, read_gguf_header
from qwen_ray.core.model_config import ModelConfig
from qwen_ray.core.plan import Span
from qwen_ray.kernels.cpu import library
from qwen_ray.kernels.quantized import FourBits
from qwen_ray.worker.stored import BlockField, BlockLayout, StoredTensor

PLAIN_TYPES = {GgmlType.F32: torch.float32, GgmlType.F16: torch.float16, GgmlType.BF16: torch.bfloat16}
# llama.cpp mixes these freely: a "Q4_K" file of a width that 256 does not divide has Q5_0 and Q8_0 in it.
SERVED_TYPES = (
    *PLAIN_TYPES,
    *(GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1),
    *(GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.Q4_K, GgmlType.Q5_K, GgmlType.Q6_K),
)
# Which bytes of a K-quant's block of 256 values decode which 32 of them, so that a rank whose columns end inside of a
# block reads little beyond them. Of Qwen2.5's shapes at tp=2 to 8 no rank reads more than 1.05 x its shard in Q2_K,
# Q4_K, Q5_K or Q6_K. In Q3_K, where all values of a block share 46 of its 110 bytes, it is up to 1.09 x for the 0.5B
# (1.06 at tp=7) and 1.07 x for the 1.5B, both at tp=8. Experts are narrow: cut in 8, those of Qwen3-30B-A3B (768 wide)
# take 1.26 x in Q4_K, 1.48 x in Q5_K and 1.39 x in Q6_K, where whole experts on each rank take 1.
SHARED, BY_TWO, BY_HALF, EACH = (0,) * 8, (0, 0, 1, 1, 2, 2, 3, 3), (0, 0, 0, 0, 1, 1, 1, 1), (0, 1, 2, 3, 4, 5, 6, 7)
FIELDS: dict[GgmlType, tuple[BlockField, ...]] = {
    # scales, 2-bit values, d and dmin
    GgmlType.Q2_K: (BlockField(0, 2, EACH), BlockField(16, 32, BY_HALF), BlockField(80, 4, SHARED)),
    # high bits, low 2 bits, scales and d
    GgmlType.Q3_K: (BlockField(0, 32, SHARED), BlockField(32, 32, BY_HALF), BlockField(96, 14, SHARED)),
    # d, dmin and scales (of Q5_K also the high bits), low 4 bits
    GgmlType.Q4_K: (BlockField(0, 16, SHARED), BlockField(16, 32, BY_TWO)),
    GgmlType.Q5_K: (BlockField(0, 48, SHARED), BlockField(48, 32, BY_TWO)),
    # low 4 bits, high 2 bits, scales, d
    GgmlType.Q6_K: (
        *(BlockField(0, 32, (0, 1, 0, 1, 2, 3, 2, 3)), BlockField(128, 32, BY_HALF)),
        *(BlockField(192, 2, EACH), BlockField(208, 2, SHARED)),
    ),
}
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
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_gate_up_exps": "mlp.experts.gate_up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}


def _halves(blocks: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """[n, bytes of a block] to [n, count]: the half floats from byte `first` on."""
    return blocks[:, first : first + 2 * count].contiguous().view(torch.float16)


def _low_and_high(halves: torch.Tensor) -> torch.Tensor:
    """[…, m] bytes to [… 2 m]: all low halves, then all high ones."""
    return torch.cat((halves & 15, halves >> 4), dim=-1)


def _q4_0(data: bytearray) -> FourBits:
    blocks = torch.frombuffer(data, dtype=torch.uint8).view(-1, 18)
    scales = _halves(blocks, 0, 1)
    return FourBits(
        values=_low_and_high(blocks[:, 2:]).view(1, -1), scales=scales.view(1, -1), least=scales.view(1, -1) * -8
    )


def _q4_1(data: bytearray) -> FourBits:
    blocks = torch.frombuffer(data, dtype=torch.uint8).view(-1, 20)
    scales, least = _halves(blocks, 0, 1), _halves(blocks, 2, 1)
    return FourBits(values=_low_and_high(blocks[:, 4:]).view(1, -1), scales=scales.view(1, -1), least=least.view(1, -1))


def _q4_k(data: bytearray) -> FourBits:
    """Eight parts of a block have 6 bits of a scale and of a least value, those of the last four in two places."""
    blocks = torch.frombuffer(data, dtype=torch.uint8).view(-1, 144)
    whole = _halves(blocks, 0, 2).float()
    first, second, both = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, both & 15 | first >> 6 << 4), dim=1) * whole[:, :1]
    least = torch.cat((second & 63, both >> 4 | second >> 6 << 4), dim=1) * -whole[:, 1:]
    values = _low_and_high(blocks[:, 16:].reshape(-1, 4, 32))
    return FourBits(values=values.view(1, -1), scales=scales.half().view(1, -1), least=least.half().view(1, -1))


IN_FOUR_BITS: dict[GgmlType, Callable[[bytearray], FourBits]] = {
    GgmlType.Q4_0: _q4_0,
    GgmlType.Q4_1: _q4_1,
    GgmlType.Q4_K: _q4_k,
}


def open_gguf(path: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """Every tensor of the file, experts stacked; one that has no Hugging Face name keeps its own.

    Raises CheckpointError.
    """
    header = read_gguf_header(path)
    num_parts = header.metadata.get("split.count", 1)
    if num_parts > 1:
        raise CheckpointError(f"{path}: one of {num_parts} parts; join them with llama-gguf-split --merge.")
    size = path.stat().st_size
    stored: dict[str, StoredTensor] = {}
    for tensor in header.tensors.values():
        name = to_hf_name(tensor.name)
        part = _stored(path, name, tensor, config)
        # A matrix of one row to Hugging Face, a vector to llama.cpp.
        stored[name] = part.cut(Span(0, 1)) if name.endswith("shared_expert_gate.weight") else part
        if part.offset + part.num_bytes > size:
            raise CheckpointError(f"{path}: the file of {size} bytes ends inside of tensor {tensor.name}.")
    if config.rope.kind == "llama3":
        stored.pop("rope_freqs.weight", None)  # the scaling that the config describes, tabulated
    if "lm_head.weight" not in stored and "model.embed_tokens.weight" in stored:
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
    return stored


def to_hf_name(name: str) -> str:
    """`blk.0.attn_q.weight` to `model.layers.0.self_attn.q_proj.weight`; unknown names as they are."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in IN_LAYER:
        return f"model.layers.{match[1]}.{IN_LAYER[match[2]]}.{match[3]}"
    return TOP_LEVEL.get(name, name)


def _stored(path: Path, name: str, tensor: GgufTensor, config: ModelConfig) -> StoredTensor:
    if tensor.type not in SERVED_TYPES:
        found = {member.value: member.name for member in GgmlType}.get(tensor.type, tensor.type)
        served = ", ".join(member.name for member in SERVED_TYPES)
        raise CheckpointError(f"{path}: tensor {tensor.name} has type {found}; read are {served}.")
    ggml_type = GgmlType(tensor.type)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    if len(tensor.shape) not in (1, 2, 3) or tensor.shape[-1] % block_size:
        raise CheckpointError(f"{path}: tensor {tensor.name} of type {ggml_type.name} has shape {tensor.shape}.")
    # llama.cpp's converter interleaves the two halves of each head's rows, for Llama only.
    is_paired = config.architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight"))
    return StoredTensor(
        name=tensor.name,
        path=path,
        offset=tensor.start,
        shape=tensor.shape,
        block=BlockLayout(size=block_size, num_bytes=block_bytes, fields=FIELDS.get(ggml_type, ())),
        decode=decoder(ggml_type, library.load()),
        paired_head_dim=config.head_dim if is_paired else None,
        in_four_bits=IN_FOUR_BITS.get(ggml_type),
    )


def decoder(ggml_type: GgmlType, kernels: library.Library | None) -> Callable[[bytearray], torch.Tensor]:
    """What widens the bytes of whole blocks to a flat tensor: ours, or the package's, which takes 5 to 40 times as long
    and gives the same to the last bit."""
    if ggml_type in PLAIN_TYPES:
        return lambda data: torch.frombuffer(data, dtype=PLAIN_TYPES[ggml_type])
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    widen = kernels.function(f"widen_{ggml_type.name.lower()}", "pnp") if kernels is not None else None

    def decode(data: bytearray) -> torch.Tensor:
        if widen is None:
            flat = gguf.dequantize(np.frombuffer(data, dtype=np.uint8).reshape(1, -1), ggml_type)
            return torch.from_numpy(flat.reshape(-1))
        num_blocks = len(data) // block_bytes
        out = torch.empty(num_blocks * block_size)
        widen(torch.frombuffer(data, dtype=torch.uint8).data_ptr(), num_blocks, out.data_ptr())
        return out

    return decode
