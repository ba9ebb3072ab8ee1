"""A checkpoint in the quantized form that vLLM reads on CPUs: compressed-tensors, rounded to the nearest.

int8: W8A8, weights by output channel, activations by token as they come. int4: W4A16, symmetric by groups of 128, eight
values in an int32. Both are the common presets; embeddings and the LM head stay in bf16 with them. Made from the same
weights, without calibration: quality is not what is measured.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

GROUP_SIZE = 128
VALUES_IN_WORD = 8  # 4-bit values of an int32, the first in the lowest bits


def write(source: Path, folder: Path, precision: str) -> None:
    """`source`, a bf16 checkpoint, into the new folder."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix == ".json" and file.name != "config.json":
            shutil.copy(file, folder)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization_config(precision)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights: dict[str, torch.Tensor] = {}
    with safe_open(source / "model.safetensors", "pt") as stored:
        for name in stored.keys():  # noqa: SIM118
            weight = stored.get_tensor(name)
            if name.endswith("_proj.weight"):
                prefix = name.removesuffix("weight")
                pack = by_channel if precision == "int8" else by_group
                weights |= {prefix + part: tensor for part, tensor in pack(weight).items()}
            else:
                weights[name] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def by_channel(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """[rows, columns] -> int8 of the same shape and a scale for each row."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    values = (weight.float() / scale).round().clamp(-127, 127).to(torch.int8)
    return {"weight": values, "weight_scale": scale.to(torch.bfloat16)}


def by_group(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """[rows, columns] -> int32 [rows, columns / 8] of values plus 8, and a scale for each 128 columns."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // GROUP_SIZE, GROUP_SIZE)
    scale = groups.abs().amax(2, keepdim=True) / 7.5
    values = (groups / scale).round().clamp(-8, 7).to(torch.int64).view(rows, -1, VALUES_IN_WORD) + 8
    words = (values << (4 * torch.arange(VALUES_IN_WORD))).sum(2)
    return {
        "weight_packed": torch.where(words >= 2**31, words - 2**32, words).to(torch.int32),
        "weight_scale": scale.squeeze(2).to(torch.bfloat16),
        "weight_shape": torch.tensor([rows, columns]),
    }


def quantization_config(precision: str) -> dict[str, Any]:
    common = {"type": "int", "symmetric": True}
    if precision == "int8":
        weights = {**common, "num_bits": 8, "strategy": "channel", "dynamic": False}
        activations = {**common, "num_bits": 8, "strategy": "token", "dynamic": True}
    else:
        weights = {**common, "num_bits": 4, "strategy": "group", "group_size": GROUP_SIZE, "dynamic": False}
        activations = None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if precision == "int8" else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
