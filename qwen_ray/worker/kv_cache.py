"""The memory that keys and values live in: one pair of tensors for each of this rank's layers.

Knows sizes. Which block belongs to whom is the engine's business.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qwen_ray.layers.attention import Attention


def allocate(
    attentions: Sequence[Attention], *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Give each attention layer its `kv_cache`; returns the bytes of all of them.

    The memory is written to: it is held from now on, not when the first long request comes.
    """
    num_bytes = 0
    for attention in attentions:
        shape = (num_blocks, block_size, attention.num_kv_heads, attention.head_dim)
        keys, values = (torch.empty(shape, dtype=dtype, device=device).zero_() for _ in range(2))
        attention.kv_cache = (keys, values)
        num_bytes += keys.nbytes + values.nbytes
    return num_bytes
