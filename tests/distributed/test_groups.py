"""Groups of real processes when a rank dies, hangs or is told to stop."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rank_deaths import (
    aborted_while_waiting,
    descriptors_after_groups,
    forget,
    joined_until_a_death,
    meets_nobody,
    one_step,
    steps_until_a_death,
)
from rank_processes import Ranks, free_address


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks(6)
    yield processes
    processes.close()


@pytest.mark.parametrize(("tp", "pp", "dying"), [(2, 1, 1), (1, 3, 2), (3, 2, 4), (2, 3, 3)])
def test_a_death_ends_every_rank_and_the_group_meets_anew(ranks: Ranks, tp: int, pp: int, dying: int) -> None:
    errors = ranks.run(tp * pp, steps_until_a_death, tp, pp, free_address(), "first", dying, dying=frozenset({dying}))
    assert errors[dying] is None
    assert all("Connection" in error or error == "BrokenPipeError" for i, error in enumerate(errors) if i != dying)
    sums = ranks.run(tp * pp, one_step, tp, pp, free_address(), "second")
    assert len(set(sums[-tp:])) == 1


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (3, 2), (1, 3)])
def test_abort_from_another_thread_ends_every_wait(ranks: Ranks, tp: int, pp: int) -> None:
    errors = ranks.run(tp * pp, aborted_while_waiting, tp, pp, free_address())
    assert errors[0] == "idle"
    assert all("Connection" in error for error in errors[1:])


@pytest.mark.parametrize(("tp", "pp", "dying"), [(2, 1, (1, 0)), (1, 3, (1, 2)), (3, 2, (4, 0))])
def test_who_survives_keeps_its_groups_and_meets_the_new_rank(
    ranks: Ranks, tp: int, pp: int, dying: tuple[int, int]
) -> None:
    """Layers hold on to methods of a group: they work again after every meeting."""
    world_size, address = tp * pp, free_address()
    for i, victim in enumerate((*dying, dying[0])):
        arguments = (tp, pp, address, f"meeting{i}", victim)
        stayed = ranks.run(world_size, joined_until_a_death, *arguments, dying=frozenset({victim}))
        new = {dying[i - 1]} if i else set(range(world_size))
        assert [rank for rank, has_stayed in enumerate(stayed) if has_stayed is False] == sorted(new - {victim})
    ranks.run(world_size, forget)


@pytest.mark.parametrize("missing", [0, 2])
def test_a_meeting_to_which_not_all_come_ends_and_leaves_nothing(ranks: Ranks, missing: int) -> None:
    ends = ranks.run(3, meets_nobody, free_address(), missing)
    for rank, (has_met, num_open, total) in enumerate(ends):
        assert has_met == [rank == missing] * 2
        assert num_open <= 1
        assert total == 3


def test_closed_groups_leave_nothing_open(ranks: Ranks) -> None:
    address = free_address()
    ranks.run(2, descriptors_after_groups, address, 1)  # what torch itself opens once
    for before, after in ranks.run(2, descriptors_after_groups, free_address(), 12):
        assert after <= before + 1
