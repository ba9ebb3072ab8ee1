"""The groups of a stage's ranks: who is in them, what arrives, and how they end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_exchanges import (
    Degrees,
    exchange_many,
    exchange_until_a_death,
    meet,
    wait_for_an_idle_rank,
)
from rank_processes import Ranks, free_address

from qwen_ray.parallel.shared_memory import CAPACITY


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks(4)
    yield processes
    processes.close()


def world_size(degrees: Degrees) -> int:
    tp, dp, pp = degrees
    return tp * dp * pp


def bits(members: range) -> int:
    return sum(1 << rank for rank in members)


KINDS = {"memory": ("SharedMemory", "SharedMemory"), "none": ("Mesh", "Mesh"), "dp rank": ("SharedMemory", "Mesh")}
SHAPES: list[Degrees] = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (3, 1, 1), (1, 3, 1), (4, 1, 1), (1, 4, 1)]
SHAPES += [(2, 2, 1), (2, 1, 2), (1, 2, 2)]


@pytest.mark.parametrize(
    ("degrees", "sharing"),
    [*((shape, "memory") for shape in SHAPES), ((2, 2, 1), "none"), ((2, 2, 1), "dp rank"), ((1, 2, 2), "none")],
)
def test_every_rank_meets_its_own_and_no_others(ranks: Ranks, degrees: Degrees, sharing: str) -> None:
    tp, dp, _ = degrees
    meetings = ranks.run(world_size(degrees), meet, degrees, free_address(), sharing)
    for rank, met in enumerate(meetings):
        stage_first, tensor_first = rank - rank % (tp * dp), rank - rank % tp
        assert met.tensor == bits(range(tensor_first, tensor_first + tp))
        assert met.stage == bits(range(stage_first, stage_first + tp * dp))
        assert met.in_order == list(range(stage_first, stage_first + tp * dp))
        assert met.from_previous == ([float(rank - tp * dp)] if stage_first else [])
        tensor_kind, stage_kind = KINDS[sharing]
        assert met.kinds == (tensor_kind if tp > 1 else "Alone", stage_kind if tp * dp > 1 else "Alone")
        assert met.is_one == (dp == 1)


@pytest.mark.parametrize("kind", ["memory", "links"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_rows_arrive_as_one_process_would_deal_them(ranks: Ranks, kind: str, size: int) -> None:
    longest = ranks.run(size, exchange_many, size, free_address(), kind, size, 30)
    assert max(longest) > 2 * CAPACITY


@pytest.mark.parametrize(
    ("degrees", "sharing", "dying"),
    [((2, 2, 1), "memory", 3), ((2, 2, 1), "none", 0), ((2, 2, 1), "dp rank", 2), ((1, 2, 2), "memory", 1),
     ((1, 2, 2), "none", 3), ((3, 1, 1), "memory", 2)],
)  # fmt: skip
@pytest.mark.parametrize(("delay", "num_rows"), [(0.02, 3), (0.05, 9000)])
def test_a_death_amid_exchanges_ends_every_rank(
    ranks: Ranks, degrees: Degrees, sharing: str, dying: int, delay: float, num_rows: int
) -> None:
    arguments = (degrees, free_address(), sharing, dying, delay, num_rows)
    errors = ranks.run(world_size(degrees), exchange_until_a_death, *arguments, dying=frozenset({dying}))
    assert errors[dying] is None
    assert all("Connection" in error or error == "BrokenPipeError" for i, error in enumerate(errors) if i != dying)


@pytest.mark.parametrize("sharing", ["memory", "none"])
@pytest.mark.parametrize("degrees", [(1, 2, 1), (2, 2, 1), (1, 4, 1)])
def test_an_abort_by_one_rank_ends_the_waits_of_all(
    ranks: Ranks, tmp_path: Path, degrees: Degrees, sharing: str
) -> None:
    size = world_size(degrees)
    ended, *errors = ranks.run(size, wait_for_an_idle_rank, degrees, free_address(), sharing, tmp_path)
    assert int(ended) == size - 1
    assert all("Connection" in error or error == "BrokenPipeError" for error in errors)
