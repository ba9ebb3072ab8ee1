"""When a replica counts as stuck."""

from __future__ import annotations

from qwen_ray.serving.patience import AT_LEAST, UNKNOWN, Patience


def learned(*steps: float) -> float:
    patience = Patience()
    for seconds in steps:
        patience.learn(seconds)
    return patience.seconds


def test_nothing_is_known_before_the_first_step() -> None:
    assert learned() == UNKNOWN


def test_a_fast_model_is_waited_for_shortly() -> None:
    assert learned(0.03, 0.02, 1.5) == AT_LEAST


def test_a_slow_model_may_take_its_time() -> None:
    assert learned(1.0, 1.2) == 300.0
    assert learned(1.0, 120.0) == 1200.0
