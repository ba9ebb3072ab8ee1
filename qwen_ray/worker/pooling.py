"""From a prompt's last position to what is asked of it in place of a token.

Knows rows of tensors and the sequences they are of. Lengths, angles and likelihoods are made of them elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qwen_ray.core.step import Sample
from qwen_ray.worker.sequences import SequenceState


def embed(hidden: torch.Tensor, states: Sequence[SequenceState]) -> list[Sample]:
    """Each of `states` gets its row of `hidden` [len(states), hidden]."""
    if not states:
        return []
    return [_pooled(state, row) for state, row in zip(states, hidden.float().cpu(), strict=True)]


def score(logits: torch.Tensor, states: Sequence[SequenceState]) -> list[Sample]:
    """Each of `states` gets the logits of the tokens that it asks for, from its row of [len(states), vocabulary]."""
    samples: list[Sample] = []
    for state, row in zip(states, logits, strict=True):
        assert state.pooling is not None, "of sequences that are pooled"
        samples.append(_pooled(state, row[list(state.pooling.token_ids)].float().cpu()))
    return samples


def _pooled(state: SequenceState, values: torch.Tensor) -> Sample:
    if not values.isfinite().all():
        return Sample(sequence_id=state.sequence_id, error="the model's hidden state or logits are not finite")
    return Sample(sequence_id=state.sequence_id, pooled=values.numpy().astype("<f4").tobytes())
