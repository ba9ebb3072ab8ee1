"""Matrix products cut over the ranks of a stage. Each layer reads its own rows or columns from the checkpoint.

Knows its span of the output (column-parallel: no communication) or of the input (row-parallel: a sum over the ranks),
as in Megatron-LM (Shoeybi et al. 2019). Knows nothing of what the numbers mean.
"""

from __future__ import annotations

import torch
from torch import nn

from qwen_ray.core.plan import Span
from qwen_ray.layers.checkpoint import Checkpoint
from qwen_ray.layers.matrix import Matrix, layer_bits
from qwen_ray.layers.site import Site, weight


class ColumnParallelLinear(Matrix):
    """One or several projections of the same input, fused: this rank's output rows of each, one after the other.

    `parts` names them as the checkpoint does and gives (whole output size, this rank's span of it).
    """

    def __init__(self, site: Site, in_size: int, parts: dict[str, tuple[int, Span]], *, bias: bool) -> None:
        out_size = sum(len(span) for _, span in parts.values())
        super().__init__(site, out_size, in_size, layer_bits(site))
        self._in_size = in_size
        self._parts = parts
        self.bias = weight(site, out_size) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] to [T, this rank's outputs]."""
        return self.multiply(x, self.bias)

    def load(self, checkpoint: Checkpoint, prefix: str) -> None:
        """`prefix` is the module that holds the parts: `model.layers.0.mlp`."""
        start = 0
        for name, (size, span) in self._parts.items():
            self.take(start, checkpoint, f"{prefix}.{name}.weight", (size, self._in_size), rows=span)
            if self.bias is not None:
                own = slice(start, start + len(span))
                self.bias[own].copy_(checkpoint.read(f"{prefix}.{name}.bias", (size,), rows=span))
            start += len(span)


class RowParallelLinear(Matrix):
    """A projection whose input is spread over the ranks: each adds its part, all get the sum. No bias."""

    def __init__(self, site: Site, in_size: int, span: Span, out_size: int) -> None:
        super().__init__(site, out_size, len(span), layer_bits(site))
        self.all_reduce = site.groups.tensor.all_reduce
        self._shape = (out_size, in_size)
        self._span = span

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, this rank's inputs] to [T, out]."""
        return self.all_reduce(self.partial(x))

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """What this rank adds to the sum."""
        return self.multiply(x)

    def load(self, checkpoint: Checkpoint, prefix: str) -> None:
        """`prefix` is this projection: `model.layers.0.mlp.down_proj`."""
        self.take(0, checkpoint, f"{prefix}.weight", self._shape, columns=self._span)


class ReplicatedLinear(nn.Module):
    """A projection so small that every rank holds it whole, and as it is. No bias."""

    def __init__(self, site: Site, in_size: int, out_size: int) -> None:
        super().__init__()
        self._linear = site.kernels.linear
        self.weight = weight(site, out_size, in_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] to [T, out]."""
        return self._linear(x, self.weight, None)

    def load(self, checkpoint: Checkpoint, prefix: str) -> None:
        """`prefix` is this projection: `model.layers.0.mlp.gate`."""
        self.weight.copy_(checkpoint.read(f"{prefix}.weight", tuple(self.weight.shape)))
