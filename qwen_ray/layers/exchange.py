"""Tokens on their way to the ranks that hold their experts, and back.

Where each dp rank of a stage has tokens of its own, every rank sends each of its tokens once to every rank that holds
one of the token's experts, or a part of it; those send back what their experts add. All ranks of the stage take part
each time, with as many tokens as they have: none, perhaps.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from qwen_ray.layers.experts import Experts
from qwen_ray.parallel.groups import TensorGroup


def dispatch(
    x: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, experts: Experts, group: TensorGroup
) -> torch.Tensor:
    """What all ranks of the stage add for this rank's tokens: [n, hidden] to [n, hidden].

    places [n, k] as in `ExpertMap`, weights [n, k] float32. Sums run in the order of ranks.
    """
    num_holders = len(experts.map.slots)
    owners = places // experts.map.width
    goes = (owners.unsqueeze(-1) == torch.arange(num_holders, device=x.device)).any(1)  # [n, expert ranks]
    holders, rows = goes.t().nonzero(as_tuple=True)
    # One message for each expert rank; every one of the ranks that are it gets the same.
    slots = places[rows] - holders.unsqueeze(1) * experts.map.width
    slots = torch.where(owners[rows] == holders.unsqueeze(1), slots, -1)
    packed = pack(x[rows], slots, weights[rows])
    ends = [0, *goes.sum(0).cumsum(0).tolist()]
    spans = [slice(a, b) for a, b in pairwise(ends) for _ in range(group.size // num_holders)]  # by rank
    counts = [span.stop - span.start for span in spans]
    received, origins = group.all_to_all(torch.cat([packed[span] for span in spans]), counts)
    added, _ = group.all_to_all(experts(*unpack(received, places.shape[1], x.dtype)), origins)
    total = x.new_zeros(x.shape, dtype=torch.float32)
    for span, part in zip(spans, added.split(counts), strict=True):
        total.index_add_(0, rows[span], part.float())  # of one rank no row comes twice
    return total.to(x.dtype)


def pack(x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Rows of bytes that hold x [n, hidden], slots [n, k] and weights [n, k]: one message in place of three."""
    num_rows, top_k = slots.shape
    packed = torch.empty(num_rows, 8 * top_k + x.shape[1] * x.itemsize, dtype=torch.uint8, device=x.device)
    for room, part in zip(unpack(packed, top_k, x.dtype), (x, slots, weights), strict=True):
        room.copy_(part)
    return packed


def unpack(packed: torch.Tensor, top_k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of what was packed: x of `dtype`, slots int32, weights float32."""
    slots, weights, x = packed.split((4 * top_k, 4 * top_k, packed.shape[1] - 8 * top_k), dim=1)
    return x.view(dtype), slots.view(torch.int32), weights.view(torch.float32)
