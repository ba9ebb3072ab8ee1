"""What a layer asks a checkpoint for: a rectangle of a named tensor, nothing more."""

from __future__ import annotations

from typing import Protocol

import torch

from qwen_ray.core.plan import Span


class Checkpoint(Protocol):
    """Named tensors, read by part.

    `read` gives `rows` (of dimension 0) and `columns` (of dimension 1) of a tensor, None meaning all, as a fresh CPU
    tensor of the compute dtype. Only the bytes of that part are read. `shape` is the tensor's expected whole shape:
    a tensor that is missing or shaped otherwise raises CheckpointError with the name, the file and both shapes.
    Names are those of the Hugging Face checkpoint (`model.layers.0.self_attn.q_proj.weight`).
    """

    def read(
        self, name: str, shape: tuple[int, ...], *, rows: Span | None = None, columns: Span | None = None
    ) -> torch.Tensor: ...
