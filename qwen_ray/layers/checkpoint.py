"""What a layer asks a checkpoint for: a rectangle of a named tensor, nothing more."""

from __future__ import annotations

from typing import Protocol

import torch

from qwen_ray.core.plan import Span
from qwen_ray.kernels.quantized import FourBits


class Checkpoint(Protocol):
    """Named tensors, read by part.

    `read` gives `rows` (of dimension 0) and `columns` (of dimension 1) of a tensor, None meaning all, as a fresh CPU
    tensor of the compute dtype. Only the bytes of that part are read. `shape` is the tensor's expected whole shape:
    a tensor that is missing or shaped otherwise raises CheckpointError with the name, the file and both shapes.
    Names are those of the Hugging Face checkpoint (`model.layers.0.self_attn.q_proj.weight`).

    `read_four_bits` is the same for a matrix that lies in 4 bits, as it lies there; None where it cannot be told so:
    it lies otherwise, or the columns' groups of 32 do not share their scales.
    """

    def read(
        self, name: str, shape: tuple[int, ...], *, rows: Span | None = None, columns: Span | None = None
    ) -> torch.Tensor: ...

    def read_four_bits(
        self, name: str, shape: tuple[int, ...], *, rows: Span | None = None, columns: Span | None = None
    ) -> FourBits | None: ...
