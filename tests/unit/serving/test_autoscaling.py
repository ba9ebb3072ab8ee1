"""How many replicas: arithmetic alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.stats import EngineStats
from qwen_ray.serving.autoscaling import autoscaling_stats, desired_replicas

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
