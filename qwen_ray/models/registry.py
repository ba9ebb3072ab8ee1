"""Which page serves which architecture."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qwen_ray.core.errors import CheckpointError, SettingsError
from qwen_ray.core.model_config import ModelConfig, Quantization
from qwen_ray.core.plan import Shard
from qwen_ray.layers.site import Groups, Site
from qwen_ray.models.qwen2 import Qwen2Layer
from qwen_ray.models.qwen2_moe import Qwen2MoeLayer
from qwen_ray.models.qwen3 import Qwen3Layer
from qwen_ray.models.qwen3_moe import Qwen3MoeLayer
from qwen_ray.models.stage import DecoderLayer, Stage

LAYERS: dict[str, Callable[[ModelConfig, Site, int], DecoderLayer]] = {
    "llama": Qwen2Layer,
    "qwen2": Qwen2Layer,
    "qwen2_moe": Qwen2MoeLayer,
    "qwen3": Qwen3Layer,
    "qwen3_moe": Qwen3MoeLayer,
}


def build(
    config: ModelConfig,
    shard: Shard,
    groups: Groups,
    device: torch.device,
    dtype: torch.dtype,
    *,
    max_len: int,
    quantization: Quantization = "none",
    deterministic: bool = False,
) -> Stage:
    """This rank's part of the model, its weights not yet filled. Computes in `dtype`, also with quantized weights.

    Positions up to `max_len` can be computed. Raises CheckpointError if no page serves the architecture, SettingsError
    if the bits of a token's logits shall not depend on others, and do on this machine.
    """
    if config.architecture not in LAYERS:
        raise CheckpointError(f"architecture {config.architecture!r} is not served; served are {', '.join(LAYERS)}.")
    site = Site.of(shard, groups, device, dtype, quantization, deterministic=deterministic)
    if deterministic and not site.kernels.is_row_by_row:
        raise SettingsError(
            f"engine.deterministic: this machine has no kernels for {dtype} on {device.type} that compute each row by "
            "itself; on a CPU they want a C++ compiler, and float32 or bfloat16, on a GPU Ampere or later.",
            field="engine.deterministic",
        )
    return Stage(config, site, max_len, LAYERS[config.architecture])
