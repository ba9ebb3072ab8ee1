"""Experts on CUDA: tokens sorted by expert, all experts in one grouped matrix product; the host never waits.

`torch.nn.functional.grouped_mm` has a kernel for bfloat16 on Hopper and Blackwell; elsewhere torch computes group by
group, behind the same name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qwen_ray.kernels import reference

PARTS_AT_ONCE = 16384  # rows of hidden states, one per token and choice: larger inputs are computed in pieces
DTYPES = (torch.bfloat16, torch.float16)
ROW_BYTES = 16  # the kernels want rows of a multiple of this


def run_experts(
    x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """As `reference.run_experts`, which takes over for dtypes and sizes that the grouped product does not know."""
    sizes = (x.shape[1], down.shape[2])
    if x.dtype not in DTYPES or not all(size > 0 and size * x.itemsize % ROW_BYTES == 0 for size in sizes):
        return reference.run_experts(x, slots, weights, gate_up, down)
    if x.shape[0] == 0:
        return torch.empty_like(x)
    step = max(1, PARTS_AT_ONCE // slots.shape[1])
    pieces = zip(x.split(step), slots.split(step), weights.split(step), strict=True)
    outputs = [_run(*piece, gate_up, down) for piece in pieces]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _run(
    x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    num_slots = gate_up.shape[0]
    # Choices that are not here come last, behind the end of the last group: nobody computes them.
    keys, order = torch.where(slots < 0, num_slots, slots).flatten().sort(stable=True)
    groups = torch.arange(num_slots, dtype=keys.dtype, device=x.device)
    ends = torch.searchsorted(keys, groups, right=True, out_int32=True)
    rows = x[order // slots.shape[1]]
    inner = reference.silu_and_mul(F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends))
    sorted_parts = F.grouped_mm(inner, down.transpose(1, 2), offs=ends)
    parts = torch.empty_like(sorted_parts).index_copy_(0, order, sorted_parts).view(*slots.shape, x.shape[1])
    # What lies behind the last group is whatever the memory held, NaN perhaps.
    return reference.sum_choices(parts.masked_fill_((slots < 0).unsqueeze(-1), 0), weights)
