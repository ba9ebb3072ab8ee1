"""The vocabulary: token ids to vectors on the first stage, vectors to logits on the last. Each rank holds its rows.

A tied model has one matrix for both; a rank that needs it for both holds it once.
"""

from __future__ import annotations

import torch
from torch import nn

from qwen_ray.core.plan import Span, split_evenly
from qwen_ray.layers.checkpoint import Checkpoint
from qwen_ray.layers.matrix import Matrix, vocab_bits
from qwen_ray.layers.site import Site

ROWS_AT_ONCE = 16384


class VocabMatrix(Matrix):
    """This rank's rows of a [vocabulary, hidden] matrix. No other is as large: to be rounded, it is read in pieces."""

    def __init__(self, site: Site, vocab_size: int, hidden_size: int) -> None:
        self.span: Span = site.shard.vocab
        super().__init__(site, len(self.span), hidden_size, vocab_bits(site))
        self.vocab_size = vocab_size
        self._shape = (vocab_size, hidden_size)

    def load(self, checkpoint: Checkpoint, prefix: str) -> None:
        at_once = max(1, len(self.span)) if self.packed is None else ROWS_AT_ONCE
        for start in range(self.span.start, self.span.stop, at_once):
            piece = Span(start, min(start + at_once, self.span.stop))
            self.take(start - self.span.start, checkpoint, f"{prefix}.weight", self._shape, rows=piece)


class Embedding(VocabMatrix):
    def __init__(self, site: Site, vocab_size: int, hidden_size: int) -> None:
        super().__init__(site, vocab_size, hidden_size)
        self._group = site.groups.tensor

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] to [T, hidden]. Each rank looks up its own tokens, the sum puts them together."""
        if self._group.size == 1 or token_ids.shape[0] == 0:
            return self.look_up(token_ids)
        mine = (token_ids >= self.span.start) & (token_ids < self.span.stop)
        rows = self.look_up(torch.where(mine, token_ids - self.span.start, 0))
        return self._group.all_reduce(rows.masked_fill_(~mine.unsqueeze(-1), 0))


class Head(nn.Module):
    """Logits from a vocabulary matrix: one of its own, or the embedding's."""

    def __init__(self, site: Site, matrix: VocabMatrix) -> None:
        super().__init__()
        self._group = site.groups.tensor
        self._is_gathering = site.shard.tp_rank == 0
        self._sizes = tuple(len(span) for span in split_evenly(matrix.vocab_size, site.shard.tp_size))
        self.matrix = matrix

    def forward(self, x: torch.Tensor) -> torch.Tensor | None:
        """[L, hidden] to logits [L, vocabulary] in the same dtype on tensor rank 0, None on the others."""
        if x.shape[0] == 0:
            return x.new_empty(0, self.matrix.vocab_size) if self._is_gathering else None
        return self._group.gather(self.matrix.multiply(x), self._sizes)

    def load(self, checkpoint: Checkpoint, prefix: str) -> None:
        self.matrix.load(checkpoint, prefix)
