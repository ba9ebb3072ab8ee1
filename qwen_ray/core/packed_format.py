"""How a checkpoint holds matrices in few bits: `quantization_config` of its config.json.

Knows the methods that can be read and what tells their dialects apart; `worker/packed.py` knows their tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qwen_ray.core.errors import CheckpointError

PackedMethod = Literal["gptq", "awq", "compressed-tensors", "fp8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFormat:
    """How a checkpoint holds matrices of its layers in few bits."""

    method: PackedMethod
    bits: int  # of a weight
    zeros_less_one: bool = False  # GPTQ: a zero is stored less 1, in its first format
    block: tuple[int, int] | None = None  # fp8: [rows, columns] that share a scale
    group: int | None = None  # columns of a row that share a scale; None: all
    in_order: bool = True  # whether those lie side by side: not where GPTQ chose by their activations

    @property
    def is_kept(self) -> bool:
        """Whether matrices can stay as they are in 4 bits by 32."""
        return self.bits == 4 and self.in_order and (self.group or 32) % 32 == 0


def packed_format(raw: Mapping[str, Any], source: str) -> PackedFormat:
    """`quantization_config`, of the kinds that can be read. Activations it wants rounded are computed as they are."""
    method = raw.get("quant_method")
    if method == "gptq":
        _one_of(raw, "bits", (4, 8), source)
        _one_of(raw, "checkpoint_format", (None, "gptq", "gptq_v2"), source)
        _one_of(raw, "dynamic", (None, {}), source)
        return PackedFormat(
            method="gptq",
            bits=raw["bits"],
            zeros_less_one=raw.get("checkpoint_format") != "gptq_v2",
            group=_group(raw, source),
            in_order=not raw.get("desc_act"),
        )
    if method == "awq":
        _one_of(raw, "bits", (4,), source)
        _one_of(raw, "version", (None, "gemm", "GEMM"), source)
        return PackedFormat(method="awq", bits=4, group=_group(raw, source))
    if method == "fp8":
        sides: list[Any] = raw.get("weight_block_size") or []
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise CheckpointError(
                f"{source}: quantization_config.weight_block_size is {sides or None!r}; fp8 is read by blocks of two "
                "sides, as [128, 128]."
            )
        return PackedFormat(method="fp8", bits=8, block=(sides[0], sides[1]))
    if method == "compressed-tensors":
        _one_of(raw, "format", ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"), source)
        groups: Mapping[str, Mapping[str, Any]] = raw.get("config_groups") or {}
        if len(groups) != 1:
            raise CheckpointError(f"{source}: quantization_config.config_groups is {groups!r}; read is one group.")
        (group,) = groups.values()
        weights: Mapping[str, Any] = group.get("weights") or {}
        _one_of(weights, "num_bits", (4, 8), source)
        return PackedFormat(
            method="compressed-tensors",
            bits=weights["num_bits"],
            group=_group(weights, source),
            in_order=not weights.get("actorder"),
        )
    raise CheckpointError(
        f"{source}: quantization_config.quant_method is {method!r}; read are gptq, awq, fp8 and compressed-tensors."
    )


def _group(raw: Mapping[str, Any], source: str) -> int | None:
    size = raw.get("group_size")
    if size in (None, -1):
        return None
    if not isinstance(size, int) or size < 1:
        raise CheckpointError(f"{source}: quantization_config.group_size is {size!r}; it is -1 or a number of columns.")
    return size


def _one_of(raw: Mapping[str, Any], key: str, known: tuple[Any, ...], source: str) -> None:
    if (value := raw.get(key)) not in known:
        words = ", ".join(repr(one) for one in known if one)
        raise CheckpointError(
            f"{source}: quantization_config.{key} is {value!r}; read are {words or 'models without it'}."
        )
