"""A request's time is cut into parts that follow each other without a gap, whatever clocks say."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.serving.trail import Trail

TIMES = st.one_of(st.just(0.0), st.floats(90, 220))


def parts(trail: Trail, begun: float, ended: float) -> dict[str, tuple[float, float]]:
    return {segment.name: (segment.start, segment.end) for segment in trail.segments(begun, ended)}


def test_in_order() -> None:
    trail = Trail(dispatched=101, scheduled=103, first_token=106, last_token=110)
    assert parts(trail, 100, 111) == {
        "ingress": (100, 101),
        "queue": (101, 103),
        "prefill": (103, 106),
        "decode": (106, 110),
        "respond": (110, 111),
    }


def test_as_far_as_it_came() -> None:
    assert parts(Trail(), 100, 101) == {"ingress": (100, 101)}
    assert list(parts(Trail(dispatched=101), 100, 105)) == ["ingress", "queue"]
    assert list(parts(Trail(dispatched=101, scheduled=102), 100, 105)) == ["ingress", "queue", "prefill"]


def test_a_replica_with_another_clock() -> None:
    early = Trail(dispatched=101, scheduled=3, first_token=106, last_token=110)
    assert parts(early, 100, 111)["prefill"] == (101, 106)
    late = Trail(dispatched=101, scheduled=300, first_token=106, last_token=110)
    assert parts(late, 100, 111)["queue"] == (101, 106)


@settings(max_examples=50)
@given(dispatched=TIMES, scheduled=TIMES, first_token=TIMES, last_token=TIMES, ended=st.floats(100, 220))
def test_they_always_add_up(
    dispatched: float, scheduled: float, first_token: float, last_token: float, ended: float
) -> None:
    trail = Trail(dispatched=dispatched, scheduled=scheduled, first_token=first_token, last_token=last_token)
    found = list(trail.segments(100, ended))
    assert found[0].start == 100
    assert found[-1].end == ended
    assert all(one.end == following.start for one, following in pairwise(found))
    assert all(segment.seconds >= 0 for segment in found)
    assert sum(segment.seconds for segment in found) == pytest.approx(ended - 100)


def test_several_sequences_are_one_request() -> None:
    trail = Trail()
    trail.was_scheduled(5.0)
    trail.was_scheduled(4.0)
    trail.had_tokens(7.0, 9.0)
    trail.had_tokens(6.0, 8.0)
    assert (trail.scheduled, trail.first_token, trail.last_token) == (5.0, 6.0, 9.0)
    trail.placed("a", is_move=False)
    trail.placed("b", is_move=False)
    trail.placed("a", is_move=True)
    assert list(trail.replicas) == ["a", "b"]
    assert [move.replica for move in trail.moves] == ["a"]
