"""Where things go: stages onto nodes, layers onto stages.

Knows how many devices and bytes nodes have. Knows nothing of what a rank holds beyond the numbers it is given, nor of
speed. The ranks of a stage stay inside a node, as they exchange much in every layer; stages may cross.

A GPU belongs to one rank. A CPU node is shared by as many ranks as memory allows, so there stages go where least is.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from qwen_ray.core.hardware import Node
from qwen_ray.core.plan import Span

Replica = tuple[int, ...]  # for each stage, the index of its node


def place_on_gpus(nodes: Sequence[Node], *, stage_size: int, pp: int) -> list[Replica]:
    """As many replicas as there is room for, whole ones inside a node first: that costs no replica, and saves hops."""
    whole: list[Replica] = []
    rest: list[int] = []
    for index, node in enumerate(nodes):
        inside, left = divmod(node.num_devices // stage_size, pp)
        whole += [(index,) * pp] * inside
        rest += [index] * left
    return whole + [tuple(rest[i : i + pp]) for i in range(0, len(rest) - pp + 1, pp)]


def place_on_cpus(nodes: Sequence[Node], *, pp: int, dp: int | None) -> list[Replica]:
    """Stage after stage to the node with the most memory for each stage that it then has.

    `dp` None: as many replicas as there are nodes for, a stage on each; one, if they have to share.
    """
    if dp is None and pp <= len(nodes):
        return [tuple(range(i, i + pp)) for i in range(0, len(nodes) - pp + 1, pp)]
    dp = dp or 1
    free = [(-float(node_memory(node)), index, 1) for index, node in enumerate(nodes)]
    heapq.heapify(free)
    stages: list[int] = []
    for _ in range(pp * dp):
        _, index, count = free[0]
        stages.append(index)
        heapq.heapreplace(free, (-node_memory(nodes[index]) / (count + 1), index, count + 1))
    return [tuple(sorted(stages[i : i + pp])) for i in range(0, pp * dp, pp)]


def node_memory(node: Node) -> int:
    return node.device.memory_bytes * node.num_devices


def divide_layers(num_layers: int, room: Sequence[int]) -> tuple[Span, ...]:
    """Layers of each stage in proportion to the bytes that it has for them, at least one each (`len(room)` stages).

    With room r and n layers, a stage has r / n for each layer's weights and KV cache. Giving each next layer to the
    stage that has most for it (D'Hondt's rule) makes the least of these as large as it can be, and with it the KV
    cache: the fullest stage decides how many tokens a replica holds.
    """
    counts = [1] * len(room)
    queue = [(-max(r, 1) / 2, stage) for stage, r in enumerate(room)]
    heapq.heapify(queue)
    for _ in range(num_layers - len(room)):
        _, stage = queue[0]
        counts[stage] += 1
        heapq.heapreplace(queue, (-max(room[stage], 1) / (counts[stage] + 1), stage))
    spans: list[Span] = []
    for count in counts:
        start = spans[-1].stop if spans else 0
        spans.append(Span(start, start + count))
    return tuple(spans)
