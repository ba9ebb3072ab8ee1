"""How many replicas: arithmetic alone."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.stats import EngineStats, ScalingStats
from qwen_ray.serving import autoscaling
from qwen_ray.serving.autoscaling import autoscaling_stats, decide, desired_replicas

CONFIG = EngineConfig(num_blocks=100, max_num_batched_tokens=1000)
pressures = st.lists(st.floats(0, 20), min_size=1, max_size=8)


def test_pressure_is_the_queue_or_the_cache() -> None:
    idle = autoscaling_stats(EngineStats(num_blocks=100), CONFIG)
    assert idle == {"pressure": 0.0, "waiting_tokens": 0.0, "kv_usage": 0.0}
    queued = autoscaling_stats(EngineStats(num_blocks=100, num_waiting_tokens=8000), CONFIG)
    assert queued["pressure"] == 2.0
    full = autoscaling_stats(EngineStats(num_blocks=100, num_used_blocks=90), CONFIG)
    assert full["pressure"] == 1.0


def test_up_to_what_is_needed_but_at_most_twice() -> None:
    assert desired_replicas([1.5], 1) == 2
    assert desired_replicas([9.0], 1) == 2
    assert desired_replicas([1.2, 1.2], 2) == 3
    assert desired_replicas([9.0], 4) == 4


def test_down_by_one_where_the_others_stay_comfortable() -> None:
    assert desired_replicas([0.1, 0.1, 0.1], 3) == 2
    assert desired_replicas([0.5, 0.5], 2) == 2
    assert desired_replicas([0.0], 1) == 1


def test_no_news_changes_nothing() -> None:
    assert desired_replicas([], 3) == 3


@given(pressures)
def test_going_down_never_leads_back_up(values: list[float]) -> None:
    """Hysteresis: the same load spread over one replica less is no reason for one more."""
    target = len(values)
    down = desired_replicas(values, target)
    if down < target:
        assert desired_replicas([sum(values) / down] * down, down) <= down


@given(pressures, st.integers(1, 8))
def test_more_pressure_never_means_fewer_replicas(values: list[float], target: int) -> None:
    assert desired_replicas([value * 1.5 for value in values], target) >= desired_replicas(values, target)


class Context:
    """What Serve gives to a policy, as far as ours reads it."""

    app_name = "app"
    capacity_adjusted_min_replicas = 1
    capacity_adjusted_max_replicas = 4

    def __init__(self, target: int, state: dict[str, Any], *stats: dict[str, float]) -> None:
        self.target_num_replicas = target
        self.policy_state = state
        self.aggregated_metrics = {name: {i: s[name] for i, s in enumerate(stats)} for name in stats[0]}


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[ScalingStats]:
    written: list[ScalingStats] = []
    monkeypatch.setattr(autoscaling, "write_note", lambda app, name, note: written.append(note))
    return written


def test_decisions_are_put_down_with_their_reasons(notes: list[ScalingStats]) -> None:
    busy = autoscaling_stats(EngineStats(num_blocks=100, num_waiting_tokens=8000), CONFIG)
    full = autoscaling_stats(EngineStats(num_blocks=100, num_used_blocks=99), CONFIG)
    idle = autoscaling_stats(EngineStats(num_blocks=100), CONFIG)
    state: dict[str, Any] = {}
    life: Any = [
        (1, [idle], 1),
        (1, [busy], 2),  # asked for, not yet done
        (1, [busy], 2),
        (2, [idle, full], 2),
        (2, [full, full], 3),
        (3, [idle, idle, idle], 2),
        (2, [full, idle], 2),
        (4, [idle] * 4, 3),  # somebody has changed the bounds
    ]
    for target, stats, asked in life:
        found, state = decide(Context(target, state, *stats))  # pyright: ignore[reportArgumentType]
        assert found == asked
    last = notes[-1]
    assert last.decisions == {
        ("up", "backlog"): 1,
        ("up", "kv_cache"): 1,
        ("down", "idle"): 1,
        ("up", "settings"): 1,
    }
    assert (last.target, last.asked, last.min, last.max, last.reason) == (4, 3, 1, 4, "idle")
    assert len(notes) == len(life) - 1  # nothing new is not written
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(last), type=ScalingStats) == last
