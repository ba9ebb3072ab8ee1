from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.api_keys import ApiKey
from qwen_ray.core.errors import Overloaded, RateLimited
from qwen_ray.serving.limits import Bucket, Meter, OpenRequests


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def meter(clock: Clock, share: float = 1.0, **limits: int) -> Meter:
    return Meter(ApiKey.of("x").model_copy(update=limits), share, clock)


@settings(max_examples=50, deadline=None)
@given(
    per_minute=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), max_size=60),
)
def test_no_minute_gives_more_than_twice_its_worth(per_minute: int, steps: list[tuple[float, int]]) -> None:
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    taken: list[tuple[float, int]] = []
    for pause, amount in steps:
        clock.now += pause
        amount = min(amount, per_minute)
        if not bucket.seconds_until(amount):
            bucket.take(amount)
            taken.append((clock.now, amount))
    for start, _ in taken:
        in_a_minute = sum(amount for at, amount in taken if start <= at < start + 60)
        assert in_a_minute <= 2 * per_minute + 1e-6


def test_waiting_as_long_as_it_says_is_enough() -> None:
    clock = Clock()
    limited = meter(clock, requests_per_minute=30)
    for _ in range(30):
        limited.request()
    with pytest.raises(RateLimited) as refused:
        limited.request()
    assert refused.value.retry_after == pytest.approx(2.0)
    clock.now += refused.value.retry_after
    limited.request()


def test_a_prompt_larger_than_a_minute_passes_when_the_bucket_is_full() -> None:
    clock = Clock()
    limited = meter(clock, tokens_per_minute=60)
    limited.prompt(100)
    with pytest.raises(RateLimited):
        limited.request()
    clock.now += 41.5
    limited.request()
    with pytest.raises(RateLimited):
        limited.prompt(60)


def test_ingresses_share_a_limit() -> None:
    clock = Clock()
    limited = meter(clock, share=1 / 3, requests_per_minute=6)
    limited.request()
    limited.request()
    with pytest.raises(RateLimited, match="6 requests per minute"):
        limited.request()
    assert limited.headers()["x-ratelimit-limit-requests"] == "2"
    meter(clock, share=1 / 3, requests_per_minute=1).request()


def test_open_requests() -> None:
    clock = Clock()
    requests = OpenRequests(2, clock)
    entered = [requests.enter("one"), requests.enter("one")]
    for _ in range(3):
        with pytest.raises(Overloaded) as refused:
            requests.enter("one")
        assert refused.value.retry_after == 1.0
    clock.now += 200.0
    for moment in entered:
        requests.leave("one", moment)
    assert requests.count == 0
    requests.enter("one")
    requests.enter("one")
    with pytest.raises(Overloaded) as refused:
        requests.enter("one")
    assert 15 < refused.value.retry_after < 25


def test_one_tenant_does_not_take_all_places_of_open_requests() -> None:
    requests = OpenRequests(4, Clock())
    for _ in range(4):
        requests.enter("heavy")
    with pytest.raises(Overloaded):
        requests.enter("heavy")
    entered = [requests.enter("light"), requests.enter("light")]  # the even share
    with pytest.raises(Overloaded):
        requests.enter("light")
    requests.leave("light", entered[0])
    for name in "abcdef":
        if requests.count < 8:
            requests.enter(name)
    with pytest.raises(Overloaded):
        requests.enter("last")
