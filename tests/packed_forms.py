"""Matrices in the forms that GPTQ's, AWQ's, compressed-tensors' and DeepSeek's tools write. Not a test itself.

Each takes apart a matrix of whole numbers with scales and zeros, bit by bit as the tools' formats are defined, and
gives the tensors by their last names beside what all of them stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qwen_ray.kernels.quantized import FourBits, dequantize, make_room, store_as_they_are

Parts = dict[str, torch.Tensor]
Form = Callable[[int, int, int], tuple[Parts, torch.Tensor]]  # (rows, columns, seed)


def compressed_config(form: str, bits: int) -> dict[str, Any]:
    groups = {"group_0": {"weights": {"num_bits": bits}}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": GPTQ_CONFIG,
    "gptq_v2": {**GPTQ_CONFIG, "checkpoint_format": "gptq_v2"},
    "gptq_8": {**GPTQ_CONFIG, "bits": 8},
    "gptq_act_order": {**GPTQ_CONFIG, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True},
    "compressed": compressed_config("pack-quantized", 4),
    "compressed_zeros": compressed_config("pack-quantized", 4),
    "compressed_8": compressed_config("int-quantized", 8),
    "compressed_fp8": compressed_config("float-quantized", 8),
    "fp8": {"quant_method": "fp8", "weight_block_size": [32, 48]},
}
# Whose groups of columns are whole groups of ours.
KEPT = ("gptq", "gptq_v2", "awq", "compressed", "compressed_zeros")


def numbers(rows: int, columns: int, groups: int, seed: int, bits: int = 4) -> tuple[torch.Tensor, ...]:
    """Numbers [rows, columns], zeros [rows, groups] of at least 1, scales of 2 bytes."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (rows, columns), generator=random)
    zeros = torch.randint(1, 2**bits, (rows, groups), generator=random)
    scales = (torch.rand(rows, groups, generator=random) * 0.2 + 0.001).half()
    return values, zeros, scales


def words(values: torch.Tensor, bits: int = 4, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """[n, m] to int32 [n, m * bits / 32]: of each word's numbers, the one `order[k]` lies k * bits from the bottom."""
    count = 32 // bits
    of_word = values.long().view(values.shape[0], -1, count)
    total = torch.zeros(of_word.shape[:2], dtype=torch.int64)
    for k in range(count):
        total |= of_word[:, :, order[k] if order else k] << (k * bits)
    return torch.where(total >= 2**31, total - 2**32, total).int()


def gptq(rows: int, columns: int, seed: int, *, less: int = 1, bits: int = 4, shuffled: bool = False) -> Any:
    groups = -(-columns // 64)
    values, zeros, scales = numbers(rows, columns, groups, seed, bits)
    group_of = torch.arange(columns) // 64
    if shuffled:
        group_of = group_of[torch.randperm(columns, generator=torch.Generator().manual_seed(seed))]
    parts = {
        "qweight": words(values.t().reshape(-1, 32 // bits, rows).transpose(1, 2).reshape(-1, 32 // bits), bits),
        "qzeros": words(zeros.t() - less, bits),
        "scales": scales.t().contiguous(),
        "g_idx": group_of.int(),
    }
    parts["qweight"] = parts["qweight"].view(-1, rows)
    return parts, (values - zeros[:, group_of]) * scales.float()[:, group_of]


def awq(rows: int, columns: int, seed: int) -> tuple[Parts, torch.Tensor]:
    values, zeros, scales = numbers(rows, columns, -(-columns // 64), seed)
    group_of = torch.arange(columns) // 64
    return awq_parts(values, zeros, scales), (values - zeros[:, group_of]) * scales.float()[:, group_of]


def compressed(rows: int, columns: int, seed: int, *, has_zeros: bool = False) -> tuple[Parts, torch.Tensor]:
    values, zeros, scales = numbers(rows, columns, -(-columns // 64), seed)
    zeros, scales, group_of = (
        zeros if has_zeros else torch.full_like(zeros, 8),
        scales.bfloat16(),
        torch.arange(columns) // 64,
    )
    parts = {"weight_packed": words(values), "weight_scale": scales, "weight_shape": torch.tensor([rows, columns])}
    if has_zeros:
        parts["weight_zero_point"] = words(zeros.t().contiguous()).t().contiguous()
    return parts, (values - zeros[:, group_of]) * scales.float()[:, group_of]


def by_row(rows: int, columns: int, seed: int) -> tuple[Parts, torch.Tensor]:
    values, _, scales = numbers(rows, columns, 1, seed, bits=8)
    values = values.clamp(1) - 128
    return {"weight": values.to(torch.int8), "weight_scale": scales.bfloat16()}, values * scales.bfloat16().float()


def fp8_by_row(rows: int, columns: int, seed: int) -> tuple[Parts, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=random).to(torch.float8_e4m3fn)
    scales = torch.rand(rows, 1, generator=random).bfloat16() + 0.01
    return {"weight": values, "weight_scale": scales}, values.float() * scales.float()


def fp8(rows: int, columns: int, seed: int) -> tuple[Parts, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=random).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // 32), -(-columns // 48), generator=random) + 0.01
    wide = scales.repeat_interleave(32, 0)[:rows].repeat_interleave(48, 1)[:, :columns]
    return {"weight": values, "weight_scale_inv": scales}, values.float() * wide


FORMS: dict[str, Form] = {
    "gptq": gptq,
    "gptq_v2": lambda rows, columns, seed: gptq(rows, columns, seed, less=0),
    "gptq_8": lambda rows, columns, seed: gptq(rows, columns, seed, bits=8),
    "gptq_act_order": lambda rows, columns, seed: gptq(rows, columns, seed, shuffled=True),
    "awq": awq,
    "compressed": compressed,
    "compressed_zeros": lambda rows, columns, seed: compressed(rows, columns, seed, has_zeros=True),
    "compressed_8": by_row,
    "compressed_fp8": fp8_by_row,
    "fp8": fp8,
}


def awq_of(weight: torch.Tensor) -> Parts:
    """A real matrix rounded to the nearest, each 64 columns of a row by themselves."""
    groups = weight.unflatten(1, (-1, 64))
    least, most = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((most - least) / 15).clamp(min=1e-6).half()
    zeros = (-least / scales).round().clamp(1, 15)
    values = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15).flatten(1)
    return awq_parts(values, zeros, scales)


def awq_parts(values: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> Parts:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words(values.t().contiguous(), order=order),
        "qzeros": words(zeros.t().contiguous(), order=order),
        "scales": scales.t().contiguous(),
    }


def in_float(part: FourBits) -> torch.Tensor:
    """What a rank computes with when it keeps them."""
    packed = make_room(4, *part.values.shape)
    store_as_they_are(packed, 0, part)
    return dequantize(packed)


def packed_model(tensors: Parts, form: str) -> tuple[Parts, Parts]:
    """A model's tensors with all projections in that form, and the same tensors as they then stand for."""
    stored, wide = dict(tensors), dict(tensors)
    for seed, (name, tensor) in enumerate(tensors.items()):
        if name.endswith("_proj.weight"):
            parts, whole = FORMS[form](*tensor.shape, seed)
            del stored[name]
            stored |= {f"{name.removesuffix('weight')}{last}": part for last, part in parts.items()}
            wide[name] = whole
    return stored, wide
