"""The one bundle of tensors that a forward pass is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwen_ray.kernels.layer import LayerWeights, Places

__all__ = ["ForwardBatch", "LayerWeights", "Places"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """Several sequences' chunks laid end to end: T tokens, S sequences, R rows that leave the last layer, of which L
    leave the model.

    Sequence s owns `query_lens[s]` tokens; its context is all its tokens up to and with the chunk. Lengths are ints:
    nobody waits for a device to know them.
    """

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slots: torch.Tensor  # [T] int64: block * block_size + offset, where each token's K and V are written
    block_tables: torch.Tensor  # [S, max blocks] int64, padded with block 0
    last_rows: torch.Tensor | None  # [R] int64: indices into T, rising; None: all. Of others only K and V are wanted
    logit_rows: torch.Tensor  # [L] int64: indices into R; of these the model gives logits, or hidden states
    query_lens: tuple[int, ...]  # S ints, adding up to T
    last_lens: tuple[int, ...]  # S ints, adding up to R: how many of its last tokens
    context_lens: tuple[int, ...]  # S ints

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)

    @property
    def num_sequences(self) -> int:
        return len(self.query_lens)
