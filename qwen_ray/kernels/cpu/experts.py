"""Experts on a CPU without kernels of ours: tokens sorted by expert, only experts with tokens read."""

from __future__ import annotations

import torch

from qwen_ray.kernels.quantized import Matrices
from qwen_ray.kernels.reference import expert, sum_choices

PARTS_AT_ONCE = 16384  # rows of hidden states, one per token and choice: larger inputs are computed in pieces


def run_experts(
    x: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Matrices,
    down: Matrices,
) -> torch.Tensor:
    """As `reference.run_experts`."""
    size = max(1, PARTS_AT_ONCE // slots.shape[1])
    pieces = zip(x.split(size), slots.split(size), weights.split(size), strict=True)
    outputs = [_run(*piece, gate_up, down) for piece in pieces]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _run(
    x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, gate_up: Matrices, down: Matrices
) -> torch.Tensor:
    num_choices = slots.shape[1]
    parts = x.new_zeros(*slots.shape, x.shape[1])
    if x.shape[0] == 1:  # a decode of one sequence: its experts differ, there is nothing to sort
        for choice, slot in enumerate(slots[0].tolist()):
            if slot >= 0:
                parts[0, choice] = expert(x, gate_up[slot], down[slot])[0]
        return sum_choices(parts, weights)
    flat = slots.flatten()
    order = flat.argsort(stable=True)
    start, *counts = (flat + 1).bincount(minlength=len(gate_up) + 1).tolist()  # those that are not here come first
    for slot, count in enumerate(counts):
        if count:
            own = order[start : start + count]
            parts.flatten(0, 1).index_copy_(0, own, expert(x[own // num_choices], gate_up[slot], down[slot]))
            start += count
    return sum_choices(parts, weights)
