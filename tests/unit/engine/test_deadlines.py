"""What becomes of a request whose time is up; in any order with other events: test_any_order.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen_ray.core.errors import DEADLINE_EXCEEDED, DeadlineExceeded, RequestFailed
from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.request import GenerateRequest, TokenDelta
from tests.unit.engine.harness import Harness, request

CONFIG = EngineConfig(num_blocks=32, block_size=4, max_model_len=100, max_num_seqs=1, max_num_batched_tokens=8)


def until(deadline: float | None, name: str = "a", prompt: range = range(4)) -> GenerateRequest:
    return replace(request(name, prompt, max_tokens=20), deadline=deadline)


def test_in_the_queue_it_ends_with_an_error_of_its_own_type() -> None:
    harness = Harness(CONFIG)
    harness.add(until(None, "first"), until(1005.0))
    harness.step()
    harness.now = 1005.0
    harness.step()
    (end,) = harness.deltas["a"]
    assert (end.finish_reason, end.code) == ("error", DEADLINE_EXCEEDED)
    error = end.to_error()
    assert isinstance(error, DeadlineExceeded)
    assert (error.status, error.message) == (408, "The request's time was up in the queue.")
    harness.drain()
    harness.check_ended()
    assert harness.scheduler.stats().overdue_total == 1


def test_before_its_first_token_it_is_an_error_too() -> None:
    harness = Harness(CONFIG)
    harness.add(until(1005.0, prompt=range(30)))
    harness.step()
    harness.now += 5.0
    harness.step()
    assert harness.deltas["a"][-1].error == "The request's time was up while its prompt was computed."
    harness.drain()
    harness.check_ended()


@pytest.mark.parametrize("depth", [1, 2])
def test_one_that_runs_keeps_what_it_has(depth: int) -> None:
    harness = Harness(replace(CONFIG, depth=depth))
    harness.add(until(1005.0))
    for _ in range(5):
        harness.step()
    harness.now += 5.0
    harness.submit()
    assert harness.deltas["a"][-1] == TokenDelta(request_id="a", finish_reason="length", code=DEADLINE_EXCEEDED)
    assert len(harness.output("a")) == 5
    harness.drain()
    harness.check_ended()


def test_one_that_another_replica_began_has_something_wherever_it_waits() -> None:
    harness = Harness(CONFIG)
    harness.add(until(999.0).resumed((7,)))
    assert not harness.submit()
    assert harness.deltas["a"] == [TokenDelta(request_id="a", finish_reason="length", code=DEADLINE_EXCEEDED)]


def test_nobody_is_ended_early_and_who_ended_in_time_stays_so() -> None:
    harness = Harness(CONFIG)
    harness.add(until(1005.0))
    harness.now = 1004.9
    harness.drain()
    harness.now = 2000.0
    harness.add(until(None, "b"), until(0.0, "c"))
    harness.drain()
    harness.check_ended()
    assert [harness.deltas[name][-1].code for name in "abc"] == [None, None, DEADLINE_EXCEEDED]


def test_other_errors_are_failures() -> None:
    error = TokenDelta(request_id="a", finish_reason="error", error="logits are not finite").to_error()
    assert (type(error), error.message, error.code) == (RequestFailed, "logits are not finite", None)
