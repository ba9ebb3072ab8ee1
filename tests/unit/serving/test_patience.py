"""When ranks count as stuck."""

from __future__ import annotations

from qwen_ray.serving.patience import AT_LEAST, TIMES, UNKNOWN, Patience


def learned(*steps: tuple[int, float], expected: tuple[int, ...] = (1,), depth: int = 1) -> float:
    """`steps`: tokens and seconds of those that are done; `expected`: tokens of those under way."""
    patience = Patience(depth)
    for num_tokens, seconds in steps:
        patience.learn(num_tokens, seconds)
    for num_tokens in expected:
        patience.expect(num_tokens)
    return patience.seconds


def test_nothing_is_known_before_the_first_step() -> None:
    assert learned() == UNKNOWN


def test_a_fast_model_is_waited_for_shortly() -> None:
    assert learned((1, 0.03), (8, 0.05), (300, 1.5)) == AT_LEAST


def test_a_step_of_many_tokens_may_take_its_time() -> None:
    assert learned((1, 0.03), expected=(2048,)) == TIMES * 0.03 * 2048
    assert learned((1, 0.03), (512, 3.0), expected=(2048,)) == TIMES * 12.0
    assert learned((2048, 12.0), expected=(1,)) == TIMES * 12.0


def test_the_largest_step_in_flight_counts() -> None:
    assert learned((1, 4.0), expected=(4, 1), depth=2) == TIMES * 16.0
    assert learned((1, 4.0), expected=(4, 1)) == TIMES * 4.0


def test_a_step_that_was_slow_once_is_forgotten() -> None:
    assert learned((1, 100.0), *[(1, 0.1)] * 300) == AT_LEAST
