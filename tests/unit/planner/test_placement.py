"""Stages onto nodes, layers onto stages."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from qwen_ray.core.hardware import Hardware, Node, cpu_device
from qwen_ray.core.plan import split_evenly
from qwen_ray.planner.placement import divide_layers, place_on_cpus, place_on_gpus

GPU = Hardware.parse("1xH100-80G").nodes[0].device


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    stage_size=st.integers(1, 4),
    pp=st.integers(1, 5),
)
def test_gpus_are_filled_and_never_shared(sizes: list[int], stage_size: int, pp: int) -> None:
    nodes = [Node(device=GPU, num_devices=size) for size in sizes]
    replicas = place_on_gpus(nodes, stage_size=stage_size, pp=pp)
    assert len(replicas) == sum(size // stage_size for size in sizes) // pp
    assert all(len(replica) == pp for replica in replicas)
    used = Counter(index for replica in replicas for index in replica)
    assert all(count * stage_size <= sizes[index] for index, count in used.items())


def test_replicas_stay_inside_a_node_where_they_can() -> None:
    nodes = [Node(device=GPU, num_devices=8)] * 2
    assert place_on_gpus(nodes, stage_size=2, pp=3) == [(0, 0, 0), (1, 1, 1)]
    assert place_on_gpus(nodes, stage_size=8, pp=2) == [(0, 1)]


def test_cpu_stages_go_where_most_memory_is_left() -> None:
    large, small = (Node(device=cpu_device(num_cores=8, memory_bytes=m), num_devices=1) for m in (64 << 30, 16 << 30))
    assert place_on_cpus([large, small], pp=2, dp=1) == [(0, 0)]
    assert place_on_cpus([small, small], pp=2, dp=1) == [(0, 1)]
    assert place_on_cpus([small], pp=2, dp=2) == [(0, 0), (0, 0)]
    assert place_on_cpus([small] * 5, pp=2, dp=None) == [(0, 1), (2, 3)]
    assert place_on_cpus([small], pp=3, dp=None) == [(0, 0, 0)]


@given(room=st.lists(st.integers(-5, 10**12), min_size=1, max_size=12), extra=st.integers(0, 100))
def test_all_layers_are_divided(room: list[int], extra: int) -> None:
    spans = divide_layers(len(room) + extra, room)
    assert [i for span in spans for i in span] == list(range(len(room) + extra))
    assert all(len(span) >= 1 for span in spans)


def test_layers_follow_room() -> None:
    assert divide_layers(30, [10, 10, 10]) == split_evenly(30, 3)
    assert divide_layers(31, [10, 10, 10]) == split_evenly(31, 3)
    assert [len(s) for s in divide_layers(30, [20, 10])] == [20, 10]
    # The ends lose as much room to embedding and head as two layers take.
    assert [len(s) for s in divide_layers(80, [18, 20, 20, 18])] == [19, 21, 21, 19]
